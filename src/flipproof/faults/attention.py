"""Faults in what attention reads: the keys and values, from the KV cache where there is one.

``transformers`` looks its attention functions up by name. ``install`` registers the model's present one under another
name, with a step in front that flips keys and values, and gives each attention module a ``FaultyKeysValues`` that
knows its site. A memory that is read anew for each token flips anew for each token; a persistent fault belongs to a
place in the cache, (row of the batch, position, head, component), and stays there as the cache grows. So rows have
regions of 2^40 elements each in the whole tensor of a draw, and within a row positions come first. Where a cache holds
a sliding window, a place is one in the window.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from flipproof.errors import ConfigError
from flipproof.faults.draw import FaultData
from flipproof.faults.fault import Fault
from flipproof.faults.fitted import Guards
from flipproof.faults.spec import BitFlipSpec
from flipproof.faults.state import FaultSite, FaultState

_CHILD = "faulty_keys_values"
_PREFIX = "flipproof_"
_ROW = 2**40


class FaultyKeysValues(FaultSite, nn.Module):
    """The faults of one attention module's keys and values; a child of it without parameters."""

    kind, keyed = "kv", ("keys",)

    def __init__(self, site: str, fault: Fault, state: FaultState) -> None:
        super().__init__()
        self.site, self.state = site, state
        self._device = torch.device("cpu")
        self.faults = self._data_of(fault, state.guards)
        self.refresh_keys()

    def faults_of(self, spec: BitFlipSpec | None, guards: Guards | None) -> dict[str, Any]:
        return {"faults": self._data_of(spec.kv if spec else Fault(), guards)}

    def _data_of(self, fault: Fault, guards: Guards | None) -> tuple[FaultData, ...]:
        return tuple(self.data_of(operand, fault, guards) for operand in "kv")

    def refresh_keys(self) -> None:
        self.keys = tuple(self._key(self.draw_name(operand), self._device) for operand in "kv")
        for fault in self.faults:
            fault.move_to(self._device)

    def _apply(self, fn: Any, recurse: bool = True) -> "FaultyKeysValues":
        super()._apply(fn, recurse)
        device = fn(torch.empty(0, device=self._device)).device  # of what has no parameters
        if device.type != "meta":
            self._device = device
            self.refresh_keys()
            self.state.move_to(device)
        return self

    def read(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as attention reads them, both (batch, heads, positions, components)."""
        if not self.state.active(self.faults[0]):
            return key, value
        run = self.next_run()
        return self._read(0, key, run), self._read(1, value, run)

    def _read(self, which: int, x: Tensor, run: int) -> Tensor:
        operand, fault, philox_key = "kv"[which], self.faults[which], self.keys[which]
        first_row = self.state.slice * len(x)
        rows = [
            self._flipped(operand, row, fault, philox_key, (first_row + i) * _ROW, run)
            for i, row in enumerate(x.transpose(1, 2))  # (positions, heads, components)
        ]
        return torch.stack(rows).transpose(1, 2)


def planned(model: Any, spec: BitFlipSpec) -> dict[str, Fault]:
    """Name -> fault of the attention modules whose keys and values are to be faulty.

    Raises:
        ConfigError: for a model that does not look its attention up by name.
    """
    if not spec.any_kv_fault:
        return {}
    found = attention_modules(model)
    if not reachable(model):
        raise ConfigError(
            [f"bitflip.kv_*: {type(model).__name__} has no attention whose keys and values flipproof can reach"]
        )
    specs = {name: spec.for_layer(name) for name in found}
    return {name: layer_spec.kv for name, layer_spec in specs.items() if layer_spec and layer_spec.kv.active}


def reachable(model: Any) -> bool:
    """Whether a model looks its attention up by name."""
    return bool(attention_modules(model)) and getattr(model, "_supports_attention_backend", False)


def install(model: Any, faults: dict[str, Fault], state: FaultState) -> None:
    """Make what the named attention modules read faulty."""
    for name, fault in faults.items():
        module = model.get_submodule(name)
        module.add_module(_CHILD, FaultyKeysValues(name, fault, state))
        _rename(module.config, _PREFIX + _original(module.config))
    if faults:
        _rename(model.config.get_text_config(), _PREFIX + _original(model.config.get_text_config()))


def uninstall(model: Any) -> None:
    """Undo ``install``."""
    for module in attention_modules(model).values():
        if hasattr(module, _CHILD):
            delattr(module, _CHILD)
            _rename(module.config, _original(module.config))
    _rename(model.config.get_text_config(), _original(model.config.get_text_config()))


def attend_with(model: Any, name: str) -> None:
    """Let a model compute attention by what ``transformers`` calls ``name``, and read faulty keys and values as before.

    Raises:
        ValueError: where the model cannot.
    """
    read = [module.config for module in attention_modules(model).values() if hasattr(module, _CHILD)]
    model.set_attn_implementation(name)
    for config in [*read, model.config.get_text_config()] if read else []:
        _rename(config, _PREFIX + name)


def attention_modules(model: nn.Module) -> dict[str, Any]:
    """Name -> module, of all that call attention functions by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Attention") and hasattr(module, "config")
    }


def _original(config: Any) -> str:
    name: str = config._attn_implementation
    return name.removeprefix(_PREFIX)


def _rename(config: Any, name: str) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    if name.startswith(_PREFIX):
        inner = name.removeprefix(_PREFIX)
        AttentionInterface.register(name, _reader(inner))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[inner])
    config._attn_implementation = name


def _reader(inner: str) -> Any:
    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        faulty = getattr(module, _CHILD, None)
        if faulty is not None:
            key, value = faulty.read(key, value)
        # each file of models has an eager function of its own
        eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        return ALL_ATTENTION_FUNCTIONS.get_interface(inner, eager)(module, query, key, value, *args, **kwargs)

    return attend
