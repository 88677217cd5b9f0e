"""What takes a step: AdamW, the course of its learning rate, and the scale of the loss."""

import math

import torch
from torch import nn

from flipproof.config import TrainingConfig
from flipproof.dtensor import local


def make_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; weight decay for matrices, none for norms and biases."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = all(parameter.is_cuda for parameter in trainable)  # else several launches for each of its operations
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=training.lr,
        betas=(training.beta1, training.beta2),
        eps=training.eps,
        fused=fused,
        foreach=not fused,
    )


def learning_rate(training: TrainingConfig, step: int) -> float:
    """The learning rate of the ``step``-th step, counted from 0: linear warm-up, then the schedule down to its
    floor."""
    assert training.steps is not None  # resolve_steps
    if step < training.warmup_steps:
        return training.lr * (step + 1) / training.warmup_steps
    if training.lr_scheduler == "constant":
        return training.lr
    progress = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    left = 1 - progress if training.lr_scheduler == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return training.lr * (training.min_lr_ratio + (1 - training.min_lr_ratio) * left)


class LossScale:
    """A factor on the loss that keeps float16 gradients in range; 1 and out of the way for other dtypes.

    Steps whose gradients are not finite are skipped and halve it, 2000 good ones in a row double it (Micikevicius et
    al., Mixed Precision Training, 2018).
    """

    def __init__(self, training: TrainingConfig, weights: torch.dtype | None = None) -> None:
        """``weights``: their dtype, where the config leaves it to the checkpoint."""
        self.used = weights == torch.float16 or "float16" in (training.dtype, training.mixed_precision_param)
        self.scale = torch.tensor(2.0**16 if self.used else 1.0, dtype=torch.float64)
        self.good_steps = torch.tensor(0)

    def unscale(self, parameters: list[nn.Parameter]) -> None:
        """Divide the gradients by it."""
        if self.used:
            torch._foreach_div_([local(p.grad) for p in parameters if p.grad is not None], float(self.scale))

    def update(self, finite: bool) -> None:
        """After a step whose gradients were finite, or not."""
        if not self.used:
            return
        if not finite:
            self.scale.div_(2)
            self.good_steps.zero_()
            return
        self.good_steps.add_(1)
        if self.good_steps >= 2000:
            self.scale.mul_(2)
            self.good_steps.zero_()
