"""Against the tensors that bitsandbytes writes of its own state, and the state that it reads of ours."""

import json
from dataclasses import replace

import bitsandbytes.functional as bnb
import pytest
import torch
from quantised import FLOATS, PLAIN_NF4, same, sample

from flipproof.errors import ConfigError
from flipproof.formats.nf4_file import pack_nf4, unpack_nf4
from flipproof.formats.quantise import dequantise, quantise
from flipproof.formats.spec import FORMATS, format_of
from flipproof.formats.stored import Stored

STATE = "weight.quant_state.bitsandbytes__nf4"


def theirs(weight, double=True, size=64):
    """A layer's tensors, and the weight that bitsandbytes makes of them."""
    packed, state = bnb.quantize_4bit(weight, blocksize=size, compress_statistics=double, quant_type="nf4")
    tensors = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    return {"weight": packed} | tensors, bnb.dequantize_4bit(packed, state).view(weight.shape)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(48, 256), (5, 64), (7, 13), (300, 192)])
@pytest.mark.parametrize("double", [True, False])
def test_what_bitsandbytes_writes_is_read_and_written_as_it_is(shape, dtype, double):
    tensors, weight = theirs(sample(shape, dtype), double)
    stored = unpack_nf4(tensors, FORMATS["nf4"] if double else PLAIN_NF4)
    assert same(dequantise(stored), weight)
    written = pack_nf4(stored)
    assert written.keys() == tensors.keys()
    assert all(same(written[name], tensors[name]) for name in tensors)  # the JSON too, byte by byte
    assert all(tensor.is_contiguous() for tensor in stored.operands.values())


@pytest.mark.parametrize("format", [FORMATS["nf4"], PLAIN_NF4, format_of("nf4", 128)])
def test_what_we_write_is_read_by_bitsandbytes(format):
    stored = quantise(sample((48, 256), torch.bfloat16), format)
    tensors = pack_nf4(stored)
    packed = tensors.pop("weight")
    state = bnb.QuantState.from_dict(tensors, device=torch.device("cpu"))
    assert same(bnb.dequantize_4bit(packed, state).view(48, 256), dequantise(stored))


def test_bytes_under_another_dtype_are_the_same():
    tensors, weight = theirs(sample((48, 256), torch.bfloat16))
    tensors["weight"] = tensors["weight"].flatten().view(torch.bfloat16)[:, None]  # bnb_4bit_quant_storage
    assert same(dequantise(unpack_nf4(tensors, FORMATS["nf4"])), weight)


def test_a_map_of_its_own_is_used_and_kept():
    """Kernels read it from memory, so a flip of it is felt."""
    stored = quantise(sample((48, 256), torch.float32), "nf4")
    table = stored.operands["map"].clone()
    place = stored.operands["scale"][5].item()
    table[place] = -7.0
    other = Stored(stored.format, {**stored.operands, "map": table}, torch.float32)
    back = unpack_nf4(pack_nf4(other), FORMATS["nf4"])
    assert same(back.operands["map"], table)
    hit = (stored.operands["scale"] == place).repeat_interleave(64).view(48, 256) & (dequantise(stored) != 0)
    assert hit.any()
    assert torch.equal(dequantise(back) != dequantise(stored), hit)


@pytest.mark.parametrize("offset", [float("nan"), float("inf"), -0.0])
def test_an_offset_that_flipped_is_written_and_read(offset):
    stored = quantise(torch.ones(2, 64), "nf4")
    changed = Stored(stored.format, {**stored.operands, "offset": torch.tensor([offset])}, torch.float32)
    assert same(unpack_nf4(pack_nf4(changed), FORMATS["nf4"]).operands["offset"], torch.tensor([offset]))


def state_with(**changes):
    def change(tensors):
        state = json.loads(bytes(tensors[STATE].tolist())) | changes
        kept = {key: value for key, value in state.items() if value is not None}
        tensors[STATE] = torch.tensor(list(json.dumps(kept).encode()), dtype=torch.uint8)

    return change


def without(name):
    return lambda tensors: tensors.pop(name)


def having(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(("change", "message"), [
    (without("weight"), "^weight is missing; there are weight.absmax, "),
    (without(STATE), f"^{STATE} is missing"),
    (without("weight.nested_absmax"), "^weight.nested_absmax is missing"),
    (having("weight.quant_map", torch.linspace(-1, 1, 16)), "^weight.quant_map is not the table of nf4$"),
    (having("weight.absmax", torch.ones(4, 256, dtype=torch.bfloat16)),
     r"^weight.absmax is torch.bfloat16 of shape \(4, 256\): torch.uint8 with 1 dimension is needed$"),
    (having("weight.absmax", torch.ones(191, dtype=torch.uint8)),
     r"^scale, .* of shape \(191,\): .* \(192,\) is needed"),
    (having("weight", torch.ones(6143, 1, dtype=torch.uint8)),
     r"^weight, in bytes, is of shape \(6143,\): \(6144,\) is needed, as its shape is \(48, 256\)$"),
    (having(STATE, torch.tensor([123, 255, 10], dtype=torch.uint8)), f"^{STATE} is not what is needed"),
    (having(STATE, torch.tensor(list(b"[]"), dtype=torch.uint8)), rf"^{STATE} is not what is needed .*: \[\]$"),
    (state_with(quant_type="fp4"), f'^{STATE} is not what is needed .*"fp4"'),
    (state_with(dtype="float64"), "is not what is needed"),
    (state_with(shape=[48, 256, 1]), "is not what is needed"),
    (state_with(shape=[48, -256]), "is not what is needed"),
    (state_with(nested_offset="1"), "is not what is needed"),
    (state_with(nested_offset=None), "is not what is needed"),
    (state_with(blocksize=128), f"^{STATE} has blocks of 128: 64 is needed$"),
    (state_with(nested_blocksize=128), f"^{STATE} has nested blocks of 128: 256 is needed"),
])  # fmt: skip
def test_wrong_tensors_are_refused(change, message):
    tensors, _ = theirs(sample((48, 256), torch.bfloat16))
    change(tensors)
    with pytest.raises(ConfigError, match=message):
        unpack_nf4(tensors, FORMATS["nf4"])


def test_scales_of_the_other_kind_are_refused():
    once, _ = theirs(torch.ones(2, 64), double=False)
    with pytest.raises(
        ConfigError, match="has nested blocks of None: 256 is needed for scales that are quantised once"
    ):
        unpack_nf4(once, FORMATS["nf4"])
    twice, _ = theirs(torch.ones(2, 64))
    with pytest.raises(ConfigError, match=r"weight.absmax is torch.uint8 .* torch.float32 with 1 dimension is needed"):
        unpack_nf4(twice, replace(FORMATS["nf4"], scale="float32"))
