"""Text that is packed while it is trained on: the first step begins in seconds, of a terabyte too.

**Order without state.** The k-th sequence of a run is a function of (seed, k): in the first pass over the text it is in
shard k // ``data.buffer_size`` (``shards``), whose sequences are permuted among each other; a later pass takes the
shards in an order of its own as well. So resuming needs the step number and nothing else, with any number of processes,
of which no two see the same.

**Who packs.** On each node a thread of one process, a few shards ahead of what training has asked for; runs that share
a cache take turns. All processes wait for files. What the thread meets (text that cannot be read, a network that is
gone) it leaves for the others to read, and each raises it when it comes to need a shard that will not be there: all at
the same step, since all ask for what all of them take.
"""

import copy
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from flipproof.config import DataConfig
from flipproof.data.packing import cache_error, cache_path
from flipproof.data.samples import instruction_format
from flipproof.data.sequences import Batch, PackedText, does_not_divide, training_limit
from flipproof.data.shards import POLL_S, Packer, Place, Reader, Shards, is_alive, status_file
from flipproof.data.source import training_source
from flipproof.data.tokens import BATCH_CHARACTERS, beginning
from flipproof.errors import ConfigError
from flipproof.log import logger

PATIENCE_S = 300.0
"""How long no sign of life of the thread that packs is waited for: its network or its disk may be slow."""
_OPEN = 64  # shards that a process keeps open


class StreamedText:
    """The training text of a run, of which shards come to be there. ``close`` it, or use it in a ``with``."""

    marks = None
    """As of ``PackedText``: all tokens have a loss."""

    def __init__(self, source: str, shards: Shards, packs: int, packer: Packer | None) -> None:
        """
        Args:
            packs: the process on this machine whose thread packs.
            packer: the thread, where that is this process; it is started.
        """
        self.source, self.shards, self._packs, self._packer = source, shards, packs, packer
        self.check: Callable[[np.ndarray], None] = lambda sequences: None
        """Called with the sequences of each shard, int32 of shape (count, seq_len), before any is used."""
        self.total: int | None = None
        """Sequences of the source, once its end is known."""
        self._known = 0  # so many first shards have been seen
        self._said = 0
        self._open: dict[int, np.ndarray] = {}
        if packer is not None:
            packer.start()

    def __enter__(self) -> "StreamedText":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._packer is not None:
            self._packer.close()

    def need(self, seed: int, first: int, count: int) -> None:
        """Wait for the first-th to (first+count)-th sequence of a run with this seed. Raises as ``coming`` does."""
        _wait_for(self.coming(seed, first, count))

    def coming(self, seed: int, first: int, count: int) -> Iterator[bool]:
        """True, again and again, while any of these sequences is still to come; who asks decides how long to wait.

        Raises:
            ConfigError: where the text cannot be read, is shorter than one sequence, holds what ``check`` refuses, or
                does not come.
        """
        while count > 0:
            if self.total is None:
                yield from self._shard_coming(first // self.shards.size)
            epoch, place = self._epoch(first)
            if epoch > self._said:
                self._said = epoch
                logger.info(
                    "data source %r has %s sequences of %d tokens to train on: pass %d over them begins",
                    self.source, f"{self.total:,}", self.shards.seq_len, epoch + 1,
                )  # fmt: skip
            number = self._number(seed, epoch, place)
            yield from self._opening(number)
            here = min(count, len(self._open[number]) - place % self.shards.size)
            first, count = first + here, count - here

    def batch(self, seed: int, first: int, count: int) -> Batch:
        """Token ids of shape (count, seq_len). Waits and raises as ``need`` does."""
        rows = []
        for k in range(first, first + count):
            epoch, place = self._epoch(k)
            number = self._number(seed, epoch, place)
            sequences = self._shard(number)
            order = _order(seed, epoch, number, len(sequences))
            rows.append(sequences[order[place % self.shards.size]])
        return Batch(torch.from_numpy(np.stack(rows).astype(np.int64)))

    def fingerprint(self, used: int) -> str:
        """Of the shards that the first ``used`` sequences of a run are of."""
        epoch, place = self._epoch(used - 1)
        assert self.total is not None or not epoch
        last = (self.total - 1 if epoch and self.total is not None else place) // self.shards.size
        self._shard(last)
        head = self.shards.head(last)
        return "" if head is None else head.text

    def _epoch(self, k: int) -> tuple[int, int]:
        """(pass over the text, which of its sequences) of a run's k-th."""
        if self.total is None:
            _wait_for(self._shard_coming(k // self.shards.size))
        if self.total is None:
            return 0, k
        if not self.total:
            raise ConfigError(
                [
                    f"data source {self.source!r}: the text in its training part is shorter than one sequence "
                    f"(training.seq_len = {self.shards.seq_len}); {does_not_divide(self.shards.seq_len)}"
                ]
            )
        return divmod(k, self.total)

    def _number(self, seed: int, epoch: int, place: int) -> int:
        """Of the shard that has the place-th sequence of a pass."""
        number = place // self.shards.size
        if not epoch:
            return number
        assert self.total is not None
        whole = self.total // self.shards.size
        # the last one, which is shorter, stays the last
        return int(_order(seed, epoch, _ALL, whole)[number]) if number < whole else number

    def _shard(self, number: int) -> np.ndarray:
        _wait_for(self._opening(number))
        return self._open[number]

    def _opening(self, number: int) -> Iterator[bool]:
        """True while a shard is to come; then it is open."""
        if self._packer is not None:
            self._packer.ask(number)
        while number not in self._open:
            yield from self._shard_coming(number)
            head = self.shards.head(number)
            sequences = None if head is None else self.shards.tokens(number, head.sequences)
            if sequences is not None:
                self.check(sequences)
                while len(self._open) >= _OPEN:
                    del self._open[next(iter(self._open))]
                self._open[number] = sequences

    def _shard_coming(self, number: int) -> Iterator[bool]:
        """True until a shard is there, or it is known that the source ends before it."""
        seen, since = -1, time.monotonic()
        while not self._is_there(number):
            if self._packer is not None:
                # an earlier one may be gone, and where the source ends is not known without it
                self._packer.ask(number if self.total is not None else min(number, self._known))
            if (problems := self._problems()) and not self._is_there(number):
                raise ConfigError(problems)
            if (sign := self._sign_of_life()) != seen:
                seen, since = sign, time.monotonic()
            alive = is_alive(self._packs) if self._packer is None else self._packer.is_alive()
            if (not alive or time.monotonic() - since > PATIENCE_S) and not self._is_there(number):
                why = f"has said nothing for {PATIENCE_S / 60:g} minutes" if alive else "is gone"
                raise ConfigError(
                    [f"data source {self.source!r}: its text is no longer packed: process {self._packs}, which does "
                     f"so on this node, {why}"]
                )  # fmt: skip
            yield True

    def _is_there(self, number: int) -> bool:
        if number in self._open:
            return True
        if (head := self.shards.head(number)) is not None:
            if head.sequences < self.shards.size:
                self.total = number * self.shards.size + head.sequences
            return True
        if self.total is not None and number > self.total // self.shards.size:
            return True
        while self._known <= number and (head := self.shards.head(self._known)) is not None:
            if head.sequences < self.shards.size:
                self.total = self._known * self.shards.size + head.sequences
                return True
            self._known += 1
        return False

    def _problems(self) -> list[str]:
        if self._packer is not None:
            return self._packer.problems
        try:
            text = status_file(self.shards.directory, self._packs).read_text()
            return list(json.loads(text)) if text else []
        except (OSError, ValueError):
            return []

    def _sign_of_life(self) -> int:
        if self._packer is not None:
            return self._packer.signs_of_life
        try:
            return status_file(self.shards.directory, self._packs).stat().st_mtime_ns
        except OSError:
            return 0


def _wait_for(coming: Iterator[bool]) -> None:
    for _ in coming:
        time.sleep(POLL_S)


_ALL = 2**32 - 1
"""In the place of a shard's number, where it is shards that are permuted."""


@lru_cache(maxsize=16)
def _order(seed: int, epoch: int, number: int, count: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch << 32 | number])).permutation(count)


def open_stream(config: DataConfig, tokenizer: Any, seq_len: int, held_out: PackedText, packs: int) -> StreamedText:
    """The training text of a run, which is packed from now on.

    Args:
        packs: the process id on this machine of the one that packs for its node. It must have been here before others
            use what they get.

    Raises:
        ConfigError: as ``load_text`` does, of what can be known before the text is read.
    """
    start, size = beginning(config.bos, tokenizer), config.buffer_size
    limit = training_limit(config, held_out, seq_len)
    source = training_source(config)
    instruction_format(config, source, "training")  # which is not streamed
    path = cache_path(source, "training", tokenizer, start, seq_len, limit)
    shards = Shards(path.with_name(f"{path.stem}-{size}x{seq_len}"), size, seq_len)
    if packs != os.getpid():
        return StreamedText(config.source, shards, packs, None)
    try:
        shards.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cache_error(shards.directory, error) from error
    for old in shards.directory.glob(f"packer-{socket.gethostname()}-*.json"):
        process = old.stem.rpartition("-")[2]
        if process.isdigit() and (int(process) == os.getpid() or not is_alive(int(process))):
            old.unlink(missing_ok=True)
    logger.info(
        "data source %r is packed while it is trained on, into %s; data.buffer_size: %d sequences are shuffled among "
        "each other",
        source.name, shards.directory, size,
    )  # fmt: skip
    tokenizer = copy.deepcopy(tokenizer)  # which is not to be used by two threads
    characters = min(BATCH_CHARACTERS, 8 * size * seq_len)

    def read(place: Place, alive: Callable[[], None]) -> Reader:
        return Reader(source, tokenizer, start, seq_len, characters, place, alive)

    packer = Packer(shards, read, None if limit is None else limit // seq_len)
    return StreamedText(config.source, shards, packs, packer)
