"""The faulty linear layer of a quantised weight: ``Y = X̃ · W̃ᵀ + s · (X̃ · Aᵀ) · Bᵀ + bias``.

What a memory holds of such a weight are codes, scales, zero points and the numbers that scales are made with. Their
bits flip, as they are stored, and W̃ is what the dequantisation then gives, behind a guard on the scales
(``w_scale_zero_out_t``) and one on W̃ (``w_zero_out_t``). Each operand is a tensor of its own, with a key and a place of
its own in a log: ``…q_proj/w_code``, ``…/w_scale``; what the guard zeroes of W̃ is there under ``…/dequantised``. Which
keys of a config are about which operand says ``PART_OF``.

**Adapters** are a separate operand, unquantised, as QLoRA trains and servers deploy them. W + s·B·A, quantised, would
be another model; here nothing is merged. They see the flipped input, and have no faults themselves.

**Backward** draws again, as that of ``FaultyLinear``: X, A and B are kept, X̃ and W̃ made anew. With ⊙ keep as there,

    dX = (dY · W̃ + s · (dY · B) · A) ⊙ keep_x        dA = s · (dY · B)ᵀ · X̃        dB = s · dYᵀ · (X̃ · Aᵀ)

W̃ is frozen and the adapters stand beside it, so what its guard zeroes is in no gradient of theirs.

Flips cost what they are in number; what costs by the element is the dequantisation, which is there without faults, too.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
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
from flipproof.faults.spec import DEFAULTS, PARTS, BitFlipSpec, LoraSpec, Part
from flipproof.faults.state import FaultState
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
_OF_NUMBERS = ("w_p_exp", "w_p_frac", "w_p_bits", "w_protected_bits")
_OF_PARTS = tuple(
    key for key in DEFAULTS if key.startswith(tuple(f"w_{part}_" for part in PARTS)) and key != "w_zero_out_t"
)


def elements(format: Format) -> dict[str, str | None]:
    """Operand -> what its elements are, of ``LAYOUTS``; None for floats of the tensor's own dtype."""
    integer = f"integer{format.bits}"
    known = {"code": integer if format.code == "int" else format.code, "zero": integer}
    known |= {"scale": _SCALES[format.scale]} if format.scale in _SCALES else {}
    return {name: known.get(name) for name in operands_of(format, (1, format.group or 1))}


class FaultyQuantisedLinear(FaultyLinear, QuantisedLinear):
    """``QuantisedLinear`` whose input and stored weight suffer bit flips at every forward pass.

    Made by ``flipproof.inject``; its buffers and bias are the very ones of the layer that it replaces.
    """

    keyed = (*FaultyLinear.keyed, "operand_keys")
    bias: nn.Parameter | None  # type: ignore[assignment]
    operand_faults: dict[str, FaultData]
    """Of the operands whose bits flip."""
    scale_guard: FaultData
    """Guard on scales, without flips."""

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
        for name, tensor in linear._buffers.items():
            self.register_buffer(name, tensor, persistent=False)
        self.register_parameter("bias", linear.bias)

    def _home(self) -> Tensor:
        return self.held("code")

    def plain(self) -> QuantisedLinear:
        return QuantisedLinear(self.stored(), self.bias, self.dtype)

    def merged_weight(self) -> Tensor:
        raise ConfigError(
            [
                f"the weights are {self.format.name}, and what adapters make of them is another model once it is "
                "quantised: nothing is merged; export the adapter (--format adapter)"
            ]
        )

    def faults_of(self, spec: BitFlipSpec | None, guards: Guards | None) -> dict[str, Any]:
        x, guard = (spec.x, spec.w) if spec else (Fault(), Fault())
        x_fault, w_fault = self._data_of(x, guard._replace(p_exp=0.0, p_frac=0.0, pattern=None), guards)
        parts = {part: spec.part(part) if spec else Fault() for part in PARTS}
        found = {
            name: FaultData(parts[PART_OF[name]], element=element)
            for name, element in self.elements.items()
            if parts[PART_OF[name]].flips
        }
        on_scales = Fault(zero_out_t=spec.w_scale_zero_out_t if spec else None)
        if guard.fitted and guards and self.draw_name("w_scale") in guards.maxima:  # not in those of a plain model
            on_scales = Fault(fitted=guard.fitted)
        scale_guard = self.data_of("w_scale", on_scales, guards)
        return {"x_fault": x_fault, "w_fault": w_fault, "operand_faults": found, "scale_guard": scale_guard}

    def refresh_keys(self) -> None:
        super().refresh_keys()
        device = key_device(self._home())
        self.operand_keys = {name: self._key(self.draw_name(f"w_{name}"), device) for name in self.elements}

    @property
    def _weight_active(self) -> bool:
        state = self.state
        guarded = state.active(self.scale_guard) or state.active(self.w_fault)
        return bool(guarded or (state.flips and self.operand_faults))

    def forward(self, x: Tensor) -> Tensor:
        state = self.state
        lora_A: Tensor | None
        lora_A, lora_B = (self.lora_A, self.lora_B) if state.adapters else (None, None)
        bias: Tensor | None = self.bias
        dtype = self.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        if not (state.active(self.x_fault) or self._weight_active or lora_A is not None):
            return F.linear(x, self.weight.to(dtype), bias)
        run, x_offset = self.next_run(), state.slice * x.numel()
        x_draw = self._draw(self.x_fault, self.x_key, x, x_offset, run)
        weight = self._weight_of_pass(x, dtype, run)
        if lora_A is not None and self.lora.dropout and self.training:
            lora_A = lora_A * self._kept_features(lora_A, run)
        if state.flip_hook is not None:
            if x_draw.active:
                x = state.flip_hook(self.draw_name("x", run), x, x_draw)
            return _product(x, weight(), bias, lora_A, lora_B, self.lora.scaling)
        product = Product(self.lora.scaling, True, self.checkpointed and torch.is_grad_enabled())
        y: Tensor = _QuantisedMatmul.apply(x, bias, lora_A, lora_B, x_draw, weight, product)
        return y

    def _weight_of_pass(self, x: Tensor, dtype: torch.dtype, run: int) -> Callable[[], Tensor]:
        """What makes W̃, the same whenever it is called, with the keys and the tick of this pass."""
        draws = {
            name: self._draw(fault, self.operand_keys[name], self.held(name), 0, run)
            for name, fault in self.operand_faults.items()
            if self.state.flips
        }
        guard = self._draw(self.w_fault, self.w_key, x, 0, run)
        scales = partial(_guarded, self.scale_guard, guard) if self.state.active(self.scale_guard) else None
        return partial(self._faulty_weight, draws, guard, scales, dtype, run)

    @torch.no_grad()
    def _faulty_weight(
        self,
        draws: Mapping[str, Draw],
        guard: Draw,
        scales: Callable[[Tensor], Tensor] | None,
        dtype: torch.dtype,
        run: int,
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
        scale = scales(scale) if scales else scale
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
        return f"{super().extra_repr()}, {self.format.name}, {self.operand_faults}{guard}"


def _guarded(guard: FaultData, where: Draw, scales: Tensor) -> Tensor:
    """The scales as new ones, 0 where the guard has it so. A draw without flips does that, since a GPU then gets the
    limit along with a kernel's launch; it is made here, where the dtype is known that the limit is of."""
    kept: Tensor = ops.flip(scales, *guard.draw(where.key, where.tick, 0, scales).arguments)
    return kept


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
        make_weight: Callable[[], Tensor],  # (out, in)
        product: Product,
    ) -> Tensor:
        ctx.x_draw, ctx.make_weight, ctx.product = x_draw, make_weight, product
        ctx.keeps_x = x_draw.active and product.checkpointed
        flipped_x, zeroed_x = x, None
        if ctx.keeps_x and x_draw.zeroes:
            flipped_x, zeroed_x = ops.flip_marked(x, *x_draw.arguments)
        elif x_draw.active:
            flipped_x = ops.flip(x, *x_draw.arguments)
        weight = make_weight()
        kept_x = flipped_x if ctx.keeps_x else x
        ctx.save_for_backward(kept_x, lora_A, lora_B, weight if product.checkpointed else None, zeroed_x)
        return _product(flipped_x, weight, bias, lora_A, lora_B, product.scaling)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, weight, zeroed_x = ctx.saved_tensors
        need_x, need_bias, need_A, need_B = ctx.needs_input_grad[:4]
        grad_y = grads[0].reshape(-1, grads[0].shape[-1])  # (n, out)
        grad_x = grad_bias = grad_A = grad_B = None
        through_b = None if lora_A is None else (grad_y @ lora_B.to(x.dtype)) * ctx.product.scaling  # (n, r)
        if need_x:
            wide = grad_y @ (ctx.make_weight() if weight is None else weight)
            if through_b is not None:
                wide = wide.addmm_(through_b, lora_A.to(x.dtype))
            grad_x = wide.view(x.shape)
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
        return grad_x, grad_bias, grad_A, grad_B, None, None, None


# -- which keys of a config are about which weights -------------------------------------------------------------------


def check_parts(spec: BitFlipSpec, layers: Iterable[nn.Module], table: bool) -> None:
    """Raises ConfigError for faults of weights that are on what the model does not have, one line each.

    Args:
        layers: the linear layers that faults are meant for.
        table: whether the embedding is to be faulty, too.
    """
    layers = list(layers)
    formats = list(dict.fromkeys(layer.format for layer in layers if isinstance(layer, QuantisedLinear)))
    plain = table or not all(isinstance(layer, QuantisedLinear) for layer in layers)
    problems = [line for variant in spec.variants() for line in _problems(variant, formats, plain)]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def _problems(spec: BitFlipSpec, formats: list[Format], plain: bool) -> Iterator[str]:
    given = {key: value for key, value in vars(spec).items() if value not in (None, 0, {}, ())}
    if not formats:
        for key in _OF_PARTS:
            if key in given and plain:
                yield (
                    f"bitflip.{key} = {given[key]!r}: the weights are not quantised (model.quantize); of plain weights "
                    "w_p_exp and w_p_frac are the keys"
                )
        return
    names = ", ".join(format.name for format in formats)
    if not plain:
        for key in _OF_NUMBERS:
            if key in given:
                yield (
                    f"bitflip.{key} = {given[key]!r}: the weights are {names}, of which bits of codes and scales flip; "
                    "w_code_p, w_scale_p_exp and w_scale_p_frac are the keys"
                )
    for part, name in (("zero", "zero points"), ("global", "float32 numbers that scales are made with")):
        has = any(PART_OF[operand] == part for format in formats for operand in elements(format))
        if (key := f"w_{part}_p") in given and not has:
            yield f"bitflip.{key} = {given[key]!r}: {names} has no {name}; leave it out"
    for format in formats:
        yield from _problems_of_bits(spec, given, format)


def _problems_of_bits(spec: BitFlipSpec, given: Mapping[str, Any], format: Format) -> Iterator[str]:
    floats = [str(dtype).removeprefix("torch.") for dtype in FLOATS] if format.scale == "float" else ["float32"]
    of = elements(format)
    for part in ("code", "scale"):
        for element in [of[part]] if of[part] else floats:
            assert element is not None
            fault = spec.part(part)
            pattern = fault.pattern
            if part == "scale" and not LAYOUTS[element].mantissa and "w_scale_p_frac" in given:
                yield (
                    f"bitflip.w_scale_p_frac = {given['w_scale_p_frac']!r}: scales of {format.name} are {element}, "
                    "whose bits are all w_scale_p_exp's; leave it out"
                )
            try:
                p_bits = pattern.bit_probabilities(fault.p_exp, fault.p_frac, element) if pattern else ()
            except ValueError as problem:
                if of[part] or element == "bfloat16":  # of scales that may be of any dtype, the least
                    yield f"bitflip.w_{part}_p_bits or w_{part}_protected_bits, of {format.name}: {problem}"
                continue
            if pattern and pattern.burst > 1 and len(set(p_bits)) > 1:
                yield (
                    f"bitflip.w_burst = {pattern.burst}: runs of bits need one probability for all bits of a "
                    f"{part}: {'w_scale_p_exp = w_scale_p_frac, ' if part == 'scale' else ''}without p_bits and "
                    "protected_bits"
                )
