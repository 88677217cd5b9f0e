"""Against the sizes of what the libraries write, and against bits per weight worked out by hand."""

import pytest
import torch
from quantised import COMPRESSED, FLOATS, PLAIN_NF4, compressed, sample

from flipproof.errors import ConfigError
from flipproof.formats.operands import bits_per_weight, operands_of
from flipproof.formats.pack import pack
from flipproof.formats.quantise import quantise
from flipproof.formats.spec import FORMATS, format_of


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", COMPRESSED)
def test_the_bits_are_those_that_compressed_tensors_writes(name, dtype):
    weight = sample((64, 256), dtype)
    tensors = compressed(weight, name)
    tensors.pop("weight_shape", None)
    written = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    assert bits_per_weight(FORMATS[name], (64, 256), dtype) == written * 8 / weight.numel()


@pytest.mark.parametrize(("format", "expected"), [
    (FORMATS["int8"], 8 + 16 / 4096),
    (FORMATS["int4"], 4 + 16 / 128),
    (format_of("int4", 32), 4 + 16 / 32),
    (FORMATS["int4-asym"], 4 + 20 / 128),
    (FORMATS["fp8-e5m2"], 8 + 16 / 4096),
    (FORMATS["nf4"], 4 + 8 / 64 + 32 / 16384 + 32 / 2**24 + 256 * 32 / 2**24),
    (PLAIN_NF4, 4 + 32 / 64),
    (FORMATS["nvfp4"], 4 + 8 / 16 + 32 / 2**24),
])  # fmt: skip
def test_bits_per_weight_of_4096_by_4096(format, expected):
    assert bits_per_weight(format, (4096, 4096)) == expected


@pytest.mark.parametrize("shape", [(5, 13), (1, 1), (3, 96), (300, 64)])
def test_blocks_of_nf4_run_over_the_ends_of_rows(shape):
    operands = operands_of(FORMATS["nf4"], shape)
    blocks = -(-shape[0] * shape[1] // 64)
    assert operands["scale"].shape == (blocks,)
    assert operands["nested"].shape == (-(-blocks // 256),)
    written = pack(quantise(sample(shape, torch.float32), "nf4"))
    assert written["weight.absmax"].shape == (blocks,)


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(
        ConfigError,
        match=r"^int4 has groups of 128 in-features, and a weight of shape \(4, 100\) has 100: a multiple of the group",
    ):
        operands_of(FORMATS["int4"], (4, 100))
