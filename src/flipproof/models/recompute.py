"""Activation checkpointing: what backward computes anew instead of keeping it from forward.

Each block of a model keeps one of these for its backward pass, from least to most:

- ``nothing`` but its input: the block runs again;
- ``products``: the results of matrix products and of attention, which cost nearly all of the time; the rest, norms,
  rotations, activations and flips, is computed again;
- ``everything`` that backward needs (with torch.compile, less: its partitioner recomputes what is cheap);
- ``weights``: everything, and the faulty layers' merged weights and flipped inputs, which they otherwise merge and flip
  again for backward.

``fit`` picks the most that the memory of the GPU holds: it goes through this list as long as all blocks find room, each
cost being that of a trial step, and the level that does not fit goes to as many blocks as it does.

Flips come out the same when they are drawn again, since a draw is a function of its key (``linear.py``), so none of
this changes a result.

A block compiled with torch.compile has the recomputation inside of what is compiled: there the last product of a block,
whose result backward does not need, is not computed again. FSDP's hooks stay outside.
"""

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from flipproof.faults.linear import FaultyLinear
from flipproof.log import logger

Keep = Literal["nothing", "products", "everything", "weights"]
LEVELS: tuple[Keep, ...] = get_args(Keep)

_VARIANTS = 64
"""Of a compiled block, in a training or evaluation."""
_aten = torch.ops.aten
_PRODUCTS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_fused_attention_overrideable.default,
    torch.ops.higher_order.flex_attention,
}


def _policy(kept: frozenset[Any], _context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.MUST_RECOMPUTE


def _keeping(ops: set[Any]) -> Callable[[], Any]:
    return partial(create_selective_checkpoint_contexts, partial(_policy, frozenset(ops)))


_CONTEXTS: dict[Keep, Callable[[], Any]] = {
    "products": _keeping(_PRODUCTS),
    "nothing": _keeping(set()),
}


def _run(forward: Callable[..., Any], block: nn.Module, keep: Keep, *args: Any, **kwargs: Any) -> Any:
    if keep in ("everything", "weights"):
        return forward(block, *args, **kwargs)
    contexts: dict[str, Any] = {"context_fn": _CONTEXTS[keep]}
    if keep == "nothing" and not torch.compiler.is_compiling():
        contexts = {}  # compiled, custom autograd functions would be kept if nothing were said
    return checkpoint(partial(forward, block), *args, use_reentrant=False, **contexts, **kwargs)


class Recomputing:
    """Mixed into a block's class: a forward that keeps what ``keep`` says."""

    keep: Keep = "everything"
    run: Callable[..., Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.keep if torch.is_grad_enabled() else "everything", *args, **kwargs)


@cache
def _recomputing(block: type[Any], compiled: bool, compiler: Any) -> type[nn.Module]:
    # One class for all blocks of a kind, so that torch.compile sees one function and compiles it once.
    def run(self: nn.Module, keep: Keep, *args: Any, **kwargs: Any) -> Any:
        return _run(block.forward, self, keep, *args, **kwargs)

    chosen = {} if compiler is None else {"backend": compiler}
    return type(
        block.__name__, (Recomputing, block), {"run": torch.compile(run, fullgraph=True, **chosen) if compiled else run}
    )


def prepare(blocks: list[nn.Module], compiled: bool, compiler: Any = None) -> None:
    """Give each block a ``keep`` and, if asked, compile it, in place; its class becomes a subclass of what it was.
    ``compiler`` is a backend of torch.compile, in the place of its own."""
    for block in blocks:
        block.__class__ = _recomputing(type(block), compiled, compiler)  # type: ignore[arg-type]
    if compiled:
        logging.getLogger("torch._higher_order_ops.wrap").addFilter(_not_of_contexts)
        expect_variants(_VARIANTS)


def expect_variants(count: int) -> None:
    """Let torch.compile compile a block so many times: each arm of an evaluation, each ``keep``, and whatever else is
    done otherwise and not just with other values, is a variant of the one function."""
    limits = torch._dynamo.config
    limits.recompile_limit = max(count, limits.recompile_limit)
    limits.accumulated_recompile_limit = max(4 * count, limits.accumulated_recompile_limit)


def _not_of_contexts(record: logging.LogRecord) -> bool:
    """Whether a line of torch's is for users. One warns of what ``contexts`` above do, where something in a block works
    in place: whoever reads it can do nothing about it, and the gradients are tested to be those without."""
    return "context_fn is passed to torch.utils.checkpoint" not in record.getMessage()


def set_kept(blocks: list[nn.Module], mode: str | int) -> None:
    """Apply ``training.activation_checkpointing``; auto begins with nothing kept."""
    for i, block in enumerate(blocks):
        if mode in ("full", "auto") or (isinstance(mode, int) and i % mode == 0):
            keep(block, "nothing")
        else:
            keep(block, "products" if mode == "selective" else "everything")


def keep(block: nn.Module, what: Keep) -> None:
    """Let a prepared block keep this for its backward pass."""
    block.keep = what  # type: ignore[assignment]
    for module in block.modules():
        if isinstance(module, FaultyLinear):
            module.checkpointed = what != "everything"


def fit(blocks: list[nn.Module], trial: Callable[[], tuple[float, float]], room: Callable[[], float]) -> None:
    """Keep as much as memory has room for.

    Args:
        trial: runs a micro-step and gives (GiB held after its forward, GiB at its peak), the most of any process.
        room: after a trial, the GiB that a step's peak may reach in every process.
    """
    tried = blocks[:2]
    set_kept(blocks, "full")
    said = []
    cost = 0.0
    for level in LEVELS[1:]:
        before: Keep = blocks[0].keep  # type: ignore[assignment]
        held, peak = trial()
        left = room() - peak
        said.append(f"{before} of all: a peak of {peak:.1f} GiB, {left:.1f} GiB left")
        if left < 4 * cost * len(tried):  # the trial itself must fit, and levels cost a few times each other at most
            break
        for block in tried:
            keep(block, level)
        cost = max((trial()[0] - held) / len(tried), 1e-3)
        fits = max(0, min(len(blocks), int(left / cost)))
        for i, block in enumerate(blocks):
            keep(block, level if i < fits else before)
        if fits < len(blocks):
            said.append(f"{level} of {fits} at {cost:.2f} GiB each")
            break
    else:
        said.append("weights of all")
    logger.info("activation checkpointing keeps of %d blocks %s", len(blocks), "; ".join(said))
