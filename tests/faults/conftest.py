import pytest
import torch

from flipproof.faults import memory, op

try:
    from flipproof.faults import triton_launch
except ImportError:  # it has no build for this platform
    triton_launch = None


@pytest.fixture(autouse=triton_launch is not None and not torch.cuda.is_available())
def few_programs(monkeypatch):
    """In Triton's interpreter 16 programs share a list of zeroed weights, in the place of 1024.

    Each goes on with the item that lies as many further as there are programs, so the result is the same. Of 1024
    nearly all find none here, and each takes milliseconds to do so.
    """
    launch, shared = triton_launch.launch, triton_launch.merging.zeroed_correction

    def launch_fewer(kernel, programs, *arguments, **options):
        launch(kernel, min(programs, 16) if kernel is shared else programs, *arguments, **options)

    monkeypatch.setattr(triton_launch, "launch", launch_fewer)


@pytest.fixture(params=["reference", "triton"])
def backend(request, monkeypatch):
    """The device to test on with this backend: Triton's kernels run in its interpreter where there is no GPU."""
    gpu = torch.cuda.is_available()
    if request.param == "triton":
        if triton_launch is None:
            pytest.skip("Triton has no build here")
        if not gpu:
            monkeypatch.setattr(
                op, "_backend", lambda _, draw=None: memory if draw and draw.patterned else triton_launch
            )
    return "cuda" if gpu and request.param == "triton" else "cpu"
