import copy

import pytest
import torch
from replayed import assert_a_cuda_graph_replays
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import flipproof
from flipproof import BitFlipSpec, LoraSpec

LISTED = {"w_zero_out_t": 0.1}  # few enough for a GPU's list of zeroed weights, which GUARDED's probabilities are not
GPU = torch.cuda.is_available()
FRACTION = {"w_p_frac": 0.05, "x_p_frac": 0.05}  # without a guard, exponent flips reach infinity
GUARDED = FRACTION | {"w_p_exp": 0.02, "x_p_exp": 0.02, "w_zero_out_t": 0.25, "x_zero_out_t": 2.0}


class Root(nn.Module):
    def __init__(self, features=48, out=40, bias=True):
        super().__init__()
        self.linear = nn.Linear(features, out, bias=bias)

    def forward(self, x):
        return self.linear(x)


def make(spec, r=0, dtype=torch.float32, **changes):
    """A root with one faulty layer whose adapters are not zero."""
    torch.manual_seed(0)
    root = Root(**changes).to(dtype)
    flipproof.inject(root, BitFlipSpec(**spec), LoraSpec(r=r, lora_alpha=2 * r or 1))
    if r:
        with torch.no_grad():
            root.linear.lora_B.normal_(std=0.1)
    return root, root.linear


def operands(layer, x, tick):
    """(flipped x, kept, flipped w, kept) by the public flip, drawn as the layer names its sites."""
    out = []
    for operand, value, fault in (("x", x, layer.x_fault.fault), ("w", layer.merged_weight(), layer.w_fault.fault)):
        flipped = flipproof.flip(
            value.detach(), p_exp=fault.p_exp, p_frac=fault.p_frac, seed=0, site=f"linear/{operand}", tick=tick
        )
        keep = torch.ones_like(flipped, dtype=torch.bool)
        if fault.zero_out_t is not None:
            keep = flipped.double().abs() < fault.zero_out_t
        out += [torch.where(keep, flipped, 0), keep]
    return out


@pytest.mark.parametrize(("r", "trainable_weight"), [(0, True), (4, False), (4, True)])
@pytest.mark.parametrize("spec", [FRACTION, GUARDED, {"w_p_frac": 0.02}, {"x_zero_out_t": 1.0}, LISTED])
def test_gradients_equal_autograd_through_an_explicit_where_in_float64(r, spec, trainable_weight, backend):
    root, layer = make(spec, r)
    root.to(backend)
    layer.weight.requires_grad_(trainable_weight)
    layer.bias.requires_grad_(True)
    x = torch.randn(5, 7, 48).to(backend).requires_grad_()
    flipproof.set_tick(root, 3)
    y = root(x)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()

    # The same function in float64: value by the flips, gradient by `where` and autograd alone.
    flipped_x, keep_x, flipped_w, keep_w = operands(layer, x, tick=3)

    def exact(of=lambda t: t):
        leaves = {
            name: of(tensor.detach().double()).requires_grad_()
            for name, tensor in [("x", x), *layer.named_parameters(recurse=False)]
        }
        merged = leaves["weight"] + (layer.lora.scaling * leaves["lora_B"] @ leaves["lora_A"] if r else 0)

        def straight_through(clean, flipped, keep):
            return torch.where(keep, clean + (of(flipped.double()) - clean).detach(), 0.0)

        y = straight_through(leaves["x"], flipped_x, keep_x) @ straight_through(merged, flipped_w, keep_w).T
        y = y + leaves["bias"]
        (y * of(weights.double())).sum().backward()
        return y.detach(), {name: leaf.grad for name, leaf in leaves.items()}

    # A float32 sum of products is off by a rounding of the sum of their sizes for each term, in whatever order.
    (expected, gradients), (size, sizes) = exact(), exact(torch.abs)
    roundings = (5 * 7 + 48 + 40 + 8) * 2.0**-24  # terms of any chain of sums here
    assert ((y.double() - expected).abs() <= roundings * size).all()
    for name, parameter in [("x", x), *layer.named_parameters(recurse=False)]:
        if not parameter.requires_grad:
            assert parameter.grad is None
            continue
        assert ((parameter.grad.double() - gradients[name]).abs() <= roundings * sizes[name]).all(), name
    if "w_zero_out_t" in spec:
        assert 0 < int((~keep_w).sum()) < keep_w.numel()
    if "x_zero_out_t" in spec:
        assert 0 < int((~keep_x).sum()) < keep_x.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_forward_is_the_product_of_the_flipped_operands(dtype):
    root, layer = make(GUARDED, r=4, dtype=dtype)
    assert layer.lora_A.dtype == torch.float32
    x = torch.randn(9, 48).to(dtype)
    flipped_x, _, flipped_w, _ = operands(layer, x, tick=0)
    assert torch.equal(root(x), nn.functional.linear(flipped_x, flipped_w, layer.bias))


def test_without_faults_it_is_the_layer_it_was():
    root, layer = make(GUARDED)
    x = torch.randn(6, 48)
    with flipproof.faults(root, flips=False, guard=False):
        assert torch.equal(root(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_guard_alone_zeroes_and_flips_nothing():
    root, layer = make(GUARDED)
    x = torch.randn(6, 48)
    with flipproof.faults(root, flips=False):
        clipped_x = torch.where(x.abs() < 2.0, x, 0)
        clipped_w = torch.where(layer.weight.abs() < 0.25, layer.weight, 0)
        torch.testing.assert_close(root(x), nn.functional.linear(clipped_x, clipped_w, layer.bias), rtol=0, atol=0)


def test_autocast_flips_in_the_compute_dtype():
    root, layer = make(FRACTION)
    x = torch.randn(6, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = root(x)
    where = {"p_frac": 0.05, "seed": 0, "tick": 0}
    flip_x = flipproof.flip(x.bfloat16(), site="linear/x", **where)
    flip_w = flipproof.flip(layer.weight.detach().bfloat16(), site="linear/w", **where)
    assert torch.equal(y, nn.functional.linear(flip_x, flip_w, layer.bias.bfloat16()))


def test_autocast_does_not_part_backward_from_forward():
    """Backward runs outside of autocast and has to find the weight that forward multiplied by."""
    root, layer = make(FRACTION, r=4)
    x = torch.randn(6, 48).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = root(x)
    grad = torch.zeros_like(y)
    grad[0, 3] = 1.0
    y.backward(grad)
    low = layer.weight.detach().bfloat16()
    factors, rates = (low, layer.lora_A.detach(), layer.lora_B.detach()), torch.tensor([0.0, 0.05], dtype=torch.float64)
    seen = torch.ops.flipproof.merge(*factors, layer.lora.scaling, rates, None, layer.w_key, torch.tensor(0), 0)
    assert torch.equal(x.grad[0], seen[3])
    flipped_x = flipproof.flip(x.detach(), p_frac=0.05, site="linear/x", seed=0, tick=0)
    assert torch.equal(y, nn.functional.linear(flipped_x, seen, layer.bias.bfloat16()))


def test_backward_keeps_no_more_than_the_inputs():
    root, layer = make(GUARDED, r=4)
    x = torch.randn(6, 48, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        root(x)
    assert saved
    allowed = {t.data_ptr() for t in (x, layer.weight, layer.lora_A, layer.lora_B)}
    assert {t.data_ptr() for t in saved if t.numel() > 2} <= allowed  # two are rates


def test_nothing_is_added_to_the_state_dict_but_adapters():
    root, _ = make(GUARDED)
    assert set(root.state_dict()) == {"linear.weight", "linear.bias"}
    root, _ = make(GUARDED, r=2)
    assert set(root.state_dict()) == {"linear.weight", "linear.bias", "linear.lora_A", "linear.lora_B"}


def test_adapters_start_as_nothing_and_do_not_depend_on_global_state():
    torch.manual_seed(0)
    first = Root()
    flipproof.inject(first, BitFlipSpec(), LoraSpec(r=4))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    second = Root()
    after_root = torch.get_rng_state()
    flipproof.inject(second, BitFlipSpec(), LoraSpec(r=4))
    assert torch.equal(torch.get_rng_state(), after_root)
    assert not torch.equal(before, after_root)
    assert torch.equal(first.linear.lora_A, second.linear.lora_A)
    assert torch.equal(first.linear.merged_weight(), first.linear.weight)
    assert float(first.linear.lora_A.detach().abs().max()) <= 48**-0.5


def test_moving_and_materialising_keep_the_draw():
    spec = BitFlipSpec(**GUARDED)
    root, _ = make(GUARDED)
    x = torch.randn(3, 48)
    expected = root(x)
    with torch.device("meta"):
        skeleton = Root()
    flipproof.inject(skeleton, spec, LoraSpec(r=2))
    skeleton.to_empty(device="cpu")
    for layer in flipproof.faulty_layers(skeleton).values():
        layer.reset_lora_parameters()
    skeleton.load_state_dict(root.state_dict(), strict=False)
    assert torch.equal(skeleton(x), expected)


def test_a_deep_copy_is_independent_and_draws_alike():
    root, _ = make(GUARDED)
    x = torch.randn(3, 48)
    root(x)
    twin = copy.deepcopy(root)
    assert torch.equal(twin(x), root(x))
    flipproof.set_tick(twin, 0)
    assert not torch.equal(twin(x), root(x))
    flipproof.remove(twin)
    assert isinstance(root.linear, flipproof.FaultyLinear)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_recompute_draws_the_same_flips_even_after_later_forwards(use_reentrant):
    """Gradients are bitwise those without checkpointing, also where another forward pass ran in between."""

    class Deep(nn.Module):
        def __init__(self, checkpointed):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
            self.checkpointed = checkpointed

        def forward(self, x):
            for layer in self.layers:
                x = (
                    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=use_reentrant)
                    if self.checkpointed
                    else layer(x)
                ).tanh()
            return {"out": x}

    grads, x = [], torch.randn(4, 32, requires_grad=True)
    for checkpointed in (False, True):
        model = Deep(checkpointed)
        flipproof.inject(model, BitFlipSpec(**GUARDED), LoraSpec(r=2))
        losses = [model(x)["out"].sum() for _ in range(3)]
        assert len({loss.item() for loss in losses}) == 3
        for i in (1, 0, 2):
            losses[i].backward()
        model(x)  # the tick goes on from the last forward, not from the last backward
        assert int(model.layers[0].state.tick) == 3
        grads.append([p.grad for p in model.parameters() if p.grad is not None] + [x.grad])
        x.grad = None
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.parametrize("spec", [GUARDED, LISTED])
def test_the_gradient_passes_straight_through_zeroed_weights_where_exactness_is_switched_off(backend, spec):
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(5)).to(backend)
    gradients = {}
    for exact in (True, False):
        root, layer = make(spec | {"exact_gradient": exact}, r=4)
        root.to(backend)
        y = root(x)
        y.backward(torch.ones_like(y))
        gradients[exact] = layer.lora_A.grad.cpu().double(), layer.lora_B.grad.cpu().double()
    layer.cpu()
    flipped_x, _, _, keep_w = operands(layer, x.cpu(), tick=0)
    wide, size = (torch.ones(40, 64).double() @ of.double() for of in (flipped_x, flipped_x.abs()))
    lora_A, lora_B = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    for exact, kept in ((True, keep_w), (False, torch.ones_like(keep_w))):
        expected = layer.lora.scaling * lora_B.T @ (wide * kept), layer.lora.scaling * (wide * kept) @ lora_A.T
        # what the guard zeroed is added and taken back
        sizes = layer.lora.scaling * lora_B.abs().T @ size, layer.lora.scaling * size @ lora_A.abs().T
        for got, wanted, largest in zip(gradients[exact], expected, sizes, strict=True):
            assert ((got - wanted).abs() <= 2 * (64 + 48 + 40 + 8) * 2.0**-24 * largest).all()
    assert int((~keep_w).sum()) > 0


@torch.no_grad()
def test_inference_compiles_without_graph_breaks_and_without_recompiling_for_ticks():
    root, _ = make(GUARDED, r=4)
    x = torch.randn(5, 48)
    expected = [root(x) for _ in range(4)]
    flipproof.set_tick(root, 0)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    root.linear.compile(backend=counter, fullgraph=True)
    got = [root(x) for _ in range(4)]
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("spec", [GUARDED, FRACTION], ids=["guard", "no guard"])
@pytest.mark.parametrize("r", [0, 4])
def test_training_compiles_without_graph_breaks_and_without_recompiling_for_ticks(r, spec):
    """Bitwise what the layer computes uncompiled."""
    device = "cuda" if GPU else "cpu"
    x = torch.randn(64, 48).to(device)

    def steps(compiled):
        root, _ = make(spec, r)
        root.to(device)
        out = []
        if compiled:
            root.linear.compile(backend=counter, fullgraph=True)
        for _ in range(4):
            leaf = x.clone().requires_grad_()
            y = root(leaf)
            y.backward(torch.ones_like(y))
            out += [y.detach(), leaf.grad, *(p.grad.clone() for p in root.parameters() if p.grad is not None)]
            root.zero_grad()
        return out

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    expected = steps(compiled=False)
    got = steps(compiled=True)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert not torch.equal(got[0], got[len(got) // 4])
    assert counter.frame_count == 1
    torch._dynamo.reset()


class Stack(nn.Module):
    """Layers that are compiled one by one and share their code, as a model's blocks do."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(Root(48, 48) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


@pytest.mark.parametrize("r", [0, 4])
def test_layers_that_differ_in_every_value_compile_as_one(r):
    """Also where values change afterwards, and bitwise what is computed uncompiled."""
    x = torch.randn(8, 48)

    def spec(factor):
        own = {
            rf"layers\.{i}\.linear": {
                "w_p_exp": factor * 2.0 ** -(6 + i / 3), "w_p_frac": factor * 2.0 ** -(7 + i / 4),
                "x_p_exp": factor * 2.0 ** -(8 + i / 5), "w_zero_out_t": 1 + i / 7, "x_zero_out_t": 3 + i / 9,
                "x_p_bits": {"0": factor * 2.0 ** -(2 + i)},
            }
            for i in range(12)
        }  # fmt: skip
        uniform = {"w_p_exp": 0.01, "x_p_bits": {"0": 0.1}, "w_zero_out_t": 1.0, "x_zero_out_t": 3.0}
        return BitFlipSpec(**uniform, layer_name_to_config=own if factor else {})

    def frames(first, then, compiled=True):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        torch.manual_seed(0)
        stack = Stack(12)
        flipproof.inject(stack, first, LoraSpec(r=r, lora_alpha=1))
        if compiled:
            for layer in stack.layers:
                layer.compile(backend=counter, fullgraph=True)
        out = []
        for each in (first, then):
            flipproof.set_faults(stack, each)
            leaf = x.clone().requires_grad_()
            y = stack(leaf)
            y.sum().backward()
            out += [y.detach(), leaf.grad]
        return counter.frame_count, out

    count, got = frames(spec(1.0), spec(0.5))
    _, expected = frames(spec(1.0), spec(0.5), compiled=False)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert not torch.equal(got[0], got[2])
    uniform, _ = frames(spec(0), spec(0))
    assert count == uniform == 1
    torch._dynamo.reset()


def test_a_compiled_layer_keeps_its_inputs_between_forward_and_backward_and_nothing_of_their_size_beside_them():
    device = "cuda" if GPU else "cpu"
    root, layer = make(GUARDED, r=4, features=96, out=80, bias=False)
    root.to(device)
    torch._dynamo.reset()
    layer.compile(backend="aot_eager", fullgraph=True)
    x = torch.randn(32, 96).to(device).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        root(x)
    given = {t.data_ptr() for t in (x, layer.weight, layer.lora_A, layer.lora_B)}
    beside = [t.shape for t in kept if t.data_ptr() not in given and t.numel() > 4 * 96]
    assert kept
    assert not beside
    torch._dynamo.reset()


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_a_cuda_graph_replays_the_layer_with_ticks_that_go_on():
    root, _ = make(GUARDED, r=4)
    replayed = assert_a_cuda_graph_replays(root.cuda(), 16, 48)
    assert all(tensor.isfinite().all() for found in replayed for tensor in found)
