"""A weight of numbers to one that is stored, by rounding to nearest, and back.

The arithmetic is that of those who make and read such checkpoints, down to the last bit: compressed-tensors 0.20 for
all but nf4, bitsandbytes 0.50 for nf4. So scales are computed in the weight's dtype and rounded to it, and code × scale
is rounded to the dtype of the scale, where that is a float of the weight's own dtype.

Where they are at odds with themselves it is not:

* MX and nvfp4 of float16 weights are computed in float32. In float16 the scales of MX underflow below 2^-16, and the
  global scale of nvfp4 overflows for weights below 0.04.
* Scales of nf4 get the nearest number of their map, as on a GPU. On a CPU, bitsandbytes looks up one of 65536 bins,
  which is next to it once in 500.
* E8M0's 255 is NaN, as OCP has it and torch reads it.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from flipproof.errors import ConfigError
from flipproof.formats.codes import LARGEST, dynamic_map, nearest, nearest_in, numbers, powers
from flipproof.formats.operands import FLOATS, NESTED_GROUP, operands_of
from flipproof.formats.spec import Format, format_of
from flipproof.formats.stored import Stored

_SMALLEST = 1e-38
"""What bitsandbytes divides by at least."""
_LEAST_E4M3 = 0.125
"""The scale that nvfp4 has in place of 0."""


@torch.no_grad()
def quantise(weight: Tensor, format: str | Format) -> Stored:
    """The stored weight that rounding to nearest makes.

    Args:
        weight: (out, in), bfloat16, float16 or float32.
        format: or its name.

    Raises:
        ConfigError: for an unknown format, a weight that is not two-dimensional or of another dtype, that holds NaN or
            infinity or a scale that its dtype cannot hold, or in-features that the group does not divide.
    """
    format = format_of(format) if isinstance(format, str) else format
    if weight.dim() != 2 or weight.dtype not in FLOATS or not weight.numel():
        raise ConfigError(
            [
                f"a weight of {weight.dtype} and shape {tuple(weight.shape)} cannot be {format.name}: a tensor "
                f"(out, in) of {', '.join(map(str, FLOATS))} is needed"
            ]
        )
    rows, columns = weight.shape
    operands_of(format, (rows, columns))  # whether the group divides
    operands = _QUANTISERS[format.scale](weight.contiguous(), format)
    return Stored(format, operands, weight.dtype)


def _grouped(x: Tensor, format: Format) -> Tensor:
    """(out, groups, codes of a group)."""
    return x.unflatten(1, (-1, format.group or x.shape[1]))


def _finite(largest: Tensor, format: Format) -> Tensor:
    if not largest.isfinite().all():
        raise ConfigError(
            [
                f"a weight that holds NaN or infinity, or whose range {largest.dtype} cannot hold, has no scales: it "
                f"cannot be {format.name}"
            ]
        )
    return largest


def _over(x: Tensor, number: float) -> Tensor:
    """x / number. By a number that is not on the GPU torch divides there by multiplying with 1 / number."""
    return x / torch.tensor(number, dtype=x.dtype, device=x.device)


def _by_floats(weight: Tensor, format: Format) -> dict[str, Tensor]:
    groups = _grouped(weight, format)
    half = 2 ** (format.bits - 1)
    steps = 2**format.bits - 1
    if format.zero:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)  # 0 has a code
        scale = _finite(_over(high - low, steps), format)
        zero = (-half - low / scale).clamp(-half, half - 1).round().nan_to_num(0)  # NaN where all are 0
    else:
        scale = _finite(_over(groups.abs().amax(-1), LARGEST.get(format.code, steps / 2)), format)
        zero = torch.zeros_like(scale)
    scale = scale.masked_fill(scale == 0, torch.finfo(scale.dtype).eps)
    quotient = groups / scale[..., None] + zero[..., None]  # which makes 0 of −0
    found = {"code": nearest(quotient, format).flatten(1), "scale": scale}
    return found | ({"zero": (zero + half).to(torch.uint8)} if format.zero else {})


def _by_powers(weight: Tensor, format: Format) -> dict[str, Tensor]:
    """MX. The scale brings the exponent of a group's largest magnitude to the largest that a code has, and magnitudes
    from 1.75 · 2^e count as 2^(e + 1), which compressed-tensors has and OCP has not: more would be cut off at the
    largest code."""
    groups = _grouped(weight.float(), format)
    largest = _finite(groups.abs().amax(-1), format)
    exponent = largest.view(torch.int32) + (1 << 21) >> 23  # biased by 127, as E8M0 is
    scale = (exponent - _EXPONENT[format.code]).clamp(min=0).to(torch.uint8)
    quotient = groups / powers(scale)[..., None] + 0.0
    return {"code": nearest(quotient, format).flatten(1), "scale": scale}


_EXPONENT = {"e4m3": 8, "e2m1": 2}
"""Of the largest number of a code."""


def _by_two_levels(weight: Tensor, format: Format) -> dict[str, Tensor]:
    """nvfp4: the global scale makes the largest scale e4m3's largest number; scales are then computed by it."""
    groups = _grouped(weight.float() if weight.dtype == torch.float16 else weight, format)
    largest = _finite(groups.abs().amax(-1), format)
    most = largest.max().clamp(min=torch.finfo(largest.dtype).tiny)
    whole = (LARGEST["e4m3"] * LARGEST["e2m1"] / most).float().reshape(1)
    whole.masked_fill_(whole.isinf(), 1)
    scale = (whole * _over(largest, LARGEST["e2m1"])).to(torch.float8_e4m3fn)  # at most 448, but for rounding
    exact = scale.float()
    exact.masked_fill_(exact == 0, _LEAST_E4M3)
    quotient = groups / (exact / whole)[..., None]
    return {
        "code": nearest(quotient, format).flatten(1),
        "scale": exact.to(torch.float8_e4m3fn).view(torch.uint8),
        "global": whole,
    }


def _by_blocks(weight: Tensor, format: Format) -> dict[str, Tensor]:
    """nf4: of each block the largest magnitude, which is its scale, and the nearest quantiles of the rest."""
    size = format.group or weight.numel()
    flat = weight.reshape(-1).float()
    tail = flat.numel() % size
    whole = flat[: flat.numel() - tail].view(-1, size)
    largest = whole.abs().amax(1)
    parts = [(whole * (1 / largest.clamp(min=_SMALLEST))[:, None]).view(-1)]
    if tail:  # bitsandbytes divides here, where it multiplies above
        last = flat[-tail:].abs().max().clamp(min=_SMALLEST)
        parts.append(flat[-tail:] / last)
        largest = torch.cat([largest, last[None]])
    _finite(largest, format)
    code = nearest(torch.cat(parts), format).view(weight.shape)
    return {"code": code} | (_nested(largest) if format.scale == "nested" else {"scale": largest})


def _nested(largest: Tensor) -> dict[str, Tensor]:
    """Scales as 8 bits each: their differences from the mean, over the largest of 256."""
    offset = largest.mean()
    differences = largest - offset
    padded = torch.nn.functional.pad(differences, (0, -largest.numel() % NESTED_GROUP)).view(-1, NESTED_GROUP)
    nested = padded.abs().amax(1)
    table = dynamic_map().to(largest.device)
    relative = (padded * (1 / nested.clamp(min=_SMALLEST))[:, None]).view(-1)[: largest.numel()]
    return {"scale": nearest_in(relative, table), "nested": nested, "offset": offset.reshape(1), "map": table}


_QUANTISERS = {
    "float": _by_floats,
    "e8m0": _by_powers,
    "e4m3": _by_two_levels,
    "nested": _by_blocks,
    "float32": _by_blocks,
}


@torch.no_grad()
def dequantise(
    stored: Stored, dtype: torch.dtype | None = None, scales: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The weight that a stored one stands for, (out, in).

    Every pattern of bits in every operand gives a number, infinity or NaN, by IEEE arithmetic: a NaN or infinite scale
    reaches all codes that have it. Products are rounded to the dtype of the scale where that is the weight's own; else
    they are float32. Then all are rounded to ``dtype``, which compressed-tensors has bfloat16 for MX and nvfp4.

    Args:
        dtype: of the result; None is that of the weight that was quantised.
        scales: the numbers of all scales -> those to use; a guard, say.
    """
    format, operands = stored.format, stored.operands
    scale = scale_numbers(format, operands)
    scale = scales(scale) if scales else scale
    zero = zero_patterns(format, operands, stored.dtype)
    return multiplied(operands["code"], scale, zero, stored.g_idx, format, dtype or stored.dtype)


def scale_numbers(format: Format, operands: Mapping[str, Tensor]) -> Tensor:
    """The number that each scale stands for, in the dtype that products are rounded to."""
    scale = operands["scale"]
    match format.scale:
        case "e8m0":
            return powers(scale)
        case "e4m3":
            return numbers(scale, "e4m3", torch.float32) / operands["global"]
        case "nested":
            nested = operands["nested"].repeat_interleave(NESTED_GROUP)[: scale.numel()]
            return operands["map"][scale.int()] * nested + operands["offset"]
    return scale


def zero_patterns(format: Format, operands: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor | None:
    """The pattern of 0 of each scale, as numbers of ``dtype``; None where it is the middle of the range."""
    return operands["zero"].to(dtype) + format.zero_plus if format.zero else None


def multiplied(
    code: Tensor, scale: Tensor, zero: Tensor | None, g_idx: Tensor | None, format: Format, dtype: torch.dtype
) -> Tensor:
    """Code × scale, (out, in).

    Args:
        code: (out, in) uint8.
        scale, zero: what the functions above give.
        g_idx: of ``Stored``.
        dtype: of the result.
    """
    weight = numbers(code, format.code, scale.dtype)
    if format.code == "nf4":
        weight = weight.reshape(1, -1)
        scale = scale[None]
        assert format.group  # of nf4
        size = format.group
        if weight.numel() % size:  # the last block is shorter
            scale = scale.repeat_interleave(size, 1)[:, : weight.numel()]
    if g_idx is not None:
        places = g_idx.long()
        scale = scale[:, places]
        zero = None if zero is None else zero[:, places]
    weight = weight.unflatten(1, (scale.shape[1], -1))  # (out, groups, codes of a group)
    if format.code == "int":
        weight.sub_(2 ** (format.bits - 1) if zero is None else zero[..., None])
    weight.mul_(scale[..., None])
    return weight.reshape(code.shape).to(dtype)
