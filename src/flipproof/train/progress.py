"""What is seen of a training while it runs: progress on process 0, and the metrics of each logged step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from flipproof.config import RunConfig
from flipproof.log import logger
from flipproof.train.metrics import peak_memory_gib
from flipproof.train.throughput import communication_share, flops_per_token, peak_flops
from flipproof.train.trace import StepProfiler
from flipproof.train.trackers import Trackers
from flipproof.world import World

_PROFILED_STEP = 2
"""The step, counted from the first of this process, in which communication is measured: compilation is over then."""


class StepLog:
    """Measures and reports the steps of one run; all processes have one, the first reports."""

    def __init__(self, run_dir: Path, config: RunConfig, model: nn.Module, world: World, first_step: int) -> None:
        training = config.training
        assert training.steps is not None
        self.run_dir, self.world, self.first_step, self.steps = run_dir, world, first_step, training.steps
        self.tokens_per_step = (
            training.gradient_accumulation_steps * training.local_batch_size * world.size * training.seq_len
        )
        self._trackers = Trackers(config, first_step) if world.first else None
        self._profile = config.logging.profile
        self._profiler: StepProfiler | None = None
        computed_in = training.mixed_precision_param
        dtype = getattr(torch, computed_in) if computed_in else next(model.parameters()).dtype
        peak = peak_flops(world.device, dtype)
        flops = flops_per_token(model, training.seq_len)
        self._mfu_per_rate = None if peak is None else flops / (peak * world.size)
        """MFU of one token per second."""
        self._communication: tuple[float, float] | None = None

    def __enter__(self) -> "StepLog":
        """Training begins now."""
        hidden = None if self.world.first else True  # None: on a terminal only
        self._bar = tqdm(total=self.steps, initial=self.first_step, unit="step", disable=hidden)
        if self._profile:
            self._profiler = StepProfiler(self.run_dir, self.world.rank, self.first_step)
        self._timed_from, self._since = self.first_step, time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._trackers is not None:
            self._trackers.close()
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

    def sync(self) -> None:
        """Until the metrics of all logged steps are on the disk."""
        if self._trackers is not None:
            self._trackers.sync()

    def write(self, done: int, tokens: int, loss: float, lr: float, grad_norm: float, skipped: int) -> None:
        """Report the ``done``-th step, until which the run has used so many ``tokens`` and skipped so many steps; all
        processes call."""
        peak = self.world.largest(peak_memory_gib())
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
        self._bar.set_postfix_str(", ".join(seen))
        if self._bar.disable:
            left = (self.steps - done) * self.tokens_per_step / rate
            logger.info(
                "step %d/%d  %s  lr %.2e  %d:%02d left", done, self.steps, "  ".join(seen), lr, *divmod(int(left), 60)
            )
