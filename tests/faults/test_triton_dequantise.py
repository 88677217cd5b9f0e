"""The kernel that dequantises against what ``formats`` computes, bit for bit; in Triton's interpreter without a GPU."""

from dataclasses import replace

import pytest
import torch

from flipproof.faults import cpu
from flipproof.faults.guard import guard_of, limits_of
from flipproof.formats.codes import LARGEST, numbers
from flipproof.formats.fields import to_bytes
from flipproof.formats.quantise import dequantise, quantise, scale_numbers, zero_patterns
from flipproof.formats.spec import FORMATS, format_of
from flipproof.formats.stored import Stored

triton_launch = pytest.importorskip("flipproof.faults.triton_launch", reason="Triton has no build here")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# of the interpreter, which cuts float32 off to bfloat16, see test_quantised.py
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
# wider than a tile, so that blocks of nf4 run over the ends of rows, and the last is a shorter one
SHAPE = 3, 1056


def weight_of(name, dtype, shape=SHAPE):
    format = format_of(name)
    group = 32 if format.group == 128 else None
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(len(name))).to(dtype)
    return quantise(weight, format_of(name, group))


def both(stored, dtype, limits=None, packed=False):
    """What the kernel makes of a stored weight, and what the definition does."""
    format, operands = stored.format, stored.operands
    scale, zero = scale_numbers(format, operands), zero_patterns(format, operands, stored.dtype)
    code = to_bytes(operands["code"], format.bits) if packed else operands["code"]
    parts = [None if x is None else x.to(DEVICE) for x in (code, scale, zero, stored.g_idx)]
    moved = None if limits is None else limits.to(DEVICE) if limits.dim() else limits
    made = triton_launch.dequantise(*parts, moved, format, stored.shape[1], dtype).cpu()
    return made, cpu.dequantise(operands["code"], scale, zero, stored.g_idx, limits, format, stored.shape[1], dtype)


def same(x, y):
    return x.dtype == y.dtype and torch.equal(x.nan_to_num(nan=123), y.nan_to_num(nan=123))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
def test_of_every_format(name, dtype, packed):
    stored = weight_of(name, dtype)
    for computed in DTYPES:
        made, expected = both(stored, computed, packed=packed)
        assert same(made, expected)
        assert same(made, dequantise(stored, computed))
        assert made.isfinite().all()
        assert made.any()


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_with_the_scales_that_flips_make(name):
    """Infinite, not a number, the smallest there is and the largest; every pattern by each of them."""
    format = replace(format_of(name), group=2 ** format_of(name).bits, scale="float")
    if name == "nf4":
        format = replace(format, scale="float32")
    scale = torch.tensor([float("inf"), float("nan"), 1e-45, -3e38, -0.0, 1.5])
    code = torch.arange(2**format.bits, dtype=torch.uint8).repeat(len(scale), 1)
    operands = {"code": code, "scale": scale if name == "nf4" else scale[:, None]}
    operands |= {"zero": torch.full((len(scale), 1), 3, dtype=torch.uint8)} if format.zero else {}
    made, expected = both(Stored(format, operands, torch.float32), torch.float32)
    assert same(made, expected)
    assert torch.equal(made.signbit() & ~made.isnan(), expected.signbit() & ~expected.isnan())
    assert made.isnan().any()
    assert made.isinf().any()
    largest = numbers(code[:1], format.code, torch.float32) if format.code in LARGEST else None
    assert largest is None or largest.nan_to_num(nan=0, posinf=0, neginf=0).max() == LARGEST[format.code]


def test_groups_that_columns_list():
    """GPTQ's act-order."""
    stored = weight_of("int4-asym", torch.float32)
    order = torch.randperm(SHAPE[1], generator=torch.Generator().manual_seed(0))
    listed = Stored(stored.format, stored.operands, stored.dtype, (order % (SHAPE[1] // 32)).int())
    made, expected = both(listed, torch.float32, packed=True)
    assert same(made, expected)
    assert not same(made, dequantise(stored))


@pytest.mark.parametrize("by", ["one", "row", "column"])
@pytest.mark.parametrize("name", ["int8", "nf4", "fp8-e5m2"])
def test_behind_a_guard(name, by):
    """One threshold for all, and one for each row or column."""
    stored = weight_of(name, torch.float32)
    shape = {"one": (), "row": (SHAPE[0], 1), "column": (SHAPE[1],)}[by]
    thresholds = 0.5 + torch.rand(shape, generator=torch.Generator().manual_seed(0))
    made, expected = both(stored, torch.float16, limits_of(guard_of(thresholds), torch.float16))
    weight = dequantise(stored, torch.float16)
    assert same(made, expected)
    assert same(made, torch.where(weight.float().abs() < thresholds, weight, 0))
    assert 0 < (made != weight).sum() < made.numel() / 2


@pytest.mark.parametrize("columns", [1, 2, 7, 1056, 4099])
def test_unpacking(columns):
    codes = torch.randint(16, (3, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(columns))
    packed = to_bytes(codes, 4)
    assert torch.equal(triton_launch.unpack(packed.to(DEVICE), columns).cpu(), codes)
    assert torch.equal(cpu.unpack(packed, columns), codes)
