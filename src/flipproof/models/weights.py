"""Pretrained weights, straight from safetensors into the shards that a process holds.

``transformers`` itself decides which files of a directory are the model, in which dtype it is, which generation
settings it has and what its tensors are called: ``unread_model`` lets ``from_pretrained`` do all but the reading, so
that several processes have the model of one. ``read_weights`` then reads; no process ever holds the whole.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from flipproof.dtensor import held, local
from flipproof.errors import ConfigError, first_of
from flipproof.log import logger
from flipproof.models.hub import damaged_safetensors, expand, from_hub
from flipproof.models.online import attach, marked_config
from flipproof.sums import check_sums

KEY = "model.hf_model_path"
_ROWS = 4096
"""Rows of two tensors that are compared at a time."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor is."""

    file: Path
    key: str
    """Its name there."""
    shape: tuple[int, ...]
    dtype: str = ""
    """As safetensors calls it."""


Others = Mapping[str, Mapping[str, Stored]]
"""Layer -> name in it -> tensor, of layers whose weights are not what the model has."""


def read_model(name: str, dtype: str | None) -> nn.Module:
    """The model of a directory or Hub name, in this process's memory, as ``transformers`` reads it.

    Args:
        name: a directory or a Hub name.
        dtype: by name; None is the checkpoint's own.

    Raises:
        ConfigError: where tensors are missing or of another shape, or the files cannot be read.
    """
    _check_sums(name)
    with quiet():
        model, seen = _from_pretrained(name, dtype, output_loading_info=True, ignore_mismatched_sizes=True)
    check_fit(model, f"{KEY} = {name!r}", seen["missing_keys"], seen["mismatched_keys"], seen["unexpected_keys"])
    attach(model)
    return model


def unread_model(
    name: str,
    dtype: str | None,
    config: Any = None,
    others_of: Callable[[Mapping[str, Stored]], Others] | None = None,
) -> nn.Module:
    """The same model on the meta device, without its weights; ``read_weights`` reads them. Sets ``model.stored``: the
    model's name of each of its tensors -> where that is.

    Args:
        config: the model's, where it is another than the directory's.
        others_of: of all tensors of the files those that the caller reads, biases aside; the weights of these layers
            are not looked for.

    Raises:
        ConfigError: as ``read_model`` does, and where the weights are quantised, or not stored as the model has them.
    """
    _check_sums(name)
    found = _resolve(name, dtype, config)
    if found.quantised:
        raise ConfigError(
            [
                f"{KEY} = {name!r}: its weights are quantised ({found.quantised}), and several processes read plain "
                "ones; write it dequantised first (one process may do that)"
            ]
        )
    if others := [file.name for file in found.files if file.suffix != ".safetensors"]:
        raise ConfigError(
            [
                f"{KEY} = {name!r}: its weights are in {first_of(others)}, and several processes read safetensors; "
                "AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) writes those"
            ]
        )
    _keep_wide(found.model, found.wide)
    _find_tensors(found, name, others_of)
    attach(found.model)
    return found.model


def _check_sums(name: str) -> None:
    if (directory := Path(expand(name))).is_dir():
        check_sums(directory, f"{KEY} = {name!r}")


def own_dtype(name: str) -> torch.dtype:
    """The dtype in which a directory or Hub name has its weights. Raises as ``read_model`` does."""
    dtype: torch.dtype = _resolve(name, None).model.dtype
    return dtype


@torch.no_grad()
def read_weights(model: nn.Module, name: str) -> None:
    """Read the tensors of a model of ``unread_model``, which has memory now: of a sharded one each process its part.

    Raises:
        ConfigError: naming file and tensor, where one cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    stored: dict[str, Stored] = model.stored  # type: ignore[assignment]
    by_file: dict[Path, dict[int, tuple[str, Tensor]]] = {}
    for key, tensor in named_tensors(model):
        if key in stored:
            by_file.setdefault(stored[key].file, {})[id(tensor)] = key, tensor  # tied ones once
    for file, wanted in by_file.items():
        with safe_open(file, framework="pt") as opened:
            for key, tensor in wanted.values():
                source = stored[key].key
                if not local(tensor).numel():
                    continue
                try:
                    read = opened.get_slice(source)[held(tensor)] if tensor.dim() else opened.get_tensor(source)
                except (OSError, SafetensorError) as error:
                    raise ConfigError([f"{KEY} = {name!r}: {source} in {file.name} is damaged ({error})"]) from error
                local(tensor).copy_(read)


def read_tensor(model: nn.Module, key: str) -> Tensor:
    """One tensor of a model of ``unread_model``, by its name there, in the model's dtype."""
    from safetensors import safe_open

    stored: Stored = model.stored[key]  # type: ignore[index, assignment]
    with safe_open(stored.file, framework="pt") as opened:
        read: Tensor = opened.get_tensor(stored.key)
    return read.to(model.get_parameter(key).dtype)


def read_stored(tensors: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Tensors as the files have them."""
    from safetensors import safe_open

    read = {}
    for name, at in tensors.items():
        with safe_open(at.file, framework="pt") as opened:
            read[name] = opened.get_tensor(at.key)
    return read


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, tied ones under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


@dataclass(frozen=True)
class _Found:
    """What ``from_pretrained`` found out before it would have read weights."""

    model: Any
    """On the meta device, nothing tied."""
    files: list[Path]
    quantised: str | None
    """By which method."""
    wide: dict[str, torch.dtype]
    """Patterns of names -> the dtype that they keep."""
    renamings: list[Any]
    """What ``transformers`` does to names and tensors of older checkpoints."""


def _resolve(name: str, dtype: str | None, config: Any = None) -> _Found:
    from transformers import PreTrainedModel

    seen: dict[str, Any] = {}

    def note(_model: Any, _state: Any, files: list[str], how: Any, *_: Any) -> tuple[None, None]:
        seen.update(files=[Path(file) for file in files], how=how)
        return None, None

    with (
        mock.patch.object(PreTrainedModel, "_load_pretrained_model", staticmethod(note)),
        mock.patch.object(PreTrainedModel, "_finalize_model_loading", staticmethod(lambda *_: None)),
        # what is quantised stays so: its tensors are not there
        mock.patch("transformers.quantizers.base.HfQuantizer.postprocess_model", return_value=None),
    ):
        model = _from_pretrained(name, dtype, **({} if config is None else {"config": config}))
    how = seen["how"]
    method = how.hf_quantizer and how.hf_quantizer.quantization_config.quant_method
    return _Found(
        model,
        seen["files"],
        method and getattr(method, "value", method),
        how.dtype_plan or {},
        how.weight_mapping or [],
    )


def _from_pretrained(name: str, dtype: str | None, **kwargs: Any) -> Any:
    from transformers import AutoModelForCausalLM

    adapter = Path(expand(name)) / "adapter_config.json"
    if adapter.is_file():
        logger.warning("%s = %r holds a PEFT adapter too, which is left alone; --adapter names one", KEY, name)
    with ExitStack() as stack:
        # with PEFT installed, transformers would mix it in
        for module in ("models.auto.auto_factory", "integrations.peft"):
            stack.enter_context(mock.patch(f"transformers.{module}.find_adapter_config_file", return_value=None))
        if "config" not in kwargs and (config := from_hub(marked_config, name, KEY, "a model")) is not None:
            kwargs["config"] = config
        return from_hub(AutoModelForCausalLM.from_pretrained, name, KEY, "a model", dtype=dtype or "auto", **kwargs)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the report of what was missing, which is said in one line here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _keep_wide(model: nn.Module, wide: dict[str, torch.dtype]) -> None:
    """Keep in float32 the parameters of a 16-bit model that ``transformers`` does."""
    from transformers.core_model_loading import build_glob_alternation

    if not wide:
        return
    pattern, globs, _ = build_glob_alternation(list(wide))
    for key, tensor in named_tensors(model):
        if found := pattern.search(key):
            tensor.data = tensor.data.to(wide[globs[str(found.lastgroup)]])


def _read_headers(files: Iterable[Path], name: str) -> dict[str, Stored]:
    """Every tensor of some safetensors files by its name there; of one that is in several the last counts, as it does
    in ``transformers``. Raises ConfigError for a file that is damaged."""
    from safetensors import safe_open

    tensors = {}
    for file in files:
        if damage := damaged_safetensors(file):
            raise ConfigError([f"{KEY} = {name!r}: {damage}"])
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118, it is no dictionary
                part = opened.get_slice(key)
                tensors[key] = Stored(file, key, tuple(part.get_shape()), part.get_dtype())
    return tensors


def _find_tensors(found: _Found, name: str, others_of: Callable[[Mapping[str, Stored]], Others] | None = None) -> None:
    """Set ``model.stored``, and tie what is tied. What ``transformers`` renames is found; what it makes of several
    tensors, or turns, is refused."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    model = found.model
    renamings = [change for change in found.renamings if isinstance(change, WeightRenaming)]
    converters = [change for change in found.renamings if isinstance(change, WeightConverter)]
    wanted = model.state_dict()
    stored: dict[str, Stored] = {}
    unexpected, converted = [], []
    tensors = _read_headers(found.files, name)
    for layer, own in (others_of(tensors) if others_of else {}).items():
        wanted.pop(f"{layer}.weight", None)
        tensors = {key: at for key, at in tensors.items() if at not in own.values()}
    for key in sorted(tensors, key=dot_natural_key):
        target, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, wanted)
        if target not in wanted and key in wanted:  # its name is the newer one already
            target, converter = key, None
        if converter is not None:
            converted.append(key)
        elif target in wanted:
            stored.setdefault(target, tensors[key])
        else:
            unexpected.append(target)
    if converted:
        raise ConfigError(
            [
                f"{KEY} = {name!r}: transformers makes the tensors of {type(model).__name__} of others, such as "
                f"{first_of(converted)}, which one process can do and several cannot"
            ]
        )
    # save_model gives tensors the names that they had
    model._weight_conversions = [change for change in renamings if change.was_used()]
    missing = wanted.keys() - stored.keys()
    different = []
    for tied, source in model.all_tied_weights_keys.items():
        if tied in stored and source in stored:
            if _same(stored[tied], stored[source]):
                missing.add(tied)
            else:  # whatever the config says
                different.append(tied)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    for tied in different:
        model.all_tied_weights_keys.pop(tied, None)
    shapes = [(key, at.shape, tuple(wanted[key].shape)) for key, at in stored.items()]
    check_fit(model, f"{KEY} = {name!r}", missing, [entry for entry in shapes if entry[1] != entry[2]], unexpected)
    model.stored = stored


def check_fit(
    model: Any,
    what: str,
    missing: Iterable[str],
    misshapen: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]],
    unexpected: Iterable[str],
) -> None:
    """Raises ConfigError where the tensors are not those of the model; a warning where there are more. ``what`` is what
    a message calls them: the key and its value."""
    problems = [f"{key} is missing" for key in missing]
    problems += [f"{key} has shape {tuple(has)}, the model's has {tuple(wants)}" for key, has, wants in misshapen]
    if problems:
        raise ConfigError([f"{what}: these are not the weights of a {type(model).__name__}: {first_of(problems)}"])
    # buffers that older versions of a model wrote
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    if more := [key for key in unexpected if not any(re.search(pattern, key) for pattern in ignored)]:
        logger.warning("%s: %s does not have %s, and leaves it out", what, type(model).__name__, first_of(more))


def _same(one: Stored, other: Stored) -> bool:
    """Whether two stored tensors hold the same values."""
    from safetensors import safe_open

    if one.shape != other.shape:
        return False
    with safe_open(one.file, framework="pt") as a, safe_open(other.file, framework="pt") as b:
        left, right = a.get_slice(one.key), b.get_slice(other.key)
        rows = range(0, one.shape[0], _ROWS)
        return all(torch.equal(left[row : row + _ROWS], right[row : row + _ROWS]) for row in rows)
