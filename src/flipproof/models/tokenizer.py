"""Tokenizers: from a directory or the Hub, or bytes."""

from pathlib import Path
from typing import Any

from flipproof.config import ModelConfig
from flipproof.errors import ConfigError
from flipproof.log import logger
from flipproof.models.gguf import plain_directory
from flipproof.models.hub import expand, from_hub
from flipproof.models.online import marked_config
from flipproof.sums import check_sums


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


def _tried(name: str, **how: Any) -> Any:
    """A tokenizer that has read a letter: what transformers takes from its files may only fail then."""
    from transformers import AutoTokenizer

    if (config := marked_config(name, **how)) is not None:
        how["config"] = config
    tokenizer = AutoTokenizer.from_pretrained(name, **how)
    tokenizer.encode("a")
    return tokenizer


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer that the config names. Raises ConfigError where there is none, with the reason."""
    name = config.tokenizer or config.hf_model_path
    if name is None:
        logger.info("no tokenizer is named (model.tokenizer): text is read as bytes")
    if name is None or name == "bytes":
        return byte_tokenizer()
    key = "model.tokenizer" if config.tokenizer else "model.hf_model_path"
    none = ConfigError([f"{key} = {name!r}: holds no tokenizer; set model.tokenizer to one, or to 'bytes'"])
    path = plain_directory(name, key)
    if (directory := Path(expand(path))).is_dir():
        check_sums(directory, f"{key} = {path!r}", weights=False)
    if path != name and not (directory / "tokenizer.json").exists():
        raise none
    tokenizer = from_hub(_tried, path, key, "a tokenizer")
    # without tokenizer files transformers makes one that knows its special tokens alone
    if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
        raise none
    return tokenizer
