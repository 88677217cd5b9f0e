import subprocess
import sys
from pathlib import Path

import pytest
import torch

JOB = Path(__file__).parents[1] / "frozen_bits.py"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="neighbours need two GPUs")
def test_what_neighbours_share_gives_the_bits_of_the_whole_model_on_each():
    count = min(4, torch.cuda.device_count())
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", str(JOB)]
    done = subprocess.run(launched, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
