"""Kills torchrun's agent again and again, starts the job anew at once, and compares the end with an undisturbed run.

    python tests/agent_kills.py --times 10

The agent dies of SIGKILL while its two ranks are in the middle of steps; nobody tells them. They must be gone before
they write what the next start writes: metrics once, whole checkpoints, and in the end the same bits.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from crash_points import left, prepare

from flipproof.train.checkpoint import checkpoint_problems, list_checkpoints

STEPS = 300
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "flipproof"]


def start(directory: Path) -> subprocess.Popen:
    command = [*LAUNCH, "train", "--config", f"{directory}/run.toml", "--resume", "auto"]
    cache = {"HF_DATASETS_CACHE": f"{directory}/cache", "OMP_NUM_THREADS": "1"}
    with (directory / "said").open("a") as said:
        return subprocess.Popen(command, stdout=said, stderr=said, env=os.environ | cache)


def lines(directory: Path) -> list[str]:
    path = directory / "run/metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def result(directory: Path) -> dict[str, bytes]:
    return left(directory, ("run/adapter", "run/metrics", "run/results", "run/run.json"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    times = parser.parse_args().times
    rng, problems = random.Random(0), []
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place) / "now"
        directory.mkdir()
        prepare(directory, keep_last=3, steps=STEPS, save_freq=5)
        assert start(directory).wait() == 0, (directory / "said").read_text()
        expected = result(directory)
        (directory / "run").rename(directory / "undisturbed")
        for number in range(times):
            job = start(directory)
            # between two checkpoints, further on each time
            wanted = (number + 1) * STEPS // (times + 2) + rng.randrange(4)
            while len(lines(directory)) < wanted and job.poll() is None:
                time.sleep(0.002)
            time.sleep(rng.random() * 0.05)
            job.send_signal(signal.SIGKILL)
            if job.wait() != -signal.SIGKILL:
                problems.append(f"start {number + 1} ended by itself, with {job.returncode}")
            print(f"agent {number + 1} was killed after {len(lines(directory))} lines of metrics", flush=True)
        if code := start(directory).wait():
            problems.append(f"the last start ended with {code}: {(directory / 'said').read_text()[-800:]}")
        found = result(directory)
        problems += [f"{name} is another" for name in expected if found.get(name) != expected[name]]
        steps = [json.loads(line)["step"] for line in lines(directory)]
        if steps != [*range(1, STEPS + 1)]:
            problems.append(f"metrics are of the steps {steps}")
        for path in list_checkpoints(directory / "run/checkpoints"):
            problems += [f"{path.name}: {problem}" for problem in checkpoint_problems(path)]
    print(*problems, sep="\n") if problems else print(f"killed {times} times, the same bits in the end")
    return bool(problems)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
