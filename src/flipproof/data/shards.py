"""Shards: the sequences of a source's training part, packed some at a time by a thread, while others use them.

They are those that ``packing`` makes, in the same order, cut into shards of so many: files N.npy in a directory of the
cache, each with its hash as every packed file. Beside it N.json says how many sequences it has, the hash of all text up
to its end, and where in the source the next one begins, so that packing goes on there after a restart: what
comes before is read over, and not tokenised. A shard is there when its N.json is. One of fewer sequences than the
others, perhaps of none, is the last: so the end of a source is told.
"""

import hashlib
import json
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from flipproof.data import packing
from flipproof.data.document import Piece, RowCount, pieces
from flipproof.data.source import Source
from flipproof.data.tokens import Tokens, batches, begun, cut
from flipproof.errors import ConfigError
from flipproof.files import write_json
from flipproof.log import logger

AHEAD = 4
"""Shards that are packed before anybody asks for them."""
POLL_S = 0.05
"""Between two looks at what others may have done."""
_READ_OVER = 2**14  # documents between two signs of life


class Place(NamedTuple):
    """Where in a source the text of a shard begins."""

    span: int = 0
    piece: int = 0
    """Of the span."""
    used: int = 0
    """Tokens from the piece's beginning on that are in shards already."""
    before: tuple[int, ...] = ()
    """The last tokens before the piece, as ``packing`` must know them."""


class Head(NamedTuple):
    """What N.json says of a shard."""

    sequences: int
    text: str
    """Hash of this and all shards before."""
    next: Place


@dataclass(frozen=True)
class Shards:
    """The shards of one source that there are."""

    directory: Path
    size: int
    """Sequences of each but the last."""
    seq_len: int

    def _file(self, number: int, kind: str) -> Path:
        return self.directory / f"{number:06d}.{kind}"

    def head(self, number: int) -> Head | None:
        """None where the shard is not there."""
        try:
            values = json.loads(self._file(number, "json").read_text())
            span, piece, used, before = values["next"]
            return Head(values["sequences"], values["text"], Place(span, piece, used, tuple(before)))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError):
            logger.warning("%s is damaged: its text is tokenised anew", self._file(number, "json"))
            self.forget(number)
            return None

    def forget(self, number: int) -> None:
        self._file(number, "json").unlink(missing_ok=True)

    def tokens(self, number: int, count: int) -> np.ndarray | None:
        """int32, shape (count, seq_len), mapped; None where they are damaged or gone: then the shard is no more."""
        found = packing.finished(self._file(number, "npy")) if count else np.empty(0, dtype=np.int32)
        if found is None or found.size != count * self.seq_len:
            self.forget(number)
            return None
        return found.reshape(count, self.seq_len)

    def write(self, number: int, text: str, blocks: Iterator[np.ndarray], place: Callable[[], Place]) -> Head:
        """``text``: hash of all shards before; ``place``: asked when the blocks, of whole sequences, have ended."""
        digest, file = hashlib.blake2b(text.encode(), digest_size=16), self._file(number, "npy")

        def hashed() -> Iterator[np.ndarray]:
            for block in blocks:
                digest.update(block.tobytes())
                yield block

        file.unlink(missing_ok=True)
        count = packing.write(file, hashed(), None) // self.seq_len
        head = Head(count, digest.hexdigest(), place())
        write_json(self._file(number, "json"), head._asdict())
        return head


# -- packing -----------------------------------------------------------------------------------------------------------


class Reader:
    """The sequences of a source's training part from a place on."""

    def __init__(
        self,
        source: Source,
        tokenizer: Any,
        start: list[int],
        seq_len: int,
        characters: int,
        place: Place,
        alive: Callable[[], None],
    ) -> None:
        """
        Args:
            characters: that are tokenised at once.
            alive: called now and then; what it raises ends the reading.
        """
        self._source, self._start, self._seq_len, self._rows = source, start, seq_len, RowCount()
        self._tokens = Tokens(tokenizer, start)
        self._alive, self._from, self._drop = alive, place, place.used
        self._at = place.span, place.piece
        self._before = list(place.before)
        self._batches = batches(self._pieces(), characters)
        self._rest = np.empty(0, dtype="<i4")
        # the batches that ``_rest`` is the end of: where each begins, and its tokens
        self._held = deque([(place._replace(used=0), place.used)])

    @property
    def place(self) -> Place:
        """Where the next sequence begins."""
        used = sum(count for _, count in self._held) - len(self._rest)
        while len(self._held) > 1 and used >= self._held[0][1]:
            used -= self._held.popleft()[1]
        return self._held[0][0]._replace(used=used)

    def say_rows(self) -> None:
        """How many of those that it has read are empty."""
        self._rows.say(self._source.name, "training")

    def sequences(self, count: int) -> Iterator[np.ndarray]:
        """The next ``count`` sequences, some at a time, one after the other; fewer where the source ends."""
        while count > 0:
            whole, taken = cut(self._rest, self._start, self._seq_len, count)
            self._rest = self._rest[taken:]
            if len(whole):
                count -= len(whole) // self._seq_len
                yield whole
            elif not self._more():
                last = begun(self._rest, self._start)
                if len(last) >= self._seq_len:  # with its beginning
                    self._rest = self._rest[:0]
                    yield last[: self._seq_len]
                return

    def _more(self) -> bool:
        """Tokenise a batch; False at the end of the source."""
        self._alive()
        place = Place(*self._at, 0, tuple(self._before))
        batch = next(self._batches, None)
        if batch is None:
            return False
        (tokens,) = self._tokens.of([batch], self._before)
        keep = max(1, len(self._start))
        self._before = [*self._before, *tokens[-keep:].tolist()][-keep:]
        if not len(self._rest):
            self._held.clear()
        self._held.append((place, len(tokens)))
        drop = min(self._drop, len(tokens))
        self._drop -= drop
        self._rest = np.concatenate([self._rest, tokens[drop:]])
        return True

    def _pieces(self) -> Iterator[Piece]:
        for number, span in enumerate(self._source.spans("training")):
            if number % _READ_OVER == 0:
                self._alive()
            if number < self._from.span:
                continue
            self._rows.see(span)
            for of_span, piece in enumerate(pieces(span)):
                if (number, of_span) >= (self._from.span, self._from.piece):
                    self._at = number, of_span + 1
                    yield piece


class _Stopped(Exception):
    """Nobody needs the shard that is being packed."""


class Packer(threading.Thread):
    """Packs shards ahead of what training asks for."""

    def __init__(self, shards: Shards, read: Callable[[Place, Callable[[], None]], Reader], most: int | None) -> None:
        """
        Args:
            read: a reader from a place on, which calls what it is given.
            most: sequences in all.
        """
        super().__init__(name="flipproof packs text", daemon=True)
        self.shards, self.most, self._read = shards, most, read
        self.signs_of_life = 0
        self.problems: list[str] = []
        self._asked, self._end = 0, most // shards.size if most is not None else None
        self._lock = FileLock(shards.directory / "lock", thread_local=False)
        self._wake, self._stop_now = threading.Event(), False
        self._reader: Reader | None = None
        self._next, self._text = 0, ""
        """The shard that the reader is at, and the hash of those before."""
        self.status = status_file(shards.directory, os.getpid())
        self.status.write_bytes(b"")

    def ask(self, number: int) -> None:
        if number != self._asked:
            self._asked = number
            self._wake.set()

    def close(self) -> None:
        """End the thread. What it failed of stays for others to read."""
        self._stop_now = True
        self._wake.set()
        self.join(10.0)  # else it is waiting for a network
        if not self.problems:
            self.status.unlink(missing_ok=True)

    def run(self) -> None:
        try:
            while not self._stop_now:
                number = self._missing()
                if number is not None and self._locked():
                    if (number := self._missing()) is not None:  # nobody has packed it meanwhile
                        self._pack(self._first_before(number))
                    continue
                if number is None:
                    self._lock.release()
                self._wake.wait(1.0 if number is None else POLL_S)
                self._wake.clear()
        except _Stopped:
            pass
        except ConfigError as error:
            self._failed(error.problems)
        except OSError as error:  # of the source there are none: those are ConfigErrors
            self._failed(packing.cache_error(self.shards.directory, error).problems)
        except Exception as error:  # whatever it is, others wait for this thread
            self._failed([f"text could not be packed: {type(error).__name__}: {error}"])
        finally:
            self._lock.release()
            if self._reader is not None:
                self._reader.say_rows()

    def _missing(self) -> int | None:
        """The first shard that is not there, of those asked for and a few more."""
        for number in range(self._asked, self._asked + AHEAD + 1):
            if self._end is not None and number > self._end:
                return None
            if (head := self.shards.head(number)) is None:
                return number
            if head.sequences < self.shards.size:
                self._end = number
        return None

    def _locked(self) -> bool:
        try:
            if not self._lock.is_locked:  # it counts how often it is taken
                self._lock.acquire(blocking=False)
        except Timeout:
            self._sign()
            return False
        except (OSError, NotImplementedError):  # a file system without locks: at worst the same work is done twice
            pass
        return True

    def _first_before(self, number: int) -> int:
        """The first missing shard up to this one from which on none is there."""
        if self._reader is not None and self._next <= number and self.shards.head(self._next) is None:
            return self._next
        while number > 0 and self.shards.head(number - 1) is None:
            number -= 1
        return number

    def _pack(self, number: int) -> None:
        before = self.shards.head(number - 1) if number else None
        if before is not None and before.sequences < self.shards.size:
            self._end = number - 1
            return
        if self._reader is None or self._next != number:
            self._text = "" if before is None else before.text
            self._reader = self._read(Place() if before is None else before.next, self._sign)
        reader, size = self._reader, self.shards.size
        count = size if self.most is None else max(0, min(size, self.most - number * size))
        head = self.shards.write(number, self._text, reader.sequences(count), lambda: reader.place)
        self._next, self._text = number + 1, head.text
        if head.sequences < size:
            self._end = number

    def _sign(self) -> None:
        if self._stop_now:
            raise _Stopped
        self.signs_of_life += 1
        with suppress(OSError):
            os.utime(self.status)

    def _failed(self, problems: list[str]) -> None:
        self.problems = problems
        with suppress(OSError):
            write_json(self.status, problems)


def status_file(directory: Path, process: int) -> Path:
    """What the packing thread of a process on this machine says: its time is the last sign of life, and its text what
    it failed of."""
    return directory / f"packer-{socket.gethostname()}-{process}.json"


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
