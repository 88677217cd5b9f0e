"""Dropout of adapters: what ``linear.py`` says of it, against the sum written out, and against PEFT's own."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import flipproof
from flipproof import BitFlipSpec, LoraSpec

FEATURES, OUT, R = 64, 24, 4


class Root(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(FEATURES, OUT)

    def forward(self, x):
        return self.linear(x)


def make(p, spec=None, seed=0):
    torch.manual_seed(0)
    root = Root()
    lora = LoraSpec(r=R, lora_alpha=8, dropout=p, target_modules="linear")
    flipproof.inject(root, BitFlipSpec(**(spec or {"include_patterns": ["linear"], "base_seed": seed})), lora)
    nn.init.normal_(root.linear.lora_B, std=0.1)
    return root, root.linear


def mask(layer, root, tick):
    """What the adapter sees of each feature at a tick: it is read off W + s·B·A·diag(m), which is linear in m."""
    flipproof.set_tick(root, tick)
    with torch.no_grad():
        seen = root(torch.eye(FEATURES)).T - layer.bias[:, None] - layer.weight
    product = layer.lora.scaling * layer.lora_B.double() @ layer.lora_A.double()
    return (seen.double() / product).median(0).values


@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
def test_a_feature_drops_with_probability_p_and_the_mean_stays(p):
    root, layer = make(p)
    masks = torch.stack([mask(layer, root, tick) for tick in range(200)])
    kept = (masks - 1 / (1 - p)).abs() < 1e-3
    assert ((masks.abs() < 1e-3) ^ kept).all()  # nothing else
    n = masks.numel()
    assert abs(kept.double().mean() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5  # false alarm: 6e-7
    # features and ticks are apart: the pairs agree as often as independent ones, p² + (1 − p)²
    for one, other in ((kept[:, 1:], kept[:, :-1]), (kept[1:], kept[:-1])):
        same, expected = (one == other).double().mean(), p**2 + (1 - p) ** 2
        assert abs(same - expected) < 6 * (expected * (1 - expected) / one.numel()) ** 0.5 + 0.01


def test_gradients_are_those_of_the_sum_written_out():
    """X·Wᵀ + s·(X·diag(m))·Aᵀ·Bᵀ: PEFT's formula, where all rows have one mask; in a layer without faults."""
    root, layer = make(0.4)
    m = mask(layer, root, 3)
    x = torch.randn(7, FEATURES, requires_grad=True)
    flipproof.set_tick(root, 3)
    y = root(x)
    grad = torch.randn_like(y)
    mine = torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), grad)
    a, b = (matrix.detach().double().requires_grad_() for matrix in (layer.lora_A, layer.lora_B))
    expected = nn.functional.linear(x, layer.weight, layer.bias) + (layer.lora.scaling * (x * m) @ a.T @ b.T).float()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(mine, torch.autograd.grad(expected, (x, a, b), grad), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", [{}, {"w_p_frac": 0.05, "w_zero_out_t": 0.2, "x_p_frac": 0.05}])
def test_a_pass_that_is_computed_again_drops_the_same(spec):
    spec = spec | {"include_patterns": ["linear"]}
    x, losses, grads = torch.randn(5, FEATURES), [], []
    for again in (False, True):
        root, layer = make(0.3, spec)
        flipproof.set_tick(root, 9)
        torch.manual_seed(again)  # nothing of torch's own state counts

        class Around(nn.Module):
            def forward(self, y, root=root, again=again):
                return checkpoint(root.linear, y, use_reentrant=False) if again else root.linear(y)

        root.forward = Around().forward
        loss = root(x).square().sum()
        loss.backward()
        losses.append(loss.detach())
        grads.append((layer.lora_A.grad, layer.lora_B.grad))
    assert torch.equal(*losses)
    assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))


def test_it_is_a_function_of_seed_site_and_tick_and_flips_do_not_move():
    """Neither whether faults are on nor torch's state count: a run and its control drop alike. And a layer's flips are
    those without dropout."""
    root, layer = make(0.3)
    first = mask(layer, root, 5)
    torch.manual_seed(99)
    with flipproof.faults(root, flips=False, guard=False):
        assert torch.equal(mask(layer, root, 5).round(decimals=2), first.round(decimals=2))
    assert not torch.equal(mask(layer, root, 6), first)
    other, its = make(0.3, seed=1)
    assert not torch.equal(mask(its, other, 5).round(), first.round())
    x, outputs = torch.randn(3, FEATURES), []
    for p in (0.0, 0.3):
        root, layer = make(p, {"w_p_frac": 0.05, "x_p_frac": 0.05})
        nn.init.zeros_(layer.lora_B)
        flipproof.set_tick(root, 2)
        outputs.append(root(x).detach())
    assert torch.equal(*outputs)


def test_only_training_drops():
    root, layer = make(0.5)
    x = torch.randn(3, FEATURES)
    plain = nn.functional.linear(x, layer.merged_weight(), layer.bias)
    torch.testing.assert_close(root.eval()(x), plain)
    assert (root.train()(x) - plain).abs().max() > 0.01


def test_compiled_it_drops_the_same():
    root, layer = make(0.3, {"w_p_frac": 0.05})
    x, outputs = torch.randn(3, FEATURES), []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        for tick in (4, 5):
            flipproof.set_tick(root, tick)
            root.forward = run
            outputs.append(root(x).detach())
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])
