from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats

from flipproof.faults.dtypes import DTYPES
from flipproof.faults.guard import guard_bits, magnitude_bits
from flipproof.faults.poisson import BLOCK, MAX_SPARSE_P, ball_cdf, flip_plan, split

PROBABILITIES = [0.5, 0.4999, 0.3, 0.1, 2**-4, 0.01, 2**-7, 2**-10, 1e-7, 2**-30, 0.5 - 2**-50]


@pytest.mark.parametrize("p", PROBABILITIES)
def test_the_two_parts_of_a_probability_combine_to_it_exactly(p):
    coin, k, j, rest = split(p)
    q = Fraction(j, 2**k)
    odd = q + rest - 2 * q * rest
    assert ((1 - odd) / 2 if coin else odd) == Fraction(p)
    assert 0 <= rest <= MAX_SPARSE_P
    assert k == 0 or p > MAX_SPARSE_P
    assert k + coin <= 9


@pytest.mark.parametrize("p", [Fraction(1, 128), Fraction(2**-10), Fraction(1e-7)])
@pytest.mark.parametrize("bits", [6, 9, 23])
def test_the_count_table_is_the_poisson_distribution_function(p, bits):
    table = ball_cdf(p, bits)
    lam = -BLOCK * bits / 2 * np.log1p(-2 * float(p))
    expected = stats.poisson.cdf(np.arange(len(table)), lam)
    np.testing.assert_allclose(table.astype(np.float64) / 2**63, expected, rtol=1e-11, atol=1e-15)
    assert (np.diff(table) >= 0).all()
    assert table[-1] == 2**63 - 1


def test_no_table_for_no_flips():
    assert ball_cdf(Fraction(0), 9) is None
    assert not flip_plan(torch.bfloat16, 0.0, 0.0).sparse


def test_a_field_is_drawn_the_same_whatever_the_other_field_does():
    alone, together = flip_plan(torch.bfloat16, 0.3, 0.0), flip_plan(torch.bfloat16, 0.3, 0.2)
    exponent_lanes = 0xFF80FF80
    k = len(alone.digits)
    assert [d & exponent_lanes for d in together.digits[:k]] == [d & exponent_lanes for d in alone.digits]
    assert not any(d & exponent_lanes for d in together.digits[k:])
    np.testing.assert_array_equal(alone.exponent.cdf, together.exponent.cdf)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("t", [0.0, 1e-7, 0.1, 1.25, 30.0, 8192.0, 1e39, float("inf")])
def test_the_guard_is_exact_on_every_16_bit_value(dtype, t):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    expected = values.double().abs() < t  # float64 holds them exactly; NaN compares false
    assert torch.equal(magnitude_bits(values) < guard_bits(dtype, t), expected)


def test_the_guard_is_exact_around_a_float32_threshold():
    t = 0.1  # between two float32 values
    below = torch.tensor(t, dtype=torch.float32)
    values = torch.stack([below, torch.nextafter(below, torch.tensor(0.0)), torch.nextafter(below, torch.tensor(1.0))])
    assert torch.equal(magnitude_bits(values) < guard_bits(torch.float32, t), values.double() < t)
    assert guard_bits(torch.float32, t) == min(int(v.view(torch.int32)) for v in values if v.double() >= t)


def test_only_three_dtypes_are_known():
    assert set(DTYPES) == {torch.bfloat16, torch.float16, torch.float32}
