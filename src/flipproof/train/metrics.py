"""``metrics.jsonl``: a line for each logged step, for programs; and what of it a run that resumes keeps."""

import re
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from flipproof.errors import ConfigError
from flipproof.files import named, sync, write_atomically
from flipproof.records import METRICS, append_line, lines


class Metrics:
    """``metrics.jsonl``, one line per logged step; lines after ``step`` are dropped when a run resumes there."""

    def __init__(self, run_dir: Path, step: int) -> None:
        self.path = run_dir / METRICS
        kept = kept_metrics(run_dir, step) or [] if step else []
        write_atomically(self.path, "".join(f"{line}\n" for line in kept))

    def write(self, **values: Any) -> None:
        append_line(self.path, values)

    def sync(self) -> None:
        """Until all lines are on the disk; where somebody took the file away, there are none."""
        with named(self.path), suppress(FileNotFoundError):
            sync(self.path)


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


def peak_memory_gib() -> float:
    """Peak memory of this process in GiB: on the GPU where it uses one, else resident."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "linux":  # whose ru_maxrss begins with the peak of the process that started this one
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if found:  # not every container says it
            return int(found[1]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
