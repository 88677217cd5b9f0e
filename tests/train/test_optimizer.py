import math

import pytest
import torch
from torch import nn

from flipproof.config import TrainingConfig
from flipproof.train.optimizer import LossScale, learning_rate, make_optimizer


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        # closed forms at steps 0, 1 (warm-up), 2 (peak), 6 (half-way), 9 (last) of 10
        ("linear", [0.5, 1.0, 1.0, 0.5, 0.125]),
        ("cosine", [0.5, 1.0, 1.0, 0.5, 0.0380602337]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_learning_rate_schedules(scheduler, expected):
    training = TrainingConfig(steps=10, warmup_steps=2, lr=1.0, lr_scheduler=scheduler)
    assert [learning_rate(training, step) for step in (0, 1, 2, 6, 9)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        # closed forms at steps 0, 1 (warm-up), 2 (peak), 6 (half-way), 9 (last) of 10: a tenth and 0.9 of what it was
        ("linear", [0.5, 1.0, 1.0, 0.55, 0.2125]),
        ("cosine", [0.5, 1.0, 1.0, 0.55, 0.13425421]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedules_end_at_a_floor(scheduler, expected):
    training = TrainingConfig(steps=10, warmup_steps=2, lr=1.0, lr_scheduler=scheduler, min_lr_ratio=0.1)
    assert [learning_rate(training, step) for step in (0, 1, 2, 6, 9)] == pytest.approx(expected)
    assert learning_rate(training, 10) == pytest.approx(1.0 if scheduler == "constant" else 0.1)


def test_without_a_floor_schedules_are_to_the_bit_what_they_were():
    for scheduler, left in (("linear", lambda p: 1 - p), ("cosine", lambda p: (1 + math.cos(math.pi * p)) / 2)):
        training = TrainingConfig(steps=977, warmup_steps=31, lr=3e-4, lr_scheduler=scheduler)
        for step in range(31, 977):
            assert learning_rate(training, step) == 3e-4 * left((step - 31) / 946)


def test_adamw_has_the_configs_betas_and_eps():
    """Against the formulas of Loshchilov and Hutter, in float64."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, bias=False).double()
    weight, lr, decay = layer.weight.detach().clone(), 0.1, 0.3
    optimizer = make_optimizer(layer, TrainingConfig(lr=lr, weight_decay=decay, beta1=0.7, beta2=0.8, eps=0.01))
    mean = square = torch.zeros_like(weight)
    for t in (1, 2, 3):
        layer.weight.grad = gradient = torch.randn_like(weight)
        optimizer.step()
        mean, square = 0.7 * mean + 0.3 * gradient, 0.8 * square + 0.2 * gradient**2
        weight = weight * (1 - lr * decay)
        weight -= lr * (mean / (1 - 0.7**t)) / ((square / (1 - 0.8**t)).sqrt() + 0.01)
    torch.testing.assert_close(layer.weight.detach(), weight)


def test_weight_decay_is_for_matrices(tiny_llama):
    model = tiny_llama()
    optimizer = make_optimizer(model, TrainingConfig(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    assert {name for name, p in model.named_parameters() if decay[id(p)] == 0} == {
        name for name, _ in model.named_parameters() if "norm" in name
    }


def test_the_loss_scale_is_out_of_the_way_but_for_float16():
    for training in (TrainingConfig(dtype="bfloat16"), TrainingConfig(mixed_precision_param="bfloat16")):
        scale = LossScale(training)
        parameter = nn.Parameter(torch.ones(3))
        parameter.grad = torch.full((3,), 5.0)
        scale.unscale([parameter])
        assert parameter.grad.tolist() == [5.0] * 3
        scale.update(finite=False)
        assert float(scale.scale) == 1


@pytest.mark.parametrize("training", [{"dtype": "float16"}, {"dtype": "float32", "mixed_precision_param": "float16"}])
def test_the_loss_scale_halves_at_once_and_doubles_after_2000_good_steps(training):
    scale = LossScale(TrainingConfig(**training))
    assert float(scale.scale) == 2**16
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), 2.0**16)
    scale.unscale([parameter, nn.Parameter(torch.ones(1))])  # the other has no gradient
    assert parameter.grad.tolist() == [1.0] * 3

    def steps(number, finite):
        for _ in range(number):
            scale.update(finite)
        return float(scale.scale)

    assert steps(1999, True) == 2**16
    assert steps(1, False) == 2**15
    assert steps(1, False) == 2**14
    assert steps(1999, True) == 2**14  # the count began anew
    assert steps(1, True) == 2**15
