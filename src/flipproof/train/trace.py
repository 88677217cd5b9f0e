"""Traces of a few training steps, for people who want to see where the time and the memory go.

The first step compiles kernels and fills caches, the second lets the profiler warm up, and the next two are recorded:
every operation with the shapes of its inputs and, on a GPU, every kernel, in the format of chrome://tracing and
https://ui.perfetto.dev. On a GPU there is also a snapshot of its memory, with the allocations of all these steps, for
https://pytorch.org/memory_viz.
"""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, schedule

from flipproof.log import logger

_WAIT, _WARMUP, _ACTIVE = 1, 1, 2
_MEMORY_EVENTS = 100_000
"""Allocations and frees that the snapshot remembers, the latest ones."""


class StepProfiler:
    """Profiles the third and fourth step of one process, from its construction on. Afterwards it costs nothing.

    It writes ``profile/trace-rank{rank}.json.gz`` in the run's directory and, on a GPU,
    ``profile/memory-rank{rank}.pickle``. The trace calls a step ``ProfilerStep#n``, n being the ``step`` of
    ``metrics.jsonl``. A run that ends earlier has a shorter trace, or none.
    """

    def __init__(self, run_dir: Path, rank: int, first_step: int) -> None:
        """``first_step`` is how many steps were done before."""
        self._directory, self._rank = run_dir / "profile", rank
        self._directory.mkdir(parents=True, exist_ok=True)
        self._last = first_step + _WAIT + _WARMUP + _ACTIVE
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS, stacks="python")
        self._profile: torch.profiler.profile | None = torch.profiler.profile(
            activities=activities,
            schedule=schedule(skip_first=first_step + 1, wait=_WAIT, warmup=_WARMUP, active=_ACTIVE, repeat=1),
            on_trace_ready=self._write_trace,
            record_shapes=True,
            acc_events=True,
        )
        self._profile.step_num = first_step + 1  # the step that is about to run
        self._profile.start()

    def step(self) -> None:
        """To be called at the end of each optimizer step."""
        if self._profile is None:
            return
        done = self._profile.step_num
        if done < self._last:
            self._profile.step()
        else:
            self.close()

    def close(self) -> None:
        """Stop, and write what was recorded, where that has not happened yet."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        profile.stop()
        if torch.cuda.is_available():
            torch.cuda.memory._dump_snapshot(str(self._directory / f"memory-rank{self._rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write_trace(self, profile: torch.profiler.profile) -> None:
        path = self._directory / f"trace-rank{self._rank}.json.gz"
        profile.export_chrome_trace(str(path))
        logger.info("profiled steps are in %s", path)
