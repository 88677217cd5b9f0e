"""Text to packed token sequences, and which sequences make up which batch.

``source`` knows where text comes from, ``document`` which of it is held out, ``packing`` how it becomes tokens; here
tokens are cut into sequences of ``seq_len``. Instruction data come in sequences already (``samples``), with marks.

**Order without state.** The k-th of n sequences of a training run is a function of (seed, n, k): epoch k // n has a
permutation of its own. Step s of a run needs sequences s·batch to (s+1)·batch, so resuming needs the step number and
nothing else.

**Held out.** A source's held-out part is never trained on, under any config, even where evaluation text is given: see
``document``. No more of a source is read and tokenised than a run needs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flipproof.config import DataConfig
from flipproof.data.document import Part
from flipproof.data.packing import check_cache, packed_tokens
from flipproof.data.samples import BEGINS, HAS_LOSS, About, encoder, filled, instruction_format
from flipproof.data.source import Source, check_apart, held_out_source, training_source
from flipproof.data.tokens import beginning
from flipproof.errors import ConfigError
from flipproof.log import logger

_NO_LABEL = -100  # as in transformers


class Batch(NamedTuple):
    """Rows of token ids, int64 of shape (rows, seq_len), and of instruction data what else a model is given."""

    ids: Tensor
    labels: Tensor | None = None
    """The ids where there is a loss, else -100; None where all tokens have one."""
    positions: Tensor | None = None
    """Of each token in its sample; None where a row holds one."""

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """With each of its tensors changed so."""
        return Batch(*(None if tensor is None else change(tensor) for tensor in self))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> "Batch":
        return self.each(lambda tensor: tensor.to(device))


@dataclass(frozen=True)
class PackedText:
    """Token ids of shape (sequences, seq_len), int32, and where the text came from.

    Those that ``load_text`` gives are mapped from a file, read-only.
    """

    sequences: np.ndarray
    source: str
    marks: np.ndarray | None = None
    """Of instruction data, as ``samples`` has them, uint8 of the same shape."""
    about: About | None = None
    """What these are."""

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def packed(self) -> bool:
        """Whether a sequence may hold several samples."""
        return self.about is not None and self.about.packing

    def first(self, count: int) -> "PackedText":
        """The first so many of the sequences."""
        marks = None if self.marks is None else self.marks[:count]
        return replace(self, sequences=self.sequences[:count], marks=marks)

    def batch(self, indices: np.ndarray) -> Batch:
        ids = torch.from_numpy(self.sequences[indices].astype(np.int64))
        if self.marks is None:
            return Batch(ids)
        marks = torch.from_numpy(self.marks[indices])
        labels = ids.where((marks & int(HAS_LOSS)) > 0, _NO_LABEL)
        return Batch(ids, labels, _positions((marks & int(BEGINS)) > 0) if self.packed else None)

    def without_padding(self, indices: np.ndarray) -> Batch:
        """The same, as wide as the longest of these rows is without the padding at its end."""
        width = int(self.sizes(indices).max())
        return self.batch(indices).each(lambda tensor: tensor[:, :width])

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        """How many tokens each of these sequences has before its padding: int64, shape (len(indices),). What a row ends
        in, over and over and without a loss, is padding."""
        ids = self.sequences[indices]
        if self.marks is None:
            return np.full(len(indices), ids.shape[1])
        real = (self.marks[indices] > 0) | (ids != ids[:, -1:])
        return np.asarray(ids.shape[1] - real[:, ::-1].argmax(1))

    def trained_tokens(self, indices: np.ndarray) -> np.ndarray:
        """How many tokens of each of these sequences have a loss: int64, shape (len(indices),)."""
        if self.marks is None:
            return np.full(len(indices), self.sequences.shape[1] - 1)
        return np.asarray((self.marks[indices] & HAS_LOSS).sum(1, dtype=np.int64))


def _positions(begins: Tensor) -> Tensor:
    """int64 of the same shape as where samples begin."""
    places = torch.arange(begins.shape[1]).expand(begins.shape)
    return places - places.where(begins, 0).cummax(1).values


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
            training and one of held-out text; for evaluation text that is trained on; for a ``bos`` that the tokenizer
            does not have; and for a cache directory that cannot be written.
    """
    held_out = _held_out(config, tokenizer, seq_len)
    limit = None if needed is None else max(1, needed) * seq_len
    if (left := training_limit(config, held_out, seq_len)) is not None:
        limit = left if limit is None else min(limit, left)
    train = _text(training_source(config), "training", config, tokenizer, seq_len, limit, config.source)
    _say_in_vain(config, train, held_out)
    if needed is not None and needed > len(train):
        logger.warning(
            "data.source = %r has %d sequences of %d tokens to train on, and the run takes %d: each is seen %.1f times",
            config.source, len(train), seq_len, needed, needed / len(train),
        )  # fmt: skip
    return train, held_out


def training_limit(config: DataConfig, held_out: PackedText, seq_len: int) -> int | None:
    """How many tokens ``data.max_tokens`` leaves to train on. Raises ConfigError where a sequence has more."""
    if config.max_tokens is None:
        return None
    left = config.max_tokens - (held_out.sequences.size if held_out_source(config)[1] == "held-out" else 0)
    if left < seq_len:
        raise ConfigError([f"data.max_tokens = {config.max_tokens}: {does_not_divide(seq_len)}"])
    return left


def load_held_out(config: DataConfig, tokenizer: Any, seq_len: int) -> PackedText:
    """The held-out text alone. Raises as ``load_text`` does."""
    held_out = _held_out(config, tokenizer, seq_len)
    _say_in_vain(config, held_out)
    return held_out


def _say_in_vain(config: DataConfig, *texts: PackedText) -> None:
    if all(text.about is None for text in texts):
        for line in config.in_vain_of_text():
            logger.warning("%s", line)


def _held_out(config: DataConfig, tokenizer: Any, seq_len: int) -> PackedText:
    if start := beginning(config.bos, tokenizer):
        token = "".join(tokenizer.convert_ids_to_tokens(start))
        logger.info("data.bos: each document and each sequence begins with %s", token)
    source, part = held_out_source(config)
    for line in source.said:
        logger.info("data source %r: %s", source.name, line)
    if part == "all":
        check_apart(config)
        split = "" if config.eval_split is None else f", {config.eval_split}"
        return _text(source, part, config, tokenizer, seq_len, config.max_tokens, source.name + split)
    tokens = (
        config.held_out_tokens if config.max_tokens is None else min(config.held_out_tokens, config.max_tokens // 10)
    )
    count = max(1, tokens // seq_len)
    called = f"held-out {config.source}"
    return _text(source, part, config, tokenizer, seq_len, count * seq_len, called)


def _text(
    source: Source, part: Part, config: DataConfig, tokenizer: Any, seq_len: int, limit: int | None, called: str
) -> PackedText:
    """A part of a source in sequences, ``limit`` tokens at most; ``called``: what ``PackedText.source`` says."""
    if source.remote:
        check_cache()  # which what tells of its columns writes into
    if (format := instruction_format(config, source, part)) is not None:
        rows = None if limit is None else limit // seq_len
        if rows == 0:
            raise ConfigError([f"data.max_tokens = {limit}: at least one sequence (training.seq_len = {seq_len})"])
        made = filled(source, part, config, encoder(config, format, tokenizer), seq_len, rows)
        return PackedText(made[0], called, *made[1:])
    return PackedText(_sequences(source, part, config, tokenizer, seq_len, limit), called)


def _sequences(
    source: Source, part: Part, config: DataConfig, tokenizer: Any, seq_len: int, limit: int | None
) -> np.ndarray:
    start = beginning(config.bos, tokenizer)
    if len(start) >= seq_len:
        raise ConfigError([f"training.seq_len = {seq_len}: each sequence begins with {len(start)} tokens (data.bos)"])
    flat = packed_tokens(source, part, tokenizer, start, seq_len, limit)
    if len(flat) < seq_len:
        if part == "all":
            of, way_out = "", "give more text or a shorter sequence"
        else:
            of, way_out = f" in its {part} part", does_not_divide(seq_len)
        raise ConfigError(
            [
                f"data source {source.name!r}: {len(flat)} tokens of text{of} are fewer than one sequence "
                f"(training.seq_len = {seq_len}); {way_out}"
            ]
        )
    return flat[: len(flat) // seq_len * seq_len].reshape(-1, seq_len)


def does_not_divide(seq_len: int) -> str:
    return (
        f"it does not divide into training and held-out text in sequences of {seq_len}; give more text, a shorter "
        "training.seq_len, or data.eval_source"
    )
