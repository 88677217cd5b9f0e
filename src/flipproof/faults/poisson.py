"""Poisson parity: independent Bernoulli(p) flips at a cost that grows with the flips, not with the bits.

Throw K ~ Poisson(λ) balls uniformly over m bits and invert a bit once per ball that hits it. The count on each bit
is an independent Poisson(λ/m), which is odd with probability (1 − e^(−2λ/m)) / 2. So λ = −(m/2)·ln(1 − 2p) gives
*exactly* independent Bernoulli(p) flips for any p < 1/2. Two balls on one bit cancel; that is the point, not a
collision to avoid. Two independent flips combine by the same rule: inverting with probability q and then with
probability r inverts with q + r − 2qr.

**Sparse.** The tensor is cut into blocks of 8192 elements of the whole tensor. Each block has two fields, the mantissa
bits and the sign-and-exponent bits, each with its own p. One Philox call (purpose COUNTS) gives two 63-bit
uniforms, one per field; K is the number of entries of an integer Poisson CDF table that are not above the uniform.
The call (BALLS, i) gives four words: words 0 and 1 place the i-th ball of the exponent field, words 2 and 3 that of
the mantissa field. The top 13 bits of the first word are the element, and (second word · bits of the field) >> 32 is
the bit, counted from the field's lowest.

**Dense.** Beyond p = 2⁻⁷ balls are dearer than random bits. There p is split: q, the first k binary digits of p, is
drawn densely, and the rest r = (p − q) / (1 − 2q) sparsely on top; k is the smallest that leaves r ≤ 2⁻⁷, so p = 0.3
takes 6 digits and p = 1/4 takes two and no balls. One bit with probability q = 0.d1 d2 … dk is made from k random bits
u by going from the last digit to the first: b ← majority(u, b, d), which is u OR b where the digit is 1 and u AND b
where it is 0. All lanes of a 32-bit word work at once, with the digits of both fields side by side in one mask per
digit. The call (DIGITS, i << 16 | g) gives digit i (0 is the first after the point) of four words: word c is for the (c
· G + g)-th 32-bit word of the block as it lies in memory, lowest element in the lowest bits; G = 8192 · bits of an
element / 128. Elements of 4 bits lie packed, eight to a word.

**Coins.** Close to 1/2 that would take ever more digits. So beyond p = 3/8 a bit is inverted where a fair coin says so
and a bit s, which is 1 with probability 1 − 2p and drawn densely and sparsely as above, does not: coin AND NOT s. A
ball then inverts its bit only where the coin says so. The call (COINS, g) gives the coins of the four words that
(DIGITS, i << 16 | g) gives the digits of. No p takes more than nine calls for four words.

**How exact.** The CDF table is made with correctly rounded decimal arithmetic, the same on every platform, and
truncated to 63 bits. So the rate of a block of 8192 elements is off by at most 2⁻⁶³ per table entry, and the choice of
the bit within a field by at most 2⁻²⁹ of its rate. There is no rounding of p itself.
"""

import decimal
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch

from flipproof.faults.dtypes import dtype_name
from flipproof.faults.layouts import LAYOUTS, Layout

BLOCK = 8192
BLOCK_LOG2 = 13
MAX_SPARSE_P = Fraction(1, 128)
"""Largest p drawn by balls alone. Part of the definition: changing it changes every draw at a larger p."""
MAX_COINLESS_P = Fraction(3, 8)
"""Largest p drawn without a coin; here digits with and without a coin cost the same. Part of the definition."""


@dataclass(frozen=True)
class Field:
    """A run of neighbouring bits with one flip probability."""

    first_bit: int
    bits: int
    cdf: np.ndarray | None
    """int64, ascending: the block's K is how many entries are not above a 63-bit uniform. None: no balls."""


@dataclass(frozen=True, eq=False)
class FlipPlan:
    """What a backend needs to draw the flips of one dtype at (p_exp, p_frac)."""

    element_bits: int
    exponent: Field
    mantissa: Field
    digits: tuple[int, ...]
    """32-bit lane masks of the dense digits, most significant first."""
    coins: int
    """32-bit lane mask of the fields whose flips take a coin."""

    @property
    def unsigned(self) -> type[np.unsignedinteger]:
        """NumPy's unsigned integer as wide as an element."""
        if self.element_bits > 8:
            return np.uint32 if self.element_bits == 32 else np.uint16
        return np.uint8

    @cached_property
    def likely_balls(self) -> int:
        """A number of balls that a block's busier field seldom exceeds: the median and four deviations."""
        medians = [np.searchsorted(f.cdf, 2**62) for f in (self.exponent, self.mantissa) if f.cdf is not None]
        median = float(max(medians, default=0))
        return int(median + 4 * median**0.5) + 1

    @property
    def dense(self) -> bool:
        return bool(self.digits or self.coins)

    @property
    def sparse(self) -> bool:
        return self.exponent.cdf is not None or self.mantissa.cdf is not None


class Split(NamedTuple):
    """How a probability is drawn."""

    coin: bool
    """Whether p = (1 − s) / 2 is a coin AND NOT a bit of probability s; the rest is then about s, and about p if
    not."""
    k: int
    j: int
    """A dense draw at j / 2^k ..."""
    rest: Fraction
    """... combined with a sparse one at this, at most 2⁻⁷."""


def split(p: float) -> Split:
    """The parts of p, 0 to 1/2, exactly."""
    exact = Fraction(p)
    coin = exact > MAX_COINLESS_P
    if coin:
        exact = 1 - 2 * exact
    k = 0
    while True:
        q = Fraction(exact * 2**k // 1, 2**k)
        rest = (exact - q) / (1 - 2 * q)
        if rest <= MAX_SPARSE_P:
            return Split(coin, k, int(q * 2**k), rest)
        k += 1


@lru_cache(maxsize=256)
def ball_cdf(p: Fraction, bits: int) -> np.ndarray | None:
    """``poisson_cdf`` of the number of balls for one field of one block; None where there are none."""
    if p == 0 or bits == 0:
        return None
    with decimal.localcontext() as context:
        context.prec = 100
        rest = 1 - 2 * decimal.Decimal(p.numerator) / decimal.Decimal(p.denominator)
        return poisson_cdf(-decimal.Decimal(BLOCK * bits) / 2 * rest.ln())


def poisson_cdf(lam: decimal.Decimal) -> np.ndarray:
    """int64 table of floor(2^63 · P(K ≤ j)) for K ~ Poisson(lam)."""
    # Decimal's exp and ln are correctly rounded, so every machine makes the same table.
    with decimal.localcontext() as context:
        context.prec = 100
        scale = decimal.Decimal(2**63)
        mass = total = (-lam).exp()
        table = [int(total * scale)]
        while (1 - total) * scale >= 1:
            mass = mass * lam / len(table)
            total += mass
            table.append(int(total * scale))
    return np.minimum(np.array(table, dtype=np.uint64), np.uint64(2**63 - 1)).astype(np.int64)


@lru_cache(maxsize=256)
def flip_plan(element: torch.dtype | Layout, p_exp: float, p_frac: float) -> FlipPlan:
    """The plan of a dtype (bfloat16, float16 or float32), or of elements of 4 or 8 bits, at two valid probabilities."""
    bits, mantissa_bits, *_ = element if isinstance(element, Layout) else LAYOUTS[dtype_name(element)]
    exponent_bits = bits - mantissa_bits
    exp, frac = split(p_exp), split(p_frac if mantissa_bits else 0.0)

    def lane_mask(in_exp: int, in_frac: int) -> int:
        lane = in_exp * (2**exponent_bits - 1) << mantissa_bits | in_frac * (2**mantissa_bits - 1)
        return sum(lane << first for first in range(0, 32, bits))

    def digit(part: Split, i: int) -> int:
        return part.j >> part.k - 1 - i & 1 if i < part.k else 0

    return FlipPlan(
        element_bits=bits,
        exponent=Field(mantissa_bits, exponent_bits, ball_cdf(exp.rest, exponent_bits)),
        mantissa=Field(0, mantissa_bits, ball_cdf(frac.rest, mantissa_bits)),
        digits=tuple(lane_mask(digit(exp, i), digit(frac, i)) for i in range(max(exp.k, frac.k))),
        coins=lane_mask(exp.coin, frac.coin),
    )
