"""A fault of one operand of one layer: how often bits are inverted, in which pattern, behind which guard.

Nothing here needs torch, as reading a config does not.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

from flipproof.faults.layouts import LAYOUTS, bits_named

Protection = Literal["none", "secded", "parity"]
PROTECTIONS: tuple[Protection, ...] = get_args(Protection)
Granularity = Literal["tensor", "layer", "channel"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
SECDED_CHECK_BITS = 8
"""Of a word of 64 bits."""


@dataclass(frozen=True)
class Pattern:
    """How faults of one operand depart from new, independent flips at ``p_exp`` and ``p_frac`` in each pass."""

    persistent: bool = False
    """One draw per seed instead of one per forward pass."""
    p_bits: tuple[tuple[str, float], ...] = ()
    """(bits, probability): these bits' own."""
    burst: int = 1
    """Flips come in runs of so many neighbouring bits."""
    p_row: float = 0.0
    """Probability that a memory row is bad."""
    row_bytes: int = 1024
    protection: Protection = "none"
    protected_bits: tuple[str, ...] = ()
    """Bits that are stored three times."""

    @property
    def independent(self) -> bool:
        """Whether there is nothing of all this."""
        return replace(self, row_bytes=Pattern.row_bytes) == Pattern()

    def bit_probabilities(self, p_exp: float, p_frac: float, dtype: str) -> tuple[float, ...]:
        """The probability that each bit of a stored value is inverted, from the lowest bit up; without bad rows.

        Raises:
            ValueError: for a bit that the dtype does not have.
        """
        bits, mantissa, *_ = LAYOUTS[dtype]
        p = [p_frac] * mantissa + [p_exp] * (bits - mantissa)
        for name, own in self.p_bits:
            for bit in bits_named(name, dtype):
                p[bit] = own
        for bit in self.protected(dtype):
            p[bit] = p[bit] ** 2 * (3 - 2 * p[bit])  # two of three copies, or all, are wrong
        return tuple(p)

    def protected(self, dtype: str) -> set[int]:
        """The bits that are stored three times."""
        return {bit for name in self.protected_bits for bit in bits_named(name, dtype)}

    def overhead(self, dtype: str) -> float:
        """Bits stored beyond those of the values, over those of the values."""
        bits = LAYOUTS[dtype].bits
        checks = {"none": 0.0, "secded": SECDED_CHECK_BITS / 64, "parity": 1 / bits}[self.protection]
        return checks + 2 * len(self.protected(dtype)) / bits


class Stored(NamedTuple):
    """A pattern in a memory of one dtype: every bit with its probability."""

    p_bits: tuple[float, ...]
    """From the lowest bit up; without bad rows."""
    persistent: bool = False
    burst: int = 1
    p_row: float = 0.0
    row_bytes: int = 1024
    protection: str = "none"
    lost: int = 0
    """The pattern that a value has which the protection has lost."""


class Fitted(NamedTuple):
    """How thresholds are made of the maxima that ``profile`` has found (``fitted.py``)."""

    by: Granularity | None
    """None: as finely as they were fitted."""
    margin: float
    floor: float
    """No channel's maximum counts for less than this quantile of its layer's; 0 is no floor."""


class Fault(NamedTuple):
    """What happens to one operand of one layer: the argument of a flip, less its key."""

    p_exp: float = 0.0
    """Probability that a sign or exponent bit is inverted."""
    p_frac: float = 0.0
    """Probability that a mantissa bit is inverted."""
    zero_out_t: float | None = None
    """Guard threshold: after the flip, whatever is not of magnitude below it becomes 0. None: no guard."""
    pattern: Pattern | None = None
    """None where flips are independent and new in each pass, or where there are none."""
    fitted: Fitted | None = None
    """Where given, thresholds that were fitted take the place of ``zero_out_t``."""

    @property
    def persistent(self) -> bool:
        """Whether the flips are those of one map for all passes."""
        return self.pattern is not None and self.pattern.persistent

    @property
    def flips(self) -> bool:
        return self.p_exp > 0 or self.p_frac > 0 or self.pattern is not None

    def stored(self, dtype: str) -> Stored | None:
        """The pattern, where there is one, in values of a dtype such as "bfloat16", or in others of ``LAYOUTS``."""
        if (pattern := self.pattern) is None:
            return None
        p_bits, lost = pattern.bit_probabilities(self.p_exp, self.p_frac, dtype), LAYOUTS[dtype].lost
        how = pattern.persistent, pattern.burst, pattern.p_row, pattern.row_bytes, pattern.protection
        return Stored(p_bits, *how, lost)

    @property
    def active(self) -> bool:
        return self.flips or self.guarded

    @property
    def guarded(self) -> bool:
        return self.zero_out_t is not None or self.fitted is not None
