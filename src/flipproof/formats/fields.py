"""Fields of 4 and 8 bits in words of 32, and pairs of 4 bits in bytes; tensors of a checkpoint, checked.

A word is its bytes in little-endian order, and a byte of two fields has the first in its low half, so field i of a row
is at bit ``bits * i`` of it, whatever the size of the words.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from flipproof.errors import ConfigError


def to_bytes(codes: Tensor, bits: int) -> Tensor:
    """Fields (rows, n) as bytes (rows, ceil(n · bits / 8)), both uint8; what is left of the last byte is 0."""
    if bits == 8:
        return codes
    pairs = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)).unflatten(1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


def from_bytes(packed: Tensor, bits: int) -> Tensor:
    """All fields of bytes (rows, m): (rows, 8 m / bits), uint8."""
    return packed if bits == 8 else torch.stack((packed & 15, packed >> 4), -1).flatten(1)


def to_words(codes: Tensor, bits: int) -> Tensor:
    """Fields (rows, n) as words (rows, ceil(n · bits / 32)), int32; what is left of the last word is 0."""
    packed = to_bytes(codes, bits)
    return _in_order(torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4))).view(torch.int32)


def from_words(words: Tensor, bits: int) -> Tensor:
    """All fields of words (rows, m): (rows, 32 m / bits), uint8."""
    return from_bytes(_in_order(words).view(torch.uint8), bits)


def _in_order(x: Tensor) -> Tensor:
    """Row by row in memory; ``contiguous`` leaves the strides of a single column as they are."""
    return x.clone(memory_format=torch.contiguous_format)


def part(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype | tuple[torch.dtype, ...], dim: int) -> Tensor:
    """The tensor of this name.

    Raises:
        ConfigError: where it is missing, or not of this dtype or number of dimensions.
    """
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if name not in tensors:
        raise ConfigError([f"{name} is missing; there are {', '.join(sorted(tensors)) or 'no tensors'}"])
    found = tensors[name]
    if found.dtype not in dtypes or found.dim() != dim:
        raise ConfigError(
            [
                f"{name} is {found.dtype} of shape {tuple(found.shape)}: {' or '.join(map(str, dtypes))} with "
                f"{dim} dimension{'s' * (dim != 1)} is needed"
            ]
        )
    return found


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], why: str) -> None:
    """Raises ConfigError where a tensor has another shape than ``why`` makes necessary."""
    if tuple(tensor.shape) != shape:
        raise ConfigError([f"{name} is of shape {tuple(tensor.shape)}: {shape} is needed, as {why}"])
