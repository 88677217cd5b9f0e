"""What may change when a run goes on from a checkpoint, and what may not.

A run is one thing: its arms stand side by side because text, model and faults are the same, and it ends with the bits
of a run that was never stopped because batches, draws and adapters are. ``RULES`` says of every key which of these it
touches. Text and model are compared by what they hold (fingerprints in ``run.json``), not by what they are called: a
directory that was moved is the same model, and a file that was edited is another text.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flipproof.config import RunConfig, load_written
from flipproof.dtensor import whole
from flipproof.errors import ConfigError
from flipproof.faults.fitted import read_guards
from flipproof.records import CONFIG, GUARDS
from flipproof.train.checkpoint import step_of
from flipproof.train.rundir import Record
from flipproof.world import World


class Rule(Enum):
    """What a changed key means for a run that goes on."""

    FIXED = "it would be another run: refused"
    MODEL = "refused, unless the base model's tensors are the same"
    TEXT = "refused, unless the training sequences are the same"
    ROWS = "refused, unless the processes together have as many rows"
    MEASURED = "the base arms are measured anew"
    SAID = "allowed, and said in the log"
    FREE = "allowed"


RULES = {
    "model": Rule.MODEL,
    "model.init": Rule.FIXED,
    "model.tokenizer": Rule.TEXT,
    # data order, draws and gradients; a key that is not named here is one of these
    "training": Rule.FIXED,
    "training.dtype": Rule.MODEL,
    "training.local_batch_size": Rule.ROWS,
    "training.mixed_precision_reduce": Rule.SAID,
    **{
        f"training.{key}": Rule.SAID
        for key in ("steps", "lr", "lr_scheduler", "min_lr_ratio", "weight_decay", "warmup_steps", "max_norm")
    },
    **{
        f"training.{key}": Rule.FREE
        for key in (
            "tokens_per_parameter",
            "tokens_per_parameter_of",
            # what follows from these is compared: steps, warmup_steps, gradient_accumulation_steps
            "epochs",
            "warmup_ratio",
            "global_batch_size",
            "log_freq",
            "save_freq",
            "eval_freq",
            "activation_checkpointing",
            "compile",
            "control",
        )
    },
    "parallelism": Rule.FREE,
    "lora": Rule.FIXED,
    "bitflip": Rule.FIXED,
    "data": Rule.TEXT,
    "data.streaming": Rule.FIXED,  # the order is another
    "eval": Rule.MEASURED,
    "logging": Rule.FREE,
    "checkpoint": Rule.FREE,
    "sweep": Rule.FREE,
}
"""Rule of a section's keys, and of single keys where theirs is another."""


def rule(key: str) -> Rule:
    """The rule of a key such as "training.lr"."""
    return RULES.get(key) or RULES[key.partition(".")[0]]


def begun_with(config: RunConfig, checkpoint: Path) -> tuple[RunConfig, Record | None]:
    """Config and record of the run that ``config`` would go on with from a checkpoint of its directory; no record for
    runs of earlier versions.

    Raises:
        ConfigError: where they are gone or damaged, or it would be another run by keys alone, or a shorter one.
    """
    run_dir = Path(config.logging.run_dir)
    if not (run_dir / CONFIG).exists():
        raise ConfigError(
            [f"--resume: {run_dir / CONFIG} is gone, and with it what the checkpoints there were trained with"]
        )
    was = load_written(run_dir / CONFIG)
    was = replace(was, bitflip=was.bitflip.without_vain())
    check_fixed(was, config, run_dir)
    _check_guards(config, run_dir)
    check_not_done(config.training.steps, checkpoint)
    return was, Record.read(run_dir)


def check_not_done(steps: int | None, checkpoint: Path) -> None:
    """Raises ConfigError where a checkpoint has done more steps than the run has; None is not known yet."""
    done = step_of(checkpoint)
    if steps is not None and steps < done:
        raise ConfigError(
            [
                f"--resume: training.steps = {steps}, but {checkpoint} has done {done}; name an earlier one with "
                "--resume, or more steps"
            ]
        )


def _check_guards(config: RunConfig, run_dir: Path) -> None:
    """Raises ConfigError where fitted guards are not those that the run was begun with, of which it has a copy."""
    path, copy = config.bitflip.guards, run_dir / GUARDS
    if path and copy.exists() and read_guards(path).digest != read_guards(str(copy)).digest:
        raise ConfigError(
            [f"bitflip.guards = {path!r}: not the thresholds that {run_dir} was begun with: {copy} has them"]
        )


def check_fixed(was: RunConfig, now: RunConfig, run_dir: Path) -> None:
    """Raises ConfigError where keys have changed that may not: before text and model are looked at."""
    fixed = {key: change for key, change in _changed(was, now).items() if rule(key) is Rule.FIXED}
    if fixed:
        raise ConfigError([_line(run_dir, key, change) for key, change in fixed.items()])


@dataclass(frozen=True)
class Differences:
    """What a start differs in from the run that it goes on with, where that is allowed; one line each."""

    said: list[str]
    """For the log."""
    measured: list[str]
    """Why the arms before training are to be measured anew."""


def compare(was: RunConfig, now: RunConfig, record: Record | None, current: Record, run_dir: Path) -> Differences:
    """A run's config and record, and those of a start that would go on with it.

    Args:
        record: None for runs of earlier versions, which left none: then names count.
        current: its ``text`` begins with segments of the lengths that ``record.text`` has.

    Raises:
        ConfigError: naming old and new, where it would be another run.
    """
    changed = _changed(was, now)
    refused: list[str] = []
    said, measured = (
        [f"{key} = {new!r}, until now {old!r}" for key, (old, new) in changed.items() if rule(key) is each]
        for each in (Rule.SAID, Rule.MEASURED)
    )

    def judge(what: str, by: Rule, same: bool) -> None:
        """What is compared by content: the keys that name it are to blame where it differs."""
        names = {key: change for key, change in changed.items() if rule(key) is by}
        if same:
            said.extend(f"{key} = {new!r}, until now {old!r}: the same {what}" for key, (old, new) in names.items())
        elif names:
            refused.extend(f"{_line(run_dir, *item)}; the {what} is another" for item in names.items())
        else:
            refused.append(f"--resume: the {what} is another than the one that the run in {run_dir} was begun with, "
                           "though no key that names it has changed")  # fmt: skip

    if record is None:
        for each in (Rule.MODEL, Rule.TEXT, Rule.ROWS):
            refused += [_line(run_dir, *item) for item in changed.items() if rule(item[0]) is each]
    else:
        scratch = current.model is None
        renamed = any(rule(key) is Rule.MODEL for key in changed)
        judge("base model", Rule.MODEL, record.model == current.model and not (scratch and renamed))
        judge("training text", Rule.TEXT, current.text[: len(record.text)] == record.text)
        if record.held_out != current.held_out:
            measured.append("the held-out text is another")
        if record.rows != current.rows:
            refused.append(_line(run_dir, "training.local_batch_size x processes", (record.rows, current.rows)))
    if refused:
        raise ConfigError(refused)
    return Differences(said, measured)


def _line(run_dir: Path, key: str, change: tuple[Any, Any]) -> str:
    return f"--resume: {key} = {change[1]!r}, but the run in {run_dir} was begun with {change[0]!r}"


def _changed(was: RunConfig, now: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Key -> (old, new) of what differs between two configs."""
    changed = {}
    for section, before in asdict(was).items():
        after = asdict(getattr(now, section))
        if section == "lora" and before["r"] == after["r"] == 0:
            continue  # no adapters, whatever their scale
        for key, old in before.items():
            new = after[key]
            if section == "bitflip" and key.endswith(("_p_exp", "_p_frac", "_p_row")):
                old, new = old or 0, new or 0  # None is 0 there
            if old != new:
                changed[f"{section}.{key}"] = (before[key], after[key])
    return changed


def text_fingerprint(sequences: np.ndarray, marks: np.ndarray | None = None) -> str:
    """Of token ids of shape (sequences, seq_len), and of their marks if there are any."""
    rows = max(1, 2**26 // max(1, sequences[:1].nbytes))
    arrays = [sequences] if marks is None else [sequences, marks]
    parts = (np.ascontiguousarray(a[start : start + rows]) for a in arrays for start in range(0, len(a), rows))
    return _combined(f"{sequences.dtype.str} {sequences.shape}", _hashes(parts))


def text_segments(
    sequences: np.ndarray, lengths: tuple[int, ...], marks: np.ndarray | None = None
) -> tuple[tuple[int, str], ...]:
    """(length, fingerprint) of the consecutive parts of a text that have these lengths, and of the rest if any."""
    segments, start = [], 0
    for length in (*lengths, len(sequences) - sum(lengths)):
        if length > 0:
            here = slice(start, start + length)
            segments.append((length, text_fingerprint(sequences[here], None if marks is None else marks[here])))
            start += length
    return tuple(segments)


def examine_model(model: nn.Module, world: World) -> tuple[str, list[str]]:
    """(fingerprint, names of those that hold NaN or infinity) of a model's tensors, adapters left out. It does not
    depend on how the model is sharded. All processes must call; each hashes some of the tensors."""
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    names = [name for name in state if not name.endswith((".lora_A", ".lora_B"))]
    bad: list[str] = []

    def mine() -> Iterator[Any]:
        for number, name in enumerate(names):
            tensor = whole(state[name]).detach()
            if number % world.size != world.rank:
                continue
            if tensor.is_floating_point() and not (tensor.float() if tensor.itemsize == 1 else tensor).isfinite().all():
                bad.append(name)
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
            yield tensor.reshape(-1).contiguous().cpu().view(torch.uint8).numpy()

    gathered = world.gathered((list(_hashes(mine())), bad))
    # two hashes a tensor; tensor n is the (n // size)-th of process n % size
    parts = [
        gathered[number % world.size][0][2 * (number // world.size) + half]
        for number in range(len(names))
        for half in (0, 1)
    ]
    return _combined("model", parts), [name for _, found in gathered for name in found]


def _hashes(parts: Iterator[Any]) -> Iterator[str]:
    """The hash of each of some buffers, in order; several threads, a few buffers ahead."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        waiting: list[Future[str]] = []
        for part in parts:
            waiting.append(pool.submit(lambda data: hashlib.blake2b(data, digest_size=16).hexdigest(), part))
            if len(waiting) > 8:
                yield waiting.pop(0).result()
        yield from (each.result() for each in waiting)


def _combined(head: str, hashes: Any) -> str:
    return hashlib.blake2b("\n".join([head, *hashes]).encode(), digest_size=16).hexdigest()
