"""Every pattern of bits against what its standard says, in exact arithmetic; every rounding against the distances."""

import itertools
import math
from fractions import Fraction

import bitsandbytes.functional as bnb
import pytest
import torch
from quantised import FLOATS, same

from flipproof.formats.codes import NF4, dynamic_map, nearest, nearest_in, numbers, powers
from flipproof.formats.spec import FORMATS

BY_CODE = {"e4m3": FORMATS["fp8"], "e5m2": FORMATS["fp8-e5m2"], "e2m1": FORMATS["nvfp4"]}
LAYOUT = {"e4m3": (4, 3, 7), "e5m2": (5, 2, 15), "e2m1": (2, 1, 1)}
"""Bits of exponent and mantissa, and the bias."""


def meant(pattern, kind):
    """What a pattern stands for, by the standards' formulas: a Fraction, infinity or NaN."""
    exponent_bits, mantissa_bits, bias = LAYOUT[kind]
    mantissa = pattern % 2**mantissa_bits
    exponent = pattern >> mantissa_bits & 2**exponent_bits - 1
    sign = -1 if pattern >> exponent_bits + mantissa_bits else 1
    top = 2**exponent_bits - 1
    if kind == "e4m3" and (exponent, mantissa) == (top, 7):
        return math.nan
    if kind == "e5m2" and exponent == top:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * Fraction(mantissa, 2**mantissa_bits) * Fraction(2) ** (1 - bias)
    return sign * (1 + Fraction(mantissa, 2**mantissa_bits)) * Fraction(2) ** (exponent - bias)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", LAYOUT)
def test_each_pattern_is_the_number_of_its_standard(kind, dtype):
    patterns = range(2 ** BY_CODE[kind].bits)
    found = numbers(torch.tensor(patterns, dtype=torch.uint8), kind, dtype)
    assert found.dtype == dtype
    for pattern, number in zip(patterns, found.tolist(), strict=True):
        expected = meant(pattern, kind)
        if math.isnan(expected):
            assert math.isnan(number)
        else:
            assert number == expected
            assert math.copysign(1, number) == (-1 if pattern >= len(patterns) / 2 else 1)


def test_e8m0_is_a_power_of_two_and_its_last_pattern_nan():
    *found, last = powers(torch.arange(256, dtype=torch.uint8)).tolist()
    assert [Fraction(number) for number in found] == [Fraction(2) ** (pattern - 127) for pattern in range(255)]
    assert math.isnan(last)


@pytest.mark.parametrize("kind", LAYOUT)
def test_the_nearest_of_each_bfloat16_number_below_a_million(kind):
    """Distances in float64 are exact where it matters; where two are equal the even pattern is the nearer."""
    half = 2 ** (BY_CODE[kind].bits - 1)
    table = {p: float(meant(p, kind)) for p in range(half) if math.isfinite(meant(p, kind))}
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[(every.abs() < 1e6) & (every != 0)]
    distance = (every.double().abs()[:, None] - torch.tensor(list(table.values()), dtype=torch.float64)).abs()
    near = distance == distance.amin(1, keepdim=True)
    odd = torch.arange(len(table)) % 2
    expected = (near * (2 - odd)).argmax(1) + half * (every < 0)
    assert (near.sum(1) == 2).sum() >= 2 * (len(table) - 1)  # each tie, with both signs
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(nearest(every.to(dtype), BY_CODE[kind]).long(), expected)


@pytest.mark.parametrize("kind", LAYOUT)
def test_beside_a_tie_float32_is_not_halfway(kind):
    code = BY_CODE[kind]
    finite = [meant(p, kind) for p in range(2 ** (code.bits - 1)) if math.isfinite(meant(p, kind))]
    middles = torch.tensor([float((a + b) / 2) for a, b in itertools.pairwise(finite)])
    lower = torch.arange(len(middles))
    above = middles.nextafter(torch.tensor(math.inf))
    below = middles.nextafter(torch.tensor(0.0))
    assert torch.equal(nearest(above, code).long(), lower + 1)
    assert torch.equal(nearest(below, code).long(), lower)
    assert torch.equal(nearest(-above, code).long(), lower + 1 + 2 ** (code.bits - 1))


@pytest.mark.parametrize("kind", LAYOUT)
def test_what_is_too_large_becomes_the_largest(kind):
    code = BY_CODE[kind]
    largest = max(p for p in range(2 ** (code.bits - 1)) if math.isfinite(meant(p, kind)))
    found = nearest(torch.tensor([1e30, math.inf, -1e30, -math.inf]), code)
    assert found.tolist() == [largest, largest, largest + 2 ** (code.bits - 1), largest + 2 ** (code.bits - 1)]


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_integers_are_offset_and_ties_go_to_the_even(name):
    half = 2 ** (FORMATS[name].bits - 1)
    x = torch.tensor([-1e9, -half, -half + 0.5, -1.5, -0.5, 0, 0.5, 1.5, 2.5, half - 1, half, 1e9])
    expected = [0, 0, 0, half - 2, half, half, half, half + 2, half + 2, 2 * half - 1, 2 * half - 1, 2 * half - 1]
    for dtype in FLOATS:
        assert nearest(x.clamp(-6e4, 6e4).to(dtype), FORMATS[name]).tolist() == expected


def test_the_tables_of_nf4_are_those_of_bitsandbytes():
    assert same(torch.tensor(NF4), bnb.get_4bit_type("nf4", "cpu"))
    assert same(dynamic_map(), bnb.create_dynamic_map())


def test_the_nearest_in_the_dynamic_map():
    table = dynamic_map()
    x = torch.cat([torch.linspace(-1, 1, 20001), torch.logspace(-8, 0, 2001), -torch.logspace(-8, 0, 2001), table])
    found = table[nearest_in(x, table).long()].double()
    least = (x.double()[:, None] - table.double()).abs().amin(1)
    # halfway as float32 has it: off by half a unit in its last place, in both distances
    assert ((x.double() - found).abs() - least <= x.double().abs() * 2**-23).all()
    assert torch.equal(nearest_in(table, table).long(), torch.arange(256))
