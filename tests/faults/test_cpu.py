"""The vectorised definition against a scalar one, and its statistics.

Statistical tests use fixed seeds, so they pass or fail for good. Each states a bound with a family-wise false-alarm
rate below 1e-6 for a fresh seed: every comparison is an exact binomial test at 1e-6 over the number of comparisons.
"""

import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
import torch
from scalar_flips import scalar_masks
from scipy import stats

from flipproof.faults import cpu, guard
from flipproof.faults.draw import Draw, rates_of
from flipproof.faults.fault import Fault
from flipproof.faults.philox import derive_key
from flipproof.faults.poisson import BLOCK, ball_cdf, flip_plan

FALSE_ALARM = 1e-6
LAYOUT = {torch.bfloat16: (16, 7), torch.float16: (16, 10), torch.float32: (32, 23)}
LOW_BITS = {"integer4": (4, 0), "e2m1": (4, 1), "nf4": (4, 0), "e4m3": (8, 3), "e8m0": (8, 0), "integer8": (8, 0)}
KEY = derive_key(0, "test/x")


def masks(dtype, p_exp, p_frac, n, key=KEY, tick=0, offset=0):
    """Which bits flip: unsigned integers of shape (n,). ``dtype`` may be the name of elements of few bits."""
    zeros = torch.zeros(n, dtype=torch.uint8 if dtype in LOW_BITS else dtype)
    rates = rates_of(Fault(p_exp, p_frac), dtype)
    cpu.flip_(zeros, None, Draw(rates, None, torch.tensor(key), torch.tensor(tick), offset))
    if dtype in LOW_BITS:
        return zeros.numpy()
    return zeros.view(torch.int32 if dtype == torch.float32 else torch.int16).numpy().view(f"uint{LAYOUT[dtype][0]}")


# -- against an independent, scalar implementation of the definition ------------------------------------------------


@pytest.mark.parametrize("dtype", [*LAYOUT, "integer4", "e2m1", "e4m3", "e8m0"])
@pytest.mark.parametrize(
    ("p_exp", "p_frac"), [(2**-9, 2**-8), (0.0, 2**-7), (0.3, 2**-9), (0.5, 0.0), (0.499, 0.3), (2**-8, 0.42)]
)
def test_equal_to_a_scalar_implementation(dtype, p_exp, p_frac):
    n, offset, tick = 3000, 3 * BLOCK - 1000, 2**40 + 5
    expected = scalar_masks((LAYOUT | LOW_BITS)[dtype], p_exp, p_frac, n, KEY, tick, offset)
    np.testing.assert_array_equal(masks(dtype, p_exp, p_frac, n, tick=tick, offset=offset), expected)
    assert expected.any() or (p_exp == 0 and dtype in ("integer4", "e8m0"))  # which have no mantissa


def test_high_block_numbers_reach_the_counter():
    n, offset = 100, (2**40 + 3) * BLOCK + 50
    expected = scalar_masks(LAYOUT[torch.bfloat16], 2**-7, 2**-7, n, KEY, 0, offset)
    np.testing.assert_array_equal(masks(torch.bfloat16, 2**-7, 2**-7, n, offset=offset), expected)
    assert expected.any()


# -- rates --------------------------------------------------------------------------------------------------------


def bit_counts(flips, bits):
    return np.array([int(((flips >> b) & 1).sum()) for b in range(bits)])


def assert_rates(counts, trials, p):
    """Each count is Binomial(trials, p)."""
    p_values = [stats.binomtest(int(count), trials, p).pvalue for count in counts]
    assert min(p_values) > FALSE_ALARM / len(counts), (counts, trials * p, p_values)


# p -> (elements, ticks): expected flips per bit 5e5, 5e5, 3e5, 1.3e5, 3.3e4, 1.0e3 and 107
RATES = {
    0.5: (2**20, 1),
    0.49: (2**20, 1),
    0.3: (2**20, 1),
    2**-4: (2**21, 1),
    2**-10: (2**25, 1),
    2**-16: (2**26, 1),
    1e-7: (2**26, 16),
}


@pytest.mark.parametrize("dtype", LAYOUT)
@pytest.mark.parametrize("p", RATES)
def test_every_bit_flips_at_the_stated_rate(dtype, p):
    n, ticks = RATES[p]
    bits = LAYOUT[dtype][0]
    if bits == 32 and n == 2**26:
        n, ticks = n // 2, ticks * 2
    counts = np.zeros(bits, dtype=np.int64)
    for tick in range(ticks):
        flips = masks(dtype, p, p, n, tick=tick)
        counts += bit_counts(flips[flips != 0] if p < 0.01 else flips, bits)
    assert_rates(counts, n * ticks, p)


@pytest.mark.parametrize("element", LOW_BITS)
@pytest.mark.parametrize("p", [2**-8, 0.05, 0.3, 0.45, 0.5])
def test_real_bits_flip_at_the_stated_rate_and_padding_never(element, p):
    bits, mantissa = LOW_BITS[element]
    n = 2**18
    found = masks(element, p, p / 2, n)
    for bit in range(8):
        own = 0 if bit >= bits else p / 2 if bit < mantissa else p
        low, high = stats.binom.ppf([FALSE_ALARM / 80, 1 - FALSE_ALARM / 80], n, own)
        assert low <= int((found >> bit & 1).sum()) <= high


def test_the_rate_test_would_see_a_wrong_rate():
    counts = bit_counts(masks(torch.bfloat16, 2**-10, 2**-10, 2**25), 16)
    for factor in (0.95, 1.05, 2):
        with pytest.raises(AssertionError):
            assert_rates(counts, 2**25, 2**-10 * factor)


def test_each_field_has_its_own_rate():
    counts = bit_counts(masks(torch.bfloat16, 2**-6, 2**-9, 2**23), 16)
    assert_rates(counts[7:], 2**23, 2**-6)
    assert_rates(counts[:7], 2**23, 2**-9)


def test_no_flips_at_zero():
    for dtype in LAYOUT:
        assert not masks(dtype, 0.0, 0.0, 100_000).any()
    one_field = masks(torch.bfloat16, 0.5, 0.0, 100_000)
    assert not (one_field & 0x7F).any()
    assert one_field.any()


@pytest.mark.parametrize("p", [2**-9, 2**-7, 0.3])
def test_flips_per_block_are_binomial(p):
    """Poisson parity, unlike "throw a fixed number", has the variance of independent bits. Chi-square at 1e-6."""
    blocks = 2048
    flips = masks(torch.bfloat16, p, p, blocks * BLOCK).reshape(blocks, BLOCK)
    per_block = np.bitwise_count(flips).sum(axis=1, dtype=np.int64)
    edges = stats.binom.ppf(np.linspace(0, 1, 21)[1:-1], BLOCK * 16, p)
    cells = np.diff([0.0, *stats.binom.cdf(edges, BLOCK * 16, p), 1.0])
    observed = np.bincount(np.searchsorted(edges, per_block, side="left"), minlength=20)
    assert stats.chisquare(observed, cells * blocks).pvalue > FALSE_ALARM


# -- independence -------------------------------------------------------------------------------------------------


def assert_independent(pairs, p):
    """For pairs of mask arrays of independent bits at rate p: joint flips are Binomial(bits, p squared)."""
    for name, (one, other) in pairs.items():
        joint = int(np.bitwise_count(one & other).sum())
        trials = one.size * one.dtype.itemsize * 8
        p_value = stats.binomtest(joint, trials, p * p).pvalue
        assert p_value > FALSE_ALARM / len(pairs), (name, joint, trials * p * p)


@pytest.mark.parametrize("p", [2**-7, 2**-4])
def test_draws_of_other_keys_and_places_are_independent(p):
    n = 2**22

    def draw(seed=0, site="a.q_proj/x", tick=0, offset=0):
        return masks(torch.bfloat16, p, p, n, key=derive_key(seed, site), tick=tick, offset=offset)

    base = draw()
    pairs = {f"tick {tick}": (base, draw(tick=tick)) for tick in (1, 2, 2**32)}
    pairs |= {f"seed {seed}": (base, draw(seed=seed)) for seed in (1, 2, 2**32, 2**62)}
    pairs |= {f"site {site}": (base, draw(site=site)) for site in ("a.q_proj/w", "a.k_proj/x", "b.q_proj/x", "")}
    pairs |= {f"offset {offset}": (base, draw(offset=offset)) for offset in (n, 2 * n, 2**45)}
    pairs["tick 1 and seed 1"] = (draw(tick=1), draw(seed=1))
    assert_independent(pairs, p)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("p", [2**-7, 2**-4])
def test_neighbours_are_independent(dtype, p):
    flips = masks(dtype, p, p, 2**22)
    bits = LAYOUT[dtype][0]
    pairs = {f"element +{d}": (flips[:-d], flips[d:]) for d in (1, 2, 512, 1024, 2048, 4096, BLOCK)}
    assert_independent(pairs, p)
    for d in (1, 2, 7, 8):  # bits d apart within an element
        joint = int(np.bitwise_count(flips & (flips >> np.array(d, dtype=flips.dtype))).sum())
        assert stats.binomtest(joint, flips.size * (bits - d), p * p).pvalue > FALSE_ALARM / 4


def test_the_independence_test_would_see_shared_draws():
    flips = masks(torch.bfloat16, 2**-7, 2**-7, 2**20)
    other = masks(torch.bfloat16, 2**-7, 2**-7, 2**20, tick=1)
    other[: 2**15] = flips[: 2**15]  # 3% of the elements share a mask
    with pytest.raises(AssertionError):
        assert_independent({"shared": (flips, other)}, 2**-7)


# -- slices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LAYOUT)
@pytest.mark.parametrize("p", [2**-8, 0.3])
@pytest.mark.parametrize(("start", "length"), [(0, 1), (1, 1), (8191, 2), (5000, 20000), (8192, 8192), (16385, 7)])
def test_the_draw_of_a_slice_is_the_slice_of_the_draw(dtype, p, start, length):
    whole = masks(dtype, p, p / 2, 40_000, offset=12_345)
    part = masks(dtype, p, p / 2, length, offset=12_345 + start)
    np.testing.assert_array_equal(part, whole[start : start + length])


def test_chunks_do_not_show(monkeypatch):
    plain = masks(torch.bfloat16, 0.1, 2**-8, 300_000, offset=77)
    monkeypatch.setattr(cpu, "_recent_draws", cpu._RecentDraws(entries=0, capacity=0))
    monkeypatch.setattr(cpu, "_CHUNK_BALLS", 2000)
    monkeypatch.setattr(cpu, "_CHUNK_DENSE_BLOCKS", 5)
    np.testing.assert_array_equal(masks(torch.bfloat16, 0.1, 2**-8, 300_000, offset=77), plain)


def test_recent_draws_take_no_more_memory_than_they_may():
    """Not even those without a flip, of which a run with a low rate has one for each layer and pass."""
    plan = flip_plan(torch.float32, 1e-9, 0.0)
    tracemalloc.start()
    draws = cpu._RecentDraws(entries=1000, capacity=2**20)
    for tick in range(3_000):
        name = (plan, 2**60 + tick, tick, 0, 1000, 0)
        draws.put(name, cpu.sparse_flips(plan, np.arange(1), 2**60 + tick, tick, 0, 1000))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(draws.draws) == 1000
    assert held < 2**20


def test_a_rate_too_small_to_see_is_still_not_rounded_away():
    """p = 2^-60 has no lower neighbour that it snaps to: its first table entry differs from that of p = 2^-61."""
    assert ball_cdf(Fraction(2**-60), 9)[0] < ball_cdf(Fraction(2**-61), 9)[0]


def test_guard_zeroes_in_place_across_chunks(monkeypatch):
    monkeypatch.setattr(guard, "_CHUNK", 7)
    x = torch.linspace(-3, 3, 50)
    x[::11] = torch.tensor([float("nan"), float("inf"), -float("inf"), float("nan"), 9.0])
    expected = torch.where(x.abs() < 2, x, torch.zeros(()))
    guard.guard_(x, guard.limits_of(torch.tensor(2.0), x.dtype))
    assert torch.equal(x, expected)


def test_plans_are_made_once():
    assert flip_plan(torch.bfloat16, 0.25, 0.1) is flip_plan(torch.bfloat16, 0.25, 0.1)
