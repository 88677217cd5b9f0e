import numpy as np
import pytest
import torch

import flipproof
from flipproof.faults import cpu
from flipproof.faults.draw import Draw, rates_of
from flipproof.faults.fault import Fault
from flipproof.faults.guard import limits_of
from flipproof.faults.philox import derive_key

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
WHERE = {"seed": 3, "site": "a/x", "tick": 9}


def sample(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bits_of(x):
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 5000), (7, 11, 13)])
def test_flip_is_the_reference_then_the_guard(dtype, shape):
    x = sample(shape, dtype)
    y = flipproof.flip(x, p_exp=0.02, p_frac=0.01, zero_out_t=1.5, **WHERE)
    expected, rates = x.clone(), torch.tensor([0.02, 0.01], dtype=torch.float64)
    cpu.flip_(expected, None, Draw(rates, None, torch.tensor(derive_key(3, "a/x")), torch.tensor(9), 0))
    expected = torch.where(expected.double().abs() < 1.5, expected, torch.zeros((), dtype=dtype))
    assert torch.equal(bits_of(y), bits_of(expected))
    assert y.dtype == dtype
    assert y.shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_is_the_same_flip(dtype):
    x = sample((100, 333), dtype)
    y = flipproof.flip(x, p_exp=0.01, p_frac=0.3, zero_out_t=2.0, **WHERE)
    same = x.clone()
    assert flipproof.flip_(same, p_exp=0.01, p_frac=0.3, zero_out_t=2.0, **WHERE) is same
    assert torch.equal(bits_of(y), bits_of(same))
    assert not torch.equal(bits_of(y), bits_of(x))


def test_strides_do_not_show():
    x = sample((64, 130), torch.float32)
    expected = flipproof.flip(x, p_exp=0.01, p_frac=0.01, **WHERE)
    transposed = x.T.contiguous().T
    assert not transposed.is_contiguous()
    assert torch.equal(bits_of(flipproof.flip(transposed, p_exp=0.01, p_frac=0.01, **WHERE)), bits_of(expected))
    flipproof.flip_(transposed, p_exp=0.01, p_frac=0.01, **WHERE)
    assert torch.equal(bits_of(transposed.contiguous()), bits_of(expected))
    padded = torch.zeros(64, 200)
    padded[:, 3:133] = x
    flipproof.flip_(padded[:, 3:133], p_exp=0.01, p_frac=0.01, **WHERE)
    assert torch.equal(bits_of(padded[:, 3:133].contiguous()), bits_of(expected))
    assert not padded[:, :3].any()


def test_rows_of_ranks_make_up_the_whole():
    x = sample((8, 3001), torch.bfloat16)
    whole = flipproof.flip(x, p_exp=0.01, p_frac=0.2, **WHERE)
    parts = [
        flipproof.flip(rows, p_exp=0.01, p_frac=0.2, offset=i * rows.numel(), **WHERE)
        for i, rows in enumerate(x.split(2))
    ]
    assert torch.equal(bits_of(torch.cat(parts)), bits_of(whole))


@pytest.mark.parametrize("p", [2**-9, 0.1])
@pytest.mark.parametrize("t", [100.0, 1.0])  # the guard sees flipped values alone out of range, and clean ones too
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_guard_zeroes_exactly_what_is_out_of_range_after_the_flip(dtype, t, p):
    x = sample((30_000,), dtype)
    x[5] = t  # not below the threshold itself
    key, tick = torch.tensor(derive_key(3, "a/x")), torch.tensor(9)
    unguarded = flipproof.flip(x, p_exp=p, p_frac=p, **WHERE)
    out = ~(unguarded.double().abs() < t)
    for grad in (torch.ones(len(x), dtype=torch.bool), torch.arange(1.0, len(x) + 1).to(torch.bfloat16)):
        expected_grad = grad.masked_fill(out, 0)
        rates = torch.tensor([p, p], dtype=torch.float64)
        y = torch.ops.flipproof.flip_grad_(x, grad, x, rates, limits_of(torch.tensor(t), dtype), key, tick, 0)
        assert torch.equal(grad, expected_grad)
    assert torch.equal(bits_of(y), bits_of(unguarded.masked_fill(out, 0)))
    assert torch.equal(bits_of(y), bits_of(flipproof.flip(x, p_exp=p, p_frac=p, zero_out_t=t, **WHERE)))
    assert 0 < int(out.sum()) < len(x)


def test_clean_values_that_are_not_numbers_do_not_pass_the_guard():
    x = torch.tensor([1.0, float("nan"), 2.0, float("inf"), -float("inf")])
    y = flipproof.flip(x, p_exp=1e-9, zero_out_t=5.0, **WHERE)
    assert y.tolist() == [1.0, 0.0, 2.0, 0.0, 0.0]


def test_off_is_a_copy():
    x = sample((1000,), torch.float32)
    x[0] = float("nan")
    for off in ({}, {"p_exp": 0.0, "p_frac": None}):
        y = flipproof.flip(x, **off, **WHERE)
        assert torch.equal(bits_of(y), bits_of(x))
        assert y.data_ptr() != x.data_ptr()


def test_no_global_generator_is_touched():
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    flipproof.flip(sample((100_000,), torch.float32), p_exp=0.3, p_frac=0.01, **WHERE)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


@pytest.mark.parametrize("p", [0.02, 0.3])
def test_gradient_is_one_where_kept_and_zero_where_the_guard_zeroed(p):
    x = sample((40, 500), torch.float32).requires_grad_()
    arguments = {"p_exp": p, "p_frac": p, "zero_out_t": 1.0, **WHERE}
    y = flipproof.flip(x, **arguments)
    weights = sample(y.shape, torch.float32, seed=1)
    (y * weights).sum().backward()
    unguarded = flipproof.flip(x.detach(), **(arguments | {"zero_out_t": None}))
    kept = unguarded.abs() < 1.0
    assert torch.equal(x.grad, torch.where(kept, weights, 0.0))
    assert 0 < int((~kept).sum()) < x.numel()


def test_gradient_without_guard_passes_straight_through():
    x = sample((100,), torch.float32).requires_grad_()
    flipproof.flip(x, p_exp=0.1, p_frac=0.1, **WHERE).backward(torch.arange(100.0))
    assert torch.equal(x.grad, torch.arange(100.0))


def test_the_operators_pass_torchs_own_checks():
    ops, check = torch.ops.flipproof, torch.library.opcheck
    where = (torch.tensor(5), torch.tensor(2), 7)
    x, grad = sample((30, 40), torch.bfloat16), torch.ones(30, 40)
    a, b = sample((4, 40), torch.float32), sample((30, 4), torch.float32)
    rates, mantissa = torch.tensor([0.01, 0.3]).double(), torch.tensor([0.0, 0.01]).double()
    one, rows, features = (
        limits_of(sample(shape, torch.float32).abs(), torch.bfloat16) for shape in ((), (30, 1), (40,))
    )
    check(ops.flip.default, (x, rates, features, *where))
    # without a guard only mantissa bits: NaN would equal nothing
    check(ops.flip_.default, (x, mantissa, None, *where))
    check(ops.flip_grad_.default, (x, grad, x, rates, one, *where))
    check(ops.flip_again.default, (x, x, mantissa, None, *where))
    check(ops.flip_marked.default, (x, rates, features, *where))
    codes, low = torch.arange(90, dtype=torch.uint8) % 16, rates_of(Fault(0.01, 0.3), "e2m1")
    check(ops.flip.default, (codes, low, None, *where))
    check(ops.flip_.default, (codes, low, None, *where))
    _, zeroed = ops.flip_marked(x, rates, features, *where)
    check(ops.zero_marked_.default, (zeroed, grad))
    check(ops.merge.default, (x, a, b, 0.5, rates, one, *where))
    check(ops.merge_grad.default, (x, a, b, 0.5, x, True, mantissa, None, *where))
    check(ops.merge_grad.default, (x, a, b, 0.5, x, True, rates, rows, *where))
    _, zeroed = ops.merge_grad(x, a, b, 0.5, x, True, rates, rows, *where)
    factors = (sample((9, 30), x.dtype), sample((9, 40), x.dtype), a, b, 0.5)
    check(ops.zeroed_correction.default, (zeroed, rates, *factors))


def test_meta_tensors_give_meta_tensors():
    x = torch.empty(3, 4, dtype=torch.bfloat16, device="meta")
    y = flipproof.flip(x, p_exp=0.1, p_frac=0.1, zero_out_t=1.0, **WHERE)
    assert (y.device.type, y.shape, y.dtype) == ("meta", x.shape, x.dtype)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"p_exp": -0.1}, ["p_exp = -0.1", "0 to 0.5"]),
        ({"p_frac": 0.51}, ["p_frac = 0.51", "0 to 0.5"]),
        ({"p_exp": float("nan")}, ["p_exp = nan", "0 to 0.5"]),
        ({"p_exp": True}, ["p_exp = True"]),
        ({"zero_out_t": -1.0}, ["zero_out_t = -1.0", "at least 0"]),
        ({"zero_out_t": float("nan")}, ["zero_out_t = nan"]),
        ({"tick": -1}, ["tick = -1"]),
        ({"tick": 2**48}, ["tick"]),
        ({"offset": -5}, ["offset = -5"]),
        ({"seed": -1}, ["seed = -1"]),
        ({"p_exp": 2, "p_frac": 3}, ["p_exp = 2", "p_frac = 3"]),
    ],
)
def test_bad_arguments_are_named_and_nothing_changes(arguments, words):
    x = sample((10,), torch.float32)
    before = x.clone()
    for function in (flipproof.flip, flipproof.flip_):
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked below
            function(x, **(WHERE | arguments))
        assert all(word in str(error.value) for word in words)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.bool])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match=rf"{str(dtype)[6:]}.*bfloat16, float16, float32"):
        flipproof.flip(torch.zeros(4, dtype=dtype), p_exp=0.1, **WHERE)


def test_randomness_is_an_argument():
    with pytest.raises(TypeError, match="seed"):
        flipproof.flip(torch.zeros(4), p_exp=0.1)


def test_in_place_refuses_what_autograd_would_lose():
    x = torch.zeros(4, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"flip_.*requires grad"):
        flipproof.flip_(x, p_exp=0.1, **WHERE)
    with torch.no_grad():
        flipproof.flip_(x, p_exp=0.5, **WHERE)
    assert x.any()
