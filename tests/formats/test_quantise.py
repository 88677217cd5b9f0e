"""Against compressed-tensors and bitsandbytes, bit for bit; and where those do not define a pattern, against IEEE."""

import math

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from quantised import COMPRESSED, FLOATS, PLAIN_NF4, compressed, decompressed, same, sample

from flipproof.errors import ConfigError
from flipproof.formats.codes import dynamic_map, numbers
from flipproof.formats.quantise import dequantise, quantise
from flipproof.formats.spec import FORMATS, format_of
from flipproof.formats.stored import Stored

SHAPES = [(48, 256), (50, 384), (1, 128), (9, 1024)]
KINDS = ["normal", "ties", "positive", "tiny"]
IN_BFLOAT16 = ("mxfp8", "mxfp4", "nvfp4")
"""What compressed-tensors makes of these is bfloat16, whatever the weight was."""


def own_arithmetic(weight, name):
    return weight.float() if weight.dtype == torch.float16 and name in IN_BFLOAT16 else weight


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_those_of_compressed_tensors(name, dtype, kind):
    for seed, shape in enumerate(SHAPES):
        if name == "int4-asym" and shape[0] <= 8:  # which compressed-tensors packs and cannot unpack
            continue
        weight = sample(shape, dtype, kind, seed)
        expected = decompressed(compressed(own_arithmetic(weight, name), name), name)
        stored = quantise(weight, name)
        found = dequantise(stored)
        assert found.dtype == dtype
        if name in IN_BFLOAT16:
            found = dequantise(stored, torch.bfloat16)
        assert same(found, expected)
        if name not in IN_BFLOAT16:  # the product is rounded to the dtype of the scale, whatever is asked for
            assert same(dequantise(stored, torch.float32), expected.float())


@pytest.mark.parametrize("group", [-1, 16, 64])
@pytest.mark.parametrize("name", ["int8", "int4", "int4-asym"])
def test_so_are_those_of_other_groups(name, group):
    weight = sample((9, 192), torch.bfloat16)
    expected = decompressed(compressed(weight, name, group), name, group)
    assert same(dequantise(quantise(weight, format_of(name, group))), expected)


def test_float16_does_not_lose_what_it_cannot_scale():
    """compressed-tensors computes in float16 and loses all of it."""
    weight = sample((4, 256), torch.float32, "tiny").half()
    for name in ("mxfp4", "mxfp8"):
        assert not decompressed(compressed(weight, name), name).any()
    for name in IN_BFLOAT16:
        error = dequantise(quantise(weight, name), torch.float32) - weight.float()
        assert error.norm() < 0.13 * weight.float().norm()


@pytest.mark.parametrize("dtype", FLOATS)
def test_e5m2_is_the_nearest_by_the_scale_of_its_row(dtype):
    weight = sample((6, 96), dtype)
    stored = quantise(weight, "fp8-e5m2")
    scale = weight.abs().amax(1, keepdim=True) / 57344
    assert same(stored.operands["scale"][:-1], scale[:-1])
    every = numbers(torch.arange(256, dtype=torch.uint8), "e5m2", torch.float32)
    every = every[every.isfinite()].double()
    quotient = (weight / stored.operands["scale"]).double()
    found = numbers(stored.operands["code"], "e5m2", torch.float32).double()
    assert torch.equal((quotient - found).abs(), (quotient[..., None] - every).abs().amin(-1))
    assert same(dequantise(stored), found.to(dtype) * stored.operands["scale"])


NF4_SHAPES = [(128, 256), (37, 64), (33, 50), (7, 13), (5, 129), (1, 1), (300, 1024)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", NF4_SHAPES)
@pytest.mark.parametrize("kind", ["normal", "tiny", "positive"])
def test_nf4_is_that_of_bitsandbytes(shape, dtype, kind):
    weight = sample(shape, dtype, kind)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    stored = quantise(weight, "nf4")
    count = weight.numel()
    code = torch.stack((packed >> 4, packed & 15), -1).view(-1)[:count].view(shape)
    assert same(stored.operands["code"], code)
    assert same(stored.operands["nested"], state.state2.absmax)
    assert same(stored.operands["offset"], state.offset.reshape(1))
    assert same(stored.operands["map"], state.state2.code)
    # on a CPU bitsandbytes has the nearest of 65536 bins, not of the numbers: ours are never further away
    plain = quantise(weight, PLAIN_NF4).operands["scale"]
    theirs = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    nested = stored.operands["nested"].repeat_interleave(256)[: len(plain)]
    ours = stored.operands["map"][stored.operands["scale"].long()] * nested + stored.operands["offset"]
    rounding = 1e-6 * plain.abs().max()
    assert ((ours - plain).abs() <= (theirs - plain).abs() + rounding).all()


@pytest.mark.parametrize("columns", [16, 64, 80])
def test_nf4_at_its_ties_is_that_of_bitsandbytes(columns):
    """Whole blocks are multiplied by 1 / absmax and a shorter last one is divided, which only shows beside a tie."""
    table = bnb.get_4bit_type("nf4", "cpu")
    ties = ((table[:-1] + table[1:]) / 2).repeat(6)[: columns - 1]
    largest = torch.rand(400, generator=torch.Generator().manual_seed(0)) + 0.5
    for scale in largest:
        weight = torch.cat([scale[None], ties * scale])[None]
        weight[:, ::16] = scale
        packed, _ = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        code = torch.stack((packed >> 4, packed & 15), -1).view(weight.shape)
        assert same(quantise(weight, "nf4").operands["code"], code)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [shape for shape in NF4_SHAPES if shape[1] % 16 or shape[1] % 64 == 0])
def test_stored_nf4_is_the_number_that_bitsandbytes_makes_of_it(shape, dtype):
    """Of its own scales. Rows of a multiple of 16 but not of 64 it dequantises wrongly on a CPU, so none are here."""
    weight = sample(shape, dtype)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    ours = quantise(weight, "nf4")
    with_its_scales = Stored(ours.format, {**ours.operands, "scale": state.absmax}, dtype)
    assert same(dequantise(with_its_scales), bnb.dequantize_4bit(packed, state).view(shape))
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type="nf4")
    plain = quantise(weight, PLAIN_NF4)
    assert same(plain.operands["scale"], state.absmax)
    assert same(dequantise(plain), bnb.dequantize_4bit(packed, state).view(shape))


def test_scales_of_nf4_are_the_nearest_of_the_map():
    weight = sample((512, 1024), torch.float32)
    stored = quantise(weight, "nf4")
    scale = weight.view(-1, 64).abs().amax(1)
    relative = (scale - scale.mean()).double()
    nested = relative.view(-1, 256).abs().amax(1).repeat_interleave(256)
    least = (relative[:, None] - dynamic_map().double() * nested[:, None]).abs().amin(1)
    ours = (relative - dynamic_map().double()[stored.operands["scale"].long()] * nested).abs()
    assert (ours - least <= 2**-22 * relative.abs()).all()


# Patterns that only flips make


SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -2.0, 3e38, 1e-40, 0.0123]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["int8", "int4", "int4-asym", "fp8"])
def test_each_code_by_each_kind_of_scale(name, dtype):
    format = format_of(name, -1)
    scale = torch.tensor(SPECIAL * 2, dtype=torch.float64).to(dtype)[:, None]
    code = torch.arange(2**format.bits, dtype=torch.uint8).expand(len(scale), -1).contiguous()
    operands = {"code": code, "scale": scale}
    if format.zero:
        operands["zero"] = torch.arange(len(scale), dtype=torch.uint8)[:, None] % 16
    tensors = {"weight": code.view(torch.float8_e4m3fn), "weight_scale": scale}
    if name != "fp8":
        zero = operands.get("zero", torch.full_like(scale, 2 ** (format.bits - 1), dtype=torch.uint8)).int()
        expected = torch.from_numpy((code.int() - zero).float().numpy()).to(dtype) * scale
    else:
        expected = decompressed(tensors, name)
    assert same(dequantise(Stored(format, operands, dtype)), expected)


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4"])
def test_each_code_by_each_power(name):
    format = FORMATS[name]
    code = torch.arange(256).remainder(2**format.bits).to(torch.uint8).expand(256, -1).contiguous()
    scale = torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, 8).contiguous()
    stored = Stored(format, {"code": code, "scale": scale}, torch.bfloat16)
    number = numbers(code[0], format.code, torch.float32).double()
    power = torch.tensor([2.0 ** (pattern - 127) for pattern in range(255)] + [math.nan], dtype=torch.float64)
    exact = number * power[:, None]  # of few digits, and within float64
    for dtype in FLOATS:
        assert same(dequantise(stored, dtype), exact.float().to(dtype))
    tensors = {"weight_scale": scale[:-1]}
    if format.bits == 8:
        tensors["weight"] = code[:-1].view(torch.float8_e4m3fn)
    else:
        tensors["weight_packed"] = code[:-1, ::2] | code[:-1, 1::2] << 4
    assert same(dequantise(stored)[:-1], decompressed(tensors, name))


def test_each_code_of_nvfp4_by_each_scale_and_by_global_scales():
    format = FORMATS["nvfp4"]
    code = torch.arange(16, dtype=torch.uint8).expand(256, 16).contiguous()
    scale = torch.arange(256, dtype=torch.uint8)[:, None]
    packed = code[:, ::2] | code[:, 1::2] << 4
    for whole in SPECIAL:
        whole = torch.tensor([whole])
        stored = Stored(format, {"code": code, "scale": scale, "global": whole}, torch.bfloat16)
        tensors = {"weight_packed": packed, "weight_scale": scale.view(torch.float8_e4m3fn)}
        assert same(dequantise(stored), decompressed(tensors | {"weight_global_scale": whole}, "nvfp4"))


def test_each_pattern_of_each_operand_of_nf4():
    """Against float32 arithmetic of NumPy, element by element."""
    rows = 256 * 16 // 64
    code = torch.arange(256 * 16).remainder(16).to(torch.uint8).view(256, 16).T.reshape(rows, 64)
    fresh = quantise(sample((rows, 64), torch.float32), "nf4").operands
    table = fresh["map"].clone()
    table[[3, 40, 200]] = torch.tensor([math.nan, math.inf, -3e38])
    for special in SPECIAL:
        nested = torch.full_like(fresh["nested"], special)
        for scale in torch.arange(256, dtype=torch.uint8).view(-1, rows):
            operands = {"code": code, "scale": scale, "nested": nested, "offset": fresh["offset"], "map": table}
            found = dequantise(Stored(FORMATS["nf4"], operands, torch.float32))
            with np.errstate(all="ignore"):
                number = bnb.get_4bit_type("nf4", "cpu").numpy()[code.numpy()]
                product = table.numpy()[scale.numpy()] * nested.numpy()[0] + fresh["offset"].numpy()
                expected = torch.from_numpy(number * product[:, None])
            assert same(found, expected)


# What is refused


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused(name, value):
    weight = sample((3, 128), torch.bfloat16)
    weight[1, 70] = value
    with pytest.raises(ConfigError, match=f"^a weight that holds NaN or infinity, .* it cannot be {name}$"):
        quantise(weight, name)


def test_so_is_one_in_a_short_last_block():
    weight = torch.ones(3, 30)
    weight[2, 29] = math.nan
    with pytest.raises(ConfigError, match="NaN or infinity"):
        quantise(weight, "nf4")


def test_so_is_a_range_that_float16_cannot_hold():
    weight = torch.tensor([[60000.0, -60000.0] * 64]).half()
    with pytest.raises(ConfigError, match=r"whose range torch\.float16 cannot hold, .* it cannot be int4-asym$"):
        quantise(weight, "int4-asym")
    assert same(dequantise(quantise(weight.float(), "int4-asym")).sign(), weight.float().sign())


@pytest.mark.parametrize("weight", [
    torch.ones(128), torch.ones(2, 2, 128), torch.ones(2, 128, dtype=torch.float64), torch.ones(2, 128).int(),
    torch.ones(0, 128), torch.ones(2, 0),
])  # fmt: skip
def test_what_is_no_weight_is_refused(weight):
    with pytest.raises(
        ConfigError, match=r"^a weight of torch\.\w+ and shape \(.*\) cannot be int4: a tensor \(out, in\)"
    ):
        quantise(weight, "int4")


@pytest.mark.parametrize(("name", "columns"), [("int4", 64), ("int4-asym", 200), ("mxfp4", 48), ("nvfp4", 24)])
def test_in_features_that_a_group_does_not_divide_are_refused(name, columns):
    message = f"has groups of {FORMATS[name].group} in-features, .* has {columns}"
    with pytest.raises(ConfigError, match=message):
        quantise(torch.ones(4, columns), name)


@pytest.mark.parametrize("name", FORMATS)
def test_the_weight_is_left_as_it_was(name):
    weight = torch.nn.Parameter(sample((4, 128), torch.float32))
    before = weight.detach().clone()
    stored = quantise(weight.T.contiguous().T, name)  # in another order in memory
    assert same(weight.detach(), before)
    assert same(dequantise(stored), dequantise(quantise(before, name)))
    code = stored.operands["code"].clone()
    strided = Stored(stored.format, {**stored.operands, "code": code.T.contiguous().T}, torch.float32)
    assert same(dequantise(strided), dequantise(stored))
    dequantise(stored).zero_()
    assert same(stored.operands["code"], code)
