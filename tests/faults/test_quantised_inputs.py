"""Faults of quantised inputs against the same made by hand, one code and one scale at a time."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from quantised_models import quantised
from replayed import assert_a_cuda_graph_replays
from scalar_flips import scalar_masks
from scipy.stats import binomtest
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import flipproof
from flipproof import BitFlipSpec, LoraSpec, Pattern
from flipproof.errors import ConfigError
from flipproof.faults import op
from flipproof.faults.flip_log import FlipCount, FlipLog, Replay, hooked
from flipproof.faults.philox import derive_key
from flipproof.formats.inputs import coded, quantise_inputs
from flipproof.formats.linear import QuantisedLinear
from flipproof.formats.spec import FORMATS

NAMES = ["int8", "fp8"]
ELEMENTS = {"int8": "integer8", "fp8": "e4m3"}
FLIPS = {"x_code_p": 0.01, "x_scale_p_exp": 0.01, "x_scale_p_frac": 0.05}
SECDED = {"x_protection": "secded", "x_faults": "persistent"}
GPU = torch.cuda.is_available()


class Chain(nn.Module):
    def __init__(self, inputs, weights="int8", dtype=torch.float32):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.first, self.second = nn.Linear(64, 96, dtype=dtype), nn.Linear(96, 64, False, dtype=dtype)
        quantised(self, weights)
        for layer in (self.first, self.second):
            layer.inputs = FORMATS[inputs] if inputs else None

    def forward(self, x):
        return self.second(F.gelu(self.first(x)))


def sample(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def by_hand(x, name, spec, site, tick, offset=0):
    """What is computed with in the place of x: codes and scales flipped by themselves."""
    stored = quantise_inputs(x, FORMATS[name])
    flipped = {}
    for part, element, first in (("code", ELEMENTS[name], offset), ("scale", None, offset // x.shape[-1])):
        fault = spec.part(part, "x")
        flipped[part] = flipproof.flip(
            stored.operands[part],
            p_exp=fault.p_exp,
            p_frac=fault.p_frac,
            pattern=fault.pattern or Pattern(),
            element=element,
            seed=spec.base_seed,
            site=f"{site}/x_{part}",
            tick=tick,
            offset=first,
        )
    code = flipped["code"]
    number = code.to(x.dtype) - 128 if name == "int8" else code.view(torch.float8_e4m3fn).to(x.dtype)
    y = (number * flipped["scale"]).view(x.shape)
    t = spec.x_zero_out_t
    return y if t is None else torch.where(y.abs() < t, y, 0)


@pytest.mark.parametrize("name", NAMES)
def test_flips_are_those_of_the_scalar_definition(name):
    """Codes and float32 scales, bit by bit, in plain Python."""
    model = Chain(name)
    flipproof.inject(model, BitFlipSpec(**FLIPS, base_seed=5))
    layer, x = model.first, sample(2, 3, 64)
    layer.state.set_tick(4)
    layer.state.slice = 1
    found, _ = layer._inputs_of_pass(x, 0)(x)
    stored = quantise_inputs(x, FORMATS[name])
    layout = (8, 0) if name == "int8" else (8, 3)
    masks = scalar_masks(layout, 0.01, 0.01, 384, derive_key(5, "first/x_code"), 4, 384)
    of_scales = scalar_masks((32, 23), 0.01, 0.05, 6, derive_key(5, "first/x_scale"), 4, 6)
    codes = stored.operands["code"].view(-1).numpy() ^ masks.astype(np.uint8)
    scales = stored.operands["scale"].view(-1).view(torch.int32).numpy() ^ of_scales.astype(np.uint32).view(np.int32)
    scales = scales.view(np.float32).repeat(64)
    assert masks.any()
    assert of_scales.any()
    if name == "int8":
        numbers = np.array([float(code) - 128 for code in codes], dtype=np.float32)
    else:
        numbers = np.array([e4m3(int(code)) for code in codes], dtype=np.float32)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(numbers * scales)
    assert torch.equal(found.view(-1).isnan(), expected.isnan())
    assert torch.equal(found.view(-1).nan_to_num(), expected.nan_to_num())


def e4m3(code):
    sign, exponent, fraction = -1 if code >> 7 else 1, code >> 3 & 15, code & 7
    if code & 127 == 127:
        return float("nan")
    return sign * (fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"x_zero_out_t": 1.5},
        SECDED,
        {"x_protection": "parity", "x_scale_protected_bits": ("exp",)},
        {"x_burst": 3, "x_scale_p_frac": 0.01},
        {"x_p_row": 0.2, "row_bytes": 64, "x_code_p_bits": {"7": 0.1}, "x_scale_p_bits": {"sign": 0.5}},
    ],
    ids=["flips", "guard", "secded", "parity", "bursts", "rows"],
)
def test_a_layer_computes_with_what_its_flipped_codes_and_scales_stand_for(name, dtype, more):
    model, spec = Chain(name, dtype=dtype), BitFlipSpec(**FLIPS | more, base_seed=5)
    flipproof.inject(model, spec)
    layer, x = model.first, sample(5, 9, 64, dtype=dtype)
    seen = []
    for tick in (0, 1):
        layer.state.set_tick(tick)
        expected = by_hand(x, name, spec, "first", tick)
        got, product = layer(x), F.linear(expected, layer.weight, layer.bias)
        assert torch.equal(got.isnan(), product.isnan())
        assert torch.equal(got.nan_to_num(), product.nan_to_num())
        assert not torch.equal(expected, coded(x, FORMATS[name]))
        seen.append(got.nan_to_num())
    assert torch.equal(*seen) == (spec.x_faults == "persistent")
    with flipproof.faults(model, flips=False, guard=False):
        assert torch.equal(layer(x), F.linear(coded(x, FORMATS[name]), layer.weight, layer.bias))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("more", [{}, SECDED])
def test_each_slice_of_a_batch_has_its_own_flips(name, more):
    """Those of its place in the whole, codes and scales alike."""
    model = Chain(name)
    flipproof.inject(model, BitFlipSpec(**FLIPS | more, x_zero_out_t=10.0))
    layer, x = model.first, sample(4, 8, 64)
    whole = layer(x)
    for rank, half in enumerate(x.split(2)):
        layer.state.slice = rank
        torch.testing.assert_close(layer(half), whole[2 * rank : 2 * rank + 2], rtol=1e-5, atol=1e-5)
        draws = [layer._inputs_of_pass(size, 0)(half)[0].nan_to_num() for size in (half, x)]
        assert torch.equal(*draws) == (rank == 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_make_the_inputs_that_a_cpu_makes(name, dtype, monkeypatch):
    """In Triton's interpreter where there is no GPU."""
    triton_launch = pytest.importorskip("flipproof.faults.triton_launch", reason="Triton has no build here")
    model, spec = Chain(name, dtype=dtype), BitFlipSpec(**FLIPS, base_seed=5)
    flipproof.inject(model, spec)
    x = sample(40, 64, dtype=dtype)
    expected = [by_hand(x, name, spec, "first", tick) for tick in (0, 1)]
    if GPU:
        model.cuda()
    else:
        monkeypatch.setattr(op, "_backend", lambda _, draw=None: triton_launch)
    for tick, inputs in enumerate(expected):
        model.first.state.set_tick(tick)
        there = x.to(model.first.bias.device)
        got, _ = model.first._inputs_of_pass(there, 0)(there)
        assert got.device == there.device
        assert torch.equal(got.cpu().nan_to_num(), inputs.nan_to_num())
    assert not torch.equal(*(inputs.nan_to_num() for inputs in expected))


@pytest.mark.parametrize("name", NAMES)
def test_each_stored_bit_flips_at_its_rate(name):
    """Fails without cause less than once in 10⁷ runs."""
    model = Chain(name)
    spec = BitFlipSpec(x_code_p=0.01, x_code_p_bits={"7": 0.03}, x_scale_p_exp=0.02, x_scale_p_frac=0.002)
    flipproof.inject(model, spec)

    class Bits(FlipCount):
        found: dict = {}  # noqa: RUF012

        def changed(self, name, draw, dtype, changes):
            for bit in range(dtype.itemsize * 8):
                key = name.partition("/")[2], bit
                self.found[key] = self.found.get(key, 0) + int((changes.bits >> bit & 1).sum())

    with torch.no_grad(), hooked(model, count := Bits()):
        model.first(sample(5000, 64))
    rates = {("x_code", bit): 0.03 if bit == 7 else 0.01 for bit in range(8)}
    rates |= {("x_scale", bit): 0.02 if bit >= 23 else 0.002 for bit in range(32)}
    assert count.found.keys() == rates.keys()
    for (operand, bit), p in rates.items():
        n = 5000 * (64 if operand == "x_code" else 1)
        assert binomtest(count.found[operand, bit], n, p).pvalue > 1e-9


# --- gradients


class StraightThrough(torch.autograd.Function):
    """A value given, whose gradient is that of x where it was kept."""

    @staticmethod
    def forward(ctx, x, value, kept):
        ctx.kept = kept
        return value

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.kept, None, None


def lost_codes(name, spec, shape, site, tick):
    """Where the protection loses a code, or its token's scale: whatever was there, the same is there then."""
    found = []
    for part, element, size, values in (
        ("code", ELEMENTS[name], shape, [torch.tensor(pattern, dtype=torch.uint8) for pattern in (0x55, 0xAA)]),
        ("scale", None, (shape[0], 1), [torch.tensor(number) for number in (1.0, 1.5)]),
    ):
        fault = spec.part(part, "x")
        how = {"p_exp": fault.p_exp, "p_frac": fault.p_frac, "pattern": fault.pattern, "element": element}
        where = {"seed": spec.base_seed, "site": f"{site}/x_{part}", "tick": tick}
        one, two = (flipproof.flip(value.expand(size), **how, **where) for value in values)
        bits = torch.int32 if part == "scale" else torch.uint8
        found.append((one.view(bits) == two.view(bits)).expand(shape))
    assert found[1].any()
    return found[0] | found[1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("more", [{}, {"x_zero_out_t": 1.5}, SECDED | {"x_zero_out_t": 2.0}], ids=str)
def test_gradients_are_those_of_a_straight_through_estimate(name, weights, checkpointed, more):
    model, spec = (
        Chain(name, weights),
        BitFlipSpec(**FLIPS | {"x_zero_out_t": 1e9} | more, w_code_p=0.01, w_zero_out_t=0.5),
    )
    flipproof.inject(model, spec, LoraSpec(r=4, lora_alpha=8))
    layer = model.first
    layer.checkpointed = checkpointed
    with torch.no_grad():
        layer.lora_B.normal_(generator=torch.Generator().manual_seed(1))
    x = sample(3, 20, 64).requires_grad_()
    direction = torch.randn(3, 20, 96, generator=torch.Generator().manual_seed(2))
    layer.state.set_tick(3)
    (layer(x) * direction).sum().backward()
    got = [x.grad, layer.lora_A.grad, layer.lora_B.grad]

    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, layer.lora_A, layer.lora_B)]
    value = by_hand(x.detach(), name, spec, "first", 3)
    unguarded = by_hand(x.detach(), name, BitFlipSpec(**FLIPS | more | {"x_zero_out_t": None}), "first", 3)
    kept = unguarded.abs() < spec.x_zero_out_t
    assert not more or 0 < (~kept).sum() < kept.numel() / 2
    if "x_protection" in more:
        lost = lost_codes(name, spec, (60, 64), "first", 3).view(x.shape)
        assert 0 < lost.sum() < lost.numel()
        kept &= ~lost
    flipped = StraightThrough.apply(leaves[0], value, kept)
    weight = layer._weight_of_pass(x, torch.float32, 0)()
    y = flipped @ weight.T + 2 * (flipped @ leaves[1].T) @ leaves[2].T
    (y * direction).sum().backward()
    for mine, leaf in zip(got, leaves, strict=True):
        torch.testing.assert_close(mine, leaf.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_without_faults_the_gradient_passes_straight_through(name):
    model = Chain(name)
    flipproof.inject(model, BitFlipSpec(x_code_p=0.01))
    x = sample(3, 64).requires_grad_()
    with flipproof.faults(model, flips=False):
        model.first(x).sum().backward()
    torch.testing.assert_close(x.grad, model.first.weight.sum(0).expand(3, 64))


def test_backward_repeats_the_faults_under_activation_checkpointing(tiny_llama, token_ids):
    found = []
    for checkpointing in (False, True):
        model = of_llama(tiny_llama, "int8").train()
        spec = BitFlipSpec(**FLIPS, x_zero_out_t=8.0, w_code_p=0.001)
        flipproof.inject(model, spec, LoraSpec(r=2, dropout=0.1))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for _ in range(2):
            model(token_ids, labels=token_ids).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert any(grad.abs().sum() > 0 for grad in found[0])
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


# --- models


def of_llama(tiny_llama, inputs, weights="int8"):
    model = quantised(tiny_llama(), weights)
    for layer in model.modules():
        if isinstance(layer, QuantisedLinear):
            layer.inputs = FORMATS[inputs]
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("more", [{}, SECDED, {"x_protection": "parity"}], ids=str)
def test_a_log_replays_to_the_same_bits(tiny_llama, token_ids, tmp_path, name, more):
    model = of_llama(tiny_llama, name)
    flipproof.inject(model, BitFlipSpec(**FLIPS | more, x_zero_out_t=4.0, w_code_p=0.001, w_zero_out_t=1.0))
    with torch.no_grad():
        drawn = model(token_ids).logits
        flipproof.set_tick(model, 0)
        with FlipLog(tmp_path / "log", dtype="float32") as log, hooked(model, log):
            logged = model(token_ids).logits
        flipproof.set_seed(model, 77)
        replay = Replay(tmp_path / "log")
        with hooked(model, replay):
            replayed = model(token_ids).logits
    replay.check_all_done()
    assert torch.equal(drawn, logged)
    assert torch.equal(drawn, replayed)
    assert {"x_code", "x_scale", "w_code"} <= log.flipped_bits.keys()
    assert log.zeroed["x"] > 0
    assert log.flipped_bits["x"] == 0
    assert log.flipped_bits == replay.flipped_bits
    assert log.zeroed == replay.zeroed


def test_a_model_takes_faults_and_loses_them(tiny_llama, token_ids):
    model = of_llama(tiny_llama, "fp8")
    before, plain = model(token_ids).logits, quantised(tiny_llama(), "int8")(token_ids).logits
    assert not torch.equal(before, plain)
    coverage = flipproof.inject(model, BitFlipSpec(x_code_p=0.01, x_zero_out_t=20.0))
    assert len(coverage.covered) == 14
    assert "x_code" not in str(model.state_dict().keys())
    assert not torch.equal(model(token_ids).logits, before)
    again = copy.deepcopy(model)
    flipproof.set_tick(model, 9), flipproof.set_tick(again, 9)
    assert torch.equal(model(token_ids).logits, again(token_ids).logits)
    flipproof.remove(model)
    assert torch.equal(model(token_ids).logits, before)


def test_other_faults_are_those_that_inject_would_have_made(tiny_llama, token_ids):
    first, second = of_llama(tiny_llama, "int8"), of_llama(tiny_llama, "int8")
    spec = BitFlipSpec(**FLIPS, x_zero_out_t=20.0, base_seed=8)
    flipproof.inject(first, BitFlipSpec(x_code_p=0.1))
    flipproof.set_faults(first, spec)
    flipproof.inject(second, spec)
    assert torch.equal(first(token_ids).logits, second(token_ids).logits)


def test_a_head_that_is_plain_has_the_keys_of_numbers(tiny_llama, token_ids):
    model = of_llama(tiny_llama, "int8")
    flipproof.inject(model, BitFlipSpec(x_code_p=0.01, x_p_frac=0.1, sites=("linear", "head")))
    with torch.no_grad(), hooked(model, count := FlipCount()):
        model(token_ids)
    inputs = token_ids.numel() * 32
    assert 0 < count.flipped_bits["x"] < 0.2 * 23 * inputs  # of the head alone
    assert count.flipped_bits["x_code"] > 0


# --- on a GPU


class Operators(TorchDispatchMode):
    """Lists all that run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.seen.append(str(operator))
        return operator(*args, **kwargs or {})


def trained(name, checkpointed=False):
    """A layer with every fault of inputs that is drawn anew in each pass, guard and adapters; after one pass."""
    root = nn.Sequential(Chain(name).first)
    flipproof.inject(root, BitFlipSpec(**FLIPS, x_zero_out_t=4.0), LoraSpec(r=2, dropout=0.1))
    root[0].checkpointed = checkpointed
    with torch.no_grad():
        root[0].lora_B.normal_(generator=torch.Generator().manual_seed(1))
    root.to("cuda" if GPU else "cpu")
    root(torch.ones(3, 64, device=root[0].bias.device)).sum().backward()
    return root


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_no_pass_looks_at_a_number_or_takes_one_to_the_device(name, checkpointed):
    """What would make a GPU wait, or a CUDA graph impossible."""
    root = trained(name, checkpointed)
    x = torch.ones(3, 64, device=root[0].bias.device, requires_grad=True)
    with Operators() as operators:
        root(x).sum().backward()
    waits = ("_local_scalar_dense", "nonzero", "equal.", "lift_fresh", "repeat_interleave.Tensor", "masked_select")
    assert "flipproof.flip_.default" in operators.seen
    assert not [seen for seen in operators.seen if any(wait in seen for wait in waits)]


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_cuda_graph_replays_the_layer(name, checkpointed):
    assert_a_cuda_graph_replays(trained(name, checkpointed), 3, 64)


# --- refusals


@pytest.mark.parametrize(
    ("inputs", "keys", "problem"),
    [
        ("int8", {"x_p_exp": 1e-5}, "bitflip.x_p_exp = 1e-05: the inputs are int8, of which bits of codes and scales "
         "flip; x_code_p, x_scale_p_exp and x_scale_p_frac are the keys"),
        ("fp8", {"x_p_bits": {"exp": 0.1}}, "bitflip.x_p_bits = .*: the inputs are fp8, of which"),
        ("fp8", {"x_protected_bits": ("exp",)}, "bitflip.x_protected_bits = .*: the inputs are fp8, of which"),
        ("int8", {"x_code_p_bits": {"8": 0.1}}, "bitflip.x_code_p_bits or .*, of int8: bit '8': integer8 has bits 0"),
        ("int8", {"x_code_p_bits": {"exp": 0.1}}, "bit 'exp': integer8 has bits 0 to 7 and no such part"),
        ("fp8", {"x_scale_p_exp": 0.1, "x_burst": 3}, "bitflip.x_burst = 3: runs of bits need one probability for all "
         "bits of a scale: x_scale_p_exp = x_scale_p_frac, without"),
        ("fp8", {"x_scale_p_bits": {"16": 0.1}}, "bit '16': bfloat16 has bits 0 to 15"),
        (None, {"x_code_p": 0.1}, r"bitflip.x_code_p = 0.1: the inputs are not quantised \(model.quantize_inputs\); of "
         "plain inputs x_p_exp and x_p_frac are the keys"),
        (None, {"x_scale_p_exp": 0.1}, r"bitflip.x_scale_p_exp = 0.1: the inputs are not quantised"),
        ("fp8", {"x_code_p": 0.7}, "x_code_p = 0.7: a flip probability from 0 to 0.5"),
    ],
)  # fmt: skip
def test_faults_of_what_inputs_do_not_have_are_refused_in_a_line(inputs, keys, problem):
    model = Chain(inputs)
    with pytest.raises(ConfigError, match=problem) as raised:
        flipproof.inject(model, BitFlipSpec(**keys))
    assert "\n" not in str(raised.value)
    assert isinstance(model.first, QuantisedLinear)


def test_faults_of_codes_of_inputs_need_codes(tiny_llama):
    with pytest.raises(ConfigError, match=r"bitflip.x_code_p = 0.1: the inputs are not quantised"):
        flipproof.inject(tiny_llama(), BitFlipSpec(x_code_p=0.1))
