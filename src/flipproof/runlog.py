"""What a run says while it runs: log lines for people, ``metrics.jsonl`` for programs."""

import json
import logging
import os
import re
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from flipproof.files import finite, named, write_atomically

logger = logging.getLogger("flipproof")

METRICS = "metrics.jsonl"
CONFIG = "config.toml"
RESULTS = "results.json"


def set_up_logging() -> None:
    """Log lines to stderr, from rank 0 alone."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    logger.propagate = False


class Metrics:
    """``metrics.jsonl``, one line per logged step; lines after ``step`` are dropped when a run resumes there."""

    def __init__(self, run_dir: Path, step: int) -> None:
        self.path = run_dir / METRICS
        kept = []
        if self.path.exists():
            lines = self.path.read_text().splitlines()
            # the last line of a killed run may be half written
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        write_atomically(self.path, "".join(f"{line}\n" for line in kept))

    def write(self, **values: Any) -> None:
        with named(self.path), self.path.open("a") as file:
            file.write(json.dumps(finite(values), allow_nan=False) + "\n")


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
