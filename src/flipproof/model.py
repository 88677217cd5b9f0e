"""Models and tokenizers: built from a config or opened from a directory or the Hub, always through ``transformers``.

What trains is what ``AutoModelForCausalLM.from_pretrained`` opens. A flavor is a shape by name: the Llama 3 family,
AICrossSim-CLM, and the small ones of the demo and the tests.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flipproof.config import ConfigError, ModelConfig, TrainingConfig
from flipproof.ops.flip import BACKENDS
from flipproof.runlog import logger

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

    return _from_hub(AutoTokenizer.from_pretrained, name, "model.tokenizer", "a tokenizer")


def load_model(config: ModelConfig, tokenizer: Any, dtype: str | None, seed: int) -> nn.Module:
    """A causal language model: loaded, or initialised from ``seed`` without touching the global RNG.

    ``dtype`` by name; None is the checkpoint's own, or float32 from scratch.

    Raises:
        ConfigError: for an unknown flavor, one that contradicts the checkpoint, a model that cannot be read, or a
            vocabulary smaller than the tokenizer's.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    shape = None
    if config.flavor is not None:
        if config.flavor not in FLAVORS:
            raise ConfigError([f"model.flavor = {config.flavor!r}: known are {', '.join(FLAVORS)}"])
        shape = FLAVORS[config.flavor]
    if config.hf_model_path is not None:
        hf_config = _from_hub(AutoConfig.from_pretrained, config.hf_model_path, "model.hf_model_path", "a model")
        _check_flavor(config, hf_config, shape)
    else:
        hf_config = LlamaConfig(**shape, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)  # type: ignore[arg-type]
    if len(tokenizer) > hf_config.vocab_size:
        raise ConfigError(
            [f"model.tokenizer has {len(tokenizer)} tokens; the model's vocabulary has {hf_config.vocab_size}"]
        )
    if config.init == "random":
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(hf_config, dtype=getattr(torch, dtype or "float32"))
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


def to_device(model: nn.Module) -> nn.Module:
    """``model`` on the GPU where there is one. Says what flips its bits there: no backend is chosen silently."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "the CPU"
    logger.info("the model runs on %s; its bits are flipped by: %s", name, BACKENDS[device.type])
    return model.to(device)


def compute_context(training: TrainingConfig, model: nn.Module) -> AbstractContextManager[Any]:
    """Autocast to ``mixed_precision_param`` where that differs from the weights' dtype."""
    # the first parameter is the embedding, of the model's dtype; adapters come later
    parameter = next(model.parameters())
    if training.mixed_precision_param is None or getattr(torch, training.mixed_precision_param) == parameter.dtype:
        return nullcontext()
    return torch.autocast(parameter.device.type, dtype=getattr(torch, training.mixed_precision_param))
