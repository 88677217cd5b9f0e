"""A model as a Hugging Face directory, which ``AutoModelForCausalLM`` opens."""

import math
import shutil
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flipproof.dtensor import like, local, whole
from flipproof.errors import ConfigError
from flipproof.faults.dtypes import dtype_name
from flipproof.faults.linear import FaultyLinear
from flipproof.faults.ties import declared_ties, merging_cuts, untied_config
from flipproof.files import claimed, clear_dead, put_in_place, share, temporary_name, write_json
from flipproof.sums import write_sums
from flipproof.world import World

_FILE_BYTES = 4 * 2**30


@torch.no_grad()
def save_model(
    model: nn.Module, directory: Path, tokenizer: Any, world: World | None = None, what: str = "the trained model"
) -> None:
    """Write a Hugging Face model with the adapters merged, which ``AutoModelForCausalLM`` opens. The model stays as
    it is. A tie that merging cuts (``ties.py``) is none in the files, nor by their config.

    Of a sharded model all processes must call; each gathers one tensor at a time and writes some of the files.

    Args:
        what: what a message calls the weights.

    Raises:
        ConfigError: where a weight is not finite, in any process; nothing is written then.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith((".lora_A", ".lora_B"))}
    names = model.named_modules(remove_duplicate=False)  # a layer may have several
    layers = {f"{name}.weight": layer for name, layer in names if isinstance(layer, FaultyLinear)}
    if cut := merging_cuts(model):
        state |= {name: state[name].clone() for name in declared_ties(model) if name in state}
    _check_finite(model, layers, world, what)
    if world is None or world.size == 1:
        merged = {layer: layer.merged_weight() for layer in layers.values()}
        state |= {name: merged[layer] for name, layer in layers.items() if layer.lora_A is not None}
        model.save_pretrained(directory, state_dict=state)  # type: ignore[operator]
        for file in directory.glob("*.safetensors"):
            share(file)
        if cut:
            untied_config(model).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return

    from safetensors.torch import save_file

    state = {name: state[name] for name in names_to_write(model) if name in state}
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

    def begin() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for old in directory.glob("model*.safetensors*"):  # of an earlier export, in other files than these
            old.unlink()

    world.once(begin)
    for i, held in enumerate(files):
        tensors = {}
        for name in held:
            tensor = state[name]
            if name in layers:
                tensor = like(layers[name].merged_weight(), tensor)
            tensor = whole(tensor)
            if i % world.size == world.rank:
                tensors[name_in_files(model, name, tensor)] = tensor.cpu().contiguous()
        if i % world.size == world.rank:
            save_file(tensors, directory / names[i], metadata={"format": "pt"})
            share(directory / names[i])
    if world.first:
        where = {
            name_in_files(model, name, state[name]): file
            for file, held in zip(names, files, strict=True)
            for name in held
        }
        total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
        save_settings(model, model.dtype, directory, tokenizer)  # type: ignore[arg-type]
    world.wait()


def names_to_write(model: Any) -> list[str]:
    """The names in the model of what its files hold, adapters aside: of tied weights one, unless merging cuts the
    tie."""
    left_out = {*(model._keys_to_ignore_on_save or ()), *(() if merging_cuts(model) else model.all_tied_weights_keys)}
    return [name for name in model.state_dict() if name not in left_out]


def save_settings(model: Any, dtype: torch.dtype, directory: Path, tokenizer: Any) -> None:
    """Write what is in a model's directory beside its weights, which are of this dtype, as ``save_pretrained`` does."""
    config = untied_config(model) if merging_cuts(model) else model.config
    config.dtype = dtype_name(dtype)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


class Shards:
    """The safetensors files of a new directory, written as tensors come: each of at most ``_FILE_BYTES``, or of one
    tensor. ``save_pretrained`` names them so."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._held: dict[str, torch.Tensor] = {}
        self._files: list[list[str]] = []
        self._room = _FILE_BYTES
        self._total = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """A tensor under its name in the files."""
        size = tensor.numel() * tensor.element_size()
        if self._held and size > self._room:
            self._write()
        self._held[name] = tensor.to("cpu", copy=True).contiguous()
        self._room -= size
        self._total += size

    def finish(self) -> None:
        """Write what is left, and the index; without one where there is one file."""
        self._write()
        of = len(self._files)
        names = [f"model-{i + 1:05d}-of-{of:05d}.safetensors" for i in range(of)] if of > 1 else ["model.safetensors"]
        for i, name in enumerate(names):
            (self._directory / _begun(i)).rename(self._directory / name)
        if of > 1:
            where = {key: name for name, keys in zip(names, self._files, strict=True) for key in keys}
            index = {"metadata": {"total_size": self._total}, "weight_map": where}
            write_json(self._directory / "model.safetensors.index.json", index)

    def _write(self) -> None:
        from safetensors.torch import save_file

        file = self._directory / _begun(len(self._files))
        save_file(self._held, file, metadata={"format": "pt"})
        share(file)
        self._files.append(list(self._held))
        self._held, self._room = {}, _FILE_BYTES


def _begun(i: int) -> str:
    return f"model-{i + 1:05d}.safetensors"


@contextmanager
def new_directory(to: Path, world: World, replace: bool = False, unfinished: Collection[str] = ()) -> Iterator[Path]:
    """What a directory is called until all processes have written into it; then it gets its name, or what was begun
    goes. All processes must call.

    Args:
        replace: whether the directory that has the name goes; for who holds a lock on the place.
        unfinished: files in it that are written on when it has its name, and have no sums.
    """
    with ExitStack() as stack:

        def begin() -> Path:
            clear_dead(to, 0.0 if replace else None)
            new = temporary_name(to)
            stack.callback(_remove_empty, [path for path in to.parents if not path.exists()])
            stack.callback(shutil.rmtree, new, ignore_errors=True)
            new.mkdir(parents=True)
            stack.enter_context(claimed(new))
            return new

        def end() -> None:
            write_sums(new, unfinished)
            put_in_place(new, to, replace)

        new = world.once(begin)
        yield new
        world.once(end, patient=True)


def _remove_empty(directories: list[Path]) -> None:
    with suppress(OSError):  # there is something in it
        for path in directories:
            path.rmdir()


def name_in_files(model: nn.Module, name: str, tensor: torch.Tensor) -> str:
    """What the files call a tensor: with some models it is an older name, which the files had that were read."""
    from transformers.core_model_loading import WeightConverter, revert_weight_conversion

    changes = getattr(model, "_weight_conversions", None)
    if changes is None or any(isinstance(change, WeightConverter) for change in changes):
        return name  # as the model calls it, which transformers reads too
    return next(iter(revert_weight_conversion(model, {name: tensor})))  # type: ignore[arg-type]


def _check_finite(model: nn.Module, layers: dict[str, FaultyLinear], world: World | None, what: str) -> None:
    names, broken = [], math.inf
    for i, (name, parameter) in enumerate(model.named_parameters(remove_duplicate=False)):
        names.append(name)
        tensor = layers[name].merged_weight() if name in layers else local(parameter)
        if not (tensor.float() if tensor.itemsize == 1 else tensor).isfinite().all():
            broken = min(broken, i)
    if world is not None:
        broken = world.least(broken)
    if broken < math.inf:
        raise unfit(what, names[int(broken)])


def unfit(what: str, name: str) -> ConfigError:
    """The error that says that ``what`` holds numbers that are none."""
    return ConfigError([f"{what} is not finite and is not written: {name} holds NaN or infinity"])
