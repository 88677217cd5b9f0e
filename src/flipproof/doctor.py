"""What this machine can run, and why not; and whether it draws the flips that the definition says."""

import hashlib
import importlib.metadata
import os
import platform

import torch

from flipproof.faults.op import BACKENDS, flip

# Digest of the bytes of the draw below. A backend with another one computes other flips.
_KNOWN_DRAW = "8186b14588d6379c"


def draw_digest(device: str) -> str:
    """Hash of sparse and dense flips in every dtype, the same on every machine and device."""
    digest = hashlib.blake2b(digest_size=8)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for p_exp, p_frac in ((2**-8, 2**-9), (0.3, 2**-10), (0.5, 0.41)):
            ones = torch.ones(20000, dtype=dtype, device=device)
            y = flip(ones, p_exp=p_exp, p_frac=p_frac, seed=7, site="doctor/x", tick=3, offset=5)
            digest.update(y.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def doctor() -> tuple[str, bool]:
    """(report, whether the self-test passed)."""
    lines = [f"python {platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores"]
    for package, wanted in (
        ("torch", "needed"),
        ("transformers", "needed"),
        ("datasets", "needed"),
        ("peft", "optional: opens exported adapters"),
        ("triton", "needed on a GPU; comes with torch's CUDA builds"),
    ):
        try:
            lines.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{package} is not installed ({wanted})")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        lines += [f"GPU {i}: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    else:
        built = (
            f"torch {torch.__version__} is built with CUDA"
            if torch.version.cuda
            else "this torch is built without CUDA"
        )
        lines.append(f"no GPU that torch sees ({built})")
    healthy = True
    for device in devices:
        lines.append(f"bits on {device} are flipped by: {BACKENDS[device]}")
        try:
            digest = draw_digest(device)
        except ImportError as error:
            digest = f"cannot run ({error})"
        passed = digest == _KNOWN_DRAW
        healthy &= passed
        lines.append(f"self-test of the draw on {device}: {'passed' if passed else f'FAILED, {digest}'}")
    return "\n".join(lines), healthy
