"""The guard: after flipping, every value for which ``|v| < t`` is not true, NaN and infinity included, becomes 0.

It is done on bit patterns, so that every backend zeroes the same values, those that are not below ``guard_bits``: here,
in ``cpu.py`` where only flipped values can be out of range, in ``memory.py``, and on a GPU in ``triton_kernels.py``.
"""

from functools import lru_cache

import torch

from flipproof.faults.dtypes import INTEGERS

_CHUNK = 1 << 18


@lru_cache(maxsize=256)
def guard_bits(dtype: torch.dtype, zero_out_t: float) -> int:
    """The bit pattern of the smallest value of ``dtype`` that is not below ``zero_out_t``.

    Magnitudes of IEEE floats are ordered as their bit patterns are, and infinity and NaN come last, so
    ``|v| < zero_out_t`` in exact arithmetic is ``bits(|v|) < guard_bits`` on every backend.
    """
    low, high = 0, int(torch.tensor(float("inf"), dtype=dtype).view(INTEGERS[dtype]).item())
    while low < high:
        middle = (low + high) // 2
        if torch.tensor(middle, dtype=INTEGERS[dtype]).view(dtype).item() >= zero_out_t:
            high = middle
        else:
            low = middle + 1
    return low


def magnitude_bits(x: torch.Tensor) -> torch.Tensor:
    """The bit patterns of |x| as integers of the same size; order-preserving, NaN above infinity."""
    return x.view(INTEGERS[x.dtype]) & (2 ** (x.dtype.itemsize * 8 - 1) - 1)


def guard_(x: torch.Tensor, zero_out_t: float, grad: torch.Tensor | None = None) -> None:
    """Zero, in place, every element of a flat ``x`` for which |v| < zero_out_t is not true, and of ``grad`` with it."""
    limit = guard_bits(x.dtype, zero_out_t)
    for start in range(0, len(x), _CHUNK):  # chunks stay in the cache
        chunk = slice(start, start + _CHUNK)
        out = magnitude_bits(x[chunk]) >= limit
        x[chunk].masked_fill_(out, 0)
        if grad is not None:
            grad[chunk].masked_fill_(out, 0)
