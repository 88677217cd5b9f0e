"""A GGUF file, llama.cpp's format, as the Hugging Face directory that everything else here reads.

``transformers`` dequantises the file once, into ``flipproof/gguf-KEY/`` in the cache directory of ``datasets``: plain
safetensors, config and tokenizer, which then load, shard, train and export as any others. KEY is a hash of where the
file is, its size, when it was written and who converted it, so a directory is never out of date, only unused; between
runs any may be deleted. Whoever first takes the lock of a key converts, in one process's memory, and the others wait
for the lock and find the directory, which gets its name when it is complete.
"""

import hashlib
import importlib.util
import json
import shutil
from collections import Counter
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from flipproof.errors import ConfigError
from flipproof.faults.dtypes import dtype_name
from flipproof.files import claimed, clear_dead, put_in_place, share, temporary_name
from flipproof.log import logger
from flipproof.models.hub import expand, reason
from flipproof.models.weights import check_fit, quiet
from flipproof.sums import write_sums

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""GGUF's types that are no quantisation."""
_LINK = "model.gguf"


def plain_directory(name: str, key: str) -> str:
    """``name``, or, where that is a GGUF file or a directory with one and no other weights, the directory of the cache
    that it is converted into, which is made where it is not there.

    The weights are in the file's dtype, or, where they are quantised, in bfloat16.

    Args:
        name: a directory, a file or a Hub name.
        key: the config key that names it.

    Raises:
        ConfigError: for several such files, one that cannot be read, or a missing package ``gguf``.
    """
    file = _file(name, key)
    if file is None:
        return name
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError([f"{key} = {name!r} needs the package gguf; pip install 'flipproof[gguf]'"])
    import datasets

    cache = Path(datasets.config.HF_DATASETS_CACHE) / "flipproof"
    final = cache / f"gguf-{_key(file)}"
    if not final.is_dir():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with _lock(final):
                if not final.is_dir():
                    logger.info("%s = %r is converted into %s", key, name, final)
                    _convert(file, final, f"{key} = {name!r}")
        except OSError as error:
            raise ConfigError(
                [
                    f"{key} = {name!r}: the cache directory {cache} cannot be written ({error}); "
                    "name another one in the environment variable HF_DATASETS_CACHE"
                ]
            ) from error
    return str(final)


def _file(name: str, key: str) -> Path | None:
    path = Path(expand(name))
    if path.suffix == ".gguf" and not path.is_dir():
        if not path.is_file():
            raise ConfigError([f"{key} = {name!r}: there is no such file"])
        return path
    if not path.is_dir() or any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ConfigError([f"{key} = {name!r}: holds {len(files)} GGUF files ({names}); name one of them"])
    return files[0] if files else None


def _key(file: Path) -> str:
    there = file.stat()
    depends_on = [str(file.resolve()), there.st_size, there.st_mtime_ns, version("transformers"), version("gguf")]
    return hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:32]


def _lock(final: Path) -> Any:
    try:
        return FileLock(final.with_suffix(".lock")).acquire()
    except (OSError, NotImplementedError):  # a file system without locks: at worst the same work is done twice
        return nullcontext()


def _convert(file: Path, final: Path, what: str) -> None:
    clear_dead(final)
    new = temporary_name(final)
    try:
        new.mkdir()
        with claimed(new):
            link = new / _LINK  # alone in its directory: no config or adapter beside the file is mixed in
            link.symlink_to(file.resolve())
            dtype, quantised = _dtype(file, what)
            model = _read(new, dtype, what)
            _write_tokenizer(new, what)
            model.save_pretrained(new)  # type: ignore[operator]
            link.unlink()
            for written in new.glob("*.safetensors"):
                share(written)
            write_sums(new)
            put_in_place(new, final, replace=False)
        if quantised:
            logger.info("%s: its weights are quantised (%s), and become %s", what, quantised, dtype_name(dtype))
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _dtype(file: Path, what: str) -> tuple[torch.dtype, str]:
    """(the dtype of most elements, or bfloat16 where most are quantised; by which type they are, else "")."""
    from gguf import GGUFReader

    sizes: Counter[str] = Counter()
    try:
        for tensor in GGUFReader(file).tensors:
            sizes[tensor.tensor_type.name] += int(tensor.n_elements)
        if not sizes:
            raise ValueError("it holds no tensors")
    except OSError:
        raise
    except Exception as error:  # of all kinds, from wherever its bytes lead the reader
        raise ConfigError([f"{what}: is no GGUF file, damaged or cut short ({reason(error, file.name)})"]) from error
    most = sizes.most_common(1)[0][0]
    return _PLAIN.get(most, torch.bfloat16), "" if most in _PLAIN else most


def _read(directory: Path, dtype: torch.dtype, what: str) -> nn.Module:
    """The model of the file, as one that was never quantised: ``transformers`` may refuse to save the one that was."""
    import transformers

    how: dict[str, Any] = {"gguf_file": _LINK, "dtype": dtype, "trust_remote_code": False}
    if hasattr(transformers, "GgufConfig"):  # newer ones leave the weights quantised where they can compute with them
        how["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loader: Any = transformers.AutoModelForCausalLM
    try:
        with quiet():
            read, seen = loader.from_pretrained(directory, **how, output_loading_info=True)
    except Exception as error:  # an architecture that it does not know, keys that are missing, values that do not fit
        raise ConfigError([f"{what}: transformers cannot read it ({reason(error, str(directory))})"]) from error
    check_fit(read, what, seen["missing_keys"], seen["mismatched_keys"], seen["unexpected_keys"])
    settings = read.config
    if hasattr(settings, "quantization_config"):
        del settings.quantization_config
    with torch.device("meta"):
        model: nn.Module = loader.from_config(settings, dtype=dtype)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()  # type: ignore[operator]
    model.generation_config = read.generation_config
    return model


def _write_tokenizer(directory: Path, what: str) -> None:
    """Write the file's tokenizer, if it has one that can be read; model.tokenizer may name another."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(directory, gguf_file=_LINK).save_pretrained(directory)
    except Exception as error:  # of many kinds; a later message says where a tokenizer is missed
        logger.warning("%s: its tokenizer cannot be read (%s)", what, reason(error, str(directory)))
