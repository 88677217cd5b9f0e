"""Text to packed token sequences, and which sequences make up which batch.

Every source ends as a ``datasets.Dataset`` with one text column: a file or folder (txt, jsonl, parquet), a Hub data
set, or "stdlib", the source of the Python standard library on this machine, real text that is present everywhere.
Texts are tokenised, each followed by the end-of-text token, concatenated and cut into sequences of ``seq_len``.

**Order without state.** The k-th of n sequences of a training run is a function of (seed, n, k): epoch k // n has a
permutation of its own. Step s of a run needs sequences s·batch to (s+1)·batch, so resuming needs the step number and
nothing else.

**Held out.** Unless evaluation text is given, documents are shuffled once by a fixed seed and the first of the packed
sequences are kept out of training: ``held_out_tokens``, or a tenth of a small source. Which ones does not depend on the
length of the run, and no more of the source is read and tokenised than a run needs.

**Packed once.** The tokens, not yet cut, are a file ``flipproof/KEY.npy`` in the cache directory of ``datasets``, which
every process maps into memory: the processes of a node share its pages, and a resumed run tokenises nothing. KEY is a
hash of all that the tokens depend on, so a file is never out of date, only unused; between runs any may be deleted.
Whoever first takes the lock of a key packs, and the others wait for the lock and find the file. A file gets its name
when it is complete, so even where a file system has no locks the worst is that two processes do the same work.
"""

import hashlib
import json
import os
import sysconfig
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from flipproof.config import DataConfig
from flipproof.errors import ConfigError
from flipproof.runlog import logger

_SUFFIX_LOADERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_WAYS_OUT = "give a local file or folder as data.source, or data.source = 'stdlib', which needs no network"
_PACKING = 1  # part of every key: to be raised when _write_tokens makes other tokens of the same text
_BATCH_CHARACTERS = 2**21  # enough texts for the tokenizer's threads, and about 0.3 GB while it works


@dataclass(frozen=True)
class PackedText:
    """Token ids of shape (sequences, seq_len), int32, and where the text came from.

    Those that ``load_text`` gives are mapped from a file, read-only.
    """

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
            training and one of held-out text; and for a cache directory that cannot be written.
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
    flat = _packed_tokens(source, config.text_column, tokenizer, min(limits, default=None))
    if len(flat) < seq_len:
        raise ConfigError(
            [
                f"data source {source!r}: {len(flat)} tokens of text are fewer than one sequence "
                f"(training.seq_len = {seq_len}); give more text or a shorter sequence"
            ]
        )
    return flat[: len(flat) // seq_len * seq_len].reshape(-1, seq_len)


def _packed_tokens(source: str, column: str, tokenizer: Any, limit: int | None) -> np.memmap:
    """The first ``limit`` tokens of a source (None: all), from the cache; whoever finds none there packs them."""
    import datasets

    directory = Path(datasets.config.HF_DATASETS_CACHE) / "flipproof"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        dataset = _stdlib_dataset() if source == "stdlib" else _open_dataset(source, column)
        order = np.random.Generator(np.random.Philox(key=0)).permutation(len(dataset))
        path = directory / f"{_key(dataset, order, tokenizer, limit)}.npy"
        if (tokens := _finished(path)) is None:
            logger.info("data source %r is tokenised into %s", source, path)
            with FileLock(path.with_suffix(".lock")):
                if (tokens := _finished(path)) is None:
                    _write_tokens(path, source, _text_batches(dataset, order), tokenizer, limit)
                    tokens = np.load(path, mmap_mode="r")
    except OSError as error:
        raise ConfigError(
            [
                f"the cache directory {directory} cannot be written ({error}); "
                "name another one in the environment variable HF_DATASETS_CACHE"
            ]
        ) from error
    return tokens


def _key(dataset: Any, order: np.ndarray, tokenizer: Any, limit: int | None) -> str:
    """Equal in every process for the same tokens; another one wherever the tokens might be others."""
    from datasets.fingerprint import Hasher

    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # Each call of a tokenizer sets these two anew: here they only tell what its last call was.
        del state["truncation"], state["padding"]
        state["split_special_tokens"] = tokenizer.split_special_tokens
    else:
        state = Hasher.hash(tokenizer)
    depends_on = {
        "packing": _PACKING,
        # Of a file: its path and the time of its last change; of Hub data: the revision; of "stdlib": the texts.
        # All three: the column. datasets keeps its own cache by the same.
        "texts": dataset._fingerprint,
        "order": hashlib.sha256(order.tobytes()).hexdigest(),
        "tokenizer": [type(tokenizer).__qualname__, state],
        "versions": [version("tokenizers"), version("transformers")],
        "end": tokenizer.eos_token_id,
        "limit": limit,
    }
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:32]


def _finished(path: Path) -> np.memmap | None:
    """The tokens of a packed file; None where there is none, or a damaged one."""
    try:
        tokens = np.load(path, mmap_mode="r")
        return tokens if path.stat().st_size == tokens.offset + tokens.nbytes else None
    except (OSError, EOFError, ValueError):  # absent; empty; shorter than the shape in its header says
        return None


def _write_tokens(path: Path, source: str, batches: Iterator[list[str]], tokenizer: Any, limit: int | None) -> None:
    """Tokenise texts, each followed by the end-of-text token, into a file that appears when it is complete."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    total = 0
    temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            _write_header(file, 0)
            for texts in batches:
                encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
                tokens = np.concatenate([np.array([*ids, *end], dtype="<i4") for ids in encoded["input_ids"]])
                if limit is not None:
                    tokens = tokens[: limit - total]
                file.write(tokens.tobytes())
                total += len(tokens)
                if total == limit:
                    break
            if total == 0:
                raise ConfigError([f"data source {source!r} holds no text"])
            file.seek(0)
            _write_header(file, total)
            file.flush()
            os.fsync(file.fileno())  # else a crash of the machine could leave the name without the tokens
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_header(file: BinaryIO, total: int) -> None:
    # NumPy leaves room for the first axis to grow: the header is as long for any total.
    np.lib.format.write_array_header_1_0(file, {"descr": "<i4", "fortran_order": False, "shape": (total,)})


def _text_batches(dataset: Any, order: np.ndarray) -> Iterator[list[str]]:
    """The non-empty texts of a data set of one column, some at a time."""
    (column,) = dataset.column_names
    batch: list[str] = []
    characters = 0
    for start in range(0, len(order), 64):
        for text in dataset[order[start : start + 64]][column]:
            if not text or text.isspace():
                continue
            batch.append(text)
            characters += len(text)
            if characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _open_dataset(source: str, column: str) -> Any:
    """A source as a data set of its text column alone."""
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
    return dataset.select_columns(column)


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
