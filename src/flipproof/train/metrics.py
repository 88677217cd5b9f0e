"""What is logged of the steps of a training, and where it goes: ``metrics.jsonl`` always, TensorBoard and Weights &
Biases if asked for, the log and a progress bar for who looks on.

All of them must tell one story of a run that was killed and resumed. Steps beyond the checkpoint run again, with the
same bits, hence:

- ``metrics.jsonl`` drops their lines and gets them anew;
- TensorBoard cannot take back what it has, but an event file that begins with a session start at step n hides
  everything from n on in the files before it (``purge_step``);
- a W&B run goes on under its id, kept in ``wandb_id``; steps that its server has seen are ignored, and the values that
  come again are the values it has.
"""

import dataclasses
import json
import re
import resource
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flipproof.config import LoggingConfig, RunConfig
from flipproof.errors import ConfigError
from flipproof.files import named, sync, write_atomically
from flipproof.log import bar, logger
from flipproof.records import CONFIG, METRICS, append_line, lines
from flipproof.train.checkpoint import logged_lines, step_of
from flipproof.train.cuda_graph import Recorded, peak_allocated
from flipproof.train.throughput import communication_share, flops_per_token, peak_flops
from flipproof.train.trace import StepProfiler
from flipproof.world import World

if TYPE_CHECKING:
    import wandb
    from torch.utils.tensorboard import SummaryWriter

WANDB_ID = "wandb_id"
_PROFILED_STEP = 2
"""The step, counted from the first of this process, in which communication is measured: compilation is over then."""


class StepLog:
    """Measures and reports the steps of one run; all processes have one, the first reports. A context, which ends when
    the trackers have all that there is to tell: the steps (``training``), and the arms after them."""

    def __init__(self, config: RunConfig, model: nn.Module, world: World, first_step: int) -> None:
        """What was logged of steps after ``first_step``, the last one done, is dropped or hidden. All processes call.

        Raises:
            ConfigError: where Weights & Biases does not let the run in.
        """
        training = config.training
        assert training.steps is not None
        self.run_dir, self.world, self.first_step, self.steps = (
            Path(config.logging.run_dir), world, first_step, training.steps
        )  # fmt: skip
        self.tokens_per_step = config.sequences_per_step(world.size) * training.seq_len
        self._trackers: Trackers | None = None

        def start() -> None:
            self._trackers = Trackers(config, first_step)

        world.once(start)
        self._profile = config.logging.profile
        self._profiler: StepProfiler | None = None
        computed_in = training.mixed_precision_param
        dtype = getattr(torch, computed_in) if computed_in else next(model.parameters()).dtype
        peak = peak_flops(world.device, dtype)
        flops = flops_per_token(model, training.seq_len, distilled=training.distill > 0)
        self._mfu_per_rate = None if peak is None else flops / (peak * world.size)
        """MFU of one token per second."""
        self._communication: tuple[float, float | None] | None = None

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self._trackers is not None:
            self._trackers.close()

    @contextmanager
    def training(self) -> Iterator[None]:
        """Around all steps: training begins now."""
        self._bar = bar(self.steps, "step", self.world.first, initial=self.first_step, leave=True)
        if self._profile:
            self._profiler = StepProfiler(self.run_dir, self.world.rank, self.first_step)
        self._timed_from, self._since = self.first_step, time.perf_counter()
        try:
            yield
        finally:
            self._bar.close()
            if self._profiler is not None:
                self._profiler.close()

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around one optimizer step."""
        measured = step == self.first_step + _PROFILED_STEP and self.world.size > 1 and not self._profile
        measured &= self.world.device.type == "cuda"
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities, acc_events=True) if measured else nullcontext() as profile:
            yield
            if measured:
                torch.cuda.synchronize()
        if profile is not None:
            self._communication = communication_share(profile)
        if self._profiler is not None:
            self._profiler.step()
        self._bar.update()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no part of a step: its time does not count in tokens per second."""
        begun = time.perf_counter()
        yield
        self._since += time.perf_counter() - begun

    def validated(self, done: int, losses: Mapping[str, float]) -> None:
        """Report what validation after the ``done``-th step found: a line of metrics of its own."""
        if self._trackers is None:
            return
        self._trackers.write(step=done, **losses)
        said = ", ".join(f"{loss:.4f} {name.removeprefix('eval_loss_')}" for name, loss in losses.items())
        self._bar.set_postfix_str(f"validation loss {said}")
        logger.info("step %d/%d  validation loss %s", done, self.steps, said)

    def measured(self, losses: Mapping[str, float]) -> None:
        """Tell the trackers the losses of arms, by name; ``results.json`` has all else of them."""
        if self._trackers is not None:
            self._trackers.track(self.steps, {f"arm_loss_{name}": loss for name, loss in losses.items()})

    def sync(self) -> None:
        """Until the metrics of all logged steps are on the disk."""
        if self._trackers is not None:
            self._trackers.sync()

    def write(
        self, done: int, tokens: int, loss: float, lr: float, grad_norm: float, skipped: int, peak: float
    ) -> None:
        """Report the ``done``-th step, until which the run has used so many ``tokens``, skipped so many steps and had
        its ``peak`` memory in GiB in this process; all processes call."""
        peak = self.world.largest(peak)
        if self._trackers is None:
            return
        now = time.perf_counter()
        rate = (done - self._timed_from) * self.tokens_per_step / (now - self._since)
        self._timed_from, self._since = done, now
        mfu = None if self._mfu_per_rate is None else rate * self._mfu_per_rate
        running, exposed = self._communication or (None, None)
        self._trackers.write(
            step=done,
            tokens=tokens,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            skipped_steps=skipped,
            tokens_per_second=round(rate, 1),
            mfu=mfu if mfu is None else round(mfu, 4),
            peak_memory_gib=round(peak, 3),
            communication_share=running if running is None else round(running, 4),
            exposed_communication_share=exposed if exposed is None else round(exposed, 4),
        )
        seen = [f"loss {loss:.4f}", f"{rate:,.0f} tokens/s", f"{peak:.1f} GiB"]
        if mfu is not None:
            seen.insert(2, f"MFU {mfu:.1%}")
        if running is not None:
            seen.append(f"communication {running:.0%}, exposed {exposed:.0%}")
        if skipped:
            seen.append(f"{skipped} skipped")
        left = int((self.steps - done) * self.tokens_per_step / rate)
        logger.info(
            "step %d/%d  %s  lr %.2e  %d:%02d left", done, self.steps, "  ".join(seen), lr, *divmod(left, 60)
        )  # fmt: skip


# -- where it goes -----------------------------------------------------------------------------------------------------


class Trackers:
    """Writes the metrics of logged steps to every tracker of the config. For one process of the run."""

    def __init__(self, config: RunConfig, first_step: int) -> None:
        """As ``StepLog``'s. The run's directory must exist, and ``check_trackers`` have found nothing."""
        run_dir, logging = Path(config.logging.run_dir), config.logging
        self._path = run_dir / METRICS
        kept = kept_metrics(run_dir, first_step) or [] if first_step else []
        write_atomically(self._path, "".join(f"{line}\n" for line in kept))
        self._tensorboard = _start_tensorboard(run_dir, first_step) if logging.tensorboard else None
        self._wandb = _start_wandb(config, run_dir) if logging.wandb != "disabled" else None

    def write(self, step: int, **values: float | None) -> None:
        """The metrics after ``step`` steps. None, for what was not measured, is null in ``metrics.jsonl`` and absent
        elsewhere."""
        append_line(self._path, {"step": step, **values})
        self.track(step, {name: value for name, value in values.items() if value is not None})

    def track(self, step: int, measured: dict[str, float]) -> None:
        """What is no metric of a step, to TensorBoard and Weights & Biases alone."""
        if self._tensorboard is not None:
            for name, value in measured.items():
                self._tensorboard.add_scalar(name, value, step)
            # what a checkpoint covers is not logged again, so a kill right after it must lose nothing
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(measured, step=step)

    def sync(self) -> None:
        """Until all lines of ``metrics.jsonl`` are on the disk; where somebody took the file away, there are none."""
        with named(self._path), suppress(FileNotFoundError):
            sync(self._path)

    def close(self) -> None:
        """Finish: flush files and wait for uploads."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def check_trackers(logging: LoggingConfig) -> None:
    """Raises ConfigError where the config asks for a tracker whose package is not installed."""
    wanted: list[tuple[str, Any]] = []
    if logging.tensorboard:
        wanted.append(("tensorboard", logging.tensorboard))
    if logging.wandb != "disabled":
        wanted.append(("wandb", logging.wandb))
    problems = [
        f"logging.{package} = {json.dumps(value)} needs the package {package}; pip install 'flipproof[track]'"
        for package, value in wanted
        if not _installed(package)
    ]
    if problems:
        raise ConfigError(problems)


def log_in(logging: LoggingConfig) -> None:
    """Raises ConfigError where the config asks for Weights & Biases' server and it does not let this user in. Before
    anything is loaded or measured, where ``check_trackers`` has found nothing; for one process of the run."""
    if logging.wandb != "online":
        return
    import wandb

    try:
        wandb.login(verify=True)
    except (wandb.Error, OSError) as error:  # no key, a wrong one, no network
        raise ConfigError([_refused(logging, error)]) from error


def _refused(logging: LoggingConfig, error: Exception) -> str:
    reason = " ".join(str(error).split())
    return f"logging.wandb = {json.dumps(logging.wandb)}: {reason}; offline logs into {Path(logging.run_dir) / 'wandb'}"


def _installed(package: str) -> bool:
    # the folder ./wandb that W&B runs leave behind is found too, as a namespace package: that one has no origin
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def _start_tensorboard(run_dir: Path, first_step: int) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)


def _start_wandb(config: RunConfig, run_dir: Path) -> "wandb.Run":
    import wandb

    try:
        return wandb.init(
            project=config.logging.wandb_project,
            group=config.logging.wandb_group,
            tags=list(config.logging.wandb_tags),
            name=_name_of(run_dir),
            dir=run_dir,
            mode=config.logging.wandb,
            config=dataclasses.asdict(config),
            id=_wandb_id(run_dir),
            resume="allow",
        )
    except wandb.Error as error:  # no key, no network, no such entity
        raise ConfigError([_refused(config.logging, error)]) from error


def _name_of(run_dir: Path) -> str:
    """That of a run is its directory's; of what lies in a run's directory, as its control does, that run's comes
    first."""
    of_run = (run_dir.parent / CONFIG).is_file()
    return f"{run_dir.parent.name}-{run_dir.name}" if of_run else run_dir.name


def _wandb_id(run_dir: Path) -> str:
    """The id of the W&B run that this directory belongs to, made at the first call."""
    path = run_dir / WANDB_ID
    if not path.exists():
        write_atomically(path, uuid.uuid4().hex + "\n")
    return path.read_text().strip()


# -- what a run that resumes finds -------------------------------------------------------------------------------------


def kept_metrics(run_dir: Path, step: int) -> list[str] | None:
    """The lines of a run's metrics of up to ``step``; None where there is no such file.

    Raises:
        ConfigError: for a line that is not what was written, by its number.
    """
    path = run_dir / METRICS
    if not path.exists():
        return None
    text = path.read_bytes()
    written = text[: text.rfind(b"\n") + 1]  # the last line of a killed run may be half written
    texts, kept = written.split(b"\n"), []
    for number, line in lines(written):
        if isinstance(line, ValueError) or not isinstance(line.get("step"), int):
            why = line if isinstance(line, ValueError) else "it has no step"
            raise ConfigError(
                [f"{path} line {number}: {why}; without the file a run goes on, and logs anew from there"]
            )
        if line["step"] <= step:
            kept.append(texts[number - 1].decode())
    return kept


def logged_before(run_dir: Path, checkpoint: Path, begins: int) -> tuple[int, int]:
    """(lines of metrics that there are of the steps that a checkpoint has done, the step after which they begin); in
    the run's record they began after step ``begins``.

    Raises:
        ConfigError: where lines are gone.
    """
    path, done = run_dir / METRICS, step_of(checkpoint)
    kept, written = kept_metrics(run_dir, done), logged_lines(checkpoint) if done > begins else 0
    if kept is None:
        logger.warning("%s is gone: metrics are logged from step %d on", path, done + 1)
        return 0, done
    if len(kept) < written:
        raise ConfigError(
            [
                f"{path} has {len(kept)} lines up to step {done}, and {written} were written; without the file a run "
                "goes on, and logs anew from there"
            ]
        )
    return len(kept), min(begins, done)


def peak_memory_gib(recorded: Recorded | None = None) -> float:
    """Peak memory of this process in GiB: on the GPU where it uses one, else resident. ``recorded``: what its
    micro-batches may be."""
    if torch.cuda.is_initialized():
        return peak_allocated(recorded) / 2**30
    if sys.platform == "linux":  # whose ru_maxrss begins with the peak of the process that started this one
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if found:  # not every container says it
            return int(found[1]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
