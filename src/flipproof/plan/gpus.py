"""GPUs by name: memory, bandwidth and links, from their makers' data sheets; their dense peaks are in throughput.py."""

from typing import NamedTuple

import torch

from flipproof.errors import ConfigError
from flipproof.train.throughput import peak_flops_by_name


class Gpu(NamedTuple):
    """A GPU as it is rented."""

    name: str
    """As CUDA calls it, behind "NVIDIA "."""
    memory: float
    """GiB that a program sees, as ``nvidia-smi`` has them."""
    bandwidth: float
    """Of its memory, in 10⁹ bytes a second."""
    link: float
    """To the other GPUs of its node, in each direction, in 10⁹ bytes a second: NVLink's, or PCI Express's."""

    @property
    def peak(self) -> float:
        """Dense FLOPs a second in bfloat16."""
        peak = peak_flops_by_name(self.name, torch.bfloat16)
        assert peak is not None  # tests/plan/test_gpus.py
        return peak


GPUS: dict[str, Gpu] = {
    "a100-40": Gpu("A100-SXM4-40GB", 39.4, 1555, 300),
    "a100-80": Gpu("A100-SXM4-80GB", 79.3, 2039, 300),
    "h100": Gpu("H100 80GB HBM3", 79.6, 3350, 450),
    "h200": Gpu("H200", 140.4, 4800, 450),
    "b200": Gpu("B200", 179.0, 8000, 900),
    "l40s": Gpu("L40S", 44.9, 864, 32),
    "4090": Gpu("GeForce RTX 4090", 24.0, 1008, 32),
    "5090": Gpu("GeForce RTX 5090", 31.8, 1792, 64),
}
"""By the names of ``--gpu``."""


def gpu_cuda_calls(device: str) -> Gpu | None:
    """The GPU that CUDA calls so ("NVIDIA H200"); None for one that is not listed, and for a part of one."""
    return next((gpu for gpu in GPUS.values() if gpu.name == device.removeprefix("NVIDIA ")), None)


def gpu_called(name: str) -> Gpu:
    """Raises ConfigError for a GPU that nobody knows."""
    found = GPUS.get(name.lower().removeprefix("nvidia-"))
    if found is None:
        raise ConfigError([f"--gpu {name}: known are {', '.join(GPUS)}"])
    return found
