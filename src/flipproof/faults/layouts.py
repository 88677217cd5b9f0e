"""What the bits of an element are: of a dtype that is computed with, or of a pattern of 4 or 8 bits.

Nothing here needs torch, as reading a config does not.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple


class Layout(NamedTuple):
    """The real bits of an element, the low ones: a mantissa, and above it those that ``p_exp`` is of."""

    bits: int
    mantissa: int = 0
    sign: bool = False
    exponent: bool = False
    """Whether there are bits that are called so; an integer has none."""
    lost: int = 0
    """The pattern that takes the place of one that a protection has lost: that of 0, where there is one."""


LAYOUTS: Mapping[str, Layout] = {
    "bfloat16": Layout(16, 7, True, True),
    "float16": Layout(16, 10, True, True),
    "float32": Layout(32, 23, True, True),
    "e4m3": Layout(8, 3, True, True),
    "e5m2": Layout(8, 2, True, True),
    "e2m1": Layout(4, 1, True, True),
    "e8m0": Layout(8, 0, False, True),
    "integer4": Layout(4, lost=8),
    "integer8": Layout(8, lost=128),
    "nf4": Layout(4, lost=7),
    "nf4-scale": Layout(8, lost=127),
}
"""What an element is -> its bits: dtypes, and what uint8 tensors hold of quantised weights (``formats``). Integers are
in offset binary; nf4 and its scales are places in a table."""
FLOATS = ("bfloat16", "float16", "float32")
"""Those that are dtypes to compute with."""
ELEMENT_BITS = {name: LAYOUTS[name].bits for name in FLOATS}
MANTISSA_BITS = {name: LAYOUTS[name].mantissa for name in FLOATS}


def bits_named(name: str, element: str) -> range:
    """The bits that "sign", "exp" (the exponent), "frac", "15" or "7-14" means; bit 0 is the lowest of the mantissa.

    Args:
        element: one of ``LAYOUTS``.

    Raises:
        ValueError: for a bit that the element does not have.
    """
    bits, mantissa, sign, exponent, _ = LAYOUTS[element]
    named = {
        "sign": range(bits - 1, bits) if sign else range(0),
        "exp": range(mantissa, bits - sign) if exponent else range(0),
        "frac": range(mantissa),
    }
    if named.get(name):
        return named[name]
    low, _, high = name.partition("-")
    if name in named or int(high or low) >= bits:
        raise ValueError(f"bit {name!r}: {element} has bits 0 to {bits - 1}" + " and no such part" * (name in named))
    return range(int(low), int(high or low) + 1)


def is_bits(name: str) -> bool:
    """Whether some dtype has bits that are called so."""
    low, _, high = name.partition("-")
    return name in ("sign", "exp", "frac") or (
        bool(re.fullmatch(r"\d+(-\d+)?", name)) and int(low) <= int(high or low) < 32
    )
