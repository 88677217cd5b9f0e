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

**Distillation** (Hinton et al., 2015; forward KL). The teacher is the model itself with faults and adapters off, which
``ask_teacher`` runs without gradients; of a share d of the loss its next-token distribution q is the target. In nats,
the mean over tokens of

    (1 - d) · CE(e, p) + d · KL(q ‖ p)        d loss / d logits = (p - (1 - d)·e - d·q) / n

so it is one more term of the same chunks. What is kept of the teacher are its last hidden states, and its logits are
made beside the model's own, from the same weights: a ``LossHead`` has neither faults nor adapters. A head that has is
a faulty layer, and no ``LossHead``: clean for the teacher, and the logits of both are held whole.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flipproof.faults.inject import faults

HELD_LOGITS = 2**27
"""Logits held at a time, at most: 512 MiB in float32."""
CHANGES_LOGITS = (
    *("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"),
    *("logit_scale", "logits_scaling", "lm_head_multiplier"),
)
"""Keys of transformers configs of models that work on the logits after the head."""
IGNORED = -100
"""A label that counts for nothing, as in transformers."""


class Teacher(NamedTuple):
    """What a model learns from beside the text: what it says itself, of the same tokens, without faults."""

    states: Tensor
    """Its last hidden states (rows, s, d) where it has a ``LossHead``, else its logits (rows, s, v)."""
    share: float
    """Of the loss, 0 to 1, that is the divergence from it."""


class LossHead(nn.Linear):
    """An output head that can give the loss instead of the logits."""

    targets: Tensor | None = None
    """Labels (batch, sequence): forward then gives the mean next-token loss over them."""
    by_row = False
    """Whether the mean is taken of each row apart, without gradients."""
    teacher: Teacher | None = None
    """Whose distribution is a share of that loss's target, if any."""
    gives_hidden = False
    """Whether forward gives the hidden states themselves."""
    gave: Tensor | None = None
    """What it gave last in the place of logits."""

    def __init__(self, head: nn.Linear) -> None:
        nn.Module.__init__(self)  # the parameters are the head's: nothing is allocated twice
        self.in_features, self.out_features = head.in_features, head.out_features
        self.weight, self.bias = head.weight, head.bias
        self.training = head.training

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (batch, sequence, vocabulary), or with ``targets`` their mean cross-entropy in float32; ``by_row``, a
        float64 one for each of the batch. With ``gives_hidden`` what it got."""
        if self.gives_hidden:
            self.gave = hidden
            return hidden
        if self.targets is None:
            return F.linear(hidden, self.weight, self.bias)
        hidden = hidden[:, :-1].reshape(-1, self.in_features)
        if self.by_row:
            targets = self.targets[:, 1:]
            losses = self._token_losses(hidden, targets.clamp(min=0).reshape(-1, 1))
            self.gave = _means(losses.view(targets.shape), targets)
            return self.gave
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if not torch.is_grad_enabled():  # a function is not told, and would take gradients that nobody wants
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        taught, share = (None, 0.0) if self.teacher is None else self.teacher
        if taught is not None:
            taught = taught[:, :-1].reshape(-1, self.in_features)
        self.gave = _LinearCrossEntropy.apply(hidden, weight, bias, self.targets[:, 1:].reshape(-1), taught, share)
        return self.gave

    def _token_losses(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy (n, 1) in float64 of hidden states (n, in) with their targets (n, 1), a chunk at a time."""
        parts = hidden.split(max(1, HELD_LOGITS // self.out_features))
        losses = [
            _cross_entropy(F.linear(part, self.weight, self.bias), rows)
            for part, rows in zip(parts, target.split(len(parts[0])), strict=True)
        ]
        return torch.cat(losses).double()


def fuse_loss(model: nn.Module) -> None:
    """Give ``model`` a ``LossHead``, where it has a head that nothing follows."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    if type(head) is nn.Linear and not any(getattr(config, key, None) for key in CHANGES_LOGITS):
        model.set_output_embeddings(LossHead(head))  # type: ignore[operator]


def next_token_loss(
    model: nn.Module,
    ids: Tensor,
    labels: Tensor | None = None,
    teacher: Teacher | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy in nats of tokens 1 to s-1 of each row given those before, as a float32 scalar; with a
    teacher, its share of the loss is the mean KL divergence of the model's distribution from the teacher's.

    Args:
        ids: int64 token ids of shape (rows, s).
        labels: the same shape, where they are not ``ids``; the mean is over those that are not IGNORED, and 0 where
            all are.
        teacher: what ``ask_teacher`` gave for the same ids and positions.
        positions: of each token in its sample, where rows hold several (``packed.py``): int64 of the shape of ids.
    """
    targets = ids if labels is None else labels
    head = model.get_output_embeddings()  # type: ignore[operator]
    if isinstance(head, LossHead):
        return _from_head(head, model, ids, positions, targets=targets, teacher=teacher)
    if teacher is not None:
        return _distilled(model(**_inputs(ids, positions)).logits, targets, teacher)
    if labels is not None:  # of which none may count: transformers' mean would be no number
        logits = model(**_inputs(ids, positions)).logits[:, :-1].float()
        counted = (labels[:, 1:] != IGNORED).sum().clamp(min=1)
        total: Tensor = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / counted
        return total
    loss: Tensor = model(**_inputs(ids, positions), labels=targets).loss
    return loss


@torch.no_grad()
def ask_teacher(model: nn.Module, ids: Tensor, share: float, positions: Tensor | None = None) -> Teacher:
    """What a model with faulty layers says of ``ids`` (rows, s) without faults, adapters and dropout. Its next pass has
    the tick that it would have had without this one."""
    with faults(model, flips=False, guard=False, adapters=False):
        return Teacher(last_states(model, ids, positions), share)


@torch.no_grad()
def last_states(model: nn.Module, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    """Hidden states (rows, s, d) before the output head, or logits (rows, s, v) where that is no ``LossHead``, of
    ``ids`` (rows, s) without dropout."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        if isinstance(head, LossHead):
            return _from_head(head, model, ids, positions, gives_hidden=True)
        states: Tensor = model(**_inputs(ids, positions)).logits
        return states
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def loss_by_row(model: nn.Module, ids: Tensor, labels: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
    """What ``next_token_loss`` is the mean of: the mean cross-entropy in nats of each row of ``ids`` (rows, s), over
    its labels that are not IGNORED, as float64 of shape (rows,). No gradients."""
    head, targets = model.get_output_embeddings(), ids if labels is None else labels  # type: ignore[operator]
    if not isinstance(head, LossHead):
        logits, targets = model(**_inputs(ids, positions)).logits[:, :-1], targets[:, 1:]
        rows = [_cross_entropy(row, own[:, None]) for row, own in zip(logits, targets.clamp(min=0), strict=True)]
        return _means(torch.stack(rows).squeeze(2).double(), targets)
    return _from_head(head, model, ids, positions, targets=targets, by_row=True)


def _means(losses: Tensor, targets: Tensor) -> Tensor:
    """The mean of each row of losses (rows, n) over the targets that count."""
    counts = targets != IGNORED
    # where all count it is what it is without labels, to the bit
    means = losses.where(counts, 0.0).sum(1) / counts.sum(1).clamp(min=1)
    return torch.where(counts.all(1), losses.mean(1), means)


def _inputs(ids: Tensor, positions: Tensor | None) -> dict[str, Any]:
    """What a model is called with. Without positions nothing is said of them: then it is called as ever."""
    return {"input_ids": ids, "use_cache": False, **({} if positions is None else {"position_ids": positions})}


def _from_head(
    head: LossHead,
    model: nn.Module,
    ids: Tensor,
    positions: Tensor | None = None,
    **asked: Any,
) -> Tensor:
    """What ``head`` gives in the place of logits, where it has these attributes for one forward pass."""
    vars(head).update(asked)
    try:
        given: Tensor = model(**_inputs(ids, positions)).logits
        if head.gave is None or given.data_ptr() != head.gave.data_ptr():
            raise NotImplementedError(f"{type(model).__name__} changes its logits after the output head")
    finally:
        for name in (*asked, "gave"):
            vars(head).pop(name, None)
    return given


def _distilled(logits: Tensor, labels: Tensor, teacher: Teacher) -> Tensor:
    """The loss of whole logits (rows, s, v) with a teacher whose ``states`` are logits."""
    own, taught = (each[:, :-1].float().log_softmax(2) for each in (logits, teacher.states))
    counts = labels[:, 1:] != IGNORED
    of_text = -own.gather(2, labels[:, 1:, None].where(counts[..., None], 0)).squeeze(2)
    divergence = F.kl_div(own, taught, reduction="none", log_target=True).sum(2)
    losses = (1 - teacher.share) * of_text + teacher.share * divergence
    return losses.where(counts, 0.0).sum() / counts.sum().clamp(min=1)


class _LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of ``hidden @ weight.T + bias``, a chunk of rows at a time; of a share of it the target is the
    distribution that ``taught @ weight.T + bias`` is, and less what the target's own entropy is: the divergence."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (n, d)
        weight: Tensor,  # (v, d)
        bias: Tensor | None,  # (v,)
        targets: Tensor,  # (n,)
        taught: Tensor | None,  # (n, d)
        share: float,
    ) -> Tensor:
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
            taught = None if taught is None else taught.to(dtype)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        counted = targets != IGNORED
        logits_of_a_row = len(weight) * (1 if taught is None else 2)
        n, rows = counted.sum().clamp(min=1), max(1, HELD_LOGITS // logits_of_a_row)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # sums over chunks are in float32 whatever the weight is
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
        grad_bias = torch.zeros(len(weight), dtype=torch.float32, device=weight.device) if need_bias else None
        for start in range(0, len(targets), rows):
            part, counts = hidden[start : start + rows], counted[start : start + rows, None]
            target = targets[start : start + rows, None].where(counts, 0)
            others = None if taught is None else F.linear(taught[start : start + rows], weight, bias)
            losses, grad = _losses_and_gradient(F.linear(part, weight, bias), target, counts, others, share)
            total += losses.sum()
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=torch.float32)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[start : start + rows])
            if grad_weight is not None:
                _add_product_(grad_weight, grad.T, part)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, n)
        return total / n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *held, n = ctx.saved_tensors
        scale = grads[0] / n
        return *(None if grad is None else grad * scale for grad in held), None, None, None


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a @ b`` to a float32 sum; on a GPU within the product, whose sums are float32 there too."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def _losses_and_gradient(
    logits: Tensor, target: Tensor, counts: Tensor, taught: Tensor | None, share: float
) -> tuple[Tensor, Tensor]:
    """Loss (n, 1) in float32 of rows of logits (n, v), a share of it from those of a teacher (n, v) where there are
    some, and its gradient times n, 0 for rows that do not count.

    Divided by n it might leave float16's range; backward does that, after a loss scale came in.
    """
    run = _fused() if logits.is_cuda else _eager_losses_and_gradient
    return run(logits, target, counts, taught, share)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """(n, 1) in float32, of rows of logits (n, v)."""
    wide = logits.float()
    return wide.logsumexp(1, keepdim=True) - wide.gather(1, target)


def _eager_losses_and_gradient(
    logits: Tensor, target: Tensor, counts: Tensor, taught: Tensor | None, share: float
) -> tuple[Tensor, Tensor]:
    wide = logits.float()
    # as logsumexp, but in the form of which the compiler knows that one pass over the logits gives both
    largest = wide.amax(1, keepdim=True)
    norm = (wide - largest).exp().sum(1, keepdim=True).log() + largest
    losses = norm - wide.gather(1, target)
    wanted = (torch.arange(logits.shape[1], device=logits.device) == target).float()
    if taught is not None:
        logs = taught.float()  # computed as the model's own, so that who says the same learns exactly nothing
        logs = logs - logs.logsumexp(1, keepdim=True)
        divergence = (logs.exp() * (logs - (wide - norm))).sum(1, keepdim=True)
        losses = (1 - share) * losses + share * divergence
        wanted = (1 - share) * wanted + share * logs.exp()
    return losses.where(counts, 0.0), (((wide - norm).exp() - wanted) * counts).to(logits.dtype)


@cache
def _fused() -> Any:
    """As one pass over the logits for each result, where the kernel pays. Made when it is asked for: the compiler is
    imported then, which takes a second and cannot be done in a locale without UTF-8."""
    return torch.compile(_eager_losses_and_gradient)
