"""The directory of a sweep: what was measured, and who measures what.

Any number of processes share a directory, each started by hand or by torchrun. A process **claims** a trial by an
operating-system lock on ``claims/ID.lock``, which ends with the process however that ends, and looks again whether
it is measured already; lock files of finished trials are removed, those that killed processes left are used again.

A measured point is one file, ``points/ID.json``, which appears whole, by a rename, and never changes: a process knows
by its name whether it has read it.
"""

import json
import math
import os
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flipproof.config import RunConfig, load_written
from flipproof.errors import ConfigError
from flipproof.faults.spec import OPERANDS
from flipproof.files import check_writable, finite, is_temporary
from flipproof.measure.points import Point, Setting
from flipproof.records import lines, read_record, write_record, write_toml
from flipproof.sweep.order import Trial

CONFIG = "sweep.toml"
HEADER = "sweep.json"
FORMATS = "formats.json"
"""Beside the directories of several sweeps, one for each format of weights: which, and what they have in common."""
POINTS = "points"
OLDER_POINTS = "points.jsonl"
"""What earlier versions wrote in the place of ``POINTS``: a line for each point."""
CLAIMS = "claims"

_UNUSED = {"exact_gradient", *(f"{operand}_{key}" for operand in OPERANDS for key in ("p_exp", "p_frac"))}
"""Keys of [bitflip] that no point depends on."""


def read_points(directory: Path, known: Container[str] = (), again: bool = False) -> Iterator[tuple[str, Point]]:
    """(id, point) of each point of a sweep's directory whose id is not ``known``, in the order of their names.

    Args:
        again: leave out the file of an earlier version, to which nobody adds any more.

    Raises:
        ConfigError: for a file, or a line of an earlier version's file, that is no point.
    """
    older, points = directory / OLDER_POINTS, directory / POINTS
    if not again and older.exists():
        text = older.read_bytes()  # a process that was killed may have left half a line at its end
        for number, line in lines(text[: text.rfind(b"\n") + 1]):
            name, point = _point(line, f"{older} line {number}", "take the line out")
            if name not in known:
                yield name, point
    for file in sorted(os.listdir(points) if points.is_dir() else []):
        stem, ending = os.path.splitext(file)
        if file[0] == "." or ending != ".json" or (name := "/".join(stem.rsplit("-", 1))) in known:
            continue
        try:
            values: dict[str, Any] | Exception = read_record(points / file)
        except (OSError, ValueError) as error:
            values = error
        found, point = _point(values, f"{points / file}", "delete it to measure it anew")
        if found != name:
            raise ConfigError([f"{points / file}: it holds the point {found}; delete it to measure its own anew"])
        yield name, point


def _point(values: Mapping[str, Any] | Exception, where: str, what_to_do: str) -> tuple[str, Point]:
    """(id, point) of what was read somewhere. Raises ConfigError where it is none."""
    try:
        if isinstance(values, Exception):
            raise values
        voltage, loss = values.get("voltage"), values["loss"]
        return str(values["id"]), Point(
            p=float(values["p"]),
            voltage=None if voltage is None else float(voltage),
            setting=Setting(*(sys.intern(str(values[key])) for key in Setting._fields)),
            seed=int(values["seed"]),
            loss=math.inf if loss is None else float(loss),
            tokens=int(values["tokens"]),
            seconds=float(values["seconds"]),
        )
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise ConfigError([f"{where}: not a point of a sweep ({error}); {what_to_do}"]) from error


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


def refuse_other(path: Path, kind: str, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises ConfigError where what is there in a directory is another sweep, or ``kind``, than the one here: a line
    for each key that differs."""
    problems = [
        f"--to {path}: holds another {kind}, of {key} = {_short(there.get(key))}; here it is {_short(value)}"
        for key, value in here.items()
        if there.get(key) != value
    ]
    if problems:
        raise ConfigError(problems)


class SweepDirectory:
    """One process's view of a sweep's directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.measured: dict[str, Point] = {}
        """By id, as far as they are read."""
        self._looked = False

    def check(self, config: RunConfig, known: dict[str, Any] | None = None) -> None:
        """Raises ConfigError where the directory holds anything but this sweep, or could not be written.

        Args:
            known: keys of the header that are known before the model is.
        """
        for name in (CONFIG, HEADER, f"{POINTS}/point.json", f"{CLAIMS}/sweep.lock"):
            check_writable(self.path / name, "--to")
        names = sorted(path.name for path in self.path.iterdir()) if self.path.exists() else []
        if CONFIG not in names:
            # of a start that was killed there may be locks, and the table half written
            if other := [name for name in names if name != CLAIMS and not is_temporary(name, CONFIG)]:
                shown = ", ".join(other[:3]) + (f" and {len(other) - 3} more" if len(other) > 3 else "")
                raise ConfigError([f"--to {self.path}: holds something that is no sweep ({shown}); name another one"])
            return
        refuse_other(self.path, "sweep", depends_on(load_written(self.path / CONFIG)), depends_on(config))
        self.header(known or {})

    def begin(self, config: RunConfig, known: dict[str, Any] | None = None) -> FileLock:
        """Make the directory, or find this sweep in it. The lock is to be held until the header is written."""
        (self.path / CLAIMS).mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / CLAIMS / "sweep.lock")
        lock.acquire()
        try:
            self.check(config, known)  # another process may have begun another sweep in the meantime
            if not (self.path / CONFIG).exists():
                write_toml(self.path / CONFIG, config.to_toml())
            (self.path / POINTS).mkdir(exist_ok=True)
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
            for one in (there.get("clean"), there.get("guard"), *there.get("guards", {}).values()):
                if one is not None:
                    one |= {key: None if one[key] is None else float(one[key]) for key in ("loss", "perplexity")}
        except (OSError, ValueError, TypeError, LookupError, ArithmeticError) as error:
            raise ConfigError([f"{path}: not as a sweep writes it ({error}); delete it to measure it anew"]) from error
        refuse_other(self.path, "sweep", there, json.loads(json.dumps(finite(expected))))
        if missing := {"clean", "guard"} - there.keys():
            raise ConfigError([f"{path}: not as a sweep writes it (no {min(missing)}); delete it to measure it anew"])
        return there

    def write_header(self, header: dict[str, Any]) -> None:
        write_record(self.path / HEADER, header)

    def refresh(self, trials: Mapping[str, Trial]) -> None:
        """Read the points that were measured since the last time.

        Raises:
            ConfigError: for what is no point, or one of none of these ``trials``.
        """
        for name, point in read_points(self.path, self.measured, self._looked):
            if name not in trials:
                raise ConfigError([f"{self.path / POINTS}: {name} is a point of another grid; name another --to"])
            self.measured.setdefault(name, point)
        self._looked = True

    def write(self, trial: Trial, loss: float, tokens: int, seconds: float) -> None:
        """Write down a measured point."""
        cell = trial.cell
        values = {"id": trial.id, "p": cell.rate.p, "voltage": cell.rate.voltage, **cell.setting._asdict()}
        values |= {"seed": trial.seed, "loss": loss, "tokens": tokens, "seconds": round(seconds, 3)}
        write_record(self.path / POINTS / f"{_name(trial)}.json", values)

    def claim(self, trial: Trial) -> FileLock | None:
        """The lock that makes the trial this process's own; None where another process has it."""
        lock = FileLock(self.path / CLAIMS / f"{_name(trial)}.lock", blocking=False)
        try:
            lock.acquire()
        except Timeout:
            return None
        return lock

    def clear(self, lock: FileLock) -> None:
        """Give back a claim whose trial is measured."""
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _name(trial: Trial) -> str:
    """What the trial's files are called."""
    return trial.id.replace("/", "-")


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
    return text if len(text) <= 100 else f"{text[:60]} … {text[-30:]}"
