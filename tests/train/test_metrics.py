import os
import subprocess
import sys

import pytest

from flipproof.records import unsealed
from flipproof.train.metrics import Metrics


def test_metrics_go_on_after_the_step_they_resume_from(tmp_path):
    metrics = Metrics(tmp_path, 0)
    for step in (1, 2, 3):
        metrics.write(step=step)
    with metrics.path.open("a") as file:
        file.write('{"step": 4')
    Metrics(tmp_path, 2).write(step=3, again=True)
    assert [unsealed(line) for line in metrics.path.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "again": True},
    ]


def test_peak_memory_counts_what_is_allocated():
    """In a process of its own: the peak of this one depends on the tests before."""
    code = """
from flipproof.train.metrics import peak_memory_gib
blocks, peaks = [], []
for mib in (600, 200, 200):  # the first two are more than what importing took and gave back
    blocks.append(bytearray(mib * 2**20))
    blocks[-1][::4096] = b"x" * len(blocks[-1][::4096])
    peaks.append(peak_memory_gib())
print(*peaks)
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    first, second, third = map(float, said.split())
    assert first > 600 / 2**10
    assert 190 / 2**10 < third - second < 210 / 2**10


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a new program begins with a peak of its own")
def test_peak_memory_is_not_that_of_the_process_before():
    """Linux hands the largest resident size on to the program that takes a process's place."""
    code = """
import os, sys
if len(sys.argv) == 1:
    large = b"x" * 2 * 2**30
    os.execv(sys.executable, [sys.executable, "-c", os.environ["CODE"], "again"])
from flipproof.train.metrics import peak_memory_gib
print(peak_memory_gib())
"""
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | {"CODE": code}, check=True, capture_output=True)
    assert 0.05 < float(run.stdout) < 1.5
