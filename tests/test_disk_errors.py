import os
import subprocess
import sys
from pathlib import Path

VERBS = ("eval", "sweep", "export")


def test_a_disk_that_does_not_take_or_give_is_one_line_and_costs_nothing():
    """Three verbs, one size; ``disk_errors.py`` alone tries all. In a process of its own, which forks: this one has
    threads."""
    script = Path(__file__).with_name("disk_errors.py")
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(script.parent), *sys.path]),
    }
    run = subprocess.run(
        [sys.executable, str(script), *VERBS, "--sizes", "100"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    assert run.stdout.count(" trials, 0 problems") == len(VERBS)
