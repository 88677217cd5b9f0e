import pytest
import torch

from flipproof import BitFlipSpec
from flipproof.config import load_config
from flipproof.models.build import build_model, unguarded
from flipproof.models.load import byte_tokenizer
from flipproof.world import World


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({}, ""),
        ({"w_p_exp": 1e-5, "w_zero_out_t": 4.0}, ""),
        ({"w_p_frac": 0.1, "x_p_frac": 0.1}, ""),  # a mantissa bit moves a value by less than itself
        ({"w_p_bits": {"frac": 0.1, "sign": 0.1}, "x_p_exp": 0.0}, ""),
        ({"x_zero_out_t": 4.0}, ""),
        ({"w_p_exp": 1e-5}, "bitflip.w_p_exp = 1e-05 and no w_zero_out_t"),
        ({"w_p_exp": 1e-5, "x_zero_out_t": 4.0}, "bitflip.w_p_exp = 1e-05 and no w_zero_out_t"),
        ({"kv_p_row": 1e-4}, "bitflip.kv_p_row = 0.0001 and no kv_zero_out_t"),
        ({"x_p_bits": {"14": 1e-4, "frac": 0.1}}, "bitflip.x_p_bits = {'14': 0.0001} and no x_zero_out_t"),
        (
            {"w_p_exp": 1e-5, "x_p_exp": 1e-6},
            "bitflip.w_p_exp = 1e-05 and no w_zero_out_t, bitflip.x_p_exp = 1e-06 and no x_zero_out_t",
        ),
        (  # one layer alone
            {"w_zero_out_t": 4.0, "layer_name_to_config": {"a": {"w_p_exp": 1e-5, "w_zero_out_t": None}}},
            "bitflip.w_p_exp = 1e-05 and no w_zero_out_t",
        ),
    ],
)
def test_exponent_bits_that_flip_without_a_guard(spec, said):
    assert unguarded(BitFlipSpec(**spec)) == said


@pytest.mark.parametrize("guard", [None, 4.0])
def test_flips_without_a_guard_are_one_warning_wherever_a_model_is_built(caplog, guard):
    config = load_config(
        [],
        {
            "model": {"flavor": "demo", "init": "random", "tokenizer": "bytes"},
            "bitflip": {"w_p_exp": 1e-5, "w_zero_out_t": guard},
        },
    )
    build_model(config, byte_tokenizer(), World(0, 1, torch.device("cpu")))
    found = [line for line in caplog.messages if "without a guard" in line]
    assert len(found) == (guard is None)
    assert all("(bitflip.w_p_exp = 1e-05 and no w_zero_out_t)" in line for line in found)
