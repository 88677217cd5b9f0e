"""Text to packed token sequences, and which sequences make up which batch.

Every source ends as a ``datasets.Dataset`` with one text column: a file or folder (txt, jsonl, parquet), a Hub data
set, or "stdlib", the source of the Python standard library on this machine, real text that is present everywhere.
Texts are tokenised, each followed by the end-of-text token, concatenated and cut into sequences of ``seq_len``.

**Order without state.** The k-th sequence of a training run is a function of (seed, k): epoch k // n has a
permutation of its own. Step s of a run needs sequences s·batch to (s+1)·batch, so resuming needs the step number and
nothing else.

**Held out.** Unless evaluation text is given, documents are shuffled once by a fixed seed and the first of the packed
sequences are kept out of training: ``held_out_tokens``, or a tenth of a small source. Which ones does not depend on the
length of the run, and no more of the source is read and tokenised than a run needs.
"""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flipproof.config import ConfigError, DataConfig

_SUFFIX_LOADERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_WAYS_OUT = "give a local file or folder as data.source, or data.source = 'stdlib', which needs no network"


@dataclass(frozen=True)
class PackedText:
    """Token ids of shape (sequences, seq_len), int32, and where the text came from."""

    sequences: np.ndarray
    source: str

    def __len__(self) -> int:
        return len(self.sequences)

    def batch(self, indices: np.ndarray) -> Tensor:
        """int64 token ids of shape (len(indices), seq_len)."""
        return torch.from_numpy(self.sequences[indices].astype(np.int64))


def training_indices(n: int, seed: int, first: int, count: int) -> np.ndarray:
    """Which of ``n`` sequences are the first-th to (first+count)-th of a training run: int64, shape (count,)."""
    positions = np.arange(first, first + count)
    epochs = positions // n
    indices = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = _epoch_order(n, seed, int(epoch))[positions[here] % n]
    return indices


@lru_cache(maxsize=2)  # a batch may span two epochs
def _epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)


def load_text(
    config: DataConfig, tokenizer: Any, seq_len: int, needed: int | None = None
) -> tuple[PackedText, PackedText]:
    """(training text, held-out text), packed.

    Args:
        needed: how many training sequences are enough; None is the whole source.

    Raises:
        ConfigError: for a source that cannot be read, has no such column, is empty, or is shorter than one sequence of
            training and one of held-out text.
    """
    if config.eval_source is not None:
        sequences = _pack(config.source, config, tokenizer, seq_len, None if needed is None else needed * seq_len)
        return PackedText(sequences, config.source), load_held_out(config, tokenizer, seq_len)
    enough = None
    if needed is not None:
        # ten times the held-out tokens, so that the tenth of a small source is known to be one
        enough = max(10 * config.held_out_tokens, config.held_out_tokens + needed * seq_len)
    sequences = _pack(config.source, config, tokenizer, seq_len, enough)
    held = max(1, min(config.held_out_tokens, sequences.size // 10) // seq_len)
    if held >= len(sequences):
        raise ConfigError(
            [
                f"data.source = {config.source!r}: {len(sequences)} sequence of {seq_len} tokens does not divide into "
                "training and held-out text; give more text, a shorter training.seq_len, or data.eval_source"
            ]
        )
    return PackedText(sequences[held:], config.source), PackedText(sequences[:held], f"held-out {config.source}")


def load_held_out(config: DataConfig, tokenizer: Any, seq_len: int) -> PackedText:
    """The held-out text alone."""
    if config.eval_source is not None:
        sequences = _pack(config.eval_source, config, tokenizer, seq_len, None)
        return PackedText(sequences, config.eval_source)
    return load_text(config, tokenizer, seq_len, needed=0)[1]


def _pack(source: str, config: DataConfig, tokenizer: Any, seq_len: int, enough: int | None) -> np.ndarray:
    """Sequences of the first ``enough`` tokens of a source (None: all), and of no more than ``max_tokens``."""
    limits = [limit for limit in (enough, config.max_tokens) if limit is not None]
    max_tokens = min(limits, default=None)
    end = tokenizer.eos_token_id
    pieces: list[np.ndarray] = []
    total = 0
    for texts in _text_batches(source, config.text_column):
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            pieces.append(np.array(ids if end is None else [*ids, end], dtype=np.int32))
            total += len(pieces[-1])
        if max_tokens is not None and total >= max_tokens:
            break
    flat = np.concatenate(pieces)[:max_tokens] if pieces else np.empty(0, dtype=np.int32)
    if len(flat) < seq_len:
        raise ConfigError(
            [
                f"data source {source!r}: {len(flat)} tokens of text are fewer than one sequence "
                f"(training.seq_len = {seq_len}); give more text or a shorter sequence"
            ]
        )
    return flat[: len(flat) // seq_len * seq_len].reshape(-1, seq_len)


def _text_batches(source: str, column: str, size: int = 64) -> Iterator[list[str]]:
    """Non-empty texts of a source, some at a time, in an order that does not change from run to run."""
    dataset = _stdlib_dataset() if source == "stdlib" else _open_dataset(source, column)
    order = np.random.Generator(np.random.Philox(key=0)).permutation(len(dataset))
    found = False
    for start in range(0, len(order), size):
        texts = [text for text in dataset[order[start : start + size]][column] if text and not text.isspace()]
        if texts:
            found = True
            yield texts
    if not found:
        raise ConfigError([f"data source {source!r} holds no text"])


def _open_dataset(source: str, column: str) -> Any:
    import datasets

    path = Path(source)
    try:
        if path.exists():
            loader, files = _local_files(path)
            # one document per text file: line breaks are part of it
            extra = {"sample_by": "document"} if loader == "text" else {}
            dataset = datasets.load_dataset(loader, data_files=files, split="train", **extra)
            column = "text" if loader == "text" else column
        else:
            dataset = datasets.load_dataset(source, split="train")
    except ConfigError:
        raise
    except Exception as error:  # datasets raises dozens of kinds; each means that this source gives no text
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = "cannot be read" if path.exists() else "is no local path and cannot be reached as a Hub data set"
        raise ConfigError([f"data source {source!r} {where} ({reason}); {_WAYS_OUT}"]) from error
    if column not in dataset.column_names:
        raise ConfigError(
            [f"data.text_column = {column!r}: {source!r} has the columns {', '.join(dataset.column_names)}"]
        )
    return dataset


def _local_files(path: Path) -> tuple[str, list[str]]:
    """The ``datasets`` loader and the files of a local source."""
    candidates = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    kinds: dict[str, list[str]] = {}
    for file in candidates:
        if file.suffix in _SUFFIX_LOADERS:
            kinds.setdefault(_SUFFIX_LOADERS[file.suffix], []).append(str(file))
    if len(kinds) != 1:
        found = ", ".join(sorted({file.suffix or file.name for file in candidates})) or "nothing"
        raise ConfigError(
            [f"data source {str(path)!r}: files of one kind (.txt, .jsonl or .parquet) are read; found {found}"]
        )
    return next(iter(kinds.items()))


def _stdlib_dataset() -> Any:
    """The standard library's modules as documents, without tests and without what was installed beside them."""
    import datasets

    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    files = [f for f in sorted(root.rglob("*.py")) if not left_out & set(f.relative_to(root).parts)]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    return datasets.Dataset.from_dict({"text": texts})
