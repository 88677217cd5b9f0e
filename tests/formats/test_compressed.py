"""Tensors of a layer against those that compressed-tensors writes: names, dtypes, shapes and every bit."""

from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from quantised import COMPRESSED, FLOATS, compressed, same, sample, scheme

from flipproof.errors import ConfigError
from flipproof.formats.compressed import pack_compressed, unpack_compressed
from flipproof.formats.quantise import dequantise, quantise
from flipproof.formats.spec import FORMATS, format_of
from flipproof.formats.stored import Stored

IN_FLOAT32 = ("mxfp8", "mxfp4", "nvfp4")
"""Ours are computed in float32 where the weight is float16."""


def same_tensors(found, expected):
    return found.keys() == expected.keys() and all(same(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize("kind", ["normal", "ties", "positive", "tiny"])
def test_the_tensors_are_those_of_compressed_tensors(name, dtype, kind):
    for seed, shape in enumerate([(48, 256), (50, 384), (1, 128), (5, 1024)]):
        weight = sample(shape, dtype, kind, seed)
        expected = compressed(weight.float() if dtype == torch.float16 and name in IN_FLOAT32 else weight, name)
        stored = quantise(weight, name)
        assert same_tensors(pack_compressed(stored), expected)
        back = unpack_compressed(expected, FORMATS[name])
        assert same_tensors(back.operands, stored.operands)
        assert back.dtype == (torch.bfloat16 if name in IN_FLOAT32 else dtype)
        assert all(tensor.is_contiguous() for tensor in back.operands.values())


@pytest.mark.parametrize(("name", "group", "shape"), [
    ("int8", -1, (3, 13)), ("int4", -1, (3, 13)), ("int4", 3, (3, 12)), ("int4-asym", -1, (11, 13)),
    ("int4-asym", 5, (19, 20)), ("int8", 128, (4, 256)),
])  # fmt: skip
def test_so_are_those_of_other_groups_and_odd_shapes(name, group, shape):
    weight = sample(shape, torch.bfloat16)
    expected = compressed(weight, name, group)
    stored = quantise(weight, format_of(name, group))
    assert same_tensors(pack_compressed(stored), expected)
    assert same_tensors(unpack_compressed(expected, stored.format).operands, stored.operands)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_integers_are_read_and_written_plain_too(name):
    weight = sample((6, 256), torch.float32)
    stored = quantise(weight, name)
    given = {"weight": weight, "weight_scale": stored.operands["scale"]}
    plain = BaseCompressor.get_value_from_registry("int-quantized").compress(given, scheme(name))
    assert plain["weight"].dtype == torch.int8
    assert same_tensors(unpack_compressed(plain, FORMATS[name]).operands, stored.operands)
    assert same_tensors(pack_compressed(stored, plain=True), {key: plain[key] for key in ("weight", "weight_scale")})
    every = torch.arange(2 ** FORMATS[name].bits, dtype=torch.uint8).repeat(1, 128)
    whole = Stored(replace(FORMATS[name], group=None), {"code": every, "scale": torch.ones(1, 1)}, torch.float32)
    back = unpack_compressed(pack_compressed(whole, plain=True), whole.format)
    assert torch.equal(back.operands["code"], every)


def test_a_plain_number_that_int4_does_not_have_is_refused():
    given = {"weight": torch.tensor([[7, -8, 8]], dtype=torch.int8), "weight_scale": torch.ones(1, 1)}
    with pytest.raises(ConfigError, match="weight holds numbers beyond −8 to 7, those of int4"):
        unpack_compressed(given, format_of("int4", -1))


def test_a_flip_is_the_same_in_twos_complement():
    stored = quantise(sample((2, 16), torch.float32), "int8")
    scale, code = stored.operands["scale"], stored.operands["code"]
    for bit in range(8):
        flipped = Stored(stored.format, {"code": code ^ 1 << bit, "scale": scale}, torch.float32)
        twos = ((code ^ 0x80) ^ 1 << bit).view(torch.int8)
        assert same(dequantise(flipped), twos.float() * scale)


def test_a_first_version_zero_point_is_written_as_what_it_means():
    stored = quantise(sample((4, 128), torch.float16), "int4-asym")
    zero = torch.tensor([[0], [7], [14], [3]], dtype=torch.uint8)
    first_version = replace(FORMATS["int4-asym"], zero_plus=1)
    first = Stored(first_version, {**stored.operands, "zero": zero}, torch.float16)
    back = unpack_compressed(pack_compressed(first), FORMATS["int4-asym"])
    assert back.operands["zero"].flatten().tolist() == [1, 8, 15, 4]
    assert same(dequantise(back), dequantise(first))
    zero[2] = 15
    with pytest.raises(ConfigError, match=r"^a zero point is 16: compressed-tensors holds up to 15$"):
        pack_compressed(first)


def test_what_has_no_layout_is_refused():
    with pytest.raises(
        ConfigError, match=r"^fp8-e5m2 has no layout in compressed-tensors: its float of 8 bits is e4m3$"
    ):
        pack_compressed(quantise(torch.ones(2, 8), "fp8-e5m2"))
    for name in ("fp8-e5m2", "nf4"):
        with pytest.raises(ConfigError, match=f"^{name} has no layout in compressed-tensors"):
            unpack_compressed({}, FORMATS[name])
    stored = quantise(torch.ones(2, 256), "int4-asym")
    g_idx = torch.arange(256, dtype=torch.int32) % 2
    with pytest.raises(ConfigError, match=r"^a layer with g_idx \(desc_act\) has no layout"):
        pack_compressed(Stored(stored.format, stored.operands, torch.float32, g_idx))


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("int4", {"weight_packed": None}, "^weight_packed is missing; there are weight_scale, weight_shape$"),
    ("int4", {"weight_shape": torch.tensor([4, 120])}, r"^weight_packed is of shape \(4, 32\): \(4, 15\) is needed"),
    ("int4", {"weight_shape": torch.tensor([4])}, r"^weight_shape is \[4\]: the sizes \(out, in\) are needed$"),
    ("int4", {"weight_shape": torch.tensor([-4, 256])}, r"^weight_shape is \[-4, 256\]"),
    ("int4", {"weight_scale": torch.ones(4, 3)}, r"^scale, .* of shape \(4, 3\): torch.float32 of shape \(4, 2\) is"),
    ("int4", {"weight_packed": torch.ones(4, 32)}, "^weight_packed is torch.float32 .*: torch.int32 with 2 dim"),
    ("int4-asym", {"weight_zero_point": None}, "^weight_zero_point is missing"),
    ("int4-asym", {"weight_zero_point": torch.ones(4, 2, dtype=torch.int32)},
     r"^weight_zero_point is of shape \(4, 2\): \(1, 2\) is needed, as weight_scale is of shape \(4, 2\)$"),
    ("fp8", {"weight_scale": torch.ones(1)}, r"^weight_scale is torch.float32 of shape \(1,\): .* with 2 dimensions"),
    ("fp8", {"weight": torch.ones(4, 256, dtype=torch.float8_e5m2)},
     "^weight is torch.float8_e5m2 .* torch.float8_e4m3"),
    ("mxfp4", {"weight_scale": torch.ones(4, 8)}, "^weight_scale is torch.float32 .* torch.uint8 with 2 dimensions is"),
    ("mxfp8", {"weight_scale": torch.ones(4, 9, dtype=torch.uint8)},
     r"^scale, .* \(4, 9\): torch.uint8 of shape \(4, 8\)"),
    ("nvfp4", {"weight_global_scale": None}, "^weight_global_scale is missing"),
])  # fmt: skip
def test_wrong_tensors_are_refused(name, changes, message):
    tensors = pack_compressed(quantise(torch.ones(4, 256), name)) | changes
    with pytest.raises(ConfigError, match=message):
        unpack_compressed({key: tensor for key, tensor in tensors.items() if tensor is not None}, FORMATS[name])
