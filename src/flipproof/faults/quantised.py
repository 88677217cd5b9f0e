"""The faulty linear layer of a quantised weight: ``Y = X̃ · W̃ᵀ + s · (X̃ · Aᵀ) · Bᵀ + bias``.

What a memory holds of such a weight are codes, scales, zero points and the numbers that scales are made with. Their
bits flip, as they are stored, and W̃ is what the dequantisation then gives, behind a guard on the scales
(``w_scale_zero_out_t``) and one on W̃ (``w_zero_out_t``). Each operand is a tensor of its own, with a key and a place of
its own in a log: ``…q_proj/w_code``, ``…/w_scale``; what the guards zero is there under ``…/scales`` and
``…/dequantised``. ``PART_OF`` says which keys of a config are about which operand.

**Inputs** that are quantised (``QuantisedLinear.inputs``) have codes and scales of their own, ``…q_proj/x_code`` and
``…/x_scale``, a scale for each token. They are indexed as X is, by their place in the global micro-batch. X̃ is what the
dequantisation gives, behind the guard ``x_zero_out_t``.

**Adapters** are a separate operand, unquantised, as QLoRA trains and servers deploy them. W + s·B·A, quantised, would
be another model; here nothing is merged. They see the flipped input, and have no faults themselves.

**Backward** draws again, as that of ``FaultyLinear``: X, A and B are kept, X̃ and W̃ made anew. With ⊙ keep as there,

    dX = (dY · W̃ + s · (dY · B) · A) ⊙ keep_x        dA = s · (dY · B)ᵀ · X̃        dB = s · dYᵀ · (X̃ · Aᵀ)

W̃ is frozen and the adapters stand beside it, so what its guard zeroes is in no gradient of theirs. keep_x also leaves
out codes of X that a protection has lost, and all of a token whose scale it has.

Flips cost what they are in number; what costs by the element is the dequantisation, which is there without faults, too.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flipproof.errors import ConfigError
from flipproof.faults.draw import Draw, FaultData
from flipproof.faults.fault import Fault
from flipproof.faults.fitted import Guards
from flipproof.faults.layouts import LAYOUTS
from flipproof.faults.linear import FaultyLinear, Product, flip_again, key_device
from flipproof.faults.spec import DEFAULTS, INPUT_PARTS, PARTS, BitFlipSpec, LoraSpec, Operand, Part
from flipproof.faults.state import FaultState
from flipproof.formats.inputs import coded, straight_through
from flipproof.formats.linear import QuantisedLinear
from flipproof.formats.operands import FLOATS, operands_of
from flipproof.formats.quantise import scale_numbers, zero_patterns
from flipproof.formats.spec import Format

ops = torch.ops.flipproof

PART_OF: Mapping[str, Part] = {
    "code": "code",
    "scale": "scale",
    "zero": "zero",
    "global": "global",
    "nested": "global",
    "offset": "global",
    "map": "global",
}
"""Operand of ``formats`` -> what the keys of its faults call it."""
_SCALES = {"e8m0": "e8m0", "e4m3": "e4m3", "nested": "nf4-scale"}
_OF_NUMBERS = ("p_exp", "p_frac", "p_bits", "protected_bits")
_OF_PARTS = tuple(
    key
    for key in DEFAULTS
    if key.startswith(tuple(f"{operand}_{part}_" for operand in "wx" for part in PARTS))
    and key not in ("w_zero_out_t", "x_zero_out_t")
)


def elements(format: Format) -> dict[str, str | None]:
    """Operand -> what its elements are, of ``LAYOUTS``; None for floats of the tensor's own dtype."""
    integer = f"integer{format.bits}"
    known = {"code": integer if format.code == "int" else format.code, "zero": integer}
    known |= {"scale": _SCALES[format.scale]} if format.scale in _SCALES else {}
    return {name: known.get(name) for name in operands_of(format, (1, format.group or 1))}


def cannot_merge(format: str) -> str:
    """What is said where adapters are to be merged into weights in the format of this name."""
    return (
        f"the weights are {format}, and what adapters make of them is another model once it is quantised: nothing is "
        "merged; export the adapter (--format adapter)"
    )


class FaultyQuantisedLinear(FaultyLinear, QuantisedLinear):
    """``QuantisedLinear`` whose input and stored weight suffer bit flips at every forward pass.

    Made by ``flipproof.inject``; its buffers and bias are the very ones of the layer that it replaces.
    """

    keyed = (*FaultyLinear.keyed, "operand_keys", "input_keys")
    bias: nn.Parameter | None  # type: ignore[assignment]
    operand_faults: dict[str, FaultData]
    """Of the operands whose bits flip."""
    scale_guard: FaultData
    """Guard on scales, without flips."""
    input_keys: dict[str, Tensor]
    input_faults: dict[str, FaultData]
    """Of the operands of quantised inputs whose bits flip."""

    def __init__(
        self, linear: QuantisedLinear, site: str, spec: BitFlipSpec | None, lora: LoraSpec, state: FaultState, kind: str
    ) -> None:
        """``spec``: of this very layer; None is no fault."""
        self.elements = elements(linear.format)
        super().__init__(linear, site, Fault(), Fault(), lora, state, kind)
        vars(self).update(self.faults_of(spec, state.guards))
        self.refresh_keys()

    def _take(self, linear: nn.Linear) -> None:
        assert isinstance(linear, QuantisedLinear)
        self.format, self.stored_dtype, self.dtype = linear.format, linear.stored_dtype, linear.dtype
        self.inputs = linear.inputs
        for name, tensor in linear._buffers.items():
            self.register_buffer(name, tensor, persistent=False)
        self.register_parameter("bias", linear.bias)

    def _home(self) -> Tensor:
        return self._buffers["code"]  # type: ignore[return-value]

    def plain(self) -> QuantisedLinear:
        linear = QuantisedLinear(self.stored(), self.bias, self.dtype)
        linear.inputs = self.inputs
        return linear

    def merged_weight(self) -> Tensor:
        raise ConfigError([cannot_merge(self.format.name)])

    def faults_of(self, spec: BitFlipSpec | None, guards: Guards | None) -> dict[str, Any]:
        x, guard = (spec.x, spec.w) if spec else (Fault(), Fault())
        x = _without_flips(x) if self.inputs else x
        x_fault, w_fault = self._data_of(x, _without_flips(guard), guards)
        parts = {part: spec.part(part) if spec else Fault() for part in PARTS}
        found = {
            name: FaultData(parts[PART_OF[name]], element=element)
            for name, element in self.elements.items()
            if parts[PART_OF[name]].flips
        }
        inputs = {
            name: FaultData(fault, element=element)
            for name, element in (elements(self.inputs) if self.inputs else {}).items()
            if spec and (fault := spec.part(PART_OF[name], "x")).flips
        }
        on_scales = Fault(zero_out_t=spec.w_scale_zero_out_t if spec else None)
        if guard.fitted and guards and self.draw_name("w_scale") in guards.maxima:  # not in those of a plain model
            on_scales = Fault(fitted=guard.fitted)
        return {
            "x_fault": x_fault,
            "w_fault": w_fault,
            "operand_faults": found,
            "scale_guard": self.data_of("w_scale", on_scales, guards),
            "input_faults": inputs,
        }

    def refresh_keys(self) -> None:
        super().refresh_keys()
        device = key_device(self._home())
        self.operand_keys = {name: self._key(self.draw_name(f"w_{name}"), device) for name in self.elements}
        self.input_keys = {name: self._key(self.draw_name(f"x_{name}"), device) for name in INPUT_PARTS}

    @property
    def _weight_active(self) -> bool:
        state = self.state
        guarded = state.active(self.scale_guard) or state.active(self.w_fault)
        return bool(guarded or (state.flips and self.operand_faults))

    @property
    def _input_active(self) -> bool:
        return self.state.active(self.x_fault) or bool(self.state.flips and self.input_faults)

    def forward(self, x: Tensor) -> Tensor:
        state = self.state
        lora_A: Tensor | None
        lora_A, lora_B = (self.lora_A, self.lora_B) if state.adapters else (None, None)
        bias: Tensor | None = self.bias
        dtype = self.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        if not (self._input_active or self._weight_active or lora_A is not None):
            x = straight_through(x, self.inputs) if self.inputs else x
            return F.linear(x, self._weight_of_pass(x, dtype, 0)(), bias)
        run, x_offset = self.next_run(), state.slice * x.numel()
        x_draw = self._draw(self.x_fault, self.x_key, x, x_offset, run)
        inputs = self._inputs_of_pass(x, run) if self.inputs else None
        weight = self._weight_of_pass(x, dtype, run)
        if lora_A is not None and self.lora.dropout and self.training:
            lora_A = lora_A * self._kept_features(lora_A, run)
        if state.flip_hook is not None:
            if inputs is not None:
                x, _ = inputs(x)
            if x_draw.active:
                x = state.flip_hook(self.draw_name("x", run), x, x_draw)
            return _product(x, weight(), bias, lora_A, lora_B, self.lora.scaling)
        product = Product(self.lora.scaling, True, self.checkpointed and torch.is_grad_enabled())
        y: Tensor = _QuantisedMatmul.apply(x, bias, lora_A, lora_B, x_draw, inputs, weight, product)
        return y

    def _inputs_of_pass(self, x: Tensor, run: int) -> "Inputs":
        """What makes X̃ of X but for its guard, the same whenever it is called, as below."""
        offsets: dict[str, int] = {
            "code": self.state.slice * x.numel(),
            "scale": self.state.slice * (x.numel() // x.shape[-1]),
        }
        alike: dict[str, Tensor] = {"code": x.new_empty(0, dtype=torch.uint8), "scale": x}  # of their dtypes and device
        draws = {
            name: self._draw(fault, self.input_keys[name], alike[name], offsets[name], run)
            for name, fault in self.input_faults.items()
            if self.state.flips
        }
        return partial(self._faulty_inputs, draws, run)

    @torch.no_grad()
    def _faulty_inputs(self, draws: Mapping[str, Draw], run: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
        assert self.inputs is not None
        hook, lost = self.state.flip_hook, list[Tensor]()

        def flipped(name: str, operand: Tensor) -> Tensor:
            if name not in draws:
                return operand
            if hook is not None:
                return hook(self.draw_name(f"x_{name}", run), operand, draws[name])
            if draws[name].decoder:
                operand, marks = ops.flip_marked(operand, *draws[name].arguments)
                lost.append(marks)
                return operand
            ops.flip_(operand, *draws[name].arguments)
            return operand

        y = coded(x, self.inputs, flipped)
        return y, reduce(torch.logical_or, lost) if lost else None

    def _weight_of_pass(self, x: Tensor, dtype: torch.dtype, run: int) -> Callable[[], Tensor]:
        """What makes W̃, the same whenever it is called, with the keys and the tick of this pass."""
        draws = {
            name: self._draw(fault, self.operand_keys[name], self.held(name), 0, run)
            for name, fault in self.operand_faults.items()
            if self.state.flips
        }
        guard = self._draw(self.w_fault, self.w_key, x, 0, run)
        return partial(self._faulty_weight, draws, guard, self.state.active(self.scale_guard), dtype, run)

    @torch.no_grad()
    def _faulty_weight(
        self, draws: Mapping[str, Draw], guard: Draw, guards_scales: bool, dtype: torch.dtype, run: int
    ) -> Tensor:
        hook, format = self.state.flip_hook, self.format

        def flipped(name: str) -> Tensor:
            if name not in draws:
                return self.held(name)
            tensor = self.operand(name)
            if hook is not None:
                return hook(self.draw_name(f"w_{name}", run), tensor, draws[name])
            if tensor is self.held(name):
                new: Tensor = ops.flip(tensor, *draws[name].arguments)
                return new
            ops.flip_(tensor, *draws[name].arguments)
            return tensor

        operands = {name: flipped(name) for name in self.elements}
        scale = scale_numbers(format, operands)
        if guards_scales:  # by a draw without flips, made here, where the dtype is known that its limit is of
            kept = self.scale_guard.draw(guard.key, guard.tick, 0, scale)
            scale = hook(self.draw_name("scales", run), scale, kept) if hook else ops.flip(scale, *kept.arguments)
        zero = zero_patterns(format, operands, self.stored_dtype)
        limits = guard.limits if hook is None else None
        of = format.name, format.group, self.in_features, dtype
        weight: Tensor = ops.dequantise(operands["code"], scale, zero, self._buffers["g_idx"], limits, *of)
        if hook is not None and guard.limits is not None:
            return hook(self.draw_name("dequantised", run), weight, guard)
        return weight

    def operand(self, name: str) -> Tensor:
        if name == "code" and self.format.bits == 4:
            codes: Tensor = ops.unpack(self.held(name), self.in_features)
            return codes
        return super().operand(name)

    def extra_repr(self) -> str:
        guard = f", scale_zero_out_t={self.scale_guard.one}" if self.scale_guard.guarded else ""
        inputs = f", {self.input_faults}" if self.inputs else ""
        return f"{super().extra_repr()}, {self.operand_faults}{guard}{inputs}"


Inputs = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""X -> (what is computed with but for the guard, where a protection has lost it: None, or of shape (tokens, in) or
(tokens, 1))."""


def _without_flips(fault: Fault) -> Fault:
    """The guard alone."""
    return fault._replace(p_exp=0.0, p_frac=0.0, pattern=None)


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None, scaling: float
) -> Tensor:
    """x (…, in), weight (out, in); the adapters' branch in the dtype of x."""
    y = F.linear(x, weight, bias)
    if lora_A is None or lora_B is None:
        return y
    return torch.add(y, F.linear(F.linear(x, lora_A.to(x.dtype)), lora_B.to(x.dtype)), alpha=scaling)


class _QuantisedMatmul(torch.autograd.Function):
    """flip(X) · W̃ᵀ + s · (flip(X) · Aᵀ) · Bᵀ + bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (..., in)
        bias: Tensor | None,
        lora_A: Tensor | None,  # (r, in)
        lora_B: Tensor | None,  # (out, r)
        x_draw: Draw,
        inputs: Inputs | None,
        make_weight: Callable[[], Tensor],  # (out, in)
        product: Product,
    ) -> Tensor:
        ctx.x_draw, ctx.inputs, ctx.make_weight, ctx.product = x_draw, inputs, make_weight, product
        ctx.keeps_x = (x_draw.active or inputs is not None) and product.checkpointed
        flipped_x, lost, zeroed_x = x, None, None
        if inputs is not None:
            flipped_x, lost = inputs(x)
        if ctx.keeps_x and x_draw.zeroes:
            flipped_x, zeroed_x = ops.flip_marked(flipped_x, *x_draw.arguments)
        elif x_draw.active:
            flipped_x = ops.flip(flipped_x, *x_draw.arguments)
        weight = make_weight()
        kept_x, lost = (flipped_x, lost) if ctx.keeps_x else (x, None)
        ctx.save_for_backward(kept_x, lora_A, lora_B, weight if product.checkpointed else None, zeroed_x, lost)
        return _product(flipped_x, weight, bias, lora_A, lora_B, product.scaling)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, weight, zeroed_x, lost = ctx.saved_tensors
        need_x, need_bias, need_A, need_B = ctx.needs_input_grad[:4]
        grad_y = grads[0].reshape(-1, grads[0].shape[-1])  # (n, out)
        grad_x = grad_bias = grad_A = grad_B = None
        through_b = None if lora_A is None else (grad_y @ lora_B.to(x.dtype)) * ctx.product.scaling  # (n, r)
        if need_x:
            wide = grad_y @ (ctx.make_weight() if weight is None else weight)
            if through_b is not None:
                wide = wide.addmm_(through_b, lora_A.to(x.dtype))
            grad_x = wide.view(x.shape)
        if ctx.inputs is not None and not ctx.keeps_x:
            x, lost = ctx.inputs(x)
        if grad_x is not None:
            if lost is not None:
                grad_x.view(wide.shape).masked_fill_(lost, 0)
            if zeroed_x is not None:
                ops.zero_marked_(zeroed_x, grad_x)
        flipped_x = x
        if ctx.x_draw.active and not ctx.keeps_x:
            flipped_x = flip_again(x, grad_x, grad_y, ctx.x_draw)
        flipped_x = flipped_x.reshape(-1, x.shape[-1])  # (n, in)
        if need_bias:
            grad_bias = grad_y.sum(0)
        if need_A:
            grad_A = (through_b.T @ flipped_x).to(lora_A.dtype)  # type: ignore[union-attr]
        if need_B:
            grad_B = (grad_y.T @ (flipped_x @ lora_A.to(x.dtype).T)).to(lora_B.dtype) * ctx.product.scaling
        return grad_x, grad_bias, grad_A, grad_B, None, None, None, None


# -- which keys of a config are about which weights and inputs ---------------------------------------------------------


def check_parts(spec: BitFlipSpec, layers: Iterable[nn.Module], table: bool) -> None:
    """Raises ConfigError for faults of weights or inputs that are on what the model does not have, one line each.

    Args:
        layers: the linear layers that faults are meant for.
        table: whether the embedding is to be faulty, too.
    """
    layers = list(layers)
    quantised = [layer for layer in layers if isinstance(layer, QuantisedLinear)]
    weights = list(dict.fromkeys(layer.format for layer in quantised))
    inputs = list(dict.fromkeys(layer.inputs for layer in quantised if layer.inputs))
    plain = table or len(quantised) < len(layers)
    plain_inputs = any(getattr(layer, "inputs", None) is None for layer in layers)
    problems = [
        line
        for variant in spec.variants()
        for line in (*_problems("w", variant, weights, plain), *_problems("x", variant, inputs, plain_inputs))
    ]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


_CALLED: Mapping[Operand, tuple[str, str]] = {
    "w": ("weights", "model.quantize"),
    "x": ("inputs", "model.quantize_inputs"),
}


def _problems(operand: Operand, spec: BitFlipSpec, formats: list[Format], plain: bool) -> Iterator[str]:
    given = {key: value for key, value in vars(spec).items() if value not in (None, 0, {}, ())}
    what, key_of_formats = _CALLED[operand]
    if not formats:
        for key in _OF_PARTS:
            if key.startswith(operand) and key in given and plain:
                yield (
                    f"bitflip.{key} = {given[key]!r}: the {what} are not quantised ({key_of_formats}); of plain {what} "
                    f"{operand}_p_exp and {operand}_p_frac are the keys"
                )
        return
    names = ", ".join(format.name for format in formats)
    if not plain:
        for key in (f"{operand}_{key}" for key in _OF_NUMBERS):
            if key in given:
                yield (
                    f"bitflip.{key} = {given[key]!r}: the {what} are {names}, of which bits of codes and scales flip; "
                    f"{operand}_code_p, {operand}_scale_p_exp and {operand}_scale_p_frac are the keys"
                )
    for part, name in (("zero", "zero points"), ("global", "float32 numbers that scales are made with")):
        has = any(PART_OF[each] == part for format in formats for each in elements(format))
        if (key := f"{operand}_{part}_p") in given and not has:
            yield f"bitflip.{key} = {given[key]!r}: {names} has no {name}; leave it out"
    for format in formats:
        yield from _problems_of_bits(operand, spec, given, format)


def _problems_of_bits(operand: Operand, spec: BitFlipSpec, given: Mapping[str, Any], format: Format) -> Iterator[str]:
    floats = [str(dtype).removeprefix("torch.") for dtype in FLOATS] if format.scale == "float" else ["float32"]
    of = elements(format)
    for part in INPUT_PARTS:  # which are those of a weight that have bits of their own
        keys = f"{operand}_{part}"
        for element in [of[part]] if of[part] else floats:
            assert element is not None
            fault = spec.part(part, operand)
            pattern = fault.pattern
            if part == "scale" and not LAYOUTS[element].mantissa and f"{keys}_p_frac" in given:
                yield (
                    f"bitflip.{keys}_p_frac = {given[f'{keys}_p_frac']!r}: scales of {format.name} are {element}, "
                    f"whose bits are all {keys}_p_exp's; leave it out"
                )
            try:
                p_bits = pattern.bit_probabilities(fault.p_exp, fault.p_frac, element) if pattern else ()
            except ValueError as problem:
                if of[part] or element == "bfloat16":  # of scales that may be of any dtype, the least
                    yield f"bitflip.{keys}_p_bits or {keys}_protected_bits, of {format.name}: {problem}"
                continue
            if pattern and pattern.burst > 1 and len(set(p_bits)) > 1:
                yield (
                    f"bitflip.{operand}_burst = {pattern.burst}: runs of bits need one probability for all bits of a "
                    f"{part}: {f'{keys}_p_exp = {keys}_p_frac, ' if part == 'scale' else ''}without p_bits and "
                    "protected_bits"
                )
