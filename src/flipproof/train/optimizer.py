"""What takes a step: AdamW, the course of its learning rate, and the scale of the loss."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from flipproof.config import TrainingConfig
from flipproof.dtensor import like, local, of_rows
from flipproof.models.parallelize import buckets, sharing


class ShardedAdamW(torch.optim.AdamW):
    """AdamW of parameters that each process has whole: each steps its own rows, whose moments it alone holds, and is
    sent those of the others (ZeRO's first stage, Rajbhandari et al., 2020). It steps to the bits of AdamW.

    ``param_groups`` have DTensors of the rows, which lie in the parameters' own memory.
    """

    def __init__(self, groups: list[dict[str, Any]], mesh: DeviceMesh, **options: Any) -> None:
        """
        Args:
            groups: of parameters, and what holds for each group.
            mesh: of the processes that share; where it has two dimensions the first is of replicas.
        """
        self._group = mesh.get_group(mesh.ndim - 1)
        self._rows = {
            parameter: nn.Parameter(of_rows(self._part(parameter.data, self._group.rank()), parameter, mesh))
            for group in groups
            for parameter in group["params"]
        }
        groups = [group | {"params": [self._rows[parameter] for parameter in group["params"]]} for group in groups]
        super().__init__(groups, **options)

    def _part(self, tensor: Tensor, rank: int) -> Tensor:
        """The rows of a process, as DTensors have them."""
        rows = math.ceil(len(tensor) / self._group.size())
        return tensor[rank * rows : (rank + 1) * rows]

    def step(self, closure: Any = None) -> Any:
        """All processes call."""
        for parameter, rows in self._rows.items():
            if parameter.grad is not None:
                rows.grad = like(self._part(parameter.grad, self._group.rank()), rows)
        result = super().step(closure)
        for rows in self._rows.values():
            rows.grad = None
        self.gather()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for parameter in self._rows:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    @torch.no_grad()
    def gather(self) -> None:
        """Have each process's rows in all. All processes call."""
        size = self._group.size()
        for bucket in buckets([parameter.data for parameter in self._rows]):
            longest = sum(self._part(tensor, 0).numel() for tensor in bucket)
            parts = [[self._part(tensor, rank) for tensor in bucket] for rank in range(size)]
            received = [bucket[0].new_empty(longest) for _ in range(size)]
            own = torch.cat([part.flatten() for part in parts[self._group.rank()]])
            dist.all_gather(received, nn.functional.pad(own, (0, longest - len(own))), self._group)
            for of_rank, flat in zip(parts, received, strict=True):
                sizes = [part.numel() for part in of_rank]
                values = flat[: sum(sizes)].split(sizes)
                torch._foreach_copy_(of_rank, [v.view_as(part) for v, part in zip(values, of_rank, strict=True)])

    @contextmanager
    def parameters_of(self, model: nn.Module) -> Iterator[None]:
        """Within, the model's parameters are those that the optimizer has, as a checkpoint wants them."""
        held = [(m, key, p) for m in model.modules() for key, p in m._parameters.items() if p in self._rows]
        for module, key, parameter in held:
            module._parameters[key] = self._rows[parameter]
        try:
            yield
        finally:
            for module, key, parameter in held:
                module._parameters[key] = parameter


def make_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; weight decay for matrices, none for norms and biases."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # Else several launches for each of its operations, or for offloaded weights as many passes over the CPU's memory.
    # Where there is no GPU it takes these: fused, a tensor's end is rounded otherwise, so that shards would show.
    fused = torch.cuda.is_available()
    options: dict[str, Any] = {
        "lr": training.lr,
        "betas": (training.beta1, training.beta2),
        "eps": training.eps,
        "fused": fused,
        "foreach": not fused,
    }
    mesh = sharing(model)
    return torch.optim.AdamW(groups, **options) if mesh is None else ShardedAdamW(groups, mesh, **options)


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
