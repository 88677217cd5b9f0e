"""The guard: after flipping, every value for which ``|v| < t`` is not true, NaN and infinity included, becomes 0.

A guard is a float32 tensor of thresholds: one for all (no dimensions), or **by channel**, of the shape of the guarded
tensor's last dimensions (one threshold for each feature of an input), or of its first ones with ones behind (one for
each row of a weight). No threshold loses anything by being float32: what it is compared with has no more digits, so it
is rounded up.

Backends compare bit patterns with **limits**, which a guard gives for each dtype, so all of them zero the same values:
``cpu.py`` where only flipped values can be out of range, ``memory.py``, and on a GPU ``triton_kernels.py``.
"""

import math

import torch
from torch import Tensor

from flipproof.faults.dtypes import INTEGERS

_CHUNK = 1 << 18
"""Elements at a time on a CPU, which stay in its cache; elsewhere all."""


def guard_of(zero_out_t: float | Tensor) -> Tensor:
    """Thresholds as a guard: float32, each the smallest that is not below the one given."""
    exact = torch.as_tensor(zero_out_t, dtype=torch.float64)
    rounded = exact.float()
    return torch.where(rounded < exact, rounded.nextafter(torch.full_like(rounded, math.inf)), rounded)


def limits_of(guard: Tensor, dtype: torch.dtype) -> Tensor:
    """The bit patterns of the smallest values of ``dtype`` that are not below the thresholds, as integers of its size.

    Magnitudes of IEEE floats are ordered as their bit patterns are, and infinity and NaN come last, so ``|v| < t`` in
    exact arithmetic is ``bits(|v|) < limit`` on every backend. One for all has no dimensions and is in CPU memory.
    """
    if guard.numel() == 1:
        guard = guard.reshape(()).cpu()
    if dtype == torch.float16:
        near = guard.to(dtype)
        return near.view(torch.int16) + (near.float() < guard).to(torch.int16)
    bits = guard.contiguous().view(torch.int32)
    return bits if dtype == torch.float32 else (bits + 0xFFFF >> 16).to(torch.int16)


def guard_bits(dtype: torch.dtype, zero_out_t: float) -> int:
    """The limit of one threshold."""
    return int(limits_of(guard_of(zero_out_t), dtype))


def channels_of(limits: Tensor, shape: torch.Size) -> tuple[int, int]:
    """(channels, inner): the i-th element of a tensor of ``shape`` has threshold ``(i // inner) % channels``.

    Raises:
        ValueError: where the shape of the limits is neither that of the last dimensions nor that of the first with ones
            behind.
    """
    own = (1,) * (len(shape) - limits.dim()) + tuple(limits.shape)
    many = [d for d, size in enumerate(own) if size != 1] or [len(own)]
    fits = len(own) == len(shape)
    if fits and own[: many[-1] + 1] == tuple(shape[: many[-1] + 1]):
        return limits.numel(), math.prod(shape[many[-1] + 1 :])
    if fits and own[many[0] :] == tuple(shape[many[0] :]):
        return limits.numel(), 1
    raise ValueError(
        f"zero_out_t of shape {tuple(limits.shape)} for a tensor of shape {tuple(shape)}: a number is allowed, or "
        "thresholds of the shape of its last dimensions, or of its first ones with ones behind"
    )


def magnitude_bits(x: Tensor) -> Tensor:
    """The bit patterns of |x| as integers of the same size; order-preserving, NaN above infinity."""
    return x.view(INTEGERS[x.dtype]) & (2 ** (x.dtype.itemsize * 8 - 1) - 1)


def guard_(x: Tensor, limits: Tensor, grad: Tensor | None = None) -> None:
    """Zero, in place, every element of a contiguous ``x`` whose magnitude is not below its limit, and of ``grad`` with
    it."""
    channels, inner = channels_of(limits, x.shape)
    limit = limits.to(x.device).reshape(-1, 1)
    rows = x.view(-1, channels, inner)
    grads = None if grad is None else grad.view(-1, channels, inner)
    at_once = _CHUNK if x.device.type == "cpu" else max(1, x.numel())
    a_channel = min(channels, max(1, at_once // inner))
    a_row = max(1, at_once // (channels * inner))
    for row in range(0, len(rows), a_row):  # chunks stay in the cache
        for first in range(0, channels, a_channel):
            chunk = slice(row, row + a_row), slice(first, first + a_channel)
            out = magnitude_bits(rows[chunk]) >= limit[chunk[1]]
            rows[chunk].masked_fill_(out, 0)
            if grads is not None:
                grads[chunk].masked_fill_(out, 0)
