"""Bits that a memory holds for a weight, counted by hand, and which operands flip under each cell of a grid."""

import pytest
import torch
from quantised_models import GROUPS, quantised
from torch import nn

import flipproof
from flipproof import BitFlipSpec
from flipproof.config import load_config
from flipproof.errors import ConfigError
from flipproof.faults.inject import iter_faulty
from flipproof.formats.linear import QuantisedLinear
from flipproof.formats.spec import FORMATS
from flipproof.sweep.table import Grid, all_that_flips, rates_of, resolved
from flipproof.sweep.weights import stored_bits

ROWS, COLUMNS = 32, 256
N = ROWS * COLUMNS
BY_HAND = {
    "int8": (8, 16 / 256, 0),
    "int4": (4, 16 / 128, 0),
    "int4-asym": (4, 16 / 128, 4 / 128),
    "fp8": (8, 16 / 256, 0),
    "fp8-e5m2": (8, 16 / 256, 0),
    "nf4": (4, 8 / 64, 32 * (1 + 1 + 256) / N),  # 128 scales share one nested; the offset; the map
    "mxfp8": (8, 8 / 32, 0),
    "mxfp4": (4, 8 / 32, 0),
    "nvfp4": (4, 8 / 16, 32 / N),
}
"""Of a weight (32, 256) of bfloat16: bits for each of its elements in codes, in scales, in the rest."""


def layer(name):
    return QuantisedLinear.of(nn.Linear(COLUMNS, ROWS, bias=False, dtype=torch.bfloat16), FORMATS[name])


@pytest.mark.parametrize("name", FORMATS)
def test_bits_of_a_weight_by_hand(name):
    code, scale, rest = BY_HAND[name]
    found = stored_bits([layer(name)] * 2, "bfloat16", BitFlipSpec())
    assert found == pytest.approx({"w": code + scale + rest, "code": code, "scale": scale}, rel=1e-12)


def test_bits_of_a_protection_are_stored_too():
    everything = {"w_code_p": 0.5, "w_scale_p_exp": 0.5, "w_scale_p_frac": 0.5, "w_zero_p": 0.5}

    def bits(name, **keys):
        return stored_bits([layer(name)], "bfloat16", BitFlipSpec(**everything, **keys))

    assert bits("int4", w_protection="secded") == pytest.approx(
        {"w": 4.125 * 1.125, "code": 4.5, "scale": 0.125 * 1.125}
    )
    # a bit for each code, scale and zero point
    assert bits("int4-asym", w_protection="parity") == pytest.approx(
        {"w": 4 + 1 + (16 + 1 + 4 + 1) / 128, "code": 5, "scale": 17 / 128}
    )
    tripled = bits("int4", w_scale_protected_bits=("sign", "exp"))
    assert tripled == pytest.approx({"w": 4 + (16 + 2 * 9) / 128, "code": 4, "scale": (16 + 2 * 9) / 128})
    plain = [nn.Linear(COLUMNS, ROWS, dtype=torch.bfloat16)]
    assert stored_bits(plain, "bfloat16", BitFlipSpec()) == {"w": 16}
    assert stored_bits(plain, "bfloat16", BitFlipSpec(w_p_exp=0.5, w_protected_bits=("exp",))) == {"w": 16 + 2 * 8}


def grid(model, bitflip=None, **sweep):
    tables = {"model": {"hf_model_path": "some/model"}, "bitflip": bitflip or {}, "sweep": {"p": "1e-3"} | sweep}
    config = resolved(load_config([], tables))
    flipproof.inject(model, all_that_flips(config))
    return Grid(config, rates_of(config.sweep), model, "float32")


@pytest.mark.parametrize("name", GROUPS)
def test_each_site_flips_its_own_operands_at_p(tiny_llama, name):
    model = quantised(tiny_llama(), name)
    found = grid(model, sites="w,code,scale,x,wx", protection="none,secded")
    every = {operand for operand in next(iter_faulty(model))[1]._buffers if operand != "g_idx"}
    meant = {"w": every, "wx": every, "code": {"code"}, "scale": {"scale"}, "x": set()}
    assert len(found.plan.cells) == 2 * 5
    for cell in found.plan.cells:
        flipproof.set_faults(model, found.spec(cell))
        for _, faulty in iter_faulty(model):
            assert set(faulty.operand_faults) == meant[cell.sites]
            for fault in faulty.operand_faults.values():
                pattern = fault.fault.pattern
                bits = pattern.bit_probabilities(1e-3, 1e-3, "float32") if pattern else ()
                assert set(bits) <= {1e-3}
                assert (pattern is not None) == (cell.protection == "secded")
            assert faulty.x_fault.flips == ("x" in cell.sites)


def with_inputs(model, name):
    for module in model.modules():
        if isinstance(module, QuantisedLinear):
            module.inputs = FORMATS[name]
    return model


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_of_quantised_inputs_codes_and_scales_flip_at_p(tiny_llama, name):
    model = with_inputs(quantised(tiny_llama(), "int4"), name)
    found = grid(model, sites="w,x,wx", protection="none,secded,tmr-exp")
    assert len(found.plan.cells) == 3 * 3
    for cell in found.plan.cells:
        flipproof.set_faults(model, spec := found.spec(cell))
        for _, faulty in iter_faulty(model):
            assert set(faulty.input_faults) == ({"code", "scale"} if "x" in cell.sites else set())
            assert bool(faulty.operand_faults) == ("w" in cell.sites)
            assert not faulty.x_fault.flips
            for operand, fault in faulty.input_faults.items():
                pattern = fault.fault.pattern
                assert (pattern is None) == (
                    cell.protection == "none" or (operand, cell.protection) == ("code", "tmr-exp")
                )
                bits = pattern.bit_probabilities(1e-3, 1e-3, "float32") if pattern else ()
                tripled = 3e-6 - 2e-9 if (operand, cell.protection) == ("scale", "tmr-exp") else 1e-3
                assert set(bits) <= {1e-3, tripled}
        own = ("exp",) if cell.protection == "tmr-exp" else ()
        assert spec.x_scale_protected_bits == (own if "x" in cell.sites else ())


def test_what_is_tripled_are_bits_of_scales_and_of_plain_weights(tiny_llama):
    found = grid(quantised(tiny_llama(), "int4"), sites="w", protection="tmr-sign+exp")
    spec = found.spec(found.plan.cells[0])
    assert (spec.w_scale_protected_bits, spec.w_protected_bits) == (("sign", "exp"), ())
    found = grid(tiny_llama(), sites="w", protection="tmr-sign+exp")
    spec = found.spec(found.plan.cells[0])
    assert (spec.w_scale_protected_bits, spec.w_protected_bits) == ((), ("sign", "exp"))


@pytest.mark.parametrize(
    ("name", "bitflip", "sweep", "words"),
    [
        (None, {}, {"sites": "w,code"}, "sweep.sites = code: the weights are not quantised (model.quantize"),
        ("int4", {}, {"sites": "w", "bits": "exp"}, "sweep.bits = exp: of quantised weights and inputs all bits flip"),
        ("int4", {"w_p_row": 0.1}, {"sites": "w,code"}, "bitflip.w_p_row = 0.1: a bad row is one of any operand"),
        ("int8+int8", {}, {"sites": "x", "bits": "exp"}, "sweep.bits = exp: of quantised weights and inputs all bits"),
        (
            "int8+int8",
            {"x_scale_protected_bits": ["7"]},
            {"sites": "x"},
            "x_scale_protected_bits = ('7',): a sweep takes",
        ),
        ("nf4", {}, {"sites": "w", "protection": "tmr-exp"}, "bit 'exp': nf4-scale has bits 0 to 7"),
        ("nf4", {"w_scale_protected_bits": ["7"]}, {"sites": "w"}, "takes that from sweep.protection (tmr-BITS)"),
        (
            "int4",
            {"layer_name_to_config": {"a": {"w_code_p": 0.1}}},
            {"sites": "w"},
            "layer_name_to_config 'a': sets w_code_p, which the sweep's points set",
        ),
    ],
)
def test_what_quantised_weights_cannot_be_is_refused(tiny_llama, name, bitflip, sweep, words):
    weights, _, inputs = (name or "").partition("+")
    model = quantised(tiny_llama(), weights) if weights else tiny_llama()
    model = with_inputs(model, inputs) if inputs else model
    with pytest.raises(ConfigError) as error:
        grid(model, bitflip, **sweep)
    (problem,) = error.value.problems
    assert words in problem


def test_weights_stored_in_several_ways_are_refused(tiny_llama):
    model = quantised(tiny_llama(), "int8", but=("lm_head", "q_proj"))
    with pytest.raises(ConfigError, match=r"stored in several ways \(int8, plain\); name the layers of one"):
        grid(model, sites="w")


def test_a_guard_of_scales_is_a_guard(tiny_llama):
    found = grid(quantised(tiny_llama(), "int4"), {"w_scale_zero_out_t": 0.5}, sites="w", protection="none,guard")
    thresholds = {cell.protection: found.spec(cell).w_scale_zero_out_t for cell in found.plan.cells}
    assert thresholds == {"none": None, "guard": 0.5}
    assert grid(quantised(tiny_llama(), "int4"), {"w_scale_zero_out_t": 0.5}, sites="w").protections == ["guard"]
