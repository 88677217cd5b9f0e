"""A linear layer whose weight is quantised: its operands are buffers, and what it computes with is made anew each time.

Codes of 4 bits are packed in pairs, so a layer takes the bits of ``bits_per_weight``. While it runs it takes a byte for
each code (faulty ones only where codes flip) and the whole weight in the dtype that is computed with, which go when it
has run. None of it trains, and it is in no ``state_dict``: a checkpoint of a training is what trains.

Its inputs may be quantised, too, before they meet the weight (``inputs.py``).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flipproof.dtensor import whole
from flipproof.formats.fields import from_bytes, to_bytes
from flipproof.formats.inputs import straight_through
from flipproof.formats.quantise import dequantise, quantise
from flipproof.formats.spec import Format
from flipproof.formats.stored import Stored


class QuantisedLinear(nn.Linear):
    """``nn.Linear`` with a quantised weight (out, in) in the place of the parameter; its bias is one as ever."""

    inputs: Format | None = None
    """How its inputs are quantised; None where they are not."""

    def __init__(self, stored: Stored, bias: nn.Parameter | None = None, dtype: torch.dtype | None = None) -> None:
        """
        Args:
            stored: the weight.
            bias: (out,), or None.
            dtype: in which it is computed with; None is that of the weight that was quantised.
        """
        nn.Module.__init__(self)
        self.out_features, self.in_features = stored.shape
        self.format, self.stored_dtype, self.dtype = stored.format, stored.dtype, dtype or stored.dtype
        for name, tensor in stored.operands.items():
            held = to_bytes(tensor, stored.format.bits) if name == "code" else tensor
            self.register_buffer(name, held, persistent=False)
        self.register_buffer("g_idx", stored.g_idx, persistent=False)
        self.register_parameter("bias", bias)

    @classmethod
    def of(cls, linear: nn.Linear, format: Format) -> "QuantisedLinear":
        """A layer with the quantised weight of ``linear``, and its bias. Raises as ``quantise`` does."""
        return cls(quantise(linear.weight, format), linear.bias)

    def held(self, name: str) -> Tensor:
        """One of the operands that the format has, as it is in memory: codes packed. Where processes share its rows and
        the layer is not at work, all of them must call."""
        return whole(self._buffers[name])  # type: ignore[arg-type]

    def operand(self, name: str) -> Tensor:
        """The same, codes unpacked: of 4 bits these are new, and anyone's to change."""
        tensor = self.held(name)
        if name == "code" and self.format.bits == 4:
            return from_bytes(tensor, 4)[:, : self.in_features].contiguous()
        return tensor

    def stored(self, change: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor) -> Stored:
        """The weight as it is held.

        Args:
            change: name and tensor of an operand -> what is there in its place.
        """
        names = [name for name in self._buffers if name != "g_idx"]
        operands = {name: change(name, self.operand(name)) for name in names}
        return Stored(self.format, operands, self.stored_dtype, self._buffers["g_idx"])

    def forward(self, x: Tensor) -> Tensor:
        if self.inputs is None:
            return super().forward(x)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return F.linear(straight_through(x, self.inputs), self.weight, self.bias)

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """What is computed with, made anew: (out, in)."""
        return dequantise(self.stored(), self.dtype)

    def extra_repr(self) -> str:
        inputs = f", inputs={self.inputs.name}" if self.inputs else ""
        return f"{super().extra_repr()}, {self.format.name}, group={self.format.group}{inputs}"


def quantised_weights(model: nn.Module) -> int:
    """How many weights of a model are quantised, each once."""
    layers = (module for module in model.modules() if isinstance(module, QuantisedLinear))
    return sum(layer.in_features * layer.out_features for layer in layers)
