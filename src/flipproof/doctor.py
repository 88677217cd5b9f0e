"""What this machine can run, and why not; and whether it draws the flips that the definition says."""

import hashlib
import importlib.metadata
import os
import platform

import torch

from flipproof.ops.flip import flip

# Digest of the bytes of the draw below. A machine that prints another one computes other flips.
_KNOWN_DRAW = "8186b14588d6379c"


def draw_digest() -> str:
    """Hash of sparse and dense flips in every dtype, the same on every machine."""
    digest = hashlib.blake2b(digest_size=8)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for p_exp, p_frac in ((2**-8, 2**-9), (0.3, 2**-10), (0.5, 0.41)):
            y = flip(
                torch.ones(20000, dtype=dtype), p_exp=p_exp, p_frac=p_frac, seed=7, site="doctor/x", tick=3, offset=5
            )
            digest.update(y.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def doctor() -> tuple[str, bool]:
    """(report, whether the self-test passed)."""
    lines = [f"python {platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores"]
    for package, wanted in (
        ("torch", "needed"),
        ("transformers", "needed"),
        ("datasets", "needed"),
        ("peft", "optional: opens exported adapters"),
        ("triton", "optional: GPU kernels, which this version does not have yet"),
    ):
        try:
            lines.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{package} is not installed ({wanted})")
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        lines.append(f"GPUs: {names}; they stay idle, flips run on the CPU only in this version")
    else:
        lines.append("GPUs: none that torch sees")
    lines.append("flip backend on the CPU: reference (NumPy)")
    digest = draw_digest()
    healthy = digest == _KNOWN_DRAW
    lines.append(f"self-test of the draw: {'passed' if healthy else f'FAILED, {digest} instead of {_KNOWN_DRAW}'}")
    return "\n".join(lines), healthy
