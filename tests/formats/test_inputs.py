"""Inputs that are quantised as they come, against compressed-tensors bit for bit."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationStatus, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, forward_quantize, quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from quantised import FLOATS, same
from torch import nn

from flipproof.formats.inputs import coded, quantise_inputs, straight_through
from flipproof.formats.linear import QuantisedLinear
from flipproof.formats.quantise import quantise
from flipproof.formats.spec import FORMATS

INPUTS = [("int8", "W8A8"), ("int8", "W4A8"), ("fp8", "FP8_DYNAMIC"), ("fp8", "W4AFP8")]
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def sample(dtype, broken=True):
    """(3, 40, 129), of magnitudes from 10⁻⁸ to 1000: tokens of zeros, of −0, of ties, and some that are not finite."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 40, 129, generator=g) * torch.logspace(-8, 3, 40)[:, None]
    x[0, 0] = 0
    x[0, 1, ::2] = -0.0
    x[0, 2] = torch.arange(129) / 2 - 127.5  # a scale of 1
    x[0, 3] = -x[0, 2]
    if broken:
        x[1, 2, 5], x[1, 3, 5], x[1, 4, 5:7] = torch.inf, torch.nan, torch.tensor([torch.inf, torch.nan])
    return x.to(dtype)


def scheme(preset):
    return preset_name_to_scheme(preset, ["Linear"]).input_activations


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("name", "preset"), INPUTS)
def test_codes_and_scales_are_those_of_compressed_tensors(name, preset, dtype):
    x, args = sample(dtype), scheme(preset)
    scale, zero = compute_dynamic_scales_and_zp(x, args, None)
    expected = quantize(x, scale, zero, args, dtype=CODES[name])
    stored = quantise_inputs(x, FORMATS[name])
    assert same(stored.operands["scale"].view(scale.shape).nan_to_num(), scale.nan_to_num())
    code = stored.operands["code"].view(x.shape)
    code = (code ^ 0x80).view(torch.int8) if name == "int8" else code.view(torch.float8_e4m3fn)
    finite = scale.isfinite().expand_as(x)
    assert 0 < (~finite).sum() < finite.sum()
    assert torch.equal(code.view(torch.uint8)[finite], expected.view(torch.uint8)[finite])
    assert not code[~finite].float().any()  # where theirs are whatever a cast of NaN gives
    numbers = dequantize(expected, scale, zero, args)
    assert same(coded(x, FORMATS[name])[finite], numbers[finite])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("name", "preset"), INPUTS)
def test_what_is_computed_with_is_their_fake_quantisation(name, preset, dtype):
    """Whose zeros may have a sign, since it has no codes; a token that is not finite is all NaN."""
    module = nn.Module()
    module.quantization_status = QuantizationStatus.FROZEN
    x = sample(dtype)
    expected, found = forward_quantize(module, x, "input", scheme(preset)), coded(x, FORMATS[name])
    assert found.dtype == dtype
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isnan().any(-1), ~x.isfinite().all(-1))
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("name", CODES)
def test_a_row_is_a_token_whatever_the_shape(name):
    x = sample(torch.bfloat16, broken=False)
    found = coded(x, FORMATS[name])
    assert same(coded(x.view(-1, 129), FORMATS[name]), found.view(-1, 129))
    assert same(coded(x[1, 7], FORMATS[name]), found[1, 7])
    assert same(coded(x.transpose(0, 1), FORMATS[name]), found.transpose(0, 1))
    assert coded(x[:0], FORMATS[name]).shape == (0, 40, 129)


@pytest.mark.parametrize("name", CODES)
def test_no_number_is_further_from_its_code_than_half_a_step(name):
    """So the gradient that passes straight through is that of something which follows the input everywhere."""
    x = sample(torch.float32, broken=False)
    scale = quantise_inputs(x, FORMATS[name]).operands["scale"].view(3, 40, 1)
    error = (coded(x, FORMATS[name]) - x).abs()
    step = scale if name == "int8" else torch.maximum(x.abs() / 8, scale * 2.0**-9)  # e4m3's, normal or not
    assert (error <= 0.5001 * step).all()


@pytest.mark.parametrize("name", CODES)
def test_the_gradient_passes_straight_through(name):
    x = sample(torch.float32, broken=False).requires_grad_()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    y = straight_through(x, FORMATS[name])
    assert same(y.detach(), coded(x, FORMATS[name]))
    (y * direction).sum().backward()
    assert torch.equal(x.grad, direction)


@pytest.mark.parametrize("name", CODES)
def test_a_layer_quantises_what_comes_in_the_dtype_that_is_computed_with(name):
    linear = nn.Linear(129, 8)
    layer = QuantisedLinear(quantise(linear.weight, "int8"), linear.bias)
    x = sample(torch.float32, broken=False)
    plain = layer(x)
    layer.inputs = FORMATS[name]
    assert torch.equal(layer(x), nn.functional.linear(coded(x, FORMATS[name]), layer.weight, layer.bias))
    assert not torch.equal(layer(x), plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, x = layer(x), coded(x.bfloat16(), FORMATS[name])
        assert torch.equal(y, nn.functional.linear(x, layer.weight, layer.bias))
