"""What a checkpoint's ``quantization_config`` in config.json says: written for our formats, read of any checkpoint."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from flipproof.errors import ConfigError
from flipproof.formats.gptq import unpack_awq, unpack_gptq
from flipproof.formats.pack import unpack
from flipproof.formats.spec import FORMATS, Format, format_of
from flipproof.formats.stored import Stored
from flipproof.values import shown

Method = Literal["compressed-tensors", "bitsandbytes", "gptq", "awq"]

_SUPPORTED = (
    "supported are compressed-tensors (int8, int4, fp8 by channel, mxfp8, mxfp4, nvfp4), bitsandbytes nf4, GPTQ and "
    "AWQ (gemm) of 4 bits"
)

# What compressed-tensors calls a format's layout, and what it says of its weights beside bits and type
_LAYOUTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "int8": ("pack-quantized", {}),  # weights alone are read by vLLM in this layout only
    "int4": ("pack-quantized", {}),
    "int4-asym": ("pack-quantized", {}),
    "fp8": ("float-quantized", {}),
    "mxfp8": ("mxfp8-quantized", {"scale_dtype": "torch.uint8"}),
    "mxfp4": ("mxfp4-pack-quantized", {"scale_dtype": "torch.uint8"}),
    "nvfp4": ("nvfp4-pack-quantized", {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}),
}
_OTHER_LAYOUTS = {"int8": "int-quantized", "int4": "int-quantized", "fp8": "naive-quantized"}
"""Which a format is read from as well."""
_WITH_INPUTS = {"int8": "int-quantized", "int4": "int-quantized", "fp8": "float-quantized"}
"""Where inputs are quantised, too."""
_HEAD = ("lm_head",)


@dataclass(frozen=True)
class Checkpoint:
    """How the layers of a checkpoint are quantised."""

    method: Method
    format: Format
    ignore: tuple[str, ...]
    """Layers that are not quantised: names, parts of names, or, in compressed-tensors behind ``re:``, patterns."""
    inputs: Format | None = None
    """How inputs of its layers are quantised where it is served, where that is a way that we have, too."""
    activations: bool = False
    """Whether inputs, outputs or the cache are quantised in other ways there. Nothing here does so."""

    def quantises(self, name: str) -> bool:
        """Whether the linear layer of this name is quantised, by what config.json says."""
        if self.method == "compressed-tensors":  # whole names there
            return not any(
                _begins(other.removeprefix("re:"), name) if other.startswith("re:") else other == name
                for other in self.ignore
            )
        return not any(_begins(rf"(?:{other})(\.|$)", name) or name.endswith(other) for other in self.ignore)

    def unpack(self, tensors: Mapping[str, Tensor]) -> Stored:
        """The weight of one of its layers, from the tensors of the layer by their names in it; errors as of
        ``flipproof.formats.pack.unpack``."""
        by_method: dict[str, Callable[[Mapping[str, Tensor], Format], Stored]] = {
            "gptq": unpack_gptq,
            "awq": unpack_awq,
        }
        return by_method.get(self.method, unpack)(tensors, self.format)


def _begins(pattern: str, name: str) -> bool:
    """Whether a name begins as a pattern says; what is no pattern fits none, as nothing is read by it."""
    try:
        return re.match(pattern, name) is not None
    except re.error:
        return False


def quantization_config(
    format: Format, ignore: Sequence[str] = _HEAD, dtype: str = "bfloat16", inputs: Format | None = None
) -> dict[str, Any]:
    """What config.json says where all linear layers but those of ``ignore`` are as ``pack`` packs them.

    The layout is there twice: compressed-tensors looks for it in the group, vLLM beside it. Without the status, a model
    is loaded with random weights.

    Args:
        format: of the weights.
        ignore: names of layers, or, but for nf4, patterns behind ``re:``.
        dtype: which nf4 is computed in.
        inputs: how inputs are quantised as they come (``inputs.py``); integers are then packed ``plain``.

    Raises:
        ConfigError: for fp8-e5m2 and nf4 in other blocks, which no checkpoint has, and for inputs beside weights that
            have none there.
    """
    if inputs and format.ungrouped not in _WITH_INPUTS:
        allowed = ", ".join(_WITH_INPUTS)
        raise ConfigError([f"no checkpoint holds {format.name} with {inputs.name} inputs; weights may be {allowed}"])
    if format.code == "nf4":
        if format.group != FORMATS["nf4"].group:
            raise ConfigError([f"no checkpoint holds {format.name}: blocks of nf4 are of {FORMATS['nf4'].group} there"])
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "_load_in_4bit": True,
            "load_in_8bit": False,
            "_load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": format.scale == "nested",
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": list(ignore),
        }
    if format.ungrouped not in _LAYOUTS:
        raise ConfigError([f"no checkpoint holds {format.name}; {_SUPPORTED}"])
    layout, details = _LAYOUTS[format.ungrouped]
    layout = _WITH_INPUTS[format.ungrouped] if inputs else layout
    grouped = {"strategy": "group", "group_size": format.group} if format.group else {"strategy": "channel"}
    weights = _arguments(format)
    tokens = _arguments(inputs) | {"dynamic": True, "strategy": "token"} if inputs else None
    group = {
        "targets": ["Linear"],
        "format": layout,
        "weights": weights | grouped | details,
        "input_activations": tokens,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
    }


def _arguments(format: Format) -> dict[str, Any]:
    return {
        "num_bits": format.bits,
        "type": "int" if format.code == "int" else "float",
        "symmetric": not format.zero,
        "dynamic": False,
    }


def read_quantization_config(config: Mapping[str, Any]) -> Checkpoint:
    """What ``quantization_config`` says of a checkpoint.

    Raises:
        ConfigError: for what cannot be read, naming it and what can.
    """
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in _READERS:
        raise _refused("quant_method", method)
    return _READERS[method](config)


def _refused(key: str, value: Any, why: str = "is not supported") -> ConfigError:
    return ConfigError([f"quantization_config: {key} = {shown(value)} {why}; {_SUPPORTED}"])


def _names(config: Mapping[str, Any], key: str, otherwise: tuple[str, ...] = ()) -> tuple[str, ...]:
    names = config.get(key)
    if names is None:
        return otherwise
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names) or isinstance(names, str):
        raise ConfigError([f"quantization_config: {key} = {shown(names)}: a list of names is allowed"])
    return tuple(names)


def _compressed(config: Mapping[str, Any]) -> Checkpoint:
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1 or not isinstance(next(iter(groups.values())), Mapping):
        raise _refused("config_groups", groups, "is not one group of layers that are quantised alike")
    if config.get("sparsity_config"):
        raise _refused("sparsity_config", config["sparsity_config"])
    group = next(iter(groups.values()))
    if group.get("targets") != ["Linear"]:
        raise _refused("targets", group.get("targets"), "is not ['Linear'], all linear layers")
    layout, weights = group.get("format") or config.get("format"), group.get("weights")
    if not isinstance(weights, Mapping):
        raise _refused("weights", weights)
    format = _format_of_weights(weights)
    if layout not in (_LAYOUTS[format.ungrouped][0], _OTHER_LAYOUTS.get(format.ungrouped)):
        raise _refused("format", layout, f"is not supported for {format.name}")
    inputs = _format_of_inputs(group.get("input_activations"))
    others = [group.get("output_activations"), config.get("kv_cache_scheme")]
    others += [] if inputs else [group.get("input_activations")]
    return Checkpoint("compressed-tensors", format, _names(config, "ignore"), inputs, any(map(bool, others)))


def _format_of_inputs(said: Any) -> Format | None:
    """Where they are quantised as they come and each token by itself (``inputs.py``)."""
    if not isinstance(said, Mapping) or said.get("dynamic") is not True or said.get("scale_dtype"):
        return None
    if (said.get("num_bits", 8), said.get("strategy"), said.get("symmetric", True)) != (8, "token", True):
        return None
    return {"int": FORMATS["int8"], "float": FORMATS["fp8"]}.get(str(said.get("type", "int")))


def _format_of_weights(weights: Mapping[str, Any]) -> Format:
    if weights.get("actorder") not in (None, False, "static", "weight"):
        raise _refused("actorder", weights["actorder"])
    strategy = weights.get("strategy")
    said = (weights.get("type"), weights.get("num_bits"), strategy, weights.get("symmetric"))
    name = next((name for known, name in _BY_WEIGHTS if known == said), None)
    if name is None:
        raise _refused("weights", dict(weights))
    return _grouped(name, -1 if strategy == "channel" else weights.get("group_size"))


_BY_WEIGHTS = (
    (("int", 8, "channel", True), "int8"),
    (("int", 8, "group", True), "int8"),
    (("int", 4, "channel", True), "int4"),
    (("int", 4, "group", True), "int4"),
    (("int", 4, "channel", False), "int4-asym"),
    (("int", 4, "group", False), "int4-asym"),
    (("float", 8, "channel", True), "fp8"),
    (("float", 8, "group", True), "mxfp8"),
    (("float", 4, "group", True), "mxfp4"),
    (("float", 4, "tensor_group", True), "nvfp4"),
)
"""Type, bits, strategy, symmetric."""


def _grouped(name: str, size: Any) -> Format:
    if type(size) is not int:
        raise _refused("group_size", size)
    try:
        return format_of(name, size)
    except ConfigError as error:
        raise ConfigError([f"quantization_config: {problem}" for problem in error.problems]) from error


def _bitsandbytes(config: Mapping[str, Any]) -> Checkpoint:
    if not config.get("load_in_4bit"):
        raise _refused("load_in_4bit", config.get("load_in_4bit"))
    if config.get("bnb_4bit_quant_type", "fp4") != "nf4":
        raise _refused("bnb_4bit_quant_type", config.get("bnb_4bit_quant_type", "fp4"))
    double = config.get("bnb_4bit_use_double_quant", False)
    format = FORMATS["nf4"] if double else replace(FORMATS["nf4"], scale="float32")
    return Checkpoint("bitsandbytes", format, _names(config, "llm_int8_skip_modules", _HEAD))


def _gptq(config: Mapping[str, Any]) -> Checkpoint:
    if config.get("bits") != 4:
        raise _refused("bits", config.get("bits"))
    version = config.get("checkpoint_format", config.get("format", "gptq"))
    if version not in ("gptq", "gptq_v2"):
        raise _refused("checkpoint_format", version)
    for key in ("dynamic", "is_marlin_format"):
        if config.get(key):
            raise _refused(key, config[key])
    format = replace(_grouped("int4-asym", config.get("group_size", 128)), zero_plus=int(version == "gptq"))
    return Checkpoint("gptq", format, () if config.get("lm_head") else _HEAD)


def _awq(config: Mapping[str, Any]) -> Checkpoint:
    bits, size = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size", 128))
    if bits != 4:
        raise _refused("bits", bits)
    if str(config.get("version", "gemm")).lower() != "gemm":
        raise _refused("version", config["version"])
    if not config.get("zero_point", True):
        raise _refused("zero_point", config["zero_point"])
    return Checkpoint("awq", _grouped("int4-asym", size), (*_HEAD, *_names(config, "modules_to_not_convert")))


_READERS: Mapping[str, Callable[[Mapping[str, Any]], Checkpoint]] = {
    "compressed-tensors": _compressed,
    "bitsandbytes": _bitsandbytes,
    "gptq": _gptq,
    "awq": _awq,
}
