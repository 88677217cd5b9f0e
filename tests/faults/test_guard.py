"""Thresholds by channel: what is zeroed against |v| < t of each value by itself, in exact arithmetic."""

import math

import pytest
import torch

import flipproof
from flipproof import Pattern
from flipproof.faults import cpu
from flipproof.faults.draw import rates_of
from flipproof.faults.dtypes import DTYPES
from flipproof.faults.fault import Fault
from flipproof.faults.guard import channels_of, guard_of, limits_of, magnitude_bits
from flipproof.faults.philox import derive_key

GPU = torch.cuda.is_available()
WHERE = {"seed": 3, "site": "a/x", "tick": 9}
SHAPES = [(3, 7, 200), (6, 40, 1), (130, 65), (2, 8300), (2800, 3), (40, 64)]


def sample(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(x, y):
    kind = torch.int32 if x.dtype == torch.float32 else torch.int16
    return torch.equal(x.cpu().view(kind), y.cpu().view(kind))


def thresholds(shape, by, lowest):
    """Some that catch clean values, some that catch flipped ones alone, zero and infinity; from ``lowest`` up."""
    own = shape[-1:] if by == "feature" else (shape[0], *(1 for _ in shape[1:]))
    t = lowest * 2 ** (4 * torch.rand(own, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    flat = t.view(-1)
    flat[0], flat[-1] = (math.inf, 0.0) if lowest < 1 else (math.inf, lowest)
    return t


def assert_marked(x, rates, limits, expected, kept, offset=0):
    """Flipping ``x`` from a forward that keeps it, and zeroing a gradient where it marked."""
    where = (torch.tensor(rates, dtype=torch.float64), limits, torch.tensor(derive_key(3, "a/x")), torch.tensor(9))
    y, zeroed = torch.ops.flipproof.flip_marked(x, *where, offset)
    assert same_bits(y, expected)
    grad = torch.arange(1.0, x.numel() + 1).to(x.dtype).view(x.shape)
    strided = torch.stack([grad, grad], -1).to(x.device)[..., 0]  # as a product may give it
    torch.ops.flipproof.zero_marked_(zeroed, strided)
    assert same_bits(strided.contiguous(), grad.masked_fill(~kept, 0))


@pytest.mark.parametrize("by", ["feature", "row"])
@pytest.mark.parametrize(("shape", "dtype", "p", "lowest"), [
    (shape, dtype, p, lowest)
    for i, shape in enumerate(SHAPES) for j, dtype in enumerate(DTYPES)
    for k, p in enumerate([2**-9, 0.1, 0.0]) for n, lowest in enumerate([0.5, 8.0])
    if (i + j + k + n) % (1 if GPU else 7) == 0
])  # fmt: skip
def test_each_channel_has_its_threshold(backend, shape, dtype, p, lowest, by):
    x, t = sample(shape, dtype), thresholds(shape, by, lowest)
    flipped = flipproof.flip(x, p_exp=p, p_frac=p, **WHERE)
    kept = flipped.double().abs() < t
    expected = flipped.masked_fill(~kept, 0)
    arguments = {"p_exp": p, "p_frac": p, "zero_out_t": t.to(backend), **WHERE}
    leaf = x.clone().to(backend).requires_grad_()
    y = flipproof.flip(leaf, **arguments)
    assert same_bits(y.detach(), expected)
    assert same_bits(flipproof.flip_(x.clone().to(backend), **arguments), expected)
    weights = sample(shape, dtype, seed=2)
    y.backward(weights.to(backend))
    assert same_bits(leaf.grad, weights.masked_fill(~kept, 0))
    assert_marked(x.to(backend), (p, p), limits_of(guard_of(t), dtype).to(backend), expected, kept)
    assert kept.any()
    assert not kept.all() or (p, lowest) == (0.0, 8.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_shard_takes_its_rows_and_their_thresholds(backend, dtype):
    x, t = sample((50, 401), dtype), thresholds((50, 401), "row", 1.5)
    arguments = {"p_exp": 2**-8, "p_frac": 2**-8, **WHERE}
    whole = flipproof.flip(x, zero_out_t=t, **arguments)
    for first, last in ((0, 13), (13, 14), (14, 50)):
        part = flipproof.flip(
            x[first:last].to(backend), zero_out_t=t[first:last].to(backend), offset=first * 401, **arguments
        )
        assert same_bits(part, whole[first:last])
        limits = limits_of(guard_of(t[first:last]), dtype).to(backend)
        flipped = flipproof.flip(x[first:last], offset=first * 401, **arguments)
        kept = flipped.double().abs() < t[first:last]
        assert_marked(x[first:last].to(backend), (2**-8, 2**-8), limits, whole[first:last], kept, first * 401)
    features = thresholds((50, 401), "feature", 1.5)
    whole = flipproof.flip(x, zero_out_t=features, **arguments)
    part = flipproof.flip(x[7:9].to(backend), zero_out_t=features.to(backend), offset=7 * 401, **arguments)
    assert same_bits(part, whole[7:9])


@pytest.mark.parametrize("pattern", [Pattern(persistent=True), Pattern(protection="secded")])
def test_other_faults_meet_the_same_guard(pattern):
    x, t = sample((60, 100), torch.bfloat16), thresholds((60, 100), "feature", 1.0)
    arguments = {"p_exp": 0.01, "p_frac": 0.01, "pattern": pattern, **WHERE}
    flipped = flipproof.flip(x, **arguments)
    kept = flipped.double().abs() < t
    assert same_bits(flipproof.flip(x, zero_out_t=t, **arguments), flipped.masked_fill(~kept, 0))
    leaf = x.clone().requires_grad_()
    weights = sample(x.shape, x.dtype, seed=2)
    flipproof.flip(leaf, zero_out_t=t, **arguments).backward(weights)
    rates = rates_of(Fault(0.01, 0.01, None, pattern), x.dtype).tolist()
    assert_marked(x, rates, limits_of(guard_of(t), x.dtype), flipped.masked_fill(~kept, 0), leaf.grad != 0)
    assert 0 < int(kept.sum()) < x.numel()


@pytest.mark.parametrize("t", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_threshold_for_all_marks_what_it_zeroes(backend, dtype, t):
    x = sample((201, 130), dtype)
    flipped = flipproof.flip(x, p_exp=2**-13, p_frac=2**-12, **WHERE)
    kept = flipped.double().abs() < t
    limits = limits_of(guard_of(t), dtype)
    assert_marked(x.to(backend), (2**-13, 2**-12), limits, flipped.masked_fill(~kept, 0), kept)
    assert 0 < int((~kept).sum()) < x.numel()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_limit_is_the_first_pattern_not_below_its_threshold(dtype):
    generator = torch.Generator().manual_seed(4)
    t = 2.0 ** (60 * torch.rand(500, generator=generator, dtype=torch.float64) - 30)
    values = t.to(dtype)
    t = torch.cat([t, values.double(), torch.tensor([0.0, 1e-300, 5e-324, 6.0e-8, 65504.0, 65519.0, 1e300, math.inf])])
    found = limits_of(guard_of(t), dtype)
    infinity = int(magnitude_bits(torch.tensor([math.inf], dtype=dtype)))
    for threshold, limit in zip(t.tolist(), found.tolist(), strict=True):
        here, below = (
            torch.tensor([bits], dtype=found.dtype).view(dtype).item() for bits in (limit, max(limit - 1, 0))
        )
        assert here >= threshold
        assert limit == 0 or below < threshold
        assert limit <= infinity


def test_shapes_that_fit_no_channel_are_refused():
    x = sample((4, 6), torch.float32)
    for shape in ((4,), (6, 1), (2, 6), (4, 6, 1), (5,)):
        with pytest.raises(ValueError, match=r"zero_out_t of shape .* for a tensor of shape \(4, 6\)"):
            flipproof.flip(x, zero_out_t=torch.ones(shape), **WHERE)
    for wrong in (torch.tensor([1.0, -1.0] * 3), torch.tensor([math.nan] * 6), torch.ones(6, dtype=torch.int64)):
        with pytest.raises(ValueError, match="zero_out_t: thresholds are floating-point numbers of at least 0"):
            flipproof.flip(x, zero_out_t=wrong, **WHERE)
    assert channels_of(torch.ones(6), x.shape) == (6, 1)
    assert channels_of(torch.ones(4, 1), x.shape) == (4, 6)
    assert channels_of(torch.ones(4, 6), x.shape) == (24, 1)
    assert channels_of(torch.ones(()), x.shape)[0] == 1


@pytest.mark.parametrize(("p", "t"), [(2**-13, 4.0), (2**-8, 4.0), (2**-13, 1.0), (0.3, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize(("rows", "columns", "r"), [(130, 201, 3), (2, 9000, 17), (70, 66, 200)])
def test_the_merged_weight_by_row(backend, rows, columns, r, p, t):
    generator = torch.Generator().manual_seed(1)
    weight = sample((rows, columns), torch.bfloat16).to(backend)
    a = (torch.randn(r, columns, generator=generator) * 0.1).to(backend)
    b = (torch.randn(rows, r, generator=generator) * 0.1).to(backend)
    guard = guard_of(t * (1 + torch.rand(rows, 1, generator=generator, dtype=torch.float64))).to(backend)
    limits = limits_of(guard, torch.bfloat16)
    where = (torch.tensor(5), torch.tensor(7), 3)
    ops, rates = torch.ops.flipproof, torch.tensor([p, p], dtype=torch.float64)
    unguarded = ops.merge(weight, a, b, 0.7, rates, None, *where)
    out = ~(unguarded.abs().double() < guard.double())
    assert same_bits(ops.merge(weight, a, b, 0.7, rates, limits, *where), unguarded.masked_fill(out, 0))
    y, zeroed = ops.merge_grad(weight, a, b, 0.7, weight, True, rates, limits, *where)
    assert same_bits(y, unguarded.masked_fill(out, 0))
    grad_y, x = sample((30, rows), torch.float32, 5).to(backend), sample((30, columns), torch.float32, 6).to(backend)
    more_a, more_b = ops.zeroed_correction(zeroed, rates, grad_y, x, a, b, 0.7)
    wide = -0.7 * (grad_y.double().T @ x.double()) * out
    if int(out.sum()) < 4096:  # else a list is full, and the gradient passes
        torch.testing.assert_close(more_a, b.double().T @ wide, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(more_b, wide @ a.double().T, rtol=1e-4, atol=1e-4)
    assert out.any() or p == 2**-13


def test_cpu_looks_only_at_what_was_flipped_where_it_may(monkeypatch):
    """The fast way and the way by all elements agree, by channel too."""
    x, t = sample((60, 100), torch.float32), guard_of(torch.full((60, 1), 9.0))
    arguments = {"p_exp": 2**-9, "p_frac": 2**-9, "zero_out_t": t, **WHERE}
    fast = flipproof.flip(x, **arguments)
    monkeypatch.setattr(cpu, "_all_below", lambda *_: False)
    assert same_bits(flipproof.flip(x, **arguments), fast)
    assert not same_bits(fast, flipproof.flip(x, p_exp=2**-9, p_frac=2**-9, **WHERE))
