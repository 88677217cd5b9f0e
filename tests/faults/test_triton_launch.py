"""The kernels against the reference, bit for bit: on a GPU where there is one, else in Triton's interpreter."""

from itertools import product

import numpy as np
import pytest
import torch
from rounding import assert_same_function
from scalar_flips import scalar_masks

pytest.importorskip("triton", reason="Triton has no build for this platform")

from flipproof.faults import cpu, triton_launch
from flipproof.faults.draw import Draw, rates_of
from flipproof.faults.fault import Fault
from flipproof.faults.guard import guard_of, limits_of
from flipproof.faults.layouts import FLOATS, LAYOUTS
from flipproof.faults.philox import derive_key
from flipproof.faults.poisson import BLOCK, flip_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
KEY = derive_key(3, "a/x")
RATES = torch.tensor([2**-16, 2**-16], dtype=torch.float64)

# both fields sparse; one dense; dense with digits of different length; coins alone, with digits and with balls; off
PROBABILITIES = [
    (2**-8, 2**-9),
    (2**-16, 2**-4),
    (0.3, 2**-10),
    (0.5, 0.41),
    (2**-6.5, 0.0),
    (0.49, 0.3),
    (2**-9, 0.4),
    (0.0, 0.0),
]


def sample(n, dtype, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bits_of(x):
    return x.cpu().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def equal(x, y):
    return torch.equal(bits_of(x), bits_of(y))


def draw(p_exp, p_frac, t, tick=7, offset=0, device="cpu", dtype=torch.bfloat16):
    limit = None if t is None else limits_of(guard_of(t), dtype)
    key, now = torch.tensor(KEY, device=device), torch.tensor(tick, device=device)
    return Draw(torch.tensor([p_exp, p_frac], dtype=torch.float64), limit, key, now, offset)


def expected_flip(x, draw):
    """(flipped, kept) by the cpu."""
    kept = torch.ones(x.shape, dtype=torch.bool)
    return cpu.flip(x, kept, draw), kept


# -- flips --------------------------------------------------------------------------------------------------------


GUARDS = [None, 1.5, 100.0]  # none; it also catches clean values; only flipped ones
# In the interpreter every dtype with every probability and with every guard, and every probability with every guard.
CASES = [
    (dtype, *PROBABILITIES[i], GUARDS[j])
    for (k, dtype), i, j in product(enumerate(DTYPES), range(len(PROBABILITIES)), range(len(GUARDS)))
    if DEVICE == "cuda" or (i + j + k) % 3 == 0
]


@pytest.mark.parametrize(("dtype", "p_exp", "p_frac", "t"), CASES)
def test_equal_to_the_reference(dtype, p_exp, p_frac, t):
    """The end of a block and a whole one, into another tensor; and a block's beginning in place."""
    x = sample(65 + BLOCK, dtype)
    arguments = p_exp, p_frac, t, 2**40 + 5, 2 * BLOCK - 65
    expected, kept = expected_flip(x, draw(*arguments, dtype=dtype))
    grad = torch.ones(len(x), device=DEVICE)
    y = triton_launch.flip(x.to(DEVICE), grad, draw(*arguments, DEVICE, dtype))
    assert equal(y, expected)
    assert torch.equal(grad.cpu(), kept.float())
    # key and tick in CPU memory
    x, arguments = x[:1000], draw(p_exp, p_frac, t, 2**32 - 1, 5 * BLOCK, dtype=dtype)
    expected, _ = expected_flip(x, arguments)
    triton_launch.flip_(same := x.to(DEVICE), None, arguments)
    assert equal(same, expected)


@pytest.mark.parametrize("p", [2**-9, 0.45])
def test_more_balls_than_lanes(p):
    """As in a block that got more balls than is likely."""
    x = sample(BLOCK, torch.bfloat16)
    assert flip_plan(torch.bfloat16, p, p).likely_balls > 48
    for t in (None, 100.0):
        expected, kept = expected_flip(x, draw(p, p, t))
        y, grad = torch.empty_like(x, device=DEVICE), torch.ones(len(x), device=DEVICE)
        triton_launch.flip_into(y, x.to(DEVICE), grad, draw(p, p, t, device=DEVICE), lanes=16)
        assert equal(y, expected)
        assert torch.equal(grad.cpu(), kept.float())


def test_strides_alignment_and_empty_tensors():
    x = sample(64 * 130, torch.bfloat16).view(64, 130)
    arguments = draw(2**-6, 2**-7, 1.5)
    expected, _ = expected_flip(x, arguments)
    assert equal(triton_launch.flip(x.T.contiguous().T.to(DEVICE), None, arguments), expected)
    for shift in (1, 2, 3):  # begins in either half of a 32-bit word
        room = torch.zeros(64 * 130 + 8, dtype=torch.bfloat16, device=DEVICE)
        view = room[shift : shift + 64 * 130].view(64, 130)
        view.copy_(x)
        assert equal(triton_launch.flip(view, None, arguments), expected)
        for p in (2**-6, 2**-9):
            view.copy_(x)
            triton_launch.flip_(view, None, draw(p, p, None))
            assert equal(view, expected_flip(x, draw(p, p, None))[0])
        assert not room[:shift].any()
        assert not room[shift + 64 * 130 :].any()
    assert triton_launch.flip(torch.empty(0, 3, device=DEVICE), None, arguments).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_infinity_and_nan_and_signed_zero(dtype):
    x = sample(BLOCK, dtype)
    x[:5] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 5e-45])
    for t in (None, 5.0):
        arguments = draw(2**-9, 2**-9, t, dtype=dtype)
        expected, _ = expected_flip(x, arguments)
        assert equal(triton_launch.flip(x.to(DEVICE), None, arguments), expected)


@pytest.mark.parametrize("p", [2**-9, 0.3])
def test_elements_beyond_two_to_the_31(p):
    """The index arithmetic of the blocks around element 2^31 of a tensor that large. Only their pages are touched, so
    memory for the rest is never taken."""
    n = 2**31 + 3 * BLOCK
    if DEVICE == "cuda":
        x, y = (torch.empty(n, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    else:
        x, y = (torch.from_numpy(np.empty(n, dtype=np.uint16)).view(torch.bfloat16) for _ in range(2))
    begin = 2**31 - 2 * BLOCK
    clean = sample(n - begin, torch.bfloat16)
    x[begin:] = clean.to(DEVICE)
    y[begin - 10 : begin] = 1.0
    for t in (None, 100.0):
        expected, _ = expected_flip(clean, draw(p, p, t, offset=begin))
        triton_launch.flip_into(y, x, None, draw(p, p, t, device=DEVICE), blocks=range(begin // BLOCK, n // BLOCK))
        assert equal(y[begin:], expected)
    x[begin:] = clean.to(DEVICE)
    if p < 2**-7:
        plan = triton_launch._device_plan(torch.bfloat16, p, p, x.device)
        triton_launch.flip_sparse_(x, plan, None, draw(p, p, None), blocks=range(begin // BLOCK, n // BLOCK))
        assert equal(x[begin:], expected_flip(clean, draw(p, p, None, offset=begin))[0])
    assert (y[begin - 10 : begin] == 1).all()


# -- codes and scales of 4 and 8 bits ----------------------------------------------------------------------------------

ELEMENTS = [name for name in LAYOUTS if name not in FLOATS]
# In the interpreter every element with every third probability, and every layout with every probability.
LOW_CASES = [
    (element, *PROBABILITIES[i])
    for (k, element), i in product(enumerate(ELEMENTS), range(len(PROBABILITIES)))
    if DEVICE == "cuda" or (i + k) % 3 == 0
]


def codes(n, element, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2 ** LAYOUTS[element].bits, (n,), generator=generator).to(torch.uint8)


def low_draw(element, p_exp, p_frac, tick=7, offset=0, device="cpu"):
    key, now = torch.tensor(KEY, device=device), torch.tensor(tick, device=device)
    return Draw(rates_of(Fault(p_exp, p_frac), element), None, key, now, offset)


@pytest.mark.parametrize(("element", "p_exp", "p_frac"), LOW_CASES)
def test_codes_are_equal_to_the_reference(element, p_exp, p_frac):
    """The end of a block and a whole one, and an odd part of the next, into another tensor and in place."""
    x = codes(65 + BLOCK + 1001, element)
    arguments = element, p_exp, p_frac, 2**40 + 5, 2**31 + 2 * BLOCK - 65
    expected = cpu.flip(x, None, low_draw(*arguments))
    on_device = x.clone().to(DEVICE)
    assert torch.equal(triton_launch.flip(on_device, None, low_draw(*arguments, DEVICE)).cpu(), expected)
    assert torch.equal(on_device.cpu(), x)
    triton_launch.flip_(on_device, None, low_draw(*arguments))  # key and tick in CPU memory
    assert torch.equal(on_device.cpu(), expected)
    assert not torch.equal(x, expected) or max(p_exp, p_frac * (LAYOUTS[element].mantissa > 0)) < 2**-8
    assert int(expected.max()) < 2 ** LAYOUTS[element].bits


@pytest.mark.parametrize("element", ["integer4", "e2m1", "e4m3", "e8m0"])  # one of each layout but e5m2's
@pytest.mark.parametrize(("p_exp", "p_frac"), [(2**-8, 2**-7), (0.3, 2**-9), (0.499, 0.3)])
def test_codes_are_equal_to_a_scalar_implementation(element, p_exp, p_frac):
    n, offset, tick = 700, 3 * BLOCK - 300, 2**40 + 5
    expected = scalar_masks(LAYOUTS[element][:2], p_exp, p_frac, n, KEY, tick, offset)
    zeros = torch.zeros(n, dtype=torch.uint8, device=DEVICE)
    y = triton_launch.flip(zeros, None, low_draw(element, p_exp, p_frac, tick, offset, DEVICE))
    np.testing.assert_array_equal(y.cpu().numpy(), expected)
    assert expected.any()


@pytest.mark.parametrize("element", ["integer4", "e4m3"])
@pytest.mark.parametrize("p", [2**-8, 0.3, 0.45])  # balls, digits, coins
def test_codes_anywhere_in_a_word_and_nothing_beside_them(element, p):
    """A slice that begins at any byte of a 32-bit word and ends at any."""
    x = codes(1003, element)
    expected = cpu.flip(x, None, low_draw(element, p, p, offset=BLOCK - 400))
    for shift in range(1, 6):
        room = torch.full((1003 + 12,), 9, dtype=torch.uint8, device=DEVICE)
        view = room[shift : shift + 1003]
        view.copy_(x)
        arguments = low_draw(element, p, p, offset=BLOCK - 400)
        assert torch.equal(triton_launch.flip(view, None, arguments).cpu(), expected)
        assert torch.equal(view.cpu(), x)
        triton_launch.flip_(view, None, arguments)
        assert torch.equal(view.cpu(), expected)
        assert (room[:shift] == 9).all()
        assert (room[shift + 1003 :] == 9).all()


def test_rows_strides_and_empty_tensors_of_codes():
    x = codes(24 * 130, "nf4").view(24, 130)
    whole = cpu.flip(x, None, low_draw("nf4", 0.02, 0.0))
    transposed = x.T.contiguous().T.to(DEVICE)
    assert torch.equal(triton_launch.flip(transposed, None, low_draw("nf4", 0.02, 0.0)).cpu(), whole)
    for first, rows in ((0, x[:7]), (7, x[7:8]), (8, x[8:])):
        part = triton_launch.flip(rows.to(DEVICE), None, low_draw("nf4", 0.02, 0.0, offset=first * 130))
        assert torch.equal(part.cpu(), whole[first : first + len(rows)])
    empty = torch.empty(0, 3, dtype=torch.uint8, device=DEVICE)
    assert triton_launch.flip(empty, None, low_draw("nf4", 0.02, 0.0)).shape == (0, 3)


def test_more_balls_than_lanes_in_codes():
    x, arguments = codes(BLOCK, "integer8"), low_draw("integer8", 2**-7, 0.0)
    assert flip_plan(LAYOUTS["integer8"], 2**-7, 0.0).likely_balls > 256
    y = torch.empty_like(x, device=DEVICE)
    triton_launch.flip_into(y, x.to(DEVICE), None, arguments, lanes=16)
    assert torch.equal(y.cpu(), cpu.flip(x, None, arguments))


# -- the merged weight ----------------------------------------------------------------------------------------------


def adapters(rows, columns, r, scale=0.3):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(r, columns, generator=generator) * scale,
        torch.randn(rows, r, generator=generator) * scale,
    )


# more rows than a program's, and more blocks than rows; the interpreter takes long for much of either
TALL, WIDE = ((2048, 40, 32), (3, 9000, 17)) if DEVICE == "cuda" else ((800, 40, 32), (5, 2100, 17))
SHAPES = [(64, 64, 4), (130, 201, 3), TALL, WIDE, (100, 128, 100), (70, 66, 200)]


@pytest.mark.parametrize(("rows", "columns", "r"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_merge_is_the_product_rounded_once(rows, columns, r, dtype):
    weight = sample(rows * columns, dtype).view(rows, columns)
    a, b = adapters(rows, columns, r)
    on_device = (t.to(DEVICE) for t in (weight, a, b))
    y = triton_launch.merge(*on_device, 0.7, None, draw(0.0, 0.0, None)).cpu()
    exact = weight.double() + 0.7 * b.double() @ a.double()
    # Half a unit in the last place of the result, and what two bfloat16 halves leave of each factor. The interpreter
    # cuts float32 off to bfloat16 where a GPU rounds.
    unit = torch.finfo(dtype).eps / (1 if DEVICE == "cpu" and dtype == torch.bfloat16 else 2)
    bound = exact.abs() * unit * 1.01 + 0.7 * (b.double().abs() @ a.double().abs()) * 2.0**-16 + 1e-7
    assert ((y.double() - exact).abs() <= bound).all()


MERGED_CASES = [  # in the interpreter every shape with every p and every t, and every p with every t
    (*SHAPES[1 + i], p, t)
    for i, (j, p), (k, t) in product(range(3), enumerate([0.0, 2**-12, 2**-8, 0.3]), enumerate([None, 100.0, 3.0]))
    if DEVICE == "cuda" or (i + j + k) % 3 == 0
]


@pytest.mark.parametrize(("rows", "columns", "r", "p", "t"), MERGED_CASES)
def test_flips_and_guard_of_the_merged_weight(rows, columns, r, p, t):
    weight = sample(rows * columns, torch.bfloat16).view(rows, columns).to(DEVICE)
    a, b = (x.to(DEVICE) for x in adapters(rows, columns, r))
    clean = triton_launch.merge(weight, a, b, 0.7, None, draw(0.0, 0.0, None))
    expected, kept = expected_flip(clean.cpu(), draw(p, p, t))
    assert equal(triton_launch.merge(weight, a, b, 0.7, None, draw(p, p, t, device=DEVICE)), expected)
    if t is not None:
        zeroed = triton_launch.new_zeroed(weight)
        y = triton_launch.merge(weight, a, b, 0.7, zeroed, draw(p, p, t, device=DEVICE))
        assert equal(y, expected)
        assert torch.equal(found(zeroed, kept.shape, p), ~kept)
        assert (~kept).any() or (p, t) == (0.0, 100.0)


def found(zeroed, shape, p):
    """What the guard zeroed, as a mask."""
    return triton_launch._unpacked(zeroed, shape).cpu() if 16 * p > 2**-8 else listed(zeroed, shape)


def listed(zeroed, shape):
    """The list, each entry of which must be there once, as a mask."""
    indices = zeroed[1 : 1 + int(zeroed[0])].cpu()
    assert len(indices.unique()) == len(indices)
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[indices] = True
    return mask


@pytest.mark.parametrize("offset", [2 * BLOCK - 5, 2**31 + 7, 2**40])
def test_a_shard_of_a_merged_weight_draws_its_part_of_the_whole(offset):
    weight = sample(70 * 130, torch.bfloat16).view(70, 130).to(DEVICE)
    weight[3, 5] = 50.0  # a clean value that the guard must find
    a, b = (x.to(DEVICE) for x in adapters(70, 130, 3))
    clean = triton_launch.merge(weight, a, b, 0.7, None, draw(0.0, 0.0, None))
    expected, kept = expected_flip(clean.cpu(), draw(2**-13, 2**-13, 20.0, offset=offset))
    zeroed = triton_launch.new_zeroed(weight)
    y = triton_launch.merge(weight, a, b, 0.7, zeroed, draw(2**-13, 2**-13, 20.0, offset=offset, device=DEVICE))
    assert equal(y, expected)
    assert torch.equal(listed(zeroed, kept.shape), ~kept)
    assert not kept[3, 5]


@pytest.mark.parametrize("rank", [4, 200])  # merged by the kernel, and by torch
def test_adapters_of_another_dtype_and_strides(rank):
    weight = sample(100 * 70, torch.bfloat16).view(70, 100).T.to(DEVICE)
    a, b = (x.bfloat16().to(DEVICE) for x in adapters(100, 70, rank))
    wide = [x.float() for x in (a, b)]
    arguments = draw(2**-13, 2**-13, 3.0, device=DEVICE)
    zeroed = [triton_launch.new_zeroed(weight) for _ in range(2)]
    y = triton_launch.merge(weight, a.T.contiguous().T, b, 0.7, zeroed[0], arguments)
    expected = triton_launch.merge(weight.contiguous(), *wide, 0.7, zeroed[1], arguments)
    assert equal(y, expected)
    assert torch.equal(*(listed(z, weight.shape) for z in zeroed))
    assert torch.equal(listed(zeroed[0], weight.shape).any(), torch.tensor(True))


def test_a_list_that_overflows_takes_nothing_back():
    weight = sample(100 * 100, torch.bfloat16).view(100, 100).to(DEVICE)
    a, b = (x.to(DEVICE) for x in adapters(100, 100, 4))
    zeroed = triton_launch.new_zeroed(weight)
    triton_launch.merge(weight, a, b, 0.7, zeroed, draw(2**-16, 2**-16, 0.1, device=DEVICE))
    assert int(zeroed[0]) > zeroed.numel() - 1
    ones = torch.ones(10, 100, device=DEVICE)
    assert not any(more.any() for more in triton_launch.zeroed_correction(zeroed, RATES, ones, ones, a, b, 0.7))


@pytest.mark.parametrize("share", [0.001, 0.2])
@pytest.mark.parametrize("backend", [cpu, triton_launch])
def test_taking_back_equals_the_masked_gradient_in_float64(backend, share):
    device = DEVICE if backend is triton_launch else "cpu"
    rows, columns, r, n = 70, 90, 5, 1500
    generator = torch.Generator().manual_seed(2)
    zero = torch.rand(rows, columns, generator=generator) < share
    grad_y, x = (torch.randn(n, size, generator=generator) for size in (rows, columns))
    a, b = adapters(rows, columns, r)
    zeroed, rates = zero.clone(), RATES
    if backend is triton_launch:
        zeroed = triton_launch.new_zeroed(zero.float())
        index = zero.view(-1).nonzero()[:, 0]
        zeroed[0] = len(index)
        zeroed[1 : 1 + len(index)] = index
    if backend is triton_launch and share > 0.01:
        triton_launch._pack(zero, zeroed)
        rates = torch.tensor([0.25, 0.0], dtype=torch.float64)

    def exact():
        wide = -0.7 * (grad_y.double().T @ x.double()) * zero
        return b.double().T @ wide, wide @ a.double().T

    more = backend.zeroed_correction(zeroed.to(device), rates, *(t.to(device) for t in (grad_y, x, a, b)), 0.7)
    assert zero.any()
    assert all(each.any() for each in more)
    assert_same_function(tuple(each.cpu() for each in more), exact, (grad_y, x, a, b))
