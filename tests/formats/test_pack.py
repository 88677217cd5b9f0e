import pytest
import torch
from quantised import same, sample

from flipproof.errors import ConfigError
from flipproof.formats.pack import pack, unpack
from flipproof.formats.quantise import quantise
from flipproof.formats.spec import FORMATS


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "fp8-e5m2"])
def test_what_is_packed_is_unpacked(name):
    stored = quantise(sample((20, 256), torch.bfloat16), name)
    stored.operands["code"].bitwise_xor_(5)  # patterns that rounding does not make
    tensors = pack(stored)
    for given in (name, FORMATS[name]):
        back = unpack(tensors | {"bias": torch.ones(20), "input_scale": torch.ones(1)}, given)
        assert back.operands.keys() == stored.operands.keys()
        assert all(same(back.operands[key], stored.operands[key]) for key in stored.operands)
        assert (back.format, back.dtype, back.g_idx) == (stored.format, stored.dtype, None)


def test_an_unknown_format_is_refused():
    with pytest.raises(ConfigError, match=r"^format = 'q4_0': int8, "):
        unpack({}, "q4_0")
