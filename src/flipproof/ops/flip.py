"""The flip as a PyTorch operator: dispatch, fake tensors, autograd; and the two functions that users import.

Three operators live in the ``flipproof`` library namespace. ``flip`` returns a new tensor, ``flip_`` works in place,
and ``flip_grad_`` is for backward passes: it draws the flips of the forward pass again, so that no mask need be
stored in between, and zeroes a gradient in place where the guard zeroed the value. Key and tick are int64 tensors,
not numbers, so a compiled graph or a CUDA graph neither specialises on them nor waits for the device.
"""

from typing import Any

import torch
from torch import Tensor

from flipproof.ops import reference
from flipproof.ops.parity import DTYPES
from flipproof.ops.philox import MAX_TICK, derive_key
from flipproof.spec import check_seed, probability_problem, threshold_problem

_DRAW = "float p_exp, float p_frac, float? zero_out_t, Tensor key, Tensor tick, SymInt offset"
_LIBRARY = torch.library.Library("flipproof", "DEF")
_LIBRARY.define(f"flip(Tensor x, {_DRAW}) -> Tensor")
_LIBRARY.define(f"flip_(Tensor(a!) x, {_DRAW}) -> ()")
_LIBRARY.define(f"flip_grad_(Tensor x, Tensor(a!) grad, {_DRAW}) -> Tensor")


def _check_dtype(x: Tensor) -> None:
    if x.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"cannot flip bits of a {str(x.dtype).removeprefix('torch.')} tensor; allowed are {allowed}")


@torch.library.impl(_LIBRARY, "flip_", "CPU")
def _flip_cpu_(
    x: Tensor, p_exp: float, p_frac: float, zero_out_t: float | None, key: Tensor, tick: Tensor, offset: int
) -> None:
    _check_dtype(x)
    target = x if x.is_contiguous() else x.contiguous()
    reference.flip_(target, p_exp, p_frac, zero_out_t, int(key), int(tick), offset)
    if target is not x:
        x.copy_(target)


@torch.library.impl(_LIBRARY, "flip", "CPU")
def _flip_cpu(
    x: Tensor, p_exp: float, p_frac: float, zero_out_t: float | None, key: Tensor, tick: Tensor, offset: int
) -> Tensor:
    y = x.clone(memory_format=torch.contiguous_format)
    _flip_cpu_(y, p_exp, p_frac, zero_out_t, key, tick, offset)
    return y


@torch.library.impl(_LIBRARY, "flip_grad_", "CPU")
def _flip_grad_cpu_(
    x: Tensor,
    grad: Tensor,
    p_exp: float,
    p_frac: float,
    zero_out_t: float | None,
    key: Tensor,
    tick: Tensor,
    offset: int,
) -> Tensor:
    _check_dtype(x)
    y = x.clone(memory_format=torch.contiguous_format)
    reference.flip_(y, p_exp, p_frac, zero_out_t, int(key), int(tick), offset, grad)
    return y


@torch.library.register_fake("flipproof::flip")
def _flip_fake(x: Tensor, *_draw: Any) -> Tensor:
    _check_dtype(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("flipproof::flip_")
def _flip_fake_(x: Tensor, *_draw: Any) -> None:
    _check_dtype(x)


@torch.library.register_fake("flipproof::flip_grad_")
def _flip_grad_fake_(x: Tensor, _grad: Tensor, *_draw: Any) -> Tensor:
    return _flip_fake(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, p_exp, p_frac, zero_out_t, key, tick, offset = inputs
    # Without a guard the gradient passes as it is, and nothing need be kept.
    ctx.save_for_backward(*(() if zero_out_t is None else (x, key, tick)))
    ctx.fault, ctx.offset = (p_exp, p_frac, zero_out_t), offset


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.saved_tensors:
        x, key, tick = ctx.saved_tensors
        grad = grad.clone(memory_format=torch.contiguous_format)
        torch.ops.flipproof.flip_grad_(x, grad, *ctx.fault, key, tick, ctx.offset)
    return grad, None, None, None, None, None, None


torch.library.register_autograd("flipproof::flip", _backward, setup_context=_setup_context)


def _draw(
    x: Tensor,
    p_exp: float | None,
    p_frac: float | None,
    zero_out_t: float | None,
    seed: int,
    site: str,
    tick: int,
    offset: int,
) -> tuple[Any, ...]:
    """The operator's arguments after ``x``, checked."""
    _check_dtype(x)
    problems = [
        probability_problem("p_exp", p_exp),
        probability_problem("p_frac", p_frac),
        threshold_problem("zero_out_t", zero_out_t),
    ]
    if not 0 <= tick < MAX_TICK:
        problems.append(f"tick = {tick!r}: ticks run from 0 to 2^48 - 1")
    if not 0 <= offset < 2**61:
        problems.append(f"offset = {offset!r}: an element's index runs from 0 to 2^61 - 1")
    if found := [problem for problem in problems if problem]:
        raise ValueError("; ".join(found))
    # full, unlike tensor, makes no host-to-device copy
    key = torch.full((), derive_key(check_seed(seed), site), dtype=torch.int64, device=x.device)
    ticks = torch.full((), tick, dtype=torch.int64, device=x.device)
    return (
        float(p_exp or 0),
        float(p_frac or 0),
        None if zero_out_t is None else float(zero_out_t),
        key,
        ticks,
        offset,
    )


def flip(
    x: Tensor,
    *,
    p_exp: float | None = None,
    p_frac: float | None = None,
    zero_out_t: float | None = None,
    seed: int,
    site: str,
    tick: int,
    offset: int = 0,
) -> Tensor:
    """A copy of ``x`` with random bits inverted, and zero where the guard catches the result.

    The draw is a pure function of (seed, site, tick, index of the element in the whole tensor): no global RNG is read
    or advanced. The gradient passes straight through where the value was kept and is 0 where the guard zeroed it.

    Args:
        x: bfloat16, float16 or float32, any shape and strides; elements are counted in row-major order.
        p_exp: probability that a sign or exponent bit is inverted, 0 to 0.5; None is 0.
        p_frac: the same for mantissa bits.
        zero_out_t: after the flip, each v for which ``|v| < zero_out_t`` is not true becomes 0. None is no guard.
        seed: 0 to 2^63 - 1.
        site: names the layer and the operand, such as "layers.0.q_proj/x".
        tick: the number of the forward pass, below 2^48.
        offset: index of x's first element in the whole tensor, so that a slice can draw its own part.

    Returns:
        Contiguous tensor of the shape and dtype of ``x``.

    Raises:
        TypeError: for any other dtype. ValueError: naming each argument out of range.
    """
    return torch.ops.flipproof.flip(x, *_draw(x, p_exp, p_frac, zero_out_t, seed, site, tick, offset))


def flip_(
    x: Tensor,
    *,
    p_exp: float | None = None,
    p_frac: float | None = None,
    zero_out_t: float | None = None,
    seed: int,
    site: str,
    tick: int,
    offset: int = 0,
) -> Tensor:
    """``flip`` in place; returns ``x``. Outside of autograd only: use ``flip`` on what needs a gradient.

    Raises:
        RuntimeError: where gradients would be recorded through ``x``; and as ``flip`` does.
    """
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("flip_ on a tensor that requires grad: use flip, or wrap the call in torch.no_grad()")
    torch.ops.flipproof.flip_(x, *_draw(x, p_exp, p_frac, zero_out_t, seed, site, tick, offset))
    return x
