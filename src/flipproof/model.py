"""Models and tokenizers: built from a config or opened from a directory or the Hub, always through ``transformers``.

What trains is what ``AutoModelForCausalLM.from_pretrained`` opens. A flavor is a shape by name: the Llama 3 family,
AICrossSim-CLM, and the small ones of the demo and the tests.
"""

import math
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from flipproof.config import ModelConfig, TrainingConfig
from flipproof.errors import ConfigError, first_of
from flipproof.files import write_json
from flipproof.inject import iter_faulty
from flipproof.layers import FaultyLinear
from flipproof.ops.philox import derive_key
from flipproof.parallel import World, cast_to
from flipproof.shards import assign_, like, local, whole
from flipproof.ties import declared_ties, merging_cuts, untied_config

_LLAMA3: dict[str, Any] = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
_CLM: dict[str, Any] = {  # AICrossSim-CLM; the feed-forward width follows from ffn_dim_multiplier 1.3, multiple_of 128
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def _shape(base: dict[str, Any], hidden: int, layers: int, heads: int, ffn: int, **more: Any) -> dict[str, Any]:
    return base | {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
        **more,
    }


def _clm_ffn(dim: int) -> int:
    """Llama's rule: 4·dim, two thirds of it, times the multiplier, rounded up to the multiple."""
    return (int(1.3 * int(2 * 4 * dim / 3)) + 127) // 128 * 128


FLAVORS: dict[str, dict[str, Any]] = {
    "8B": _shape(_LLAMA3, 4096, 32, 32, 14336),
    "70B": _shape(_LLAMA3, 8192, 80, 64, 28672),
    "405B": _shape(_LLAMA3, 16384, 126, 128, 53248),
    **{
        f"clm-{name}": _shape(_CLM, dim, layers, heads, _clm_ffn(dim), num_key_value_heads=kv_heads)
        for name, dim, layers, heads, kv_heads in (
            ("60M", 384, 22, 6, 2),
            ("200M", 768, 24, 12, 4),
            ("400M", 960, 30, 15, 5),
            ("600M", 1152, 32, 18, 6),
            ("1.1B", 1536, 32, 24, 8),
        )
    },
    "demo": _shape({"vocab_size": 258, "max_position_embeddings": 1024}, 128, 4, 4, 320),
}
"""Llama shapes by name, as keyword arguments of ``transformers.LlamaConfig``."""


def byte_tokenizer() -> Any:
    """A Hugging Face tokenizer whose tokens are the 256 bytes, an end-of-text and a padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # The byte-level alphabet writes each byte as one printable character; without merges, each is a token.
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"<|endoftext|>": 256, "<|pad|>": 257}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer that the config names. Raises ConfigError where there is none."""
    name = config.tokenizer or config.hf_model_path
    if name is None or name == "bytes":
        return byte_tokenizer()
    from transformers import AutoTokenizer

    tokenizer = _from_hub(AutoTokenizer.from_pretrained, name, "model.tokenizer", "a tokenizer")
    if not tokenizer.tokenize("a bit"):  # transformers makes an empty one for a model without tokenizer files
        raise ConfigError(
            [f"model.tokenizer = {name!r}: holds no tokenizer; name one, or 'bytes' for byte-level tokens"]
        )
    return tokenizer


def model_config(config: ModelConfig, tokenizer: Any) -> Any:
    """The ``transformers`` config of the model that the run names.

    Raises:
        ConfigError: for an unknown flavor, one that contradicts the checkpoint, a config that cannot be read, or a
            vocabulary smaller than the tokenizer's.
    """
    from transformers import AutoConfig, LlamaConfig

    shape = None
    if config.flavor is not None:
        if config.flavor not in FLAVORS:
            raise ConfigError([f"model.flavor = {config.flavor!r}: known are {', '.join(FLAVORS)}"])
        shape = FLAVORS[config.flavor]
    # from scratch a flavor is all there is to know: neither network nor weights are needed
    if config.hf_model_path is not None and (shape is None or config.init == "pretrained"):
        hf_config = _from_hub(AutoConfig.from_pretrained, config.hf_model_path, "model.hf_model_path", "a model")
        _check_flavor(config, hf_config, shape)
    else:
        hf_config = LlamaConfig(**shape, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)  # type: ignore[arg-type]
    if len(tokenizer) > hf_config.get_text_config().vocab_size:
        raise ConfigError(
            [f"model.tokenizer has {len(tokenizer)} tokens; the model's vocabulary has {hf_config.vocab_size}"]
        )
    return hf_config


def model_on_meta(config: ModelConfig, tokenizer: Any, dtype: str | None) -> nn.Module:
    """The model's skeleton on the meta device: shapes and names without memory. ``materialise`` gives it weights.

    Raises as ``model_config`` does.
    """
    from transformers import AutoModelForCausalLM

    hf_config = model_config(config, tokenizer)
    own = hf_config.get_text_config().dtype if config.init == "pretrained" else None
    torch_dtype = getattr(torch, dtype) if dtype else own or torch.float32
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(hf_config, dtype=torch_dtype)
    return model


def load_model(config: ModelConfig, tokenizer: Any, dtype: str | None, seed: int) -> nn.Module:
    """A causal language model in one process's memory: loaded, or initialised from ``seed`` without touching the global
    RNG.

    ``dtype`` by name; None is the checkpoint's own, or float32 from scratch.

    Raises:
        ConfigError: as ``model_config`` does, or for weights that cannot be read.
    """
    from transformers import AutoModelForCausalLM

    if config.init == "random":
        model = model_on_meta(config, tokenizer, dtype)
        materialise(model, config, seed, torch.device("cpu"))
        return model
    model_config(config, tokenizer)
    return _from_hub(
        AutoModelForCausalLM.from_pretrained,
        config.hf_model_path,
        "model.hf_model_path",
        "a model",
        dtype=dtype,
    )


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


def _from_hub(load: Any, name: str | None, key: str, what: str, **kwargs: Any) -> Any:
    try:
        return load(name, **kwargs)
    except Exception as error:  # transformers, safetensors and the Hub client raise many kinds, all meaning this
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        if Path(str(name)).is_dir():
            raise ConfigError([f"{key} = {name!r}: the directory holds no readable {what[2:]} ({reason})"]) from error
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        raise ConfigError(
            [
                f"{key} = {name!r}: no local directory, and the Hub did not give {what} of that name{offline}; "
                "give a local directory, or model.init = 'random' with a flavor"
            ]
        ) from error


# -- from the meta device to memory ------------------------------------------------------------------------------------


def materialise(model: nn.Module, config: ModelConfig, seed: int, device: torch.device) -> None:
    """Give a model on the meta device, sharded or not, memory on ``device`` and its weights: loaded from safetensors,
    or initialised.

    Of a sharded model each process holds, reads and writes its shards only. A module's initial weights depend on
    ``seed``, its name and the type of device, so they are the same however the model is sharded.

    Raises:
        ConfigError: where weights are missing, or are not those of this model; all processes raise.
    """
    model.to_empty(device=device)
    model.tie_weights()  # type: ignore[operator]
    for buffer in _computed_buffers(model):
        if buffer.is_floating_point():
            buffer.fill_(math.nan)  # to see below that each is computed again
    if config.init == "random":
        _initialise(model, seed)
    else:
        _load_weights(model, str(config.hf_model_path))
        for module in model.modules():
            if module._non_persistent_buffers_set:
                for parameter in module.parameters(recurse=False):
                    # it is loaded: transformers leaves it alone
                    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
                model._init_weights(module)  # type: ignore[operator]
    if any(buffer.isnan().any() for buffer in _computed_buffers(model)):
        raise ConfigError([f"{type(model).__name__} does not compute its buffers anew; start it in one process"])
    for _, layer in iter_faulty(model):
        layer.reset_lora_parameters()


def _computed_buffers(model: nn.Module) -> list[Tensor]:
    """Buffers that no checkpoint holds, such as the frequencies of a rotary embedding."""
    return [
        buffer
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set
    ]


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


def _load_weights(model: nn.Module, name: str) -> None:
    """Read the model's tensors from safetensors: of a sharded one each process the rows that it holds."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    directory = _snapshot(name)
    wanted = {
        key: tensor
        for key, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items()
        if not key.endswith((".lora_A", ".lora_B"))
    }
    computed = {id(buffer) for buffer in _computed_buffers(model)}
    wanted = {key: tensor.detach() for key, tensor in wanted.items() if id(tensor) not in computed}
    reader = HuggingFaceStorageReader(str(directory))
    held = reader.read_metadata().state_dict_metadata
    problems = [f"{key} is missing" for key in wanted.keys() - held.keys()]
    problems += [
        f"{key} has shape {tuple(held[key].size)}, the model's has {tuple(tensor.shape)}"  # type: ignore[union-attr]
        for key, tensor in wanted.items()
        if key in held and held[key].size != tensor.shape  # type: ignore[union-attr]
    ]
    if problems:
        raise ConfigError(
            [
                f"model.hf_model_path = {name!r}: several processes read safetensors by the names that "
                f"{type(model).__name__} gives its weights: {first_of(problems)}; one process reads other formats too"
            ]
        )
    dcp.load(wanted, storage_reader=reader, no_dist=not dist.is_initialized())


def _snapshot(name: str) -> Path:
    """The directory of a model's safetensors, fetched from the Hub where it is not local."""
    if Path(name).is_dir():
        directory = Path(name)
    else:
        from huggingface_hub import snapshot_download

        directory = Path(
            _from_hub(
                lambda repo: snapshot_download(repo, allow_patterns=["*.safetensors", "*.json"]),
                name,
                "model.hf_model_path",
                "safetensors",
            )
        )
    if not any(directory.glob("*.safetensors")):
        raise ConfigError([f"model.hf_model_path = {name!r}: no safetensors there, which several processes read"])
    return directory


def compute_context(training: TrainingConfig, model: nn.Module) -> AbstractContextManager[Any]:
    """Autocast to ``mixed_precision_param`` where that differs from the weights' dtype; FSDP casts what it gathers."""
    dtype = cast_to(training, model)
    if dtype is None or isinstance(model, FSDPModule):
        return nullcontext()
    return torch.autocast(next(model.parameters()).device.type, dtype=dtype)


# -- to disk ----------------------------------------------------------------------------------------------------------

_FILE_BYTES = 4 * 2**30


@torch.no_grad()
def save_model(model: nn.Module, directory: Path, tokenizer: Any, world: World | None = None) -> None:
    """Write a Hugging Face model with the adapters merged, which ``AutoModelForCausalLM`` opens. The model stays as
    it is. A tie that merging cuts (``ties.py``) is none in the files, nor by their config.

    Of a sharded model all processes must call; each gathers one tensor at a time and writes some of the files.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith((".lora_A", ".lora_B"))}
    names = model.named_modules(remove_duplicate=False)  # a layer may have several
    layers = {f"{name}.weight": layer for name, layer in names if isinstance(layer, FaultyLinear)}
    if cut := merging_cuts(model):
        state |= {name: state[name].clone() for name in declared_ties(model) if name in state}
    if world is None or world.size == 1:
        merged = {layer: layer.merged_weight() for layer in layers.values()}
        state |= {name: merged[layer] for name, layer in layers.items() if layer.lora_A is not None}
        model.save_pretrained(directory, state_dict=state)  # type: ignore[operator]
        if cut:
            untied_config(model).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return

    from safetensors.torch import save_file

    if not cut:
        for name in model.all_tied_weights_keys:  # type: ignore[union-attr]
            state.pop(name, None)
    files: list[list[str]] = [[]]
    room = _FILE_BYTES
    for name, tensor in state.items():
        size = tensor.numel() * tensor.element_size()
        if files[-1] and size > room:
            files.append([])
            room = _FILE_BYTES
        files[-1].append(name)
        room -= size
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    if world.first:
        directory.mkdir(parents=True, exist_ok=True)
        for old in directory.glob("model*.safetensors*"):  # of an earlier export, in other files than these
            old.unlink()
    world.wait()
    for i, held in enumerate(files):
        tensors = {}
        for name in held:
            tensor = state[name]
            if name in layers:
                tensor = like(layers[name].merged_weight(), tensor)
            tensor = whole(tensor)
            if i % world.size == world.rank:
                tensors[name] = tensor.cpu().contiguous()
        if i % world.size == world.rank:
            save_file(tensors, directory / names[i], metadata={"format": "pt"})
    if world.first:
        where = {name: file for file, held in zip(names, files, strict=True) for name in held}
        total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
        config: Any = untied_config(model) if cut else model.config
        config.save_pretrained(directory)
        if model.can_generate():  # type: ignore[operator]
            model.generation_config.save_pretrained(directory)  # type: ignore[union-attr, operator]
        tokenizer.save_pretrained(directory)
    world.wait()
