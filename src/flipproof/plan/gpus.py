"""GPUs by name: memory, bandwidth and links, from their makers' data sheets; their dense peaks are in throughput.py. Or
what ``flipproof bench`` measured on the GPU at hand, in the place of bandwidth and peak."""

import math
from pathlib import Path
from typing import NamedTuple

import torch

from flipproof.errors import ConfigError
from flipproof.records import read_record
from flipproof.train.throughput import peak_flops_by_name

PRODUCT_OF_PEAK, COPY_OF_BANDWIDTH = 0.8, 0.9
"""Of what the data sheet says, what a product of 8192 x 8192 x 8192 and a copy reach on an H100 (798 TFLOP/s, 3.0 TB/s)
and on an H200 (788, 4.3), in one short run of each with plain PyTorch; on these GPUs the rest of a plan was
calibrated."""


class Gpu(NamedTuple):
    """A GPU as it is rented."""

    name: str
    """As CUDA calls it, after NVIDIA."""
    memory: float
    """GiB that a program sees, as ``nvidia-smi`` has them."""
    bandwidth: float
    """Of its memory, in 10⁹ bytes a second."""
    link: float
    """To the other GPUs of its node, in each direction, in 10⁹ bytes a second: NVLink's, or PCI Express's."""
    host: float
    """To the CPU's memory, in each direction, in 10⁹ bytes a second: PCI Express's."""
    float32: float
    """10¹² FLOPs a second in float32, without TF32, which PyTorch leaves off."""
    measured_peak: float | None = None
    """What ``peak`` is in 16 bits in the place of the data sheet's."""

    def peak(self, size: int) -> float:
        """Dense FLOPs a second in numbers of ``size`` bytes."""
        if size == 4:
            return self.float32 * 1e12
        if self.measured_peak is not None:
            return self.measured_peak
        peak = peak_flops_by_name(self.name, torch.bfloat16)
        assert peak is not None  # tests/plan/test_gpus.py
        return peak


GPUS: dict[str, Gpu] = {
    "a100-40": Gpu("A100-SXM4-40GB", 39.4, 1555, 300, 32, 19.5),
    "a100-80": Gpu("A100-SXM4-80GB", 79.3, 2039, 300, 32, 19.5),
    "h100": Gpu("H100 80GB HBM3", 79.6, 3350, 450, 64, 66.9),
    "h200": Gpu("H200", 140.4, 4800, 450, 64, 66.9),
    "b200": Gpu("B200", 179.0, 8000, 900, 64, 75.0),
    "l40s": Gpu("L40S", 44.9, 864, 32, 32, 91.6),
    "4090": Gpu("GeForce RTX 4090", 24.0, 1008, 32, 32, 82.6),
    "5090": Gpu("GeForce RTX 5090", 31.8, 1792, 64, 64, 104.8),
}
"""By the names of ``--gpu``."""


def gpu_called(name: str) -> Gpu:
    """Raises ConfigError for a GPU that nobody knows."""
    found = GPUS.get(name.lower().removeprefix("nvidia-"))
    if found is None:
        raise ConfigError([f"--gpu {name}: known are {', '.join(GPUS)}"])
    return found


def gpu_named(name: str) -> str | None:
    """The name of ``--gpu`` of what CUDA calls ``name``, such as "NVIDIA H200"; None for a GPU that nobody knows, and
    for a part of one."""
    return next((key for key, gpu in GPUS.items() if gpu.name == name.removeprefix("NVIDIA ")), None)


def benched(gpu: Gpu, path: Path) -> Gpu:
    """``gpu`` with the bandwidth and the peak by which its data sheet would promise what ``flipproof bench`` measured;
    memory and link stay.

    Raises:
        ConfigError: for a file that is no record of a bench on a GPU, or is of another GPU.
    """
    where = f"--bench {path}"
    try:
        record = read_record(path)
        name, speeds = record["about"]["hardware"], record["speeds"]
        product, copy = float(speeds["product_tflop_s"]), float(speeds["copy_gb_s"])
    except OSError as error:
        raise ConfigError([f"{where}: {error.strerror}"]) from error
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            [f"{where}: it holds no speeds of a GPU; what flipproof bench --to FILE writes on one is allowed"]
        ) from error
    if not all(math.isfinite(speed) and speed > 0 for speed in (product, copy)):
        raise ConfigError([f"{where}: {product:g} TFLOP/s and {copy:g} GB/s; speeds above 0 are allowed"])
    known = gpu_named(str(name))
    if known and GPUS[known].name != gpu.name:
        raise ConfigError([f"{where}: it was measured on {name}; say --gpu {known}"])
    return gpu._replace(
        name=str(name).removeprefix("NVIDIA "),
        bandwidth=copy / COPY_OF_BANDWIDTH,
        measured_peak=product * 1e12 / PRODUCT_OF_PEAK,
    )
