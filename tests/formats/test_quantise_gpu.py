"""What needs a GPU and none of the libraries that the neighbouring tests compare with."""

import pytest
import torch

from flipproof.formats.quantise import quantise
from flipproof.formats.spec import FORMATS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, on which division may be another operation")
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gpu_stores_what_a_cpu_does(name, dtype):
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0)).to(dtype)
    here, there = (quantise(weight.to(device), name).operands for device in ("cpu", "cuda"))
    for key, tensor in here.items():
        if key == "offset":  # a mean, of sums in another order
            assert torch.isclose(tensor, there[key].cpu(), rtol=1e-6)
        elif key not in ("scale", "nested") or "offset" not in here:
            assert torch.equal(tensor, there[key].cpu()), key
