"""The dtypes whose bits flip, as torch knows them; ``spec.py`` has their bits by name."""

import torch

from flipproof.faults.spec import MANTISSA_BITS

DTYPES = tuple(getattr(torch, name) for name in MANTISSA_BITS)
INTEGERS = {dtype: torch.int32 if dtype.itemsize == 4 else torch.int16 for dtype in DTYPES}
"""By whose view a dtype's bits are looked at."""


def dtype_name(dtype: torch.dtype) -> str:
    """Without "torch."."""
    return str(dtype).removeprefix("torch.")
