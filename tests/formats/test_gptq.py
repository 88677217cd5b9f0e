"""GPTQ against packing written here from its layout, in whole numbers; AWQ against compressed-tensors' converter."""

from dataclasses import replace

import pytest
import torch
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from quantised import decompressed, same

from flipproof.errors import ConfigError
from flipproof.formats.gptq import unpack_awq, unpack_gptq
from flipproof.formats.quantise import dequantise
from flipproof.formats.spec import FORMATS, format_of

SECOND = FORMATS["int4-asym"]
FIRST = replace(SECOND, zero_plus=1)
OUT, IN = 24, 256


def words(fields):
    """A row of fields of 4 bits as words, each as the signed number that int32 has for it."""
    found = []
    for first in range(0, len(fields), 8):
        word = sum(field << 4 * place for place, field in enumerate(fields[first : first + 8]))
        found.append(word - 2**32 if word >= 2**31 else word)
    return found


def gptq(group, zero_plus, desc_act, seed=0):
    """A layer's tensors, and the weight that they are: (code − zero) · scale in float16, element by element."""
    g = torch.Generator().manual_seed(seed)
    groups = IN // group
    code = torch.randint(0, 16, (IN, OUT), generator=g)
    zero = torch.randint(zero_plus, 16 + zero_plus, (groups, OUT), generator=g)
    scale = (torch.rand(groups, OUT, generator=g) * 0.01 + 0.001).half()
    g_idx = torch.arange(IN) // group
    if desc_act:
        g_idx = g_idx[torch.randperm(IN, generator=g)]
    tensors = {
        "qweight": torch.tensor([words(column) for column in code.T.tolist()], dtype=torch.int32).T.contiguous(),
        "qzeros": torch.tensor([words(row) for row in (zero - zero_plus).tolist()], dtype=torch.int32),
        "scales": scale,
        "g_idx": g_idx.int(),
    }
    weight = torch.empty(OUT, IN, dtype=torch.float16)
    for i, place in enumerate(g_idx.tolist()):
        weight[:, i] = ((code[i] - zero[place]).double() * scale[place].double()).half()
    return tensors, weight


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("zero_plus", [0, 1])
@pytest.mark.parametrize("group", [32, 128, 256])
def test_gptq_is_what_its_layout_says(group, zero_plus, desc_act):
    tensors, weight = gptq(group, zero_plus, desc_act)
    format = replace(format_of("int4-asym", group), zero_plus=zero_plus)
    stored = unpack_gptq(tensors, format)
    assert same(dequantise(stored), weight)
    assert stored.operands["zero"].max() < 16  # of the field itself, whose bits a memory holds
    assert all(tensor.is_contiguous() for tensor in stored.operands.values())
    assert (stored.g_idx is not None) == (desc_act and group < IN)
    if not desc_act:
        tensors.pop("g_idx")
        assert same(dequantise(unpack_gptq(tensors, format)), weight)


def test_a_whole_row_is_one_group():
    tensors, weight = gptq(IN, 1, False)
    assert same(dequantise(unpack_gptq(tensors, replace(format_of("int4-asym", -1), zero_plus=1))), weight)


def test_a_stored_15_of_the_first_version_is_16():
    tensors, _ = gptq(128, 1, False)
    tensors["qzeros"] = torch.full_like(tensors["qzeros"], -1)  # all bits set
    stored = unpack_gptq(tensors, FIRST)
    expected = (stored.operands["code"].int() - 16).half() * tensors["scales"].T.repeat_interleave(128, 1)
    assert same(dequantise(stored), expected)


@pytest.mark.parametrize("group", [64, 128])
def test_awq_is_what_compressed_tensors_converts_it_to(group):
    g = torch.Generator().manual_seed(group)
    groups = IN // group
    tensors = {
        "qweight": torch.randint(-(2**31), 2**31, (IN, OUT // 8), generator=g).int(),
        "qzeros": torch.randint(-(2**31), 2**31, (groups, OUT // 8), generator=g).int(),
        "scales": (torch.rand(groups, OUT, generator=g) * 0.01).half(),
    }
    converted = AutoAWQConverter(group_size=group).process({f"l.{name}": t.clone() for name, t in tensors.items()})
    converted = {name.removeprefix("l."): tensor for name, tensor in converted.items()}
    stored = unpack_awq(tensors, format_of("int4-asym", group))
    assert same(dequantise(stored), decompressed(converted, "int4-asym", group))
    assert all(tensor.is_contiguous() for tensor in stored.operands.values())


def test_awq_by_hand():
    """Outputs 0 to 7 are in fields 0, 4, 1, 5, 2, 6, 3, 7; those of 0x75316420 are 0, 2, 4, 6, 1, 3, 5, 7."""
    tensors = {
        "qweight": torch.full((8, 1), 0x75316420, dtype=torch.int32),
        "qzeros": torch.zeros(1, 1, dtype=torch.int32),
        "scales": torch.ones(1, 8).half(),
    }
    stored = unpack_awq(tensors, format_of("int4-asym", 8))
    assert stored.operands["code"].T.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]] * 8


@pytest.mark.parametrize(("changes", "message"), [
    ({"qweight": None}, "^qweight is missing; there are g_idx, qzeros, scales$"),
    ({"qzeros": None}, "^qzeros is missing"),
    ({"qzeros": torch.ones(1, 3, dtype=torch.int32)},
     r"^qzeros is of shape \(1, 3\): \(2, 3\) is needed, as there are 2 groups and 24 out-features$"),
    ({"scales": torch.ones(2, 24, dtype=torch.int8)}, "^scales is torch.int8"),
    ({"scales": torch.ones(2, 23).half()}, r"^scale, .* of shape \(23, 2\): .* \(24, 2\) is needed"),
    ({"scales": torch.ones(4, 24).half(), "qzeros": torch.ones(4, 3, dtype=torch.int32)},
     r"^scale, .* of shape \(24, 4\): .* \(24, 2\) is needed"),
    ({"g_idx": torch.zeros(255, dtype=torch.int32)}, r"^g_idx is of shape \(255,\): \(256,\) is needed, as qweight is"),
    ({"g_idx": torch.full((256,), 2, dtype=torch.int32)}, "^g_idx goes from 2 to 2: there are 2 groups, from 0$"),
    ({"g_idx": torch.arange(-1, 255, dtype=torch.int32) // 128},
     "^g_idx goes from -1 to 1: there are 2 groups, from 0$"),
])  # fmt: skip
def test_wrong_tensors_are_refused(changes, message):
    tensors, _ = gptq(128, 1, True)
    tensors = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
    with pytest.raises(ConfigError, match=message):
        unpack_gptq(tensors, FIRST)


def test_wrong_tensors_of_awq_are_refused():
    tensors = {"qweight": torch.ones(256, 3, dtype=torch.int32), "scales": torch.ones(2, 24).half()}
    with pytest.raises(ConfigError, match=r"^qzeros is missing; there are qweight, scales$"):
        unpack_awq(tensors, SECOND)
    tensors["qzeros"] = torch.ones(2, 4, dtype=torch.int32)
    with pytest.raises(ConfigError, match=r"^qzeros is of shape \(2, 4\): \(2, 3\) is needed"):
        unpack_awq(tensors, SECOND)
