import pytest
import torch
from quantised import sample

from flipproof.errors import ConfigError
from flipproof.formats.quantise import quantise
from flipproof.formats.spec import FORMATS
from flipproof.formats.stored import Stored


def made_with(name, drop=(), dtype=torch.bfloat16, g_idx=None, **changes):
    stored = quantise(sample((4, 128), torch.bfloat16), name)
    operands = {key: tensor for key, tensor in stored.operands.items() if key not in drop} | changes
    return Stored(FORMATS[name], operands, dtype, g_idx)


def test_every_problem_is_named_at_once():
    with pytest.raises(ConfigError) as caught:
        made_with("int4-asym", drop=("zero",), scale=torch.ones(4, 2, dtype=torch.bfloat16), nested=torch.ones(1))
    assert caught.value.problems == [
        "nested is no operand of int4-asym, which has code, scale, zero",
        "scale, an operand of int4-asym, is torch.bfloat16 of shape (4, 2): torch.bfloat16 of shape (4, 1) is needed "
        "for a weight of shape (4, 128)",
        "zero, an operand of int4-asym, is missing",
    ]


@pytest.mark.parametrize(("changes", "message"), [
    ({"drop": ("code",)}, r"^code, an operand of nvfp4, is missing: a tensor \(out, in\) is needed$"),
    ({"code": torch.zeros(512, dtype=torch.uint8)}, r"^code, .* is of shape \(512,\): a tensor \(out, in\) is needed$"),
    ({"code": torch.zeros(4, 128)}, r"^code, .* is torch.float32 of shape \(4, 128\): torch.uint8 of"),
    ({"code": torch.zeros(4, 120, dtype=torch.uint8)}, r"^nvfp4 has groups of 16 in-features, .* has 120"),
    ({"scale": torch.zeros(4, 8)}, r"^scale, .* is torch.float32 of shape \(4, 8\): torch.uint8 of shape \(4, 8\)"),
    ({"global": torch.tensor(1.0)}, r"^global, .* of shape \(\): torch.float32 of shape \(1,\) is needed"),
    ({"dtype": torch.float64}, r"^a weight of torch.float64: torch.bfloat16, torch.float16, torch.float32 are"),
])  # fmt: skip
def test_wrong_operands_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        made_with("nvfp4", **changes)


def test_scales_have_the_dtype_of_the_weight():
    with pytest.raises(ConfigError, match=r"scale, .* is torch.bfloat16 .*: torch.float16 of shape \(4, 1\) is needed"):
        made_with("int8", dtype=torch.float16)


@pytest.mark.parametrize(("g_idx", "message"), [
    (torch.zeros(128), r"^g_idx is torch.float32 of shape \(128,\): torch.int32 of \(128,\) is needed$"),
    (torch.zeros(4, dtype=torch.int32), r"^g_idx is torch.int32 of shape \(4,\)"),
])  # fmt: skip
def test_wrong_groups_are_refused(g_idx, message):
    with pytest.raises(ConfigError, match=message):
        made_with("int4-asym", g_idx=g_idx)
