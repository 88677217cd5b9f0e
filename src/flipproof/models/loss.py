"""The loss at the output head, without the logits.

A vocabulary of 128,256 makes the logits of 4,096 tokens 2 GiB in float32, and a loss needs several times that. So
the head computes the loss itself, some tokens at a time, and while a chunk's logits are there takes their gradient: of
the softmax p and the one-hot target e, d loss / d logits = (p - e) / n. What stays for backward is the gradient of the
hidden states, and of the head's own weights where they train (Hsu et al., Liger Kernel, 2024, fuse the same).

``LossHead`` takes the place of a model's output head with the same parameters. Called as always it gives logits, so
that generation and lm-eval see the head they know; ``next_token_loss`` asks it for the loss, and ``loss_by_row``, for
evaluation, for that of each row. Between a model's forward and its head stands code of ``transformers`` that passes
nothing on but hidden states; so what is asked for is set on the head before, and taken from it after. A model that
changes logits after its head (a soft cap, a scale) is not given such a head: there the logits are held whole.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CHUNK = 2**27
"""Logits held at a time, at most: 512 MiB in float32."""
_CHANGES_LOGITS = (
    *("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"),
    *("logit_scale", "logits_scaling", "lm_head_multiplier"),
)
"""Keys of transformers configs of models that work on the logits after the head."""
IGNORED = -100
"""A label that counts for nothing, as in transformers."""


class LossHead(nn.Linear):
    """An output head that can give the loss instead of the logits."""

    targets: Tensor | None = None
    """Labels (batch, sequence): forward then gives the mean next-token loss over them."""
    by_row = False
    """Whether the mean is taken of each row apart, without gradients and with no label ignored."""
    loss: Tensor | None = None
    """What it gave last."""

    def __init__(self, head: nn.Linear) -> None:
        nn.Module.__init__(self)  # the parameters are the head's: nothing is allocated twice
        self.in_features, self.out_features = head.in_features, head.out_features
        self.weight, self.bias = head.weight, head.bias
        self.training = head.training

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (batch, sequence, vocabulary), or with ``targets`` their mean cross-entropy in float32; ``by_row``, a
        float64 one for each of the batch."""
        if self.targets is None:
            return F.linear(hidden, self.weight, self.bias)
        hidden = hidden[:, :-1].reshape(-1, self.in_features)
        if self.by_row:
            self.loss = (
                self._token_losses(hidden, self.targets[:, 1:].reshape(-1, 1)).view(len(self.targets), -1).mean(1)
            )
            return self.loss
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if not torch.is_grad_enabled():  # a function is not told, and would take gradients that nobody wants
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        self.loss = _LinearCrossEntropy.apply(hidden, weight, bias, self.targets[:, 1:].reshape(-1))
        return self.loss

    def _token_losses(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy (n, 1) in float64 of hidden states (n, in) with their targets (n, 1), a chunk at a time."""
        parts = hidden.split(max(1, _CHUNK // self.out_features))
        losses = [
            _cross_entropy(F.linear(part, self.weight, self.bias), rows)
            for part, rows in zip(parts, target.split(len(parts[0])), strict=True)
        ]
        return torch.cat(losses).double()


def fuse_loss(model: nn.Module) -> None:
    """Give ``model`` a ``LossHead``, where it has a head that nothing follows."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    if type(head) is nn.Linear and not any(getattr(config, key, None) for key in _CHANGES_LOGITS):
        model.set_output_embeddings(LossHead(head))  # type: ignore[operator]


def next_token_loss(
    model: nn.Module, ids: Tensor, labels: Tensor | None = None, forward: Callable[..., Any] | None = None
) -> Tensor:
    """Mean cross-entropy in nats of tokens 1 to s-1 of each row given those before, as a float32 scalar.

    Args:
        ids: int64 token ids of shape (rows, s).
        labels: the same shape, where they are not ``ids``; the mean is over those that are not IGNORED.
        forward: what to call in the place of ``model``, where something wraps it.
    """
    forward, labels = forward or model, ids if labels is None else labels
    head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, LossHead):
        loss: Tensor = forward(input_ids=ids, labels=labels, use_cache=False).loss
        return loss
    return _from_head(head, model, ids, labels, forward)


@torch.no_grad()
def loss_by_row(model: nn.Module, ids: Tensor) -> Tensor:
    """What ``next_token_loss`` is the mean of: the mean cross-entropy in nats of each row of ``ids`` (rows, s), as
    float64 of shape (rows,). No gradients."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, LossHead):
        logits = model(input_ids=ids, use_cache=False).logits
        rows = [_cross_entropy(row, targets[:, None]) for row, targets in zip(logits[:, :-1], ids[:, 1:], strict=True)]
        return torch.stack(rows).squeeze(2).double().mean(1)
    head.by_row = True
    try:
        return _from_head(head, model, ids, ids, model)
    finally:
        head.by_row = False


def _from_head(head: LossHead, model: nn.Module, ids: Tensor, labels: Tensor, forward: Callable[..., Any]) -> Tensor:
    head.targets = labels
    try:
        loss: Tensor = forward(input_ids=ids, use_cache=False).logits
        if head.loss is None or loss.data_ptr() != head.loss.data_ptr():
            raise NotImplementedError(f"{type(model).__name__} changes its logits after the output head")
    finally:
        head.targets = head.loss = None
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of ``hidden @ weight.T + bias``, a chunk of rows at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        # hidden (n, d), weight (v, d), targets (n,)
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        counted = targets != IGNORED
        n, rows = counted.sum().clamp(min=1), max(1, _CHUNK // len(weight))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # sums over chunks are in float32 whatever the weight is
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
        grad_bias = torch.zeros(len(weight), dtype=torch.float32, device=weight.device) if need_bias else None
        for start in range(0, len(targets), rows):
            part, counts = hidden[start : start + rows], counted[start : start + rows, None]
            target = targets[start : start + rows, None].where(counts, 0)
            losses, grad = _losses_and_gradient(F.linear(part, weight, bias), target, counts)
            total += losses.sum()
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=torch.float32)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[start : start + rows])
            if grad_weight is not None:
                grad_weight += grad.T @ part
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, n)
        return total / n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *held, n = ctx.saved_tensors
        scale = grads[0] / n
        return *(None if grad is None else grad * scale for grad in held), None


def _losses_and_gradient(logits: Tensor, target: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy (n, 1) in float32 of rows of logits (n, v), and its gradient times n, 0 for rows that do not count.

    Divided by n it might leave float16's range; backward does that, after a loss scale came in.
    """
    run = _fused() if logits.is_cuda else _eager_losses_and_gradient
    return run(logits, target, counts)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """(n, 1) in float32, of rows of logits (n, v)."""
    wide = logits.float()
    return wide.logsumexp(1, keepdim=True) - wide.gather(1, target)


def _eager_losses_and_gradient(logits: Tensor, target: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    wide = logits.float()
    norm = wide.logsumexp(1, keepdim=True)
    losses = (norm - wide.gather(1, target)).where(counts, 0.0)
    hit = torch.arange(logits.shape[1], device=logits.device) == target
    return losses, (((wide - norm).exp() - hit.float()) * counts).to(logits.dtype)


@cache
def _fused() -> Any:
    """As one pass over the logits for each result, where the kernel pays. Made when it is asked for: the compiler is
    imported then, which takes a second and cannot be done in a locale without UTF-8."""
    return torch.compile(_eager_losses_and_gradient)
