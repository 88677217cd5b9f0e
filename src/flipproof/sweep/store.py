"""The directory of a sweep: what was measured, and who measures what.

Any number of processes share a directory, each started by hand or by torchrun. A process **claims** a point by an
operating-system lock on ``claims/ID.lock``, which ends with the process however that ends, and looks again whether
the point is measured already; lock files of finished points are removed, those that killed processes left are used
again.

A measured point is one line of ``points.jsonl``, appended by one write and synced, under a lock of its own. A process
that is killed while it writes may leave half a line: readers stop before it, and the next writer cuts it off.
"""

import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from flipproof.config import RunConfig, load_written
from flipproof.errors import ConfigError
from flipproof.faults.spec import OPERANDS
from flipproof.files import check_writable, finite, is_temporary
from flipproof.log import logger
from flipproof.records import read_record, sealed, unsealed, write_record, write_toml
from flipproof.sweep.order import Point

CONFIG = "sweep.toml"
HEADER = "sweep.json"
POINTS = "points.jsonl"
CLAIMS = "claims"

_UNUSED = {"exact_gradient", *(f"{operand}_{key}" for operand in OPERANDS for key in ("p_exp", "p_frac"))}
"""Keys of [bitflip] that no point depends on."""


class Measured(NamedTuple):
    """What is known of a measured point."""

    loss: float
    """Nats per token; infinite for a broken model."""
    seconds: float


def depends_on(config: RunConfig) -> dict[str, Any]:
    """What the points of a sweep depend on, by the names of their keys. The rates of a voltage table and the sequences
    of a forward pass, which several processes share, are in the header."""
    sweep, training = config.sweep, config.training
    return {
        **{f"model.{key}": value for key, value in asdict(config.model).items()},
        **{f"training.{key}": getattr(training, key) for key in ("dtype", "mixed_precision_param", "seq_len", "seed")},
        **{f"bitflip.{key}": value for key, value in asdict(config.bitflip).items() if key not in _UNUSED},
        **{f"data.{key}": value for key, value in asdict(config.data).items()},
        "eval.num_samples": config.eval.num_samples,
        "sweep.p": sweep.probabilities(),
        "sweep.sites": sweep.site_names(),
        "sweep.layers": sweep.layer_names(),
        "sweep.bits": sweep.bit_names(),
        "sweep.protection": sweep.protections(),
        "sweep.seeds": sweep.seeds,
    }


class SweepDirectory:
    """One process's view of a sweep's directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.measured: dict[str, Measured] = {}
        """Points by id, as far as they are read."""
        self._read, self._lines = 0, 0  # bytes and lines of points.jsonl

    def check(self, config: RunConfig, known: dict[str, Any] | None = None) -> None:
        """Raises ConfigError where the directory holds anything but this sweep, or could not be written.

        Args:
            known: keys of the header that are known before the model is.
        """
        for name in (CONFIG, POINTS, HEADER, f"{CLAIMS}/points.lock"):
            check_writable(self.path / name, "--to")
        names = sorted(path.name for path in self.path.iterdir()) if self.path.exists() else []
        if CONFIG not in names:
            # of a start that was killed there may be locks, and the table half written
            if other := [name for name in names if name != CLAIMS and not is_temporary(name, CONFIG)]:
                shown = ", ".join(other[:3]) + (f" and {len(other) - 3} more" if len(other) > 3 else "")
                raise ConfigError([f"--to {self.path}: holds something that is no sweep ({shown}); name another one"])
            return
        self._refuse(depends_on(load_written(self.path / CONFIG)), depends_on(config))
        self.header(known or {})

    def _refuse(self, there: dict[str, Any], here: dict[str, Any]) -> None:
        problems = [
            f"--to {self.path}: holds another sweep, of {key} = {_short(there.get(key))}; here it is {_short(value)}"
            for key, value in here.items()
            if there.get(key) != value
        ]
        if problems:
            raise ConfigError(problems)

    def begin(self, config: RunConfig, known: dict[str, Any] | None = None) -> FileLock:
        """Make the directory, or find this sweep in it. The lock is to be held until the header is written."""
        (self.path / CLAIMS).mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / CLAIMS / "sweep.lock")
        lock.acquire()
        try:
            self.check(config, known)  # another process may have begun another sweep in the meantime
            if not (self.path / CONFIG).exists():
                write_toml(self.path / CONFIG, config.to_toml())
        except BaseException:
            lock.release()
            raise
        return lock

    def header(self, expected: dict[str, Any]) -> dict[str, Any] | None:
        """What ``sweep.json`` says; None where there is none yet.

        Raises:
            ConfigError: where it does not say what is ``expected``.
        """
        path = self.path / HEADER
        if not path.exists():
            return None
        try:
            there = read_record(path)
            for one in (there.get("clean"), there.get("guard")):
                if one is not None:
                    one |= {key: None if one[key] is None else float(one[key]) for key in ("loss", "perplexity")}
        except (OSError, ValueError, TypeError, LookupError, ArithmeticError) as error:
            raise ConfigError([f"{path}: not as a sweep writes it ({error}); delete it to measure it anew"]) from error
        self._refuse(there, json.loads(json.dumps(finite(expected))))
        if missing := {"clean", "guard"} - there.keys():
            raise ConfigError([f"{path}: not as a sweep writes it (no {min(missing)}); delete it to measure it anew"])
        return there

    def write_header(self, header: dict[str, Any]) -> None:
        write_record(self.path / HEADER, header)

    def refresh(self, known: dict[str, Point]) -> None:
        """Read the points that were measured since the last time.

        Raises:
            ConfigError: for a line that is no point of this sweep, by its number.
        """
        path = self.path / POINTS
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        for line in whole.splitlines():
            self._lines += 1
            try:
                point = unsealed(line)
                loss = math.inf if point["loss"] is None else float(point["loss"])
                name, result = str(point["id"]), Measured(loss, float(point["seconds"]))
            except (ValueError, KeyError, TypeError, ArithmeticError) as error:
                raise ConfigError(
                    [f"{path} line {self._lines}: not a point of a sweep ({error}); take the line out"]
                ) from error
            if name not in known:
                raise ConfigError([f"{path} line {self._lines}: {name} is a point of another grid; name another --to"])
            self.measured.setdefault(name, result)
        self._read += len(whole)

    def repair(self) -> None:
        """Cut off what a killed process wrote of a line."""
        with self._points_lock():
            self._cut_half_line()

    def append(self, point: Point, loss: float, tokens: int, seconds: float) -> None:
        """Write down a measured point."""
        cell = point.cell
        line = {
            "id": point.id,
            "p": cell.rate.p,
            "voltage": cell.rate.voltage,
            "sites": cell.sites,
            "layers": cell.layers,
            "bits": cell.bits,
            "protection": cell.protection,
            "seed": point.seed,
            "loss": loss if math.isfinite(loss) else None,
            "tokens": tokens,
            "seconds": round(seconds, 3),
        }
        data = json.dumps(sealed(line), allow_nan=False).encode() + b"\n"
        with self._points_lock():
            self._cut_half_line()
            file = os.open(self.path / POINTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                if os.write(file, data) != len(data):
                    raise OSError(f"{self.path / POINTS}: the disk took half a line only")
                os.fsync(file)
            finally:
                os.close(file)

    def _points_lock(self) -> FileLock:
        return FileLock(self.path / CLAIMS / "points.lock")

    def _cut_half_line(self) -> None:
        path = self.path / POINTS
        if not path.exists():
            return
        with path.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            start = max(0, size - 2**16)  # no line is as long
            file.seek(start)
            tail = file.read()
            if tail and not tail.endswith(b"\n"):
                keep = tail.rfind(b"\n") + 1
                half = tail[keep:].decode(errors="replace")
                logger.warning("%s: its last line was half written and is dropped: %s", path, half)
                file.truncate(start + keep)

    def claim(self, point: Point) -> FileLock | None:
        """The lock that makes the point this process's own; None where another process has it."""
        lock = FileLock(self._claim_path(point), blocking=False)
        try:
            self._claim_path(point).parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except (Timeout, FileNotFoundError):  # another one has it; or has just cleared it away
            return None
        return lock

    def clear(self, point: Point, lock: FileLock) -> None:
        """Give a claim back whose point is measured."""
        path = self._claim_path(point)
        path.unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # other seeds of the cell
            path.parent.rmdir()

    def _claim_path(self, point: Point) -> Path:
        return self.path / CLAIMS / f"{point.id}.lock"


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
    return text if len(text) <= 100 else f"{text[:60]} … {text[-30:]}"
