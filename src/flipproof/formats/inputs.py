"""Inputs of linear layers that are quantised before the product, each token by itself, as they come.

A token's scale brings its largest magnitude to the largest number of a code: 127.5 for int8, which rounds to 127 or
−128, and 448 for fp8 (e4m3). What is computed with is code × scale. This is what compressed-tensors calls dynamic, by
token (W8A8, FP8_DYNAMIC), with the same arithmetic: scales are of the input's dtype, and codes are the nearest.

A token that holds NaN or infinity has such a scale, so all of it becomes NaN; its codes are 0.

The gradient passes straight through: no number is further from its code than half a step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flipproof.formats.codes import LARGEST, nearest
from flipproof.formats.quantise import dequantise
from flipproof.formats.spec import Format
from flipproof.formats.stored import Stored


@torch.no_grad()
def quantise_inputs(x: Tensor, format: Format) -> Stored:
    """The codes and the scales of inputs: ``Stored`` with a row for each token.

    Args:
        x: (…, in), bfloat16, float16 or float32.
        format: int8 or fp8, whose codes of a row share a scale.
    """
    rows = x.detach().reshape(-1, x.shape[-1])
    largest = rows.abs().amax(-1, keepdim=True)
    # by a tensor where the inputs are: a GPU multiplies by the reciprocal of a number of the host's
    scale = largest / largest.new_full((), LARGEST.get(format.code, (2**format.bits - 1) / 2))
    scale.masked_fill_(scale == 0, torch.finfo(scale.dtype).eps)
    quotient = (rows / scale).nan_to_num_(0).add_(0.0)  # which makes 0 of −0
    return Stored(format, {"code": nearest(quotient, format), "scale": scale}, x.dtype)


def coded(x: Tensor, format: Format, change: Callable[[str, Tensor], Tensor] = lambda _, operand: operand) -> Tensor:
    """What is computed with in the place of ``x``, without a gradient.

    Args:
        x: as above.
        change: name and tensor of an operand, ``code`` (tokens, in) or ``scale`` (tokens, 1), both new -> what is there
            in its place.
    """
    stored = quantise_inputs(x, format)
    operands = {name: change(name, operand) for name, operand in stored.operands.items()}
    return dequantise(Stored(format, operands, stored.dtype)).view(x.shape)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor, format: Format) -> Tensor:
        return coded(x, format)

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


def straight_through(x: Tensor, format: Format) -> Tensor:
    """``coded`` with its gradient."""
    y: Tensor = _StraightThrough.apply(x, format)
    return y
