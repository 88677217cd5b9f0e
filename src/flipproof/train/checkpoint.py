"""Training checkpoints: written by all processes beside training (DCP), complete or not there at all.

A checkpoint is a directory ``checkpoints/step-N`` that holds what training changes (trainable parameters, optimizer
state, how much data was used) and a manifest with the size and hash of each file. Each process copies what it holds to
the CPU's memory, and a thread writes it while training goes on. The directory has another name until every process is
done, so a crash while saving never costs the last good one. Everything else that a resumed run needs (learning rate,
data order, ticks) is a function of the step.

DCP stores tensors by their place in the whole, so any number of processes reads what any other number wrote.
"""

import hashlib
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.utils._pytree import tree_map_only

from flipproof.config import CheckpointConfig
from flipproof.errors import ConfigError
from flipproof.files import discard, is_temporary, named, put_in_place, sync, temporary_name
from flipproof.log import logger
from flipproof.records import read_record, write_record
from flipproof.train.dcp_reader import INDEX, NotACheckpoint, Planted, SafePlanner, SafeReader
from flipproof.train.optimizer import ShardedAdamW
from flipproof.world import ALONE, World

MANIFEST = "manifest.json"
_TRAINABLE = StateDictOptions(ignore_frozen_params=True, strict=False)
_OWN = ("weight_decay", "fused", "foreach")
"""Of an optimizer, what the config and the device decide, whatever a checkpoint holds."""
Progress = dict[str, Tensor]
"""What a run has used beside its steps, by name: scalar tensors, changed in place when a checkpoint is loaded."""


_OTHERS_S = 60.0
"""How long a run that fails waits for a checkpoint that others write with it; these may hang, or be gone."""


class Checkpointer:
    """Writes the checkpoints of a run into ``directory``, one at a time. A context: who leaves it finds the last one
    written, so that what comes next in this process can go on from it."""

    def __init__(self, directory: Path, config: CheckpointConfig, world: World) -> None:
        self.directory, self.config, self.world = directory, config, world
        # A new thread's GPU is the first: there it would take memory for itself, which that may not have.
        gpu = (torch.cuda.set_device, (world.device,)) if world.device.type == "cuda" else ()
        self._thread = ThreadPoolExecutor(1, "checkpoints", *gpu)
        self._pending: Future[None] | None = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._pending is not None:  # what ends the run says why, and not what the checkpoint may fail of
            wait_for([self._pending], timeout=None if self.world.size == 1 else _OTHERS_S)
        self._thread.shutdown(wait=False)

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        logged: int = 0,
        validated: float | None = None,
        text: str | None = None,
    ) -> None:
        """Write ``step-N`` after the one before it, then delete all but the last ``keep_last`` and, with ``keep_best``,
        the best; and any of later steps, which this run does not go on from. All processes call.

        Args:
            logged: how many lines the run's metrics have by then.
            validated: the loss that says which checkpoint is best, where the step was validated.
            text: fingerprint of the streamed text that the step has come to.
        """
        self.wait()
        full = self.config.state_dict_type == "full"
        options = StateDictOptions(ignore_frozen_params=True, strict=False, cpu_offload=True, full_state_dict=full)
        with _as_stepped(model, optimizer):
            model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
        state = {"model": model_state, "optimizer": optimizer_state, "progress": progress}
        # a copy: training goes on with the tensors themselves, which on a CPU these are
        state = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), state)
        about = {"step": step, "metrics": logged, "validated": validated} | ({} if text is None else {"text": text})
        if self.config.asynchronous:
            self._pending = self._thread.submit(self._write, state, about)
        else:
            self._write(state, about)

    def wait(self) -> None:
        """Until the last checkpoint is complete. Raises what writing it raised, in any process."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def check(self) -> None:
        """Raises what writing the last checkpoint raised, without waiting for it."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def _write(self, state: dict[str, Any], about: dict[str, Any]) -> None:
        first, step = self.world.first, about["step"]

        def begin() -> str:
            new = temporary_name(self.directory / f"step-{step}")
            new.mkdir(parents=True)
            return new.name

        unfinished = self.directory / self._together(begin if first else None)[0]
        try:
            files = self._together(lambda: self._write_files(state, unfinished))
            self._complete(unfinished, files, about)
        finally:
            if first:  # on a full disk, what was begun is in the way of all that comes
                shutil.rmtree(unfinished, ignore_errors=True)

    def _complete(self, unfinished: Path, files: list[dict[str, str]], about: dict[str, Any]) -> None:
        """Give the checkpoint its name, and delete those that are no longer to be kept."""
        step = about["step"]

        def complete() -> None:
            written = {name: value for part in files for name, value in part.items()}
            write_record(unfinished / MANIFEST, {**about, "files": written})
            # another of its name was left by a run that resumed from an earlier step
            put_in_place(unfinished, self.directory / f"step-{step}")
            there = list_checkpoints(self.directory)
            # later ones were left by a run that this one does not go on from
            stale = [path for path in there if step_of(path) > step]
            kept = best_checkpoint(self.directory, step) if self.config.keep_best else None
            for path in stale + there[: -self.config.keep_last - len(stale)]:
                if kept is None or path != kept[0]:
                    discard(path)

        self._together(complete if self.world.first else None)

    def _write_files(self, state: dict[str, Any], directory: Path) -> dict[str, str]:
        """What this process holds, as files; returns their fingerprints by name."""
        world, alone = self.world, self.world.size == 1
        with _one_process():
            try:
                if alone or self.config.state_dict_type == "sharded":
                    dcp.save(state, checkpoint_id=directory, process_group=world.writers, no_dist=alone)
                elif world.first:
                    dcp.save(state, checkpoint_id=directory, no_dist=True)
            except CheckpointException as error:  # which is no Exception
                with named(directory):
                    raise _cause(error) from error
        # each process vouches for the files that it wrote
        prefixes = (f"__{world.rank}_", *([INDEX] if world.first else []))
        mine = [file for file in sorted(directory.iterdir()) if file.name.startswith(prefixes)]
        for file in mine:
            sync(file)
        return {file.name: _fingerprint(file) for file in mine}

    def _together(self, action: Callable[[], Any] | None) -> list[Any]:
        """All processes' results of their action, where they have one; what one raises ends it for all."""
        result, error = None, None
        try:
            result = action() if action else None
        except Exception as raised:  # told to the others, which would wait for ever, and raised again
            error = raised
        gathered = self.world.gathered((result, error and str(error)), self.world.writers)
        if error is not None:
            raise error
        for rank, (_, problem) in enumerate(gathered):
            if problem is not None:
                raise RuntimeError(f"process {rank} could not write its part of a checkpoint: {problem}")
        return [part for part, _ in gathered]


def clear_unfinished(directory: Path) -> None:
    """Delete what dead processes left of checkpoints that were not complete, or not gone yet. For who holds the lock of
    the run, before it writes any."""
    for path in directory.glob(".step-*"):
        # and so it was called by the version before
        if is_temporary(path.name, path.name.split(".")[1]) or path.name.endswith(".unfinished"):
            shutil.rmtree(path, ignore_errors=True)


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in directory.glob("step-*") if re.fullmatch(r"step-[0-9]+", path.name)]
    return sorted(found, key=step_of)


def forget_after(directory: Path, step: int) -> None:
    """Delete the checkpoints of later steps."""
    for path in list_checkpoints(directory):
        if step_of(path) > step:
            discard(path)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> int:
    """Restore trainable parameters, optimizer and progress in place; returns the step. All processes call, after
    ``whole_checkpoint``.

    Raises:
        ConfigError: where it does not fit the model, or holds what no checkpoint holds.
    """
    with _as_stepped(model, optimizer):
        model_state, optimizer_state = get_state_dict(model, optimizer, options=_TRAINABLE)
        state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state, "progress": progress}
        _load(state, path)
        own = [{key: group[key] for key in _OWN if key in group} for group in optimizer.param_groups]
        set_state_dict(
            model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=_TRAINABLE
        )
    if isinstance(optimizer, ShardedAdamW):
        optimizer.gather()
    for group, values in zip(optimizer.param_groups, own, strict=True):
        group.update(values)
    return step_of(path)


def _as_stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
    """Within, the model's parameters are those of the optimizer."""
    return optimizer.parameters_of(model) if isinstance(optimizer, ShardedAdamW) else nullcontext()


def load_trained_weights(path: Path, model: nn.Module) -> int:
    """Restore the trainable parameters alone; returns the step. Raises as ``load_checkpoint`` does."""
    state = {"model": get_model_state_dict(model, options=_TRAINABLE)}
    _load(state, path)
    set_model_state_dict(model, state["model"], options=_TRAINABLE)
    return step_of(path)


def find_checkpoint(directory: Path, resume: str | None) -> Path | None:
    """The checkpoint to go on from: ``resume`` by name, or for "auto" the last one; None where there is none.

    Raises:
        ConfigError: where there is none of that name, naming those that are there.
    """
    found = list_checkpoints(directory)
    if resume is None or (resume == "auto" and not found):
        return None
    if resume == "auto":
        return found[-1]
    names = [path.name for path in found]
    if resume not in names:
        raise ConfigError([f"--resume {resume}: {directory} holds {', '.join(names) or 'no complete checkpoint'}"])
    return directory / resume


def whole_checkpoint(path: Path, fall_back: bool = False, world: World = ALONE) -> Path:
    """``path``, where its files are those that were written. Else, to ``fall_back``, the last one before it of which
    that is true, with a warning. All processes must call.

    Raises:
        ConfigError: naming what is damaged, and the way out; and what no checkpoint holds, which nobody passes over.
    """
    before = [other for other in list_checkpoints(path.parent) if step_of(other) < step_of(path)]
    problems = checkpoint_problems(path, world)
    if not problems:
        return _of_plain_values(path, world)
    damaged = not any(_UNREADABLE in problem for problem in problems)  # what cannot be read now may be whole
    for earlier in reversed(before) if fall_back and damaged else ():
        if not checkpoint_problems(earlier, world):
            logger.warning("checkpoint %s: %s; goes on from %s", path, problems[0], earlier.name)
            return _of_plain_values(earlier, world)
    way_out = f"; train --resume {before[-1].name} goes on from the one before" if before and not fall_back else ""
    raise ConfigError([f"checkpoint {path}: {problem}{way_out}" for problem in problems])


def _load(state: dict[str, Any], path: Path) -> None:
    try:
        with _one_process():
            reader = SafeReader(path, _manifest(path))
            held = reader.read_metadata().state_dict_metadata
            # what versions before this one did not count is 0
            uncounted = {name for name in state.get("progress", {}) if f"progress.{name}" not in held}
            if uncounted:
                state["progress"] = {k: v for k, v in state["progress"].items() if k not in uncounted}
            dcp.load(state, storage_reader=reader, planner=SafePlanner(), no_dist=not dist.is_initialized())
    except (CheckpointException, Exception) as error:  # DCP's own is no Exception; files may mean anything
        cause = _cause(error)
        if isinstance(cause, NotACheckpoint):
            raise ConfigError([f"checkpoint {path} is refused: {cause}"]) from error
        if isinstance(cause, OSError):
            raise ConfigError([f"checkpoint {path} {_UNREADABLE} ({cause})"]) from error
        reason = " ".join(str(cause).split())[:300]
        raise ConfigError([f"checkpoint {path} does not fit this model and config ({reason})"]) from error


def _cause(error: BaseException) -> BaseException:
    """What DCP says that it failed of, in the first process that did."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


_UNREADABLE = "cannot be read"


def checkpoint_problems(path: Path, world: World = ALONE) -> list[str]:
    """What keeps a checkpoint from being read, one line per file. Of several processes, which all must call, each reads
    a part of the files."""
    files: dict[str, str] = {}
    problems: list[str] = []
    try:
        files = _manifest(path)
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        problems.append(f"{MANIFEST} is missing or damaged")
    except OSError as error:
        problems.append(f"{MANIFEST} {_UNREADABLE} ({error.strerror})")
    for name, expected in list(files.items())[world.rank :: world.size]:
        try:
            if _fingerprint(path / name) != expected:
                problems.append(f"{name} is damaged (size or hash differ from the manifest)")
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} {_UNREADABLE} ({error.strerror})")
    return _once_each(problems, world)


def _of_plain_values(path: Path, world: World) -> Path:
    """``path``, a whole checkpoint. Raises ConfigError where it holds what no checkpoint holds; each process looks at
    some of the values."""
    problems = []
    try:
        SafeReader(path, _manifest(path)).check_values(world.rank, world.size)
    except NotACheckpoint as error:
        problems = [f"checkpoint {path} is refused: {error}"]
    except OSError as error:
        problems = [f"checkpoint {path} {_UNREADABLE} ({error})"]
    if problems := _once_each(problems, world):
        raise ConfigError(problems)
    return path


def planted(path: Path) -> list[str]:
    """What in a checkpoint would run something where it was opened with less care. What is only damaged, or points
    elsewhere, is not told."""
    try:
        SafeReader(path, {file.name for file in path.iterdir()}).check_values()
    except Planted as error:
        return [f"checkpoint {path} is refused: {error}; delete it if you do not know where it comes from"]
    except (NotACheckpoint, OSError):
        pass
    return []


def _once_each(problems: list[str], world: World) -> list[str]:
    """What all processes have found."""
    return list(dict.fromkeys(problem for part in world.gathered(problems) for problem in part))


def _manifest(path: Path) -> dict[str, str]:
    """The fingerprint of each file of a checkpoint; no other is read. Raises where there is no manifest, or it is
    something else."""
    files: dict[str, str] = read_record(path / MANIFEST)["files"]
    if not isinstance(files, dict) or INDEX not in files:
        raise ValueError("a manifest names the index")
    if not all(Path(name).name == name and name.isprintable() for name in files):
        raise ValueError("a manifest names the files beside it")
    return files


def text_of(path: Path) -> str | None:
    """The fingerprint of the streamed text that a checkpoint was trained on; None where there was none, or no manifest
    that says so."""
    try:
        text = read_record(path / MANIFEST).get("text")
    except (OSError, ValueError):
        return None
    return text if isinstance(text, str) else None


def logged_lines(path: Path) -> int:
    """How many lines the metrics of the run had when it wrote a checkpoint; 0 where that is not known. Of one that
    ``whole_checkpoint`` has found whole."""
    lines = read_record(path / MANIFEST).get("metrics")
    return lines if isinstance(lines, int) else 0


def best_checkpoint(directory: Path, until: int) -> tuple[Path, float] | None:
    """(the checkpoint of the least validation loss, that loss in nats per token), the first of several; of those until
    a step. None where none was validated."""
    found = []
    for path in list_checkpoints(directory):
        with suppress(OSError, ValueError, LookupError, TypeError):  # what is damaged is told by who goes on from it
            loss = read_record(path / MANIFEST)["validated"]
            if step_of(path) <= until and isinstance(loss, float):
                found.append((path, loss))
    return min(found, key=lambda one: one[1], default=None)


@contextmanager
def _one_process() -> Iterator[None]:
    """DCP warns that there is one process, which is what was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _fingerprint(file: Path) -> str:
    with file.open("rb") as stream:
        return f"{file.stat().st_size}:{hashlib.file_digest(stream, 'blake2b').hexdigest()[:32]}"
