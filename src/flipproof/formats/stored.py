"""A quantised weight as a memory holds it: its operands, each element by itself.

Operands are unpacked: a code of 4 bits has a byte of its own here, its bits in the low half. So every element has its
logical place, (out, in) for codes and (out, group) for scales, whichever way a checkpoint packs them, and what pads a
packed word is not there and never flips.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flipproof.errors import ConfigError
from flipproof.formats.operands import FLOATS, operands_of
from flipproof.formats.spec import Format


@dataclass(frozen=True)
class Stored:
    """A weight (out, in) in a format.

    Raises:
        ConfigError: for operands that are not those of the format, one line for each.
    """

    format: Format
    operands: Mapping[str, Tensor]
    """What ``operands_of`` names, of the dtypes and shapes that it says."""
    dtype: torch.dtype
    """Of the weight that was quantised, and of scales that have the weight's dtype."""
    g_idx: Tensor | None = None
    """Which group each in-feature belongs to, (in,) int32, where its place does not say so (GPTQ's ``desc_act``). It
    says where a scale is and is no operand: nothing here flips it. That its groups exist is checked where a checkpoint
    is read: to look at them here, whenever a layer runs, would be to wait for the GPU."""

    def __post_init__(self) -> None:
        if self.dtype not in FLOATS:
            raise ConfigError([f"a weight of {self.dtype}: {', '.join(map(str, FLOATS))} are allowed"])
        if "code" not in self.operands or self.operands["code"].dim() != 2:
            seen = f"of shape {tuple(self.operands['code'].shape)}" if "code" in self.operands else "missing"
            raise ConfigError([f"code, an operand of {self.format.name}, is {seen}: a tensor (out, in) is needed"])
        declared = operands_of(self.format, self.shape, self.dtype)
        problems = [
            f"{name} is no operand of {self.format.name}, which has {', '.join(declared)}"
            for name in self.operands
            if name not in declared
        ]
        for name, (dtype, _, shape) in declared.items():
            tensor = self.operands.get(name)
            if tensor is None:
                problems.append(f"{name}, an operand of {self.format.name}, is missing")
            elif tensor.dtype != dtype or tuple(tensor.shape) != shape:
                problems.append(
                    f"{name}, an operand of {self.format.name}, is {tensor.dtype} of shape {tuple(tensor.shape)}: "
                    f"{dtype} of shape {shape} is needed for a weight of shape {self.shape}"
                )
        g_idx = self.g_idx
        if g_idx is not None and (g_idx.dtype != torch.int32 or tuple(g_idx.shape) != self.shape[1:]):
            seen = f"{g_idx.dtype} of shape {tuple(g_idx.shape)}"
            problems.append(f"g_idx is {seen}: torch.int32 of {self.shape[1:]} is needed")
        if problems:
            raise ConfigError(problems)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight, (out, in)."""
        rows, columns = self.operands["code"].shape
        return rows, columns
