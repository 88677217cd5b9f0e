"""Which number a pattern of bits stands for, and which pattern is nearest to a number.

Every pattern has a number, since flips make them all: NaN for two of e4m3's (S.1111.111) and for E8M0's 255, infinity
and NaN where e5m2 has them. Patterns are uint8, in the low bits.

* e4m3, e5m2: sign, exponent, mantissa (Micikevicius et al. 2022, "FP8 formats for deep learning"); e4m3 has no
  infinity.
* e2m1: sign, two bits of exponent, one of mantissa; E8M0: 2^(pattern − 127). Both are of OCP's "Microscaling formats
  (MX) specification" 1.0.
* nf4: the 16 quantiles of a normal distribution that QLoRA found (Dettmers et al. 2023, appendix E), and the dynamic
  map of 256 numbers for the scales (Dettmers et al. 2022, "8-bit optimizers via block-wise quantization").
"""

from functools import cache

import torch
from torch import Tensor

from flipproof.formats.spec import Format

FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

_TABLES = {"e2m1": E2M1, "nf4": NF4}

LARGEST = {"e4m3": 448.0, "e5m2": 57344.0, "e2m1": 6.0}
"""The largest finite number of a code."""


def numbers(patterns: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """The numbers that codes stand for, each exact.

    Args:
        patterns: uint8, of any shape.
        kind: ``Format.code``; an "int" is the pattern itself, from which a zero point has yet to be taken.
        dtype: of the numbers; ``_TABLES`` has nf4's in float32.
    """
    if kind == "int":
        return patterns.to(dtype)
    if kind in FLOAT8:
        return patterns.view(FLOAT8[kind]).to(dtype)
    make = _table if type(patterns) is Tensor else _table.__wrapped__  # a fake tensor's is fake: not one to keep
    return make(kind, dtype, patterns.device)[patterns.int()]


@cache  # without bound: it is two tables, and a CUDA graph may hold the address of one
def _table(kind: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Taken to a device once: whoever computes with codes there need not wait for the host."""
    return torch.tensor(_TABLES[kind], dtype=dtype, device=device)


def nearest(x: Tensor, format: Format) -> Tensor:
    """The patterns of the nearest numbers that a code has, uint8; ties go to the even pattern, and what is too large to
    the largest.

    Args:
        x: numbers divided by their scale; integers, −2^(bits − 1) to 2^(bits − 1) − 1 once rounded, get their offset
            here. NaN has no nearest number.
    """
    if format.code == "int":
        half = 2 ** (format.bits - 1)
        return (x.clamp(-half, half - 1).round_() + half).to(torch.uint8)
    if format.code in FLOAT8:  # what a cast does with too large numbers depends on torch's version
        largest = LARGEST[format.code]
        return x.clamp(-largest, largest).to(FLOAT8[format.code]).view(torch.uint8)
    if format.code == "nf4":
        return nearest_in(x, torch.tensor(NF4, device=x.device))
    magnitude = torch.bucketize(x.abs(), torch.tensor(_E2M1_EDGES, device=x.device), out_int32=True)
    return magnitude.to(torch.uint8) | ((x < 0).to(torch.uint8) << 3)


def _between(table: Tensor) -> Tensor:
    return (table[:-1] + table[1:]) / 2


def _below(number: float) -> float:
    return float(torch.tensor(number).nextafter(torch.tensor(0.0)))


_E2M1_EDGES = [
    _below(middle) if pattern % 2 else middle
    for pattern, middle in enumerate(_between(torch.tensor(E2M1[:8])).tolist())
]
"""The largest float32 that each magnitude but the last is nearest to: halfway goes to the even pattern."""


def nearest_in(x: Tensor, table: Tensor) -> Tensor:
    """The places of the nearest numbers in an ascending table, uint8; halfway, as float32 has it, goes to the lower."""
    return torch.bucketize(x, _between(table), out_int32=True).to(torch.uint8)


def powers(patterns: Tensor) -> Tensor:
    """The numbers of E8M0 patterns, float32."""
    return patterns.view(torch.float8_e8m0fnu).float()


def dynamic_map() -> Tensor:
    """The 256 numbers for nf4's scales, ascending, (256,) float32.

    For each of 7 powers of ten, from 10⁻⁶ to 1, the middles of 1, 2, 4 … 64 equal parts of [0.1, 1] times it, with both
    signs; and 0 and 1.
    """
    found = [0.0, 1.0]
    for i in range(7):
        middles = _between(torch.linspace(0.1, 1, 2**i + 1)) * 10 ** (i - 6)
        found += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(found))
