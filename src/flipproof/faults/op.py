"""The flip as PyTorch operators: dispatch, fake tensors, autograd; and the two functions that users import.

They live in the ``flipproof`` library namespace and run on the backend of their tensors: NumPy on a CPU, Triton on a
GPU. What is not new, independent flips (``Draw.patterned``) is torch on both (``memory.py``). Schemas know no ``Draw``,
so an operator takes its ``arguments``.

``flip``        a new tensor
``flip_``       in place
``flip_again``  for backward: flips again, so that nothing need be kept
``flip_grad_``  the same, and zeroes a gradient in place where the guard zeroed the value
``merge``       guard(flip(W + s·B·A)), the weight of a faulty layer with adapters
``merge_grad``  the same for backward, or from a forward that keeps it, and, where they are to be listed, which weights
                the guard zeroed, as the backend likes to keep it
``flip_marked``  for a forward that keeps what it flipped: also which values the guard zeroed, as the backend likes to
               keep it
``zero_marked_``  zeroes a gradient in place at these
``zeroed_correction``  what to add to the adapters' gradients so that those weights contribute nothing
``unpack``      codes of 4 bits, a byte each
``dequantise``  guard(code · scale), the weight of a quantised layer

Rates, limits, key and tick are tensors, not numbers, so a compiled graph neither specialises on them nor waits for
the device. Those for backward take ``after``, the incoming gradient, which they only wait for: so a compiler can
neither merge them with their like in forward nor run them there and keep the result.
"""

from functools import lru_cache
from typing import Annotated, Any

import torch
from torch import Tensor

from flipproof.errors import ConfigError
from flipproof.faults import cpu, memory
from flipproof.faults.draw import Draw, rates_of
from flipproof.faults.dtypes import DTYPES, dtype_name
from flipproof.faults.fault import Fault, Pattern
from flipproof.faults.guard import channels_of, guard_of, limits_of
from flipproof.faults.layouts import FLOATS, LAYOUTS
from flipproof.faults.philox import derive_key, tick_problem
from flipproof.faults.spec import Probability, Threshold
from flipproof.formats.spec import format_of
from flipproof.values import Between, Seed, check_all

_DRAW = "Tensor rates, Tensor? limits, Tensor key, Tensor tick, SymInt offset"
_MERGE = "Tensor weight, Tensor lora_A, Tensor lora_B, float scaling"
_LIBRARY = torch.library.Library("flipproof", "DEF")
_LIBRARY.define(f"flip(Tensor x, {_DRAW}) -> Tensor")
_LIBRARY.define(f"flip_(Tensor(a!) x, {_DRAW}) -> ()")
_LIBRARY.define(f"flip_again(Tensor x, Tensor after, {_DRAW}) -> Tensor")
_LIBRARY.define(f"flip_grad_(Tensor x, Tensor(a!) grad, Tensor after, {_DRAW}) -> Tensor")
_LIBRARY.define(f"flip_marked(Tensor x, {_DRAW}) -> (Tensor, Tensor)")
_LIBRARY.define("zero_marked_(Tensor zeroed, Tensor(a!) grad) -> ()")
_LIBRARY.define(f"merge({_MERGE}, {_DRAW}) -> Tensor")
_LIBRARY.define(f"merge_grad({_MERGE}, Tensor after, bool list_zeroed, {_DRAW}) -> (Tensor, Tensor)")
_LIBRARY.define(
    "zeroed_correction(Tensor zeroed, Tensor rates, Tensor grad_y, Tensor x, Tensor lora_A, Tensor lora_B, "
    "float scaling) -> (Tensor, Tensor)"
)
_LIBRARY.define("unpack(Tensor packed, SymInt columns) -> Tensor")
_LIBRARY.define(
    "dequantise(Tensor code, Tensor scale, Tensor? zero, Tensor? g_idx, Tensor? limits, str format, int? group, "
    "SymInt columns, ScalarType dtype) -> Tensor"
)

_INDEPENDENT = Pattern()
_PATTERNS = tuple(name for name in LAYOUTS if name not in FLOATS)
BACKENDS = {"cpu": "reference (NumPy)", "cuda": "Triton"}
"""What flips bits on which type of device."""


def _backend(x: Tensor, draw: Draw | None = None) -> Any:
    """The module that carries out a draw where ``x`` is."""
    if x.dtype not in (*DTYPES, torch.uint8):
        allowed = ", ".join(map(dtype_name, (*DTYPES, torch.uint8)))
        raise TypeError(f"cannot flip bits of a {dtype_name(x.dtype)} tensor; allowed are {allowed}")
    if draw is not None and draw.patterned:
        return memory
    if x.device.type != "cuda":
        return cpu
    from flipproof.faults import triton_launch  # Triton comes with CUDA builds of torch

    return triton_launch


def _implement(name: str) -> Any:
    def decorate(function: Any) -> Any:
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, function, key)
        return function

    return decorate


@_implement("flip_")
def _flip_in_place(x: Tensor, *arguments: Any) -> None:
    draw = Draw(*arguments)
    target = x.contiguous()
    _backend(x, draw).flip_(target, None, draw)
    if target is not x:
        x.copy_(target)


@_implement("flip")
def _flip(x: Tensor, *arguments: Any) -> Tensor:
    draw = Draw(*arguments)
    y: Tensor = _backend(x, draw).flip(x, None, draw)
    return y


@_implement("flip_again")
def _flip_again(x: Tensor, _after: Tensor, *arguments: Any) -> Tensor:
    return _flip(x, *arguments)


@_implement("flip_grad_")
def _flip_grad_in_place(x: Tensor, grad: Tensor, _after: Tensor, *arguments: Any) -> Tensor:
    draw = Draw(*arguments)
    target = grad.contiguous()
    y: Tensor = _backend(x, draw).flip(x, target, draw)
    if target is not grad:
        grad.copy_(target)
    return y


@_implement("flip_marked")
def _flip_marked(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    draw = Draw(*arguments)
    backend = _backend(x, draw)
    zeroed = backend.new_marks(x)
    return backend.flip_marked(x, zeroed, draw), zeroed


@_implement("zero_marked_")
def _zero_marked_in_place(zeroed: Tensor, grad: Tensor) -> None:
    if zeroed.dtype == torch.bool:  # a mask, as ``cpu`` and ``memory`` make it wherever they run
        grad.masked_fill_(zeroed, 0)
        return
    target = grad.contiguous()
    _backend(grad).zero_marked_(zeroed, target)
    if target is not grad:
        grad.copy_(target)


@_implement("merge")
def _merge(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, *arguments: Any) -> Tensor:
    draw = Draw(*arguments)
    y: Tensor = _backend(weight, draw).merge(weight, lora_A, lora_B, scaling, None, draw)
    return y


@_implement("merge_grad")
def _merge_grad(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, _after: Tensor, list_zeroed: bool, *arguments: Any
) -> tuple[Tensor, Tensor]:
    draw = Draw(*arguments)
    zeroed = _new_zeroed(weight, list_zeroed, draw)
    room = zeroed if zeroed.numel() else None
    return _backend(weight, draw).merge(weight, lora_A, lora_B, scaling, room, draw), zeroed


def _new_zeroed(weight: Tensor, list_zeroed: bool, draw: Draw) -> Tensor:
    if not list_zeroed or not (draw.limits is not None or draw.patterned):
        return torch.empty(0, device=weight.device)
    zeroed: Tensor = _backend(weight, draw).new_zeroed(weight)
    return zeroed


@_implement("zeroed_correction")
def _zeroed_correction(zeroed: Tensor, rates: Tensor, grad_y: Tensor, x: Tensor, *lora: Any) -> tuple[Tensor, Tensor]:
    more: tuple[Tensor, Tensor] = _backend(x).zeroed_correction(zeroed, rates, grad_y, x, *lora)
    return more


@_implement("unpack")
def _unpack(packed: Tensor, columns: int) -> Tensor:
    codes: Tensor = _backend(packed).unpack(packed, columns)
    return codes


@_implement("dequantise")
def _dequantise(
    code: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    g_idx: Tensor | None,
    limits: Tensor | None,
    format: str,
    group: int | None,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    of = format_of(format, -1 if group is None else group)
    weight: Tensor = _backend(code).dequantise(code, scale, zero, g_idx, limits, of, columns, dtype)
    return weight


@torch.library.register_fake("flipproof::unpack")
def _unpack_fake(packed: Tensor, columns: int) -> Tensor:
    return packed.new_empty(packed.shape[0], columns)


@torch.library.register_fake("flipproof::dequantise")
def _dequantise_fake(code: Tensor, *rest: Any) -> Tensor:
    columns, dtype = rest[-2:]
    return code.new_empty(code.shape[0], columns, dtype=dtype)


@torch.library.register_fake("flipproof::flip")
def _flip_fake(x: Tensor, *_draw: Any) -> Tensor:
    _backend(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("flipproof::flip_")
def _flip_in_place_fake(x: Tensor, *_draw: Any) -> None:
    _backend(x)


@torch.library.register_fake("flipproof::flip_again")
def _flip_again_fake(x: Tensor, _after: Tensor, *_draw: Any) -> Tensor:
    return _flip_fake(x)


@torch.library.register_fake("flipproof::flip_grad_")
def _flip_grad_in_place_fake(x: Tensor, _grad: Tensor, _after: Tensor, *_draw: Any) -> Tensor:
    return _flip_fake(x)


@torch.library.register_fake("flipproof::flip_marked")
def _flip_marked_fake(x: Tensor, *draw: Any) -> tuple[Tensor, Tensor]:
    return _flip_fake(x), _backend(x, Draw(*draw)).new_marks(x)


@torch.library.register_fake("flipproof::zero_marked_")
def _zero_marked_in_place_fake(_zeroed: Tensor, grad: Tensor) -> None:
    _backend(grad)


@torch.library.register_fake("flipproof::merge")
def _merge_fake(weight: Tensor, *_rest: Any) -> Tensor:
    return _flip_fake(weight)


@torch.library.register_fake("flipproof::merge_grad")
def _merge_grad_fake(
    weight: Tensor, _lora_A: Tensor, _lora_B: Tensor, _scaling: float, _after: Tensor, list_zeroed: bool, *draw: Any
) -> tuple[Tensor, Tensor]:
    return _flip_fake(weight), _new_zeroed(weight, list_zeroed, Draw(*draw))


@torch.library.register_fake("flipproof::zeroed_correction")
def _zeroed_correction_fake(
    _zeroed: Tensor, _rates: Tensor, _grad_y: Tensor, _x: Tensor, lora_A: Tensor, lora_B: Tensor, _scaling: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(lora_A, dtype=torch.float64), torch.empty_like(lora_B, dtype=torch.float64)


class _Flip(torch.autograd.Function):
    """``flip`` with its gradient. Not registered with the operator, whose every call would pay for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, draw: Draw) -> Tensor:
        # Where nothing is zeroed the gradient passes as it is, and nothing need be kept.
        ctx.save_for_backward(*((x, *draw[:4]) if draw.zeroes else ()))
        ctx.draw = draw
        y: Tensor = torch.ops.flipproof.flip.default(x, *draw.arguments)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        if saved := ctx.saved_tensors:  # asked for once: under activation checkpointing that recomputes
            x, rates, limits, key, tick = saved
            draw = ctx.draw._replace(rates=rates, limits=limits, key=key, tick=tick)
            grad = grad.clone(memory_format=torch.contiguous_format)
            torch.ops.flipproof.flip_grad_.default(x, grad, grad, *draw.arguments)
        return grad, None


def apply_draw(x: Tensor, draw: Draw) -> Tensor:
    """The operator ``flip`` with its gradient, where one is wanted."""
    y: Tensor = _Flip.apply(x, draw) if x.requires_grad else torch.ops.flipproof.flip.default(x, *draw.arguments)
    return y


class _Chip:
    """What the kept maps of persistent faults belong to where the key is made for one call."""


@lru_cache(maxsize=2**12)
def _chip(_seed: int, _site: str) -> _Chip:
    return _Chip()


_ARGUMENTS = {
    "p_exp": Probability | None,
    "p_frac": Probability | None,
    "zero_out_t": Threshold | None,
    "seed": Seed,
    "offset": Annotated[int, Between(0, 2**61 - 1), "an element's index"],
}


def _draw(
    x: Tensor,
    p_exp: float | None,
    p_frac: float | None,
    zero_out_t: float | Tensor | None,
    seed: int,
    site: str,
    tick: int,
    offset: int,
    pattern: Pattern,
    element: str | None,
) -> Draw:
    """The arguments as a draw, checked."""
    _backend(x)
    one = None if isinstance(zero_out_t, Tensor) else zero_out_t
    given = {"p_exp": p_exp, "p_frac": p_frac, "zero_out_t": one, "seed": seed, "offset": offset}
    good, problems = check_all({name: (name, value, _ARGUMENTS[name]) for name, value in given.items()})
    if tick_wrong := tick_problem(tick):
        problems.append(tick_wrong)
    if not isinstance(site, str):
        problems.append(f"site = {site!r}: a text is allowed")
    if isinstance(zero_out_t, Tensor):
        if not zero_out_t.is_floating_point() or not bool((zero_out_t >= 0).all()):
            problems.append("zero_out_t: thresholds are floating-point numbers of at least 0")
        channels_of(zero_out_t, x.shape)
    problems += _problems_of(element, x, zero_out_t)
    if problems:
        raise ConfigError(problems)
    fault = Fault(good["p_exp"] or 0.0, good["p_frac"] or 0.0, None, None if pattern.independent else pattern)
    limits = None if zero_out_t is None else limits_of(guard_of(zero_out_t), x.dtype)
    if limits is not None and limits.dim():
        limits = limits.to(x.device)
    pattern.bit_probabilities(0, 0, element or dtype_name(x.dtype))  # which knows the bits that there are
    # in CPU memory: their values go along with a kernel's launch
    key = torch.tensor(derive_key(seed, site))
    if pattern.persistent:
        key.owner = _chip(seed, site)  # type: ignore[attr-defined]
    flips, decoder = fault.flips, pattern.protection != "none"
    return Draw(rates_of(fault, element or x.dtype), limits, key, torch.tensor(tick), offset, flips, decoder)


def _problems_of(element: str | None, x: Tensor, zero_out_t: float | Tensor | None) -> list[str]:
    """What is wrong with ``element`` for ``x``."""
    if x.dtype != torch.uint8:
        wrong = element is not None
        return [f"element = {element!r}: it says what a uint8 tensor holds, and x is {dtype_name(x.dtype)}"] * wrong
    if element not in _PATTERNS:
        return [f"element = {element!r}: of a uint8 tensor it is to say which bits are real: {', '.join(_PATTERNS)}"]
    return ["zero_out_t: a guard is of numbers, and x holds patterns of bits; leave it out"] * (zero_out_t is not None)


def flip(
    x: Tensor,
    *,
    p_exp: float | None = None,
    p_frac: float | None = None,
    zero_out_t: float | Tensor | None = None,
    seed: int,
    site: str,
    tick: int,
    offset: int = 0,
    pattern: Pattern = _INDEPENDENT,
    element: str | None = None,
) -> Tensor:
    """A copy of ``x`` with random bits inverted, and zero where the guard catches the result.

    The draw is a pure function of (seed, site, tick, index of the element in the whole tensor): no global RNG is read
    or advanced. The gradient passes straight through where the value was kept and is 0 where the guard zeroed it.

    Args:
        x: bfloat16, float16 or float32, any shape and strides; elements are counted in row-major order. Or uint8, of
            which the low bits are real and the others stay.
        p_exp: probability that a sign or exponent bit is inverted, 0 to 0.5; None is 0.
        p_frac: the same for mantissa bits.
        zero_out_t: after the flip, each v for which ``|v| < zero_out_t`` is not true becomes 0. None is no guard. A
            tensor has a threshold for each channel: of the shape of the last dimensions of ``x`` (its features), or of
            its first ones with ones behind (its rows).
        seed: 0 to 2^63 - 1.
        site: names the layer and the operand, such as "layers.0.q_proj/x".
        tick: the number of the forward pass, below 2^48.
        offset: index of x's first element in the whole tensor, so that a slice can draw its own part.
        pattern: faults that are persistent, have probabilities of their own for single bits, come in bursts or in
            rows of memory, or meet a protection.
        element: what a uint8 tensor holds: "integer4", "integer8", "e2m1", "e4m3", "e5m2", "e8m0", "nf4" or
            "nf4-scale". Where there is no mantissa, ``p_exp`` is of all bits.

    Returns:
        Contiguous tensor of the shape and dtype of ``x``.

    Raises:
        TypeError: for any other dtype. ValueError: naming each argument out of range.
    """
    return apply_draw(x, _draw(x, p_exp, p_frac, zero_out_t, seed, site, tick, offset, pattern, element))


def flip_(
    x: Tensor,
    *,
    p_exp: float | None = None,
    p_frac: float | None = None,
    zero_out_t: float | Tensor | None = None,
    seed: int,
    site: str,
    tick: int,
    offset: int = 0,
    pattern: Pattern = _INDEPENDENT,
    element: str | None = None,
) -> Tensor:
    """``flip`` in place; returns ``x``. Outside of autograd only: use ``flip`` on what needs a gradient.

    Raises:
        RuntimeError: where gradients would be recorded through ``x``; and as ``flip`` does.
    """
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("flip_ on a tensor that requires grad: use flip, or wrap the call in torch.no_grad()")
    draw = _draw(x, p_exp, p_frac, zero_out_t, seed, site, tick, offset, pattern, element)
    torch.ops.flipproof.flip_(x, *draw.arguments)
    return x
