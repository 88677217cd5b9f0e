"""A run's model: built from a config or opened from a directory or the Hub, always through ``transformers``.

What trains is what ``AutoModelForCausalLM.from_pretrained`` opens, in one process or in several.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from flipproof.config import ModelConfig, TrainingConfig
from flipproof.dtensor import assign_, local
from flipproof.errors import ConfigError
from flipproof.faults.dtypes import dtype_name
from flipproof.faults.inject import iter_faulty
from flipproof.faults.philox import derive_key
from flipproof.formats.linear import QuantisedLinear
from flipproof.log import logger
from flipproof.models.flavors import FLAVORS
from flipproof.models.gguf import plain_directory
from flipproof.models.hub import from_hub, reason
from flipproof.models.online import attach, read_config
from flipproof.models.parallelize import cast_to
from flipproof.models.quantised import (
    Part,
    checkpoint_of,
    quantise_inputs_of,
    quantise_on_meta,
    read_and_quantise,
    read_quantised,
    wanted_format,
    wanted_inputs,
)
from flipproof.models.save import save_model
from flipproof.models.tokenizer import byte_tokenizer, load_tokenizer
from flipproof.models.weights import KEY, read_model, read_weights, unread_model

__all__ = [
    "FLAVORS",
    "byte_tokenizer",
    "compute_context",
    "load_model",
    "load_tokenizer",
    "materialise",
    "model_config",
    "model_on_meta",
    "save_model",
    "skeleton",
]


def _path(config: ModelConfig) -> str:
    """The directory or Hub name that holds the weights of ``config.hf_model_path``."""
    return plain_directory(str(config.hf_model_path), KEY)


def model_config(config: ModelConfig, tokenizer: Any) -> Any:
    """The ``transformers`` config of the model that the run names.

    Raises:
        ConfigError: for an unknown flavor, one that contradicts the checkpoint, a config that cannot be read, or inputs
            that are to be quantised where weights are not, or otherwise than the checkpoint's are.
    """
    from transformers import LlamaConfig

    shape = None
    if config.flavor is not None:
        if config.flavor not in FLAVORS:
            raise ConfigError([f"model.flavor = {config.flavor!r}: known are {', '.join(FLAVORS)}"])
        shape = FLAVORS[config.flavor]
    # from scratch a flavor is all there is to know: neither network nor weights are needed
    if config.hf_model_path is not None and (shape is None or config.init == "pretrained"):
        hf_config = from_hub(read_config, _path(config), KEY, "a model")
        _check_flavor(config, hf_config, shape)
    else:
        hf_config = LlamaConfig(**shape, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)  # type: ignore[arg-type]
    if config.quantize_inputs is not None:
        wanted_inputs(config, checkpoint_of(config, hf_config))
    return hf_config


def held_as(config: ModelConfig) -> str | None:
    """The name of the format that the model's weights are held in; None where they are not quantised. Needs no
    weights. Raises ConfigError as ``model_config`` and ``checkpoint_of`` do."""
    if (format := wanted_format(config)) is not None:
        return format.name
    if config.init == "random" or config.hf_model_path is None:
        return None
    found = checkpoint_of(config, model_config(config, None))
    return found.format.name if found else None


def skeleton(config: ModelConfig, tokenizer: Any, dtype: str | None) -> nn.Module:
    """The model on the meta device: shapes and names without memory; needs no weights. ``dtype`` by name; None is
    float32.

    Raises as ``model_config`` does.
    """
    from transformers import AutoModelForCausalLM

    hf_config = model_config(config, tokenizer)
    how = {"dtype": getattr(torch, dtype or "float32"), "trust_remote_code": False}
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(hf_config, **how)
    except ValueError as error:
        raise ConfigError([f"{KEY} = {config.hf_model_path!r}: {reason(error, str(config.hf_model_path))}"]) from error
    attach(model)
    _quantise_on_meta(model, config)
    return model


def _quantise_on_meta(model: nn.Module, config: ModelConfig) -> None:
    """Give a model on the meta device the layers that the config asks for. Raises ConfigError where groups do not
    divide one."""
    if (format := wanted_format(config)) is not None:
        quantise_on_meta(model, format)
        quantise_inputs_of(model, wanted_inputs(config, None))


def model_on_meta(config: ModelConfig, tokenizer: Any, dtype: str | None) -> nn.Module:
    """The model on the meta device, which ``materialise`` gives its weights, unless its layers are to be quantised.
    ``dtype`` as in ``load_model``.

    Raises:
        ConfigError: as ``model_config`` does, for weights that several processes cannot read, or groups that do not
            divide a layer.
    """
    if config.init == "random":
        return skeleton(config, tokenizer, dtype)
    checkpoint_of(config, model_config(config, tokenizer))  # which refuses to quantise what is quantised already
    model = unread_model(_path(config), dtype)
    _quantise_on_meta(model, config)
    return model


def load_model(
    config: ModelConfig,
    tokenizer: Any,
    dtype: str | None,
    seed: int,
    device: torch.device | None = None,
    part: Part | None = None,
) -> nn.Module:
    """A causal language model in one process's memory: loaded, quantised where the config or the checkpoint says so
    (``quantised.py``), or initialised from ``seed`` without touching the global RNG.

    ``dtype`` by name; None is the checkpoint's own, or float32 from scratch. ``device``: where layers are quantised and
    held; others are in the CPU's memory. ``part``: called with each such layer, of which it may leave a part.

    Raises:
        ConfigError: as ``model_config`` does, or for weights that cannot be read.
    """
    if config.init == "random":
        model = skeleton(config, tokenizer, dtype)
        materialise(model, config, seed, torch.device("cpu"))
        return model
    hf_config = model_config(config, tokenizer)
    device = device or torch.device("cpu")
    if (checkpoint := checkpoint_of(config, hf_config)) is not None:
        model = read_quantised(_path(config), dtype, checkpoint, hf_config, device, compute_buffers, part)
        quantise_inputs_of(model, wanted_inputs(config, checkpoint))
        return model
    if (format := wanted_format(config)) is not None:
        model = read_and_quantise(_path(config), dtype, format, device, compute_buffers, part)
        quantise_inputs_of(model, wanted_inputs(config, None))
        return model
    quantised = getattr(hf_config, "quantization_config", None)
    model = read_model(_path(config), dtype)
    if quantised is not None and not getattr(model, "is_quantized", False):
        name = dtype_name(model.dtype)  # type: ignore[arg-type]
        logger.info("%s = %r: its weights are quantised, and read as %s", KEY, config.hf_model_path, name)
    return model


def _check_flavor(config: ModelConfig, hf_config: Any, shape: dict[str, Any] | None) -> None:
    """The flavor describes what hf_model_path holds; saying two different shapes is a mistake to be told."""
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        actual = getattr(hf_config, key, None)
        if shape is not None and actual != shape[key]:
            raise ConfigError(
                [
                    f"model.flavor = {config.flavor!r} has {key} {shape[key]}, but {config.hf_model_path!r} has "
                    f"{actual}; drop the flavor or name the right one"
                ]
            )


def materialise(model: nn.Module, config: ModelConfig, seed: int, device: torch.device) -> None:
    """Give a model of ``model_on_meta``, sharded or not, memory on ``device`` and its weights: loaded, or initialised.

    Of a sharded model each process holds, reads and writes its shards only. A module's initial weights depend on
    ``seed``, its name and the type of device, so they are the same however the model is sharded.

    Raises:
        ConfigError: for a file that is damaged.
    """
    model.to_empty(device=device)
    model.tie_weights(recompute_mapping=False)  # type: ignore[operator]
    if config.init == "random":
        with _computed_anew(model):
            _initialise(model, seed)
    else:
        read_weights(model, _path(config))
        compute_buffers(model)
    for _, layer in iter_faulty(model):
        layer.reset_lora_parameters()


def compute_buffers(model: nn.Module) -> None:
    """Compute the buffers that no checkpoint holds, such as the frequencies of a rotary embedding. They have memory;
    parameters need none.

    Raises:
        ConfigError: where the model does not compute them but when it is made.
    """
    with _computed_anew(model):
        for module in model.modules():
            if module._non_persistent_buffers_set and not isinstance(module, QuantisedLinear):
                for parameter in module.parameters(recurse=False):
                    # it is loaded: transformers leaves it alone
                    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
                model._init_weights(module)  # type: ignore[operator]


@contextmanager
def _computed_anew(model: nn.Module) -> Iterator[None]:
    buffers = [
        buffer
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set and not isinstance(module, QuantisedLinear)
    ]
    for buffer in buffers:
        if buffer.is_floating_point():
            buffer.fill_(math.nan)  # to see below that each is computed again
    yield
    if any(buffer.isnan().any() for buffer in buffers):
        raise ConfigError([f"{type(model).__name__} does not compute its buffers anew; start it in one process"])


@torch.no_grad()
def _initialise(model: nn.Module, seed: int) -> None:
    for name, module in model.named_modules():
        own = {key: p for key, p in module.named_parameters(recurse=False) if not key.startswith("lora_")}
        if not own and not module._buffers:
            continue
        # transformers initialises whole parameters, so the module lends it some, one module at a time
        lent = {
            key: nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=local(p).device)) for key, p in own.items()
        }
        held, module._parameters = module._parameters, module._parameters | lent
        try:
            with torch.random.fork_rng({p.device for p in lent.values() if p.is_cuda}):
                torch.manual_seed(derive_key(seed, name))
                model._init_weights(module)  # type: ignore[operator]
        finally:
            module._parameters = held
        for key, parameter in own.items():
            assign_(parameter, lent[key])


def compute_context(training: TrainingConfig, model: nn.Module) -> AbstractContextManager[Any]:
    """Autocast to ``mixed_precision_param`` where that differs from the weights' dtype; FSDP casts what it gathers."""
    dtype = cast_to(training, model)
    if dtype is None or isinstance(model, FSDPModule):
        return nullcontext()
    return torch.autocast(next(model.parameters()).device.type, dtype=dtype)
