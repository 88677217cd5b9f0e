"""Models whose linear layers are quantised: made so while they are read, or read from checkpoints that are.

Either way the model is on the meta device first. Then one layer at a time is read, quantised on the device that the
model is to be on, or unpacked, and put in its place; what is left, embeddings, norms and the head, is read at last. So
beside what the model takes there is one layer's weight at a time.

``quantise`` makes the same of a weight whoever does it (``formats``): rounding to nearest. A checkpoint that is
quantised already, in a layout that ``formats.config`` reads, is kept as it is, bit by bit, whether or not anything is
to flip: what is measured is what is deployed, and dequantised it would be as large as the model that it was made of.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flipproof.config import ModelConfig, ParallelismConfig, RunConfig
from flipproof.errors import ConfigError, about
from flipproof.faults.dtypes import dtype_name
from flipproof.faults.inject import HEAD_NAMES, output_head
from flipproof.faults.linear import FaultyLinear
from flipproof.formats.config import Checkpoint, quantization_config, read_quantization_config
from flipproof.formats.linear import QuantisedLinear
from flipproof.formats.operands import operands_of
from flipproof.formats.pack import pack
from flipproof.formats.quantise import quantise
from flipproof.formats.spec import Format, format_of
from flipproof.formats.stored import Stored
from flipproof.log import logger
from flipproof.models.gguf import plain_directory
from flipproof.models.parallelize import shares_frozen
from flipproof.models.save import Shards, name_in_files, names_to_write, save_settings, unfit
from flipproof.models.weights import KEY, Others, read_stored, read_tensor, read_weights, unread_model
from flipproof.models.weights import Stored as At
from flipproof.world import layout

_NUMBERS = ("BF16", "F16", "F32")
_OF_QUANTISED = ("weight", "weight_packed", "qweight")
"""One of which is a layer's weight."""


def wanted_format(config: ModelConfig) -> Format | None:
    """That of ``model.quantize``. Raises ConfigError where it cannot have groups of that size."""
    return None if config.quantize is None else format_of(config.quantize)


def checkpoint_of(config: ModelConfig, hf_config: Any) -> Checkpoint | None:
    """How the checkpoint of ``config.hf_model_path`` is quantised, where it is and it is kept so; None where it is read
    as plain numbers, since it is of plain numbers, or in a layout that ``transformers`` alone reads.

    Raises:
        ConfigError: where it is to be quantised once more.
    """
    said = getattr(hf_config, "quantization_config", None)
    if said is None or config.init == "random":
        return None
    if config.quantize is not None:
        method = (said if isinstance(said, Mapping) else said.to_dict()).get("quant_method")
        raise ConfigError(
            [
                f"model.quantize = {config.quantize!r}: {KEY} = {config.hf_model_path!r} is quantised already "
                f"({method}); leave it out"
            ]
        )
    try:
        return read_quantization_config(said if isinstance(said, Mapping) else said.to_dict())
    except ConfigError:
        return None


def wanted_inputs(config: ModelConfig, checkpoint: Checkpoint | None) -> Format | None:
    """How inputs are to be quantised: as ``model.quantize_inputs`` says, or as a checkpoint does.

    Raises:
        ConfigError: where the two differ, or the weights are not quantised.
    """
    own = checkpoint.inputs if checkpoint else None
    if (name := config.quantize_inputs) is None:
        return own
    said = f"model.quantize_inputs = {name!r}"
    if config.quantize is None and checkpoint is None:
        raise ConfigError([f"{said}: the weights are plain; quantise them, too (model.quantize), or leave it out"])
    if own and own.name != name:
        where = f"{KEY} = {config.hf_model_path!r}"
        raise ConfigError([f"{said}: the inputs of {where} are {own.name} where it is served; leave it out"])
    return format_of(name)


def quantise_inputs_of(model: nn.Module, inputs: Format | None) -> None:
    """Have the inputs of all quantised layers quantised so; None leaves them as they are."""
    for layer in quantised_layers(model).values():
        layer.inputs = inputs


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Name -> linear layer, all but the output head: those that are quantised."""
    head = output_head(model)
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and not (head is None and name in HEAD_NAMES)
    }


def quantised_layers(model: nn.Module) -> dict[str, QuantisedLinear]:
    """Name -> layer, faulty or not."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}


Part = Callable[[QuantisedLinear], object]
"""Leaves of a layer, in place, what this process is to hold of it."""


def _put(
    model: nn.Module, name: str, stored: Stored, dtype: torch.dtype, device: torch.device, part: Part | None = None
) -> None:
    """A stored weight in the place of a linear layer's; hooks and bias stay."""
    linear = model.get_submodule(name)
    own = (linear.out_features, linear.in_features)
    if stored.shape != own:
        raise ConfigError([f"{name} has a weight of shape {stored.shape}, the model's has {own}"])
    parent, _, child = name.rpartition(".")
    layer = QuantisedLinear(stored, linear.bias, dtype)  # type: ignore[arg-type]
    for key, tensor in layer._buffers.items():
        if tensor is not None:
            layer._buffers[key] = tensor.to(device)
    if part:
        part(layer)
    layer._forward_pre_hooks = linear._forward_pre_hooks
    setattr(model.get_submodule(parent), child, layer)


def quantise_on_meta(model: nn.Module, format: Format, wanted: Callable[[str], bool] = lambda _: True) -> None:
    """Give a model on the meta device quantised layers there, those of wanted names. Raises ConfigError where a group
    does not divide."""
    for name, linear in linear_layers(model).items():
        if not wanted(name):
            continue
        with about(name):
            parts = operands_of(format, (linear.out_features, linear.in_features), linear.weight.dtype)
            made = {key: torch.empty(part.shape, dtype=part.dtype, device="meta") for key, part in parts.items()}
            _put(model, name, Stored(format, made, linear.weight.dtype), linear.weight.dtype, torch.device("meta"))


def quantise_as_said(model: nn.Module, config: ModelConfig, hf_config: Any) -> None:
    """Give a model on the meta device the quantised layers that its checkpoint's config.json speaks of, which need not
    be those that the files have. Raises ConfigError as ``checkpoint_of`` and ``quantise_on_meta`` do."""
    if (found := checkpoint_of(config, hf_config)) is not None:
        quantise_on_meta(model, found.format, found.quantises)
        quantise_inputs_of(model, wanted_inputs(config, found))
    elif config.init != "random" and getattr(hf_config, "quantization_config", None) is not None:
        said = "%s = %r is quantised in a way that transformers may read or not; that is seen when it is read"
        logger.warning(said, KEY, config.hf_model_path)


def read_and_quantise(
    path: str,
    dtype: str | None,
    format: Format,
    device: torch.device,
    finish: Callable[[Any], None],
    part: Part | None = None,
) -> nn.Module:
    """The model of a directory or Hub name, its layers quantised one at a time.

    Args:
        dtype: by name, of the weights that are quantised; None is the checkpoint's own.
        finish: computes the buffers that no file holds.
        part: called with each layer once it is quantised; None keeps all of it.

    Raises:
        ConfigError: where the weights cannot be read, or not be quantised so, naming the layer.
    """
    model = unread_model(path, dtype)
    for name, linear in linear_layers(model).items():
        with about(name):
            weight = read_tensor(model, f"{name}.weight").to(device)
            _put(model, name, quantise(weight, format), linear.weight.dtype, device, part)
    return _with_rest(model, path, device, finish)


def read_quantised(
    path: str,
    dtype: str | None,
    checkpoint: Checkpoint,
    hf_config: Any,
    device: torch.device,
    finish: Callable[[Any], None],
    part: Part | None = None,
) -> nn.Module:
    """The model of a directory or Hub name whose layers are quantised, as they are.

    Args:
        dtype: by name, in which is computed; None is the checkpoint's own.
        checkpoint: what ``checkpoint_of`` has found.
        hf_config: the model's.
        finish, part: as above.

    Raises:
        ConfigError: where a tensor is missing or is not what the format needs, naming the layer.
    """
    config = copy.deepcopy(hf_config)
    del config.quantization_config
    layers: Others = {}

    def others_of(tensors: Mapping[str, At]) -> Others:
        nonlocal layers
        layers = _quantised_of(tensors)
        return layers

    model: Any = unread_model(path, dtype, config, others_of)
    where, linear = f"{KEY} = {path!r}", linear_layers(model)
    if strange := [name for name in layers if name not in linear]:
        what = "its output head" if strange[0] in HEAD_NAMES else f"{strange[0]}, which is no nn.Linear,"
        raise ConfigError([f"{where}: {what} is quantised, and only linear layers before the head may be"])
    if not layers:
        raise ConfigError([f"{where}: config.json says that its weights are quantised ({checkpoint.method}); none are"])
    for name, own in layers.items():
        with about(f"{where}: {name}"):
            _put(model, name, checkpoint.unpack(read_stored(own)), linear[name].weight.dtype, device, part)
    if checkpoint.activations:
        said = "%s: its activations are quantised in another way, too, where it is served; here they are not"
        logger.warning(said, where)
    how = checkpoint.format.name + (f", their inputs {checkpoint.inputs.name}" if checkpoint.inputs else "")
    logger.info("%s: %d of its layers are quantised (%s), and stay so", where, len(layers), how)
    return _with_rest(model, path, device, finish)


def copy_checkpoint(config: ModelConfig, hf_config: Any, tokenizer: Any, directory: Path) -> str:
    """Write a checkpoint that ``checkpoint_of`` has found into a directory, its tensors as they are; returns the dtype
    of those that are not quantised, by name. Raises as ``read_quantised`` does."""
    path, plain = plain_directory(str(config.hf_model_path), KEY), copy.deepcopy(hf_config)
    del plain.quantization_config
    found: dict[str, At] = {}

    def others_of(tensors: Mapping[str, At]) -> Others:
        found.update(tensors)
        return _quantised_of(tensors)

    model: Any = unread_model(path, None, plain, others_of)
    shards = Shards(directory)
    for name, at in found.items():
        shards.add(name, read_stored({name: at})[name])
    shards.finish()
    model.config.quantization_config = hf_config.quantization_config
    save_settings(model, model.dtype, directory, tokenizer)
    return dtype_name(model.dtype)


def _quantised_of(tensors: Mapping[str, At]) -> Others:
    """The tensors of quantised layers, biases aside: of layers that have more than a weight of numbers."""
    layers: dict[str, dict[str, At]] = {}
    for key, at in tensors.items():
        layer, dot, own = key.partition(".weight.")  # of bitsandbytes
        layer, own = (layer, f"weight.{own}") if dot else key.rpartition(".")[::2]
        if own != "bias":
            layers.setdefault(layer, {})[own] = at
    return {
        layer: own
        for layer, own in layers.items()
        if own.keys() != {"weight"} or own["weight"].dtype not in _NUMBERS
        if any(name in own for name in _OF_QUANTISED)
    }


def _with_rest(model: Any, path: str, device: torch.device, finish: Callable[[Any], None]) -> nn.Module:
    """Give what is still on the meta device its memory and its values."""
    placed: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is not None and tensor.is_meta:
                    if id(tensor) not in placed:
                        made: Tensor = torch.empty_like(tensor, device=device)
                        placed[id(tensor)] = (
                            nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
                        )
                    held[key] = placed[id(tensor)]
    read_weights(model, path)
    finish(model)
    result: nn.Module = model.eval()
    return result


def check_spread(parallelism: ParallelismConfig, processes: int, on_a_node: int, name: str | None) -> None:
    """Raises ConfigError where weights in the format of this name, None where they are plain, would be spread over
    several processes, so many on each node, as FSDP alone does it."""
    if name is None or processes == 1 or parallelism.sharding_strategy == "no_shard":
        return
    _, shards = layout(parallelism, processes, on_a_node)
    if not shares_frozen(parallelism, shards, on_a_node):
        raise unshared(parallelism, name, f"over {shards} processes, {on_a_node} on a node")


def unshared(parallelism: ParallelismConfig, name: str, why: str) -> ConfigError:
    """That weights in the format of this name cannot be spread so; ``why`` follows what is said of the config."""
    keys = [f"parallelism.{key} = true" for key in ("cpu_offload", "keep_gathered") if getattr(parallelism, key)]
    said = ", ".join([f"parallelism.sharding_strategy = {parallelism.sharding_strategy!r}", *keys])
    return ConfigError(
        [
            f"{said} {why}: the weights are {name}, which full_shard and hybrid_shard share by whole rows within a "
            "node, without cpu_offload or keep_gathered; no_shard, which gives all to each, is allowed"
        ]
    )


def without_compilation(config: RunConfig, model: nn.Module) -> RunConfig:
    """The config without ``torch.compile`` where a model's weights are quantised, since their layers are not made for
    it. Raises ConfigError where it is asked for."""
    if not quantised_layers(model):
        return config
    if config.training.compile:
        raise ConfigError(["training.compile = True: layers with quantised weights are not compiled; leave it out"])
    return replace(config, training=replace(config.training, compile=False))


def check_training(config: RunConfig, name: str) -> None:
    """Raises ConfigError where the training of a model whose weights are quantised, in the format of this name, cannot
    be."""
    problems = []
    if not config.lora.r:
        problems.append(f"lora.r = 0: the weights are {name}, which do not train; adapters do (lora.r)")
    if config.checkpoint.export_merged:
        problems.append(
            f"checkpoint.export_merged = True: the weights are {name}, and with adapters merged into them it would be "
            "another model; leave it out"
        )
    if problems:
        raise ConfigError(problems)


@torch.no_grad()
def save_quantised(
    model: Any, directory: Path, tokenizer: Any, format: Format, what: str, inputs: Format | None = None
) -> None:
    """Write a Hugging Face model, adapters merged, whose linear layers but the head are quantised; ``transformers``
    opens it with the library that has the layout. For one process. The model, of plain weights, stays as it is.

    Args:
        what: what a message calls the weights.
        inputs: how inputs are to be quantised where it is served.

    Raises:
        ConfigError: for a format that no checkpoint has, in-features that a group does not divide, or a weight that is
            not finite.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head, shards = output_head(model), Shards(directory)
    left = [name for name, module in layers.items() if module is head or (head is None and name in HEAD_NAMES)]
    said = quantization_config(format, left, dtype_name(model.dtype), inputs)
    state = model.state_dict()
    for name in names_to_write(model):
        layer, _, key = name.rpartition(".")
        tensor = state[name]
        if key in ("lora_A", "lora_B"):
            continue
        if key == "weight" and isinstance(module := layers.get(layer), FaultyLinear):
            tensor = module.merged_weight()
        if not tensor.isfinite().all():
            raise unfit(what, name)
        if key != "weight" or layer not in layers or layer in left:
            shards.add(name_in_files(model, name, tensor), tensor)
            continue
        with about(layer):
            packed = pack(quantise(tensor, format), plain=inputs is not None)
        for own, part in packed.items():
            shards.add(f"{layer}.{own}", part)
    shards.finish()
    try:
        model.config.quantization_config = said
        save_settings(model, model.dtype, directory, tokenizer)
    finally:
        del model.config.quantization_config
