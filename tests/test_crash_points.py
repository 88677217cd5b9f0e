import os
import subprocess
import sys
from pathlib import Path


def test_commands_killed_at_some_points_end_as_those_never_killed():
    """The first event, the last and one between; ``crash_points.py`` alone tries all. In a process of its own, which
    forks: this one has threads."""
    script = Path(__file__).with_name("crash_points.py")
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(script.parent), *sys.path]),
    }
    run = subprocess.run(
        [sys.executable, str(script), "--points", "3"], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    assert run.stdout.count("3 of ") == 7
