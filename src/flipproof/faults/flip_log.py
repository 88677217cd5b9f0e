"""A log of what was flipped, and a run replayed from it.

Both are a ``FlipHook``, which stands in for a model's flips (``FaultState.flip_hook``). ``FlipCount`` lets the draw
happen and compares the tensor before and after; ``FlipLog`` writes the difference as well; ``Replay`` draws nothing and
does to each tensor what the log says, so a run ends with the same bits, on a machine that draws otherwise, too, or
after lines were taken out or put in to ask what single flips did.

The log is JSON lines, compressed where its name ends in .gz. The first line says what was run; every other is one
flipped bit::

    {"tick": 0, "tensor": "model.layers.0.self_attn.q_proj/w", "index": 577, "bit": 14, "zeroed": false,
     "before": 0.0153, "after": 5.2e+36, "before_bits": 15484, "after_bits": 31868}

``tick`` counts forward passes, ``index`` elements of the whole tensor in row-major order (for keys and values: 2^40
times the row of the batch, and then position, head and component), and bit 0 is the lowest. A value in which two bits
flipped has two lines. ``zeroed`` says that guard or protection set the value to 0 after all; where no bit flipped (a
threshold within the clean range, a word that was lost) ``bit`` is null. These five are what a replay does. The others
say what was there before and what was computed with; a number that JSON does not have is null. Each line has a hash of
itself under ``blake2b``, which is to be taken out of a line that is changed.

Weights do not depend on other flips, so a replay refuses a log whose weights are not the model's. Inputs do: where
lines were changed, the flips that follow meet other values, and are done to these.
"""

import gzip
import io
import json
import math
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flipproof.errors import ConfigError
from flipproof.faults.draw import Draw
from flipproof.faults.dtypes import INTEGERS, dtype_name
from flipproof.faults.inject import fault_state
from flipproof.faults.op import apply_draw
from flipproof.faults.state import FlipHook
from flipproof.files import check_new, claimed, clear_dead, named, temporary_name
from flipproof.log import logger
from flipproof.records import sealed, unsealed

_KIND = "flipproof injection log"
_ALLOWED: dict[str, type] = {"tick": int, "tensor": str, "index": int, "zeroed": bool, "before_bits": int}
_MOST = {"tick": 2**48, "index": 2**63, "before_bits": 2**32}
_KEYS = {*_ALLOWED, "bit"}


@contextmanager
def hooked(model: nn.Module, hook: FlipHook) -> Iterator[None]:
    """Within the block all flips of the model go through ``hook``. Its blocks must not be compiled."""
    state = fault_state(model)
    state.flip_hook = hook
    try:
        yield
    finally:
        state.flip_hook = None


class FlipCount:
    """Counts what is flipped."""

    def __init__(self) -> None:
        self.flipped_bits: Counter[str] = Counter()
        """Operand ("w", "x", "k", "v") -> inverted bits in all passes, less those that a protection mended."""
        self.zeroed: Counter[str] = Counter()
        """Operand -> values that guard or protection zeroed."""

    def __call__(self, name: str, x: Tensor, draw: Draw) -> Tensor:
        """Flip, and look."""
        y = apply_draw(x, draw)
        unguarded = y if draw.limits is None else apply_draw(x, draw._replace(limits=None))
        before, after, between = _bits(x), _bits(y), _bits(unguarded)
        index = ((before != after) | (before != between)).nonzero()[:, 0]
        before, after, between = before[index], after[index], between[index]
        bits, zeroed = before ^ between, after != between
        if draw.decoder:  # which zeroes whole values: that flips no bits
            pattern = _lost(draw)
            lost = (between == pattern) & (before != pattern)
            bits, zeroed = torch.where(lost, 0, bits), zeroed | lost
        operand = name.rpartition("/")[2]
        self.flipped_bits[operand] += int(sum((bits >> bit & 1).sum() for bit in range(x.dtype.itemsize * 8)))
        self.zeroed[operand] += int(zeroed.sum())
        self.changed(name, draw, x.dtype, _Changes(index, bits, zeroed, before, after))
        return y

    def changed(self, name: str, draw: Draw, dtype: torch.dtype, changes: "_Changes") -> None:
        """Called with what each flip did."""


class _Changes(NamedTuple):
    """Values that a flip changed, in columns."""

    places: Tensor
    """Indices in the tensor that was flipped."""
    bits: Tensor
    """Those that were inverted."""
    zeroed: Tensor
    before: Tensor
    """Bit patterns, as ``after``."""
    after: Tensor


class FlipLog(FlipCount):
    """Counts, and writes every flip to a file, which has its name when the block ends without an error."""

    def __init__(self, path: Path, **run: Any) -> None:
        """``run`` is what the first line says, beside what kind of file this is.

        Raises:
            ConfigError: where the file exists or cannot be written.
        """
        super().__init__()
        check_new(path, "--flip-log", "file")
        clear_dead(path)
        self.path, self._temporary, self._claim = path, temporary_name(path), ExitStack()
        try:
            self._bytes = self._temporary.open("xb")
            into: Any = self._bytes
            if path.suffix == ".gz":  # without its name and time in it: equal runs write equal files
                into = gzip.GzipFile(filename="", mode="wb", fileobj=into, mtime=0)
            self._file = io.TextIOWrapper(into, encoding="utf-8", newline="\n")
            self._claim.enter_context(claimed(self._temporary))
        except OSError as error:
            raise ConfigError([f"{path}: {error.strerror}"]) from error
        self._write({"kind": _KIND, **run})

    def __enter__(self) -> "FlipLog":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        with self._claim:
            self._end(error is None)

    def _end(self, well: bool) -> None:
        try:
            with named(self.path):
                self._file.close()  # which writes what it still holds
                self._bytes.close()  # which a GzipFile leaves open
        except OSError:
            self._temporary.unlink()
            raise
        if not well:
            self._temporary.unlink()
        elif self.path.exists():
            raise ConfigError([f"{self.path} has been written by somebody else since; the log is {self._temporary}"])
        else:
            self._temporary.replace(self.path)

    def _write(self, line: dict[str, Any]) -> None:
        with named(self.path):
            self._file.write(json.dumps(sealed(line), allow_nan=False) + "\n")

    def changed(self, name: str, draw: Draw, dtype: torch.dtype, changes: _Changes) -> None:
        tick, offset = int(draw.tick), draw.offset
        numbers = (_numbers(changes.before, dtype), _numbers(changes.after, dtype))
        columns = (column.tolist() for column in changes._replace(places=changes.places + offset))
        for where, flipped, gone, old_bits, new_bits, old, new in zip(*columns, *numbers, strict=True):
            inverted: list[int | None] = [bit for bit in range(dtype.itemsize * 8) if flipped >> bit & 1]
            for bit in inverted or [None]:
                self._write(
                    {
                        "tick": tick,
                        "tensor": name,
                        "index": where,
                        "bit": bit,
                        "zeroed": gone,
                        "before": old,
                        "after": new,
                        "before_bits": old_bits,
                        "after_bits": new_bits,
                    }
                )


class Replay:
    """Does what a log says in the place of a draw."""

    def __init__(self, path: Path, dtype: str | None = None) -> None:
        """``dtype``: of the model's flips by name, which must be the log's.

        Raises:
            ConfigError: where the file is not a whole log, naming the line, or is of another dtype.
        """
        self.path = path
        self.flipped_bits: Counter[str] = Counter()
        self.zeroed: Counter[str] = Counter()
        """Both as ``FlipCount`` has them, of what was replayed."""
        self._places: dict[tuple[str, int], dict[int, _Place]] = {}
        self._reached: set[tuple[str, int]] = set()
        self._said = False
        try:
            with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
                run = self._header(file.readline())
                for number, line in enumerate(file, start=2):
                    self._place(self._entry(line, number))
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            raise ConfigError([f"{path}: {getattr(error, 'strerror', None) or error}"]) from error
        if dtype is not None and run.get("dtype", dtype) != dtype:
            raise ConfigError([f"{path}: is of flips in {run['dtype']}, and bits flip in {dtype} here"])

    def _header(self, line: str) -> dict[str, Any]:
        try:
            header = unsealed(line)
            if header.get("kind") != _KIND:
                raise ValueError(f"its first line says {header.get('kind')!r}")
        except ValueError as error:
            raise ConfigError([f"{self.path} is not a log that --flip-log wrote ({error})"]) from error
        return header

    def _entry(self, line: str, number: int) -> dict[str, Any]:
        try:
            entry = unsealed(line)
            if not entry.keys() >= _KEYS:
                raise ValueError("keys are missing")
        except ValueError as error:
            raise ConfigError(
                [f"{self.path}, line {number}: not a whole entry ({error}); its keys are {', '.join(sorted(_KEYS))}"]
            ) from error
        for key, allowed in _ALLOWED.items():
            if type(entry[key]) is not allowed:
                raise ConfigError(
                    [f"{self.path}, line {number}: {key} = {entry[key]!r}: {allowed.__name__} is allowed"]
                )
        for key, most in _MOST.items():
            if not 0 <= entry[key] < most:
                raise ConfigError(
                    [f"{self.path}, line {number}: {key} = {entry[key]}: from 0 to {most - 1} is allowed"]
                )
        bit = entry["bit"]
        if bit is not None and (type(bit) is not int or not 0 <= bit < 32):
            raise ConfigError([f"{self.path}, line {number}: bit = {bit!r}: a bit from 0 to 31, or null, is allowed"])
        return entry

    def _place(self, entry: dict[str, Any]) -> None:
        bit = entry["bit"]
        place = self._places.setdefault((entry["tensor"], entry["tick"]), {})
        mask, zeroed, _ = place.get(entry["index"], _Place(0, False, 0))
        mask ^= 0 if bit is None else 1 << bit
        place[entry["index"]] = _Place(mask, zeroed or entry["zeroed"], entry["before_bits"])

    def __call__(self, name: str, x: Tensor, draw: Draw) -> Tensor:
        """``x`` with what the log says done to it.

        Raises:
            ConfigError: where ``x`` is a weight and holds something else than the log says, or lacks a bit.
        """
        y = x.clone(memory_format=torch.contiguous_format)
        tick, offset, operand = int(draw.tick), draw.offset, name.rpartition("/")[2]
        logged = self._places.get((name, tick), {})
        here = [(i - offset, *place) for i, place in logged.items() if 0 <= i - offset < y.numel()]
        if not here:
            return y
        self._reached.add((name, tick))
        index, mask, zeroed, before = torch.tensor(here, device=x.device).T
        flat = y.view(-1).view(INTEGERS[y.dtype])
        held = flat[index].long() & _ones(y.dtype)
        if int(mask.max()) > _ones(y.dtype):
            raise ConfigError(
                [f"{self.path}: {name} is in {dtype_name(y.dtype)}, which has no bit {int(mask.max()):b}"]
            )
        if not torch.equal(held, before):
            at = int((held != before).nonzero()[0, 0])
            seen = (
                f"{self.path}: in pass {tick} {name}[{int(index[at]) + offset}] holds bits {int(held[at]):#x}, and in "
                f"the log {int(before[at]):#x}"
            )
            if operand == "w" or operand.startswith("w_"):
                raise ConfigError([f"{seen}; the log is of other weights"])
            if not self._said:
                logger.warning("%s: the log's flips are done to what is there now", seen)
            self._said = True
        after = torch.where(zeroed.bool(), _lost(draw), held ^ mask)
        flat[index] = after.to(flat.dtype)
        self.flipped_bits[operand] += sum(int(bits).bit_count() for bits in mask.tolist())
        self.zeroed[operand] += int(zeroed.sum())
        return y

    def check_all_done(self) -> None:
        """Raises ConfigError where the run did not come to all that the log says."""
        if missed := sorted(self._places.keys() - self._reached, key=lambda place: (place[1], place[0])):
            name, tick = missed[0]
            raise ConfigError(
                [
                    f"{self.path}: {name} in pass {tick} was not reached, nor were {len(missed) - 1} of the "
                    f"log's other {len(self._places) - 1}; it replays with the same model, faulty sites, text and batch"
                ]
            )


class _Place(NamedTuple):
    """What the log says of one value."""

    mask: int
    zeroed: bool
    before: int


def _lost(draw: Draw) -> int:
    """The bit pattern of what guard or protection zeroed."""
    stored = draw.drawn().stored
    return stored.lost if stored else 0


def _ones(dtype: torch.dtype) -> int:
    return (1 << dtype.itemsize * 8) - 1


def _bits(x: Tensor) -> Tensor:
    """The bit patterns of the elements in row-major order, int64."""
    return x.detach().contiguous().view(-1).view(INTEGERS[x.dtype]).long() & _ones(x.dtype)


def _numbers(bits: Tensor, dtype: torch.dtype) -> list[float | None]:
    values = bits.to(INTEGERS[dtype]).view(dtype).tolist()
    return [value if math.isfinite(value) else None for value in values]
