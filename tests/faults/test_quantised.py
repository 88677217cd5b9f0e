"""Faults of quantised weights against the same made by hand: operands flipped one by one, then dequantised."""

import copy
import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from guards_by_hand import guards_of, scales_of
from quantised_models import GROUPS, quantised
from replayed import assert_a_cuda_graph_replays
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import flipproof
from flipproof import BitFlipSpec, LoraSpec, Pattern
from flipproof.errors import ConfigError
from flipproof.faults import op
from flipproof.faults.fault import GRANULARITIES, Fault
from flipproof.faults.fitted import read_guards
from flipproof.faults.flip_log import FlipLog, Replay, hooked
from flipproof.faults.quantised import PART_OF, FaultyQuantisedLinear, elements
from flipproof.formats.linear import QuantisedLinear
from flipproof.formats.quantise import dequantise, quantise
from flipproof.formats.spec import FORMATS, format_of

EVERY_PART = {"w_code_p": 0.01, "w_scale_p_exp": 0.02, "w_scale_p_frac": 0.03, "w_zero_p": 0.05, "w_global_p": 0.001}
INFINITY = torch.tensor(torch.inf)
NO_FRACTION = ("mxfp8", "mxfp4", "nf4")
NO_GLOBAL = [name for name in FORMATS if name not in ("nf4", "nvfp4")]


def rates(name, **more):
    """Rates of all that a format has."""
    out = {"w_zero_p"} - ({"w_zero_p"} if name == "int4-asym" else set())
    out |= {"w_global_p"} if name in NO_GLOBAL else set()
    out |= {"w_scale_p_frac"} if name in NO_FRACTION else set()
    return {key: p for key, p in EVERY_PART.items() if key not in out} | more


class Chain(nn.Module):
    def __init__(self, name, dtype=torch.float32, bias=True):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.first, self.second = nn.Linear(64, 96, bias, dtype=dtype), nn.Linear(96, 64, False, dtype=dtype)
        quantised(self, name)

    def forward(self, x):
        return self.second(F.gelu(self.first(x)))


def flipped(layer, spec, tick):
    """What a layer has stored, each operand flipped by itself, from the layer's own site."""
    stored = layer.stored()
    site = {"seed": spec.base_seed, "tick": tick}
    operands = {}
    for name, tensor in stored.operands.items():
        fault = spec.part(PART_OF[name])
        operands[name] = flipproof.flip(
            tensor,
            p_exp=fault.p_exp,
            p_frac=fault.p_frac,
            pattern=fault.pattern or Pattern(),
            element=elements(stored.format)[name],
            site=f"{layer.site}/w_{name}",
            **site,
        )
    return type(stored)(stored.format, operands, stored.dtype, stored.g_idx)


def by_hand(layer, spec, tick, cut=False):
    """The weight of a layer as its faults make it.

    With ``cut``, bfloat16 as Triton's interpreter makes it of float32, which a GPU rounds."""
    changed = flipped(layer, spec, tick)
    scale_t, t = spec.w_scale_zero_out_t, spec.w_zero_out_t
    if spec.guards:  # of margin 1: what is above the largest clean number goes
        maxima = read_guards(spec.guards).maxima
        scale_t, t = (maxima[f"{layer.site}/{key}"].nextafter(INFINITY) for key in ("w_scale", "w"))
    guard = None if scale_t is None else lambda scale: torch.where(scale.abs().float() < scale_t, scale, 0)
    if cut:
        parts = changed.operands.items()
        operands = {name: part.float() if part.dtype == torch.bfloat16 else part for name, part in parts}
        whole = dequantise(type(changed)(changed.format, operands, torch.float32, changed.g_idx), torch.float32, guard)
        weight = (whole.view(torch.int32) & -(2**16)).view(torch.float32).bfloat16()
    else:
        weight = dequantise(changed, layer.dtype, guard)
    return weight if t is None else torch.where(weight.abs().float() < t, weight, 0)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"w_zero_out_t": 0.3, "w_scale_zero_out_t": 0.5},
        {"w_faults": "persistent", "w_protection": "secded"},
        {"w_p_row": 0.2, "row_bytes": 64, "w_protection": "parity", "w_scale_protected_bits": ("7",)},
    ],
    ids=["flips", "guards", "secded", "rows"],
)
def test_a_layer_computes_with_what_its_flipped_operands_stand_for(name, dtype, more):
    model, spec = Chain(name, dtype), BitFlipSpec(**rates(name, **more), base_seed=5)
    clean = model.first.weight
    flipproof.inject(model, spec)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    for tick in (0, 1):
        model.first.state.set_tick(tick)
        expected = by_hand(model.first, spec, tick)
        got = model.first(x)
        assert torch.equal(got.nan_to_num(), F.linear(x, expected, model.first.bias).nan_to_num())
        assert not torch.equal(expected, clean)
    with flipproof.faults(model, flips=False, guard=False):
        assert torch.equal(model.first(x), F.linear(x, clean, model.first.bias))


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by", GRANULARITIES)
def test_fitted_guards_keep_every_clean_number_and_zero_what_is_beyond(name, dtype, by, tmp_path):
    """Of the margin 1, so that no number stands further from the largest of its row, or of a layer's scales."""
    model = Chain(name, dtype)
    clean = model.first.weight
    guards_of(model, str(dtype).removeprefix("torch."), by).write(tmp_path)
    spec = BitFlipSpec(**rates(name), guards=str(tmp_path), w_margin=1.0, base_seed=5)
    flipproof.inject(model, spec)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    with flipproof.faults(model, flips=False):
        assert torch.equal(model.first(x), F.linear(x, clean, model.first.bias))
    zeroed = []
    for tick in range(8):
        model.first.state.set_tick(tick)
        expected = by_hand(model.first, spec, tick)
        assert torch.equal(model.first(x), F.linear(x, expected, model.first.bias))
        unguarded = by_hand(model.first, dataclasses.replace(spec, guards=None, w_margin=1.25), tick)
        zeroed.append(((expected == 0) & (unguarded != 0)).any())
    assert any(zeroed)


def test_a_flipped_scale_is_zeroed_where_arithmetic_by_hand_says(tmp_path):
    """Of int4 in groups of 32: code less 8, times the scale."""
    model = Chain("int4")
    guards_of(model).write(tmp_path)
    flipproof.inject(model, BitFlipSpec(w_scale_p_exp=1e-9, guards=str(tmp_path), w_margin=1.0))
    layer = model.first
    codes, scales = layer.operand("code").tolist(), layer.held("scale")
    clean = [[(code - 8) * scales[i, j // 32].item() for j, code in enumerate(row)] for i, row in enumerate(codes)]
    largest = [max(map(abs, row)) for row in clean]
    most = scales.max().item()
    smallest = scales.view(-1).argmin().item()
    for where, factor in ((smallest, 2.0), (3, 2.0**100), (5, math.inf), (7, math.nan)):
        i, group = divmod(where, 2)
        before = scales[i, group].item()
        scales[i, group] = scale = before * factor
        got, expected = layer(torch.eye(64)) - layer.bias, [list(row) for row in clean]
        for j in range(group * 32, group * 32 + 32):
            value = (codes[i][j] - 8) * scale if abs(scale) <= most else 0.0
            expected[i][j] = value if abs(value) <= largest[i] else 0.0
        torch.testing.assert_close(got, torch.tensor(expected).T, rtol=1e-6, atol=1e-6)
        gone = sum(a == 0 != b for a, b in zip(expected[i], clean[i], strict=True))
        assert 0 < gone < 32 if factor == 2 else gone == sum(b != 0 for b in clean[i][group * 32 :][:32])
        scales[i, group] = before


# --- on a GPU

GPU = torch.cuda.is_available()
GUARDED = {"w_zero_out_t": 0.3, "w_scale_zero_out_t": 0.5}


NO_CODES = {"w_code_p": 0.0}


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("more", [GUARDED, NO_CODES], ids=["guards", "packed"])
def test_kernels_make_the_weight_that_a_cpu_makes(name, dtype, more, monkeypatch):
    """In Triton's interpreter where there is no GPU. Of all operands in their own layouts, behind both guards, or from
    codes as they lie, which do not flip."""
    triton_launch = pytest.importorskip("flipproof.faults.triton_launch", reason="Triton has no build here")
    model, spec = Chain(name, dtype), BitFlipSpec(**rates(name, **more), base_seed=5)
    flipproof.inject(model, spec)
    cut = dtype == torch.bfloat16 and not GPU
    expected = [by_hand(model.first, spec, tick, cut) for tick in (0, 1)]
    if GPU:
        model.cuda()
    else:
        monkeypatch.setattr(op, "_backend", lambda _, draw=None: triton_launch)
    x = torch.zeros(1, 64, dtype=dtype, device=model.first.bias.device)
    for tick, weight in enumerate(expected):
        model.first.state.set_tick(tick)
        got = model.first._weight_of_pass(x, dtype, 0)()
        assert got.device == x.device
        assert torch.equal(got.cpu().nan_to_num(), weight.nan_to_num())
    assert not torch.equal(*(weight.nan_to_num() for weight in expected))


class Operators(TorchDispatchMode):
    """Lists all that run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.seen.append(str(operator))
        return operator(*args, **kwargs or {})


def trained(name, g_idx=False):
    """A layer with every fault that is drawn anew in each pass, guards and adapters; after one pass."""
    root = nn.Sequential(Chain(name).first)
    if g_idx:
        places = torch.arange(64, dtype=torch.int32).flip(0) // GROUPS[name]
        root[0] = QuantisedLinear(dataclasses.replace(root[0].stored(), g_idx=places), root[0].bias)
    more = GUARDED | {"x_p_exp": 0.01, "x_p_frac": 0.01, "x_zero_out_t": 4.0}
    flipproof.inject(root, BitFlipSpec(**rates(name, **more)), LoraSpec(r=2, dropout=0.1))
    with torch.no_grad():
        root[0].lora_B.normal_(generator=torch.Generator().manual_seed(1))
    root.to("cuda" if GPU else "cpu")
    root(torch.ones(3, 64, device=root[0].bias.device)).sum().backward()
    return root


CASES = [*((name, False) for name in GROUPS), ("int4-asym", True), ("int4", True)]


@pytest.mark.parametrize(("name", "g_idx"), CASES)
def test_no_pass_looks_at_a_number_or_takes_one_to_the_device(name, g_idx):
    """What would make a GPU wait, or a CUDA graph impossible: reading an element, or a new tensor of numbers of the
    host's. What flips is one operator here, and does neither (``test_a_cuda_graph_replays_the_layer``)."""
    root = trained(name, g_idx)
    x = torch.ones(3, 64, device=root[0].bias.device)
    with Operators() as operators:
        root(x).sum().backward()
    waits = ("_local_scalar_dense", "nonzero", "equal.", "lift_fresh", "repeat_interleave.Tensor", "masked_select")
    assert "flipproof.flip.default" in operators.seen
    assert not [seen for seen in operators.seen if any(wait in seen for wait in waits)]


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize(("name", "g_idx"), CASES)
def test_a_cuda_graph_replays_the_layer(name, g_idx):
    assert_a_cuda_graph_replays(trained(name, g_idx), 3, 64)


# --- gradients, and models


@pytest.mark.parametrize("name", ["nf4", "int4-asym", "nvfp4"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("fitted", [False, True])
def test_gradients_are_those_of_the_formula(name, checkpointed, fitted, tmp_path):
    """Against autograd through the faulty operands, which are the same in forward and backward."""
    model = Chain(name)
    guards_of(model).write(tmp_path)
    guards = {"w_zero_out_t": 0.3, "x_zero_out_t": 4.0}
    if fitted:
        guards = {"guards": str(tmp_path), "w_margin": 1.0, "x_margin": 1.0}
    spec = BitFlipSpec(**rates(name, x_p_exp=0.01, x_p_frac=0.01, **guards))
    flipproof.inject(model, spec, LoraSpec(r=4, lora_alpha=8))
    layer = model.first
    layer.checkpointed = checkpointed
    with torch.no_grad():
        layer.lora_B.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    direction = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(2))
    layer.state.set_tick(3)
    (layer(x) * direction).sum().backward()
    got = [x.grad, layer.lora_A.grad, layer.lora_B.grad]

    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, layer.lora_A, layer.lora_B)]
    x_t = math.nextafter(30, math.inf) if fitted else 4.0
    flipped = flipproof.flip(leaves[0], p_exp=0.01, p_frac=0.01, zero_out_t=x_t, seed=0, site="first/x", tick=3)
    y = flipped @ by_hand(layer, spec, 3).T + 2 * (flipped @ leaves[1].T) @ leaves[2].T
    (y * direction).sum().backward()
    for mine, leaf in zip(got, leaves, strict=True):
        torch.testing.assert_close(mine, leaf.grad, rtol=1e-4, atol=1e-4)


def test_adapters_are_what_peft_makes_of_them(tiny_llama, token_ids):
    """On the dequantised model, which has the same weights, without faults: logits and gradients."""
    peft = pytest.importorskip("peft")
    model = quantised(tiny_llama(), "nf4")
    plain = tiny_llama()
    for name, module in model.named_modules():
        if isinstance(module, QuantisedLinear):
            plain.get_submodule(name).weight.data = module.weight
    flipproof.inject(model, BitFlipSpec(), LoraSpec(r=4, lora_alpha=8))
    theirs = peft.get_peft_model(plain, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    weights = {}
    for name, layer in flipproof.faulty_layers(model).items():
        other = theirs.base_model.model.get_submodule(name)
        with torch.no_grad():
            layer.lora_B.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
            other.lora_A["default"].weight.copy_(layer.lora_A)
            other.lora_B["default"].weight.copy_(layer.lora_B)
        weights[name] = layer, other
    mine, their = model(token_ids, labels=token_ids), theirs(token_ids, labels=token_ids)
    torch.testing.assert_close(mine.logits, their.logits, rtol=1e-4, atol=1e-5)
    mine.loss.backward()
    their.loss.backward()
    assert len(weights) == 14
    for layer, other in weights.values():
        torch.testing.assert_close(layer.lora_A.grad, other.lora_A["default"].weight.grad, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(layer.lora_B.grad, other.lora_B["default"].weight.grad, rtol=1e-3, atol=1e-6)


def test_a_model_takes_faults_and_loses_them(tiny_llama, token_ids):
    model = quantised(tiny_llama(), "nf4")
    before = model(token_ids).logits
    keys = set(model.state_dict())
    coverage = flipproof.inject(model, BitFlipSpec(w_code_p=0.01, w_zero_out_t=1.0))
    assert len(coverage.covered) == 14
    assert coverage.flops_share == flipproof.inject(tiny_llama(), BitFlipSpec(w_p_exp=0.01)).flops_share
    assert set(model.state_dict()) == keys
    assert not torch.equal(model(token_ids).logits, before)
    again = copy.deepcopy(model)
    flipproof.set_tick(model, 9), flipproof.set_tick(again, 9)
    assert torch.equal(model(token_ids).logits, again(token_ids).logits)
    flipproof.remove(model)
    assert torch.equal(model(token_ids).logits, before)
    assert sum(type(module) is QuantisedLinear for module in model.modules()) == 14


def test_adapters_are_not_merged():
    model = Chain("nf4")
    flipproof.inject(model, BitFlipSpec(w_code_p=0.01), LoraSpec(r=2))
    with pytest.raises(ConfigError, match="the weights are nf4, and what adapters make of them is another model"):
        flipproof.merge(model)
    assert isinstance(model.first, FaultyQuantisedLinear)


def test_backward_repeats_the_faults_under_activation_checkpointing(tiny_llama, token_ids):
    found = []
    for checkpointing in (False, True):
        model = quantised(tiny_llama(), "int4").train()
        spec = BitFlipSpec(w_code_p=0.01, w_scale_p_exp=0.001, w_zero_out_t=1.0, x_p_frac=0.01)
        flipproof.inject(model, spec, LoraSpec(r=2, dropout=0.1))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for _ in range(2):
            model(token_ids, labels=token_ids).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert any(grad.abs().sum() > 0 for grad in found[0])
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["nf4", "int4-asym"])
@pytest.mark.parametrize("more", [{}, {"w_protection": "secded", "w_faults": "persistent"}, {"w_protection": "parity"}])
def test_a_log_replays_to_the_same_bits(tiny_llama, token_ids, tmp_path, name, more):
    more = {"w_zero_out_t": 0.5, "w_scale_zero_out_t": 2.0, "x_p_exp": 1e-3} | more
    spec = BitFlipSpec(**rates(name, **more))
    model = quantised(tiny_llama(), name)
    flipproof.inject(model, spec)
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
    assert torch.equal(drawn.nan_to_num(), logged.nan_to_num())
    assert torch.equal(drawn.nan_to_num(), replayed.nan_to_num())
    parts = {"w_code", "w_scale", "w_zero"} if name == "int4-asym" else {"w_code", "w_scale", "w_map", "w_nested"}
    assert parts <= log.flipped_bits.keys()
    assert log.flipped_bits == replay.flipped_bits


@pytest.mark.parametrize("name", GROUPS)
def test_a_log_has_the_scales_that_the_guard_zeroed(tmp_path, name):
    """By their places: those, and only those, whose numbers by hand are not below the threshold."""
    model = Chain(name)
    threshold = 1.01 * float(scales_of(model.first.stored()).abs().max())
    spec = BitFlipSpec(**rates(name, w_scale_zero_out_t=threshold), base_seed=5, include_patterns=("first",))
    flipproof.inject(model, spec)
    with torch.no_grad(), FlipLog(tmp_path / "log", dtype="float32") as log, hooked(model, log):
        for _ in range(8):
            model(torch.zeros(1, 64))
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()[1:]]
    logged = [line for line in lines if line["tensor"] == "first/scales"]
    expected = []
    for tick in range(8):
        scales = scales_of(flipped(model.first, spec, tick)).flatten()
        expected += [(tick, i) for i, scale in enumerate(scales.tolist()) if not abs(scale) < threshold]
    assert 0 < len(expected) < 8 * len(scales)
    assert [(line["tick"], line["index"]) for line in logged] == expected
    assert all(line["zeroed"] and line["bit"] is None and line["after_bits"] == 0 for line in logged)
    assert log.zeroed["scales"] == len(expected)


def test_a_flip_of_a_code_is_a_step_of_its_table():
    """nf4 by hand: of a layer with one flip in the log, one weight differs, by the numbers of the two codes."""
    model = Chain("nf4")
    clean = model.second.weight
    flipproof.inject(model, BitFlipSpec(w_code_p=2e-4, base_seed=1, include_patterns=("second",)))
    (weight := model.second._weight_of_pass(torch.zeros(1, 96), torch.float32, 0)())
    changed = (weight != clean).nonzero()
    assert 0 < len(changed) < 20
    stored = model.second.stored()
    from flipproof.formats.codes import NF4

    scale = clean / torch.tensor(NF4)[stored.operands["code"].long()]
    for row, column in changed.tolist():
        ratio = weight[row, column] / scale[row, column]
        assert torch.isfinite(ratio)
        code = int(stored.operands["code"][row, column])
        neighbours = torch.tensor([NF4[code ^ 1 << bit] for bit in range(4)])
        assert (neighbours - ratio).abs().min() < 1e-5


# --- refusals


@pytest.mark.parametrize(
    ("name", "keys", "problem"),
    [
        ("nf4", {"w_p_exp": 1e-5}, r"bitflip.w_p_exp = 1e-05: the weights are nf4, of which bits of codes and scales "),
        ("int4", {"w_p_bits": {"exp": 0.1}}, r"bitflip.w_p_bits = .*: the weights are int4-g32, of which"),
        ("int4", {"w_zero_p": 0.1}, "bitflip.w_zero_p = 0.1: int4-g32 has no zero points; leave it out"),
        ("mxfp4", {"w_global_p": 0.1}, "bitflip.w_global_p = 0.1: mxfp4 has no float32 numbers"),
        (
            "mxfp8",
            {"w_scale_p_frac": 0.1},
            "bitflip.w_scale_p_frac = 0.1: scales of mxfp8 are e8m0, whose bits are all",
        ),
        ("nf4", {"w_scale_p_frac": 0.1}, "bitflip.w_scale_p_frac = 0.1: scales of nf4 are nf4-scale"),
        (
            "int4",
            {"w_code_p_bits": {"4": 0.1}},
            r"bitflip.w_code_p_bits .*, of int4-g32: bit '4': integer4 has bits 0 to 3",
        ),
        ("nf4", {"w_code_p_bits": {"exp": 0.1}}, "bit 'exp': nf4 has bits 0 to 3 and no such part"),
        ("mxfp4", {"w_scale_p_exp": 0.1, "w_scale_protected_bits": ("sign",)}, "bit 'sign': e8m0 has bits 0 to 7"),
        ("fp8", {"w_scale_p_exp": 0.1, "w_burst": 3}, "bitflip.w_burst = 3: runs of bits need one probability"),
        ("int4", {"w_code_p": 0.1, "w_burst": 2, "w_code_p_bits": {"3": 0}}, "for all bits of a code: without p_bits"),
        ("fp8", {"w_code_p": 0.7}, "w_code_p = 0.7: a flip probability from 0 to 0.5"),
    ],
)
def test_faults_of_what_a_format_does_not_have_are_refused_in_a_line(name, keys, problem):
    model = Chain(name)
    with pytest.raises(ConfigError, match=problem) as raised:
        flipproof.inject(model, BitFlipSpec(**keys))
    assert "\n" not in str(raised.value)
    assert isinstance(model.first, QuantisedLinear)


@pytest.mark.parametrize("key", ["w_code_p", "w_scale_p_exp", "w_zero_p", "w_global_p", "w_scale_zero_out_t"])
def test_faults_of_codes_need_codes(tiny_llama, key):
    with pytest.raises(ConfigError, match=rf"bitflip.{key} = 0.1: the weights are not quantised \(model.quantize\)"):
        flipproof.inject(tiny_llama(), BitFlipSpec(**{key: 0.1}))


def test_a_head_that_is_not_quantised_has_the_keys_of_numbers(tiny_llama, token_ids):
    model = quantised(tiny_llama(), "int8")
    spec = BitFlipSpec(w_code_p=0.01, w_p_frac=0.1, sites=("linear", "head"), base_seed=2)
    coverage = flipproof.inject(model, spec)
    assert len(coverage.covered) == 15
    assert model.lm_head.w_fault.flips
    assert not model.model.layers[0].mlp.up_proj.w_fault.flips


def test_other_faults_are_those_that_inject_would_have_made(tiny_llama, token_ids):
    """``set_faults`` gives a model the faults that ``inject`` would have."""
    first, second = quantised(tiny_llama(), "fp8"), quantised(tiny_llama(), "fp8")
    spec = BitFlipSpec(w_code_p=0.003, w_scale_p_exp=0.01, w_scale_zero_out_t=1.0, base_seed=8)
    flipproof.inject(first, BitFlipSpec(w_code_p=0.1))
    flipproof.set_faults(first, spec)
    flipproof.inject(second, spec)
    assert torch.equal(first(token_ids).logits.nan_to_num(), second(token_ids).logits.nan_to_num())
    with pytest.raises(ConfigError, match=r"bitflip.w_p_exp = 0.1: the weights are fp8"):
        flipproof.set_faults(first, BitFlipSpec(w_p_exp=0.1))


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(
        ConfigError, match=r"int4 has groups of 128 in-features, and a weight of shape \(96, 64\) has 64"
    ):
        QuantisedLinear.of(nn.Linear(64, 96), format_of("int4"))


def test_what_a_layer_takes_is_what_the_format_says():
    layer = QuantisedLinear(quantise(torch.randn(64, 128), "nf4"))
    held = sum(tensor.nbytes for tensor in layer.buffers())
    assert held == 64 * 128 // 2 + 128 + 4 + 4 + 4 * 256


def test_a_fault_of_a_part_is_what_its_keys_say():
    spec = BitFlipSpec(w_code_p=0.25, w_code_p_bits={"0": 0.5}, w_scale_p_exp=0.1, w_p_frac=0.3, w_faults="persistent")
    assert spec.part("code") == Fault(0.25, 0.25, None, Pattern(persistent=True, p_bits=(("0", 0.5),)))
    assert spec.part("scale") == Fault(0.1, 0.0, None, Pattern(persistent=True))
    assert spec.part("zero") == spec.part("global") == Fault()
