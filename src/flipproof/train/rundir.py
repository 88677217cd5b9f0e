"""The directory of a run: who writes it now, whether it holds something, and what the run in it was begun with.

**One writer.** A run holds a lock on its directory from before it loads anything until it ends. The lock is the
kernel's (flock), so that of a dead process is gone with it; a file beside it says who holds it. Where the file system
has no locks, filelock falls back to a marker that names its process.

**Decided, then done.** ``run.json`` is written before the first step of every start. It holds what later starts are
compared with (``resume.py``), and the checkpoints that this start goes back behind: once their names stand there they
are gone, whether or not the process lives to delete them.
"""

import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from flipproof.errors import ConfigError
from flipproof.files import discard, write_json
from flipproof.records import CONFIG, METRICS, RESULTS, read_record, write_record
from flipproof.world import World, node_size

RECORD = "run.json"
_LOCK, _HOLDER = ".lock", ".lock-holder"
PATIENCE_S = 5.0
"""How long a start waits for the lock: a process that was killed a moment ago may still have it."""


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Hold the lock on a run's directory, which is made, and is gone again where nothing was written into it.

    Raises:
        ConfigError: naming the holder, where another process has it.
    """
    made = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
    run_dir.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(run_dir / _LOCK), run_dir / _HOLDER
    try:
        lock.acquire(timeout=PATIENCE_S)
    except Timeout:
        raise ConfigError(
            [
                f"{run_dir} is in use by {_holder(holder)}; wait for it, stop it, or name another directory with "
                "--logging.run_dir"
            ]
        ) from None
    try:
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        write_json(holder, {"pid": os.getpid(), "host": socket.gethostname(), "since": since})
        yield
    finally:
        holder.unlink(missing_ok=True)
        (run_dir / _LOCK).unlink(missing_ok=True)  # filelock looks whether what it has locked is still there
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()
        lock.release()


def _holder(file: Path) -> str:
    try:
        who = json.loads(file.read_text(encoding="utf-8"))
        return f"process {who['pid']} on {who['host']}, since {who['since']}"
    except (OSError, ValueError, LookupError, TypeError):  # it has the lock, and has not said so yet
        return "another process"


def check_run_dir(run_dir: Path, resume: bool) -> None:
    """Raises ConfigError where the directory holds a run already and this one does not resume it.

    What a start left that came to no checkpoint and no line of metrics is no run.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError([f"logging.run_dir = {str(run_dir)!r} is not a directory"])
    metrics = run_dir / METRICS
    kept = [name for name in ("checkpoints", "adapter", "model", "control") if any(_visible(run_dir / name))]
    kept += [METRICS] if metrics.exists() and metrics.stat().st_size else []
    if kept or not (run_dir / RECORD).exists():
        kept += [name for name in (CONFIG, RESULTS) if (run_dir / name).exists()]
    begun = (run_dir / CONFIG).exists()  # else what is there is not a run's, which --resume could go on with
    if kept and not (resume and begun):
        raise ConfigError(
            [
                f"{run_dir} holds a run already ({', '.join(kept)}); resume it with --resume, or name another "
                "directory with --logging.run_dir"
            ]
        )


def _visible(directory: Path) -> Iterator[Path]:
    return (path for path in directory.glob("*") if not path.name.startswith("."))


@dataclass(frozen=True)
class Record:
    """``run.json``: what the run of a directory was begun with, beside its config."""

    model: str | None
    """Fingerprint of the base model's tensors; None for one from scratch."""
    rows: int
    """Sequences of a global micro-batch."""
    text: tuple[tuple[int, str], ...]
    """(training sequences, their fingerprint): those that the run was begun with, then those that each later start
    added because it has more steps."""
    held_out: str
    """Fingerprint of the held-out sequences."""
    measured: str | None = None
    """Fingerprint of what the arms of ``results.json`` were measured with, once they stand there."""
    abandoned: tuple[str, ...] = field(default=())
    """Checkpoints that the run does not go on from, and that are to be deleted."""
    metrics_from: int = 0
    """The step after which ``metrics.jsonl`` begins: above 0 where somebody took an earlier one away."""
    gpu: str = ""
    """What CUDA calls the first process's GPU; empty on CPUs. It and the ``nodes`` are those of the last start."""
    nodes: int = 1

    def write(self, run_dir: Path) -> None:
        write_record(run_dir / RECORD, asdict(self))

    @classmethod
    def read(cls, run_dir: Path) -> "Record | None":
        """None where there is none, as in runs of earlier versions.

        Raises:
            ConfigError: where it is damaged.
        """
        path = run_dir / RECORD
        try:
            values = read_record(path)
            text = tuple((int(count), str(mark)) for count, mark in values.pop("text"))
            record = cls(**values | {"text": text, "abandoned": tuple(map(str, values["abandoned"]))})
            kinds = {"model": str | None, "rows": int, "held_out": str, "measured": str | None, "metrics_from": int}
            kinds |= {"gpu": str, "nodes": int}
            for key, kind in kinds.items():
                if not isinstance(value := getattr(record, key), kind):
                    raise TypeError(f"{key} = {value!r}")
            if any(count < 0 for count, _ in text):
                raise ValueError(f"text = {text}")
            if record.nodes < 1:
                raise ValueError(f"nodes = {record.nodes}")
            return record
        except FileNotFoundError:
            return None
        except (ValueError, LookupError, TypeError, ArithmeticError) as error:
            raise ConfigError(
                [f"{path} is damaged ({error}); without it, --resume compares the configs alone"]
            ) from error


def placed(world: World) -> dict[str, Any]:
    """Where a run's processes are: ``gpu`` and ``nodes`` of its record."""
    gpu = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
    return {"gpu": gpu, "nodes": world.size // node_size(world.size)}


def forget_abandoned(run_dir: Path) -> None:
    """Delete the checkpoints that the run's record names as abandoned."""
    record = Record.read(run_dir)
    if record is not None and record.abandoned:
        for name in record.abandoned:
            if re.fullmatch(r"step-[0-9]+", name):  # whoever wrote the record
                discard(run_dir / "checkpoints" / name)
        replace(record, abandoned=()).write(run_dir)
