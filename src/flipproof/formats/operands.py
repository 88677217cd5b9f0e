"""Which tensors a memory holds for a weight in a format: their dtypes, shapes, and how many of their bits are real."""

import math
from typing import NamedTuple

import torch

from flipproof.errors import ConfigError
from flipproof.formats.spec import Format

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""The dtypes of weights, and so of scales that have the weight's dtype."""

NESTED_GROUP = 256
"""Scales of nf4 that share one ``nested``."""


class Operand(NamedTuple):
    """One of the tensors of a stored weight."""

    dtype: torch.dtype
    """Of the tensor that ``Stored`` has; uint8 for whatever is a pattern of up to 8 bits."""
    bits: int
    """How many bits of an element are real: the low ones."""
    shape: tuple[int, ...]


def operands_of(format: Format, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> dict[str, Operand]:
    """All operands of a weight by name, ``code`` first.

    Args:
        format: of the stored weight.
        shape: of the weight, (out, in).
        dtype: of the weight.

    Raises:
        ConfigError: where the group does not divide the in-features.
    """
    rows, columns = shape
    found = {"code": Operand(torch.uint8, format.bits, shape)}
    if format.code == "nf4":
        blocks = math.ceil(rows * columns / (format.group or rows * columns))
        if format.scale == "float32":
            return found | {"scale": _float(torch.float32, blocks)}
        return found | {
            "scale": Operand(torch.uint8, 8, (blocks,)),
            "nested": _float(torch.float32, math.ceil(blocks / NESTED_GROUP)),
            "offset": _float(torch.float32, 1),
            "map": _float(torch.float32, 256),
        }
    if format.group and columns % format.group:
        other = f", or another size: {format.ungrouped}-gN" if format.code == "int" else ""
        raise ConfigError(
            [
                f"{format.name} has groups of {format.group} in-features, and a weight of shape {shape} has {columns}: "
                f"a multiple of the group size is allowed{other}"
            ]
        )
    scales = rows, columns // format.group if format.group else 1
    found["scale"] = _float(dtype, *scales) if format.scale == "float" else Operand(torch.uint8, 8, scales)
    if format.zero:
        found["zero"] = Operand(torch.uint8, format.bits, scales)
    if format.scale == "e4m3":
        found["global"] = _float(torch.float32, 1)
    return found


def _float(dtype: torch.dtype, *shape: int) -> Operand:
    return Operand(dtype, 8 * dtype.itemsize, shape)


def bits_per_weight(format: Format, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> float:
    """Bits of all operands by elements of the weight; arguments and errors as of ``operands_of``."""
    parts = operands_of(format, shape, dtype).values()
    return sum(part.bits * math.prod(part.shape) for part in parts) / math.prod(shape)
