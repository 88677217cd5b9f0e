import pytest
import torch

from flipproof import BitFlipSpec
from flipproof.config import load_config
from flipproof.models.build import build_model, unguarded
from flipproof.models.load import byte_tokenizer, compute_context
from flipproof.models.loss import next_token_loss
from flipproof.models.parallelize import blocks
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


@pytest.mark.parametrize(
    ("dtype", "between"),
    # FSDP casts all that is computed with; sums of a residual stream leave float16's range
    [("bfloat16", torch.bfloat16), ("float16", torch.float32), (None, torch.float32)],
)
def test_what_passes_between_blocks_is_in_the_computed_dtype(token_ids, dtype, between):
    config = load_config(
        [],
        {
            "model": {"flavor": "demo", "init": "random", "tokenizer": "bytes"},
            "training": {"dtype": "float32", "mixed_precision_param": dtype},
        },
    )
    model, seen = build_model(config, byte_tokenizer(), World(0, 1, torch.device("cpu"))), []
    for block in blocks(model):
        block.register_forward_pre_hook(lambda _block, args: seen.append(args[0].dtype))
    with compute_context(config.training, model):
        next_token_loss(model, token_ids % 256).backward()
    assert seen == [between] * 4
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
