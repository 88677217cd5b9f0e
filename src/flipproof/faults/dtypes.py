"""The dtypes whose bits flip, as torch knows them; ``spec.py`` has their bits by name."""

import torch

from flipproof.faults.layouts import FLOATS

DTYPES = tuple(getattr(torch, name) for name in FLOATS)
INTEGERS = {dtype: torch.int32 if dtype.itemsize == 4 else torch.int16 for dtype in DTYPES}
"""By whose view a dtype's bits are looked at."""
INTEGERS[torch.uint8] = torch.uint8  # patterns of up to 8 bits


def dtype_name(dtype: torch.dtype) -> str:
    """Without "torch."."""
    return str(dtype).removeprefix("torch.")
