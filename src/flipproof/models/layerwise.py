"""A model that no memory holds, rotated from files to files: one block of it is in memory at a time.

The model is on the meta device. Each block gets its weights from the files when its turn comes in a forward pass, in
float32, and loses them after; parameters of one dimension, gains and biases, stay. So all that ``rotate`` finds out by
running a model it finds out here, on the whole model and its real weights, and the pass that proves the function, the
logits after, is the one that rotates and writes: a block that comes to its turn has its weights rotated in float64,
rounded once to their own dtype for the new files, and computes with what they were before that rounding.

Beside a block in float32 that takes one weight in float64 and one of the new files; each pass reads all files once.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flipproof.config import ModelConfig
from flipproof.errors import ConfigError
from flipproof.faults.dtypes import dtype_name
from flipproof.log import bar, logger
from flipproof.models.load import compute_buffers, load_model, model_config, model_on_meta, save_model
from flipproof.models.parallelize import blocks
from flipproof.models.quantised import checkpoint_of, copy_checkpoint
from flipproof.models.rotate import How, Rotation, Step, Weights, changed, rotate
from flipproof.models.save import Shards, name_in_files, names_to_write, save_settings, unfit
from flipproof.models.weights import KEY, Stored, named_tensors
from flipproof.world import World

_WHAT = "the rotated model"


class Layerwise(Weights):
    """The weights of a model of ``model_on_meta``, in its blocks while they run."""

    def __init__(self, model: Any, device: torch.device, shards: Shards) -> None:
        """
        Args:
            model: becomes float32, and gets hooks; it is of no use after.
            device: where it runs.
            shards: what the rotated weights are written into.

        Raises:
            ConfigError: where the model does not compute buffers that no file holds.
        """
        self.device = device
        self._model, self._shards = model, shards
        self._dtypes = {name: tensor.dtype for name, tensor in named_tensors(model)}
        stored: dict[str, Stored] = model.stored
        of = {id(tensor): stored[name] for name, tensor in named_tensors(model) if name in stored}
        # under all names of a tied one, whatever is tied later
        self._stored = {name: of[id(tensor)] for name, tensor in named_tensors(model) if id(tensor) in of}
        self._steps: dict[str, list[Step]] = {}
        self._unwritten: dict[str, None] | None = None  # None until weights are rotated as they are read
        model.float()
        self._place_small()
        compute_buffers(model)
        self._hook()

    def read(self, name: str) -> Tensor:
        """A parameter or buffer as the model has it, on the device."""
        at = self._stored[name]
        try:
            with safe_open(at.file, framework="pt") as opened:
                return opened.get_tensor(at.key).to(self.device, self._dtypes[name])
        except (OSError, SafetensorError) as error:
            raise ConfigError([f"{KEY}: {at.key} in {at.file} is damaged ({error})"]) from error

    def change(self, steps: dict[nn.Parameter, list[Step]]) -> None:
        """From now on each weight is what its steps make of it, and is written when it is read first."""
        parameters = list(self._model.named_parameters(remove_duplicate=False))
        self._steps = {name: steps[parameter] for name, parameter in parameters if parameter in steps}
        self._unwritten = dict.fromkeys(names_to_write(self._model))
        self._bar = bar(len(self._unwritten), "tensor")
        for name, parameter in parameters:
            if not parameter.is_meta:
                parameter.copy_(self._weight(name))

    def write_rest(self) -> None:
        """Write what was not needed by a pass."""
        if self._unwritten is None:  # nothing was rotated
            self.change({})
        for name in list(self._unwritten or ()):
            self._weight(name)
        self._bar.close()

    def _weight(self, name: str) -> Tensor:
        """In float32, rotated where that is decided."""
        tensor = self.read(name)
        wide = changed(tensor, self._steps[name]) if name in self._steps else tensor
        if self._unwritten is not None and name in self._unwritten:
            del self._unwritten[name]
            narrow = wide.to(tensor.dtype)
            if not narrow.isfinite().all():
                raise unfit(_WHAT, name)
            self._shards.add(name_in_files(self._model, name, narrow), narrow)
            self._bar.update()
        return wide.float() if wide.is_floating_point() else wide

    def _place_small(self) -> None:
        """Give memory to buffers and to parameters of one dimension."""
        placed: dict[int, nn.Parameter] = {}
        for prefix, module in self._model.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.dim() < 2:
                    if id(parameter) not in placed:
                        placed[id(parameter)] = _frozen(self._weight(_name(prefix, key)).clone())
                    module._parameters[key] = placed[id(parameter)]
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    own = key in module._non_persistent_buffers_set
                    made = torch.empty_like(buffer, device=self.device) if own else self._weight(_name(prefix, key))
                    module._buffers[key] = made

    def _hook(self) -> None:
        names = {module: name for name, module in self._model.named_modules()}
        for block in blocks(self._model):
            self._hook_one(block, {part: names.pop(part) for part in block.modules() if part in names})
        for module, name in names.items():
            self._hook_one(module, {module: name})

    def _hook_one(self, unit: nn.Module, modules: dict[nn.Module, str]) -> None:
        """Give these modules their weights while ``unit`` runs."""
        held: list[tuple[dict[str, Any], str, nn.Parameter]] = []

        def enter(_module: nn.Module, _args: Any) -> None:
            for module, prefix in modules.items():
                for key, parameter in module._parameters.items():
                    if parameter is not None and parameter.is_meta:
                        held.append((module._parameters, key, parameter))
                        module._parameters[key] = _frozen(self._weight(_name(prefix, key)))

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            while held:
                parameters, key, parameter = held.pop()
                parameters[key] = parameter

        unit.register_forward_pre_hook(enter)
        unit.register_forward_hook(leave)


def _name(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def rotate_into(
    directory: Path, config: ModelConfig, tokenizer: Any, dtype: str | None, how: How, seed: int, world: World
) -> tuple[Rotation, str]:
    """Rotate a model, and write it as a Hugging Face directory. All processes must call; the first one does it.

    Block by block, from the model's files; where those are not plain safetensors, or the model is not made so that
    several processes could read it, as a whole in the memory of one process. A checkpoint that is quantised already is
    copied as it is: no codes stand for what a rotation would make of its weights.

    Args:
        directory: where to; nobody else writes there.
        config: names the model, whose weights are rotated as they are: what is to be quantised is rotated first.
        dtype: by name; None is the checkpoint's own.
        how: as ``rotate`` takes it.
        seed: of the bases.

    Returns:
        (what was done, the dtype that the weights are written in, by name).

    Raises:
        ConfigError: where the model cannot be read, or cannot be rotated so.
    """
    hf_config = model_config(config, tokenizer)
    if world.size == 1 and (checkpoint := checkpoint_of(config, hf_config)):
        why = (
            f"quantised already ({checkpoint.method}, {checkpoint.format.name}); the model that they were made of can "
            "be rotated and then quantised (model.quantize)"
        )
        left = {} if how == "none" else {"its weights": why}
        return Rotation("none", seed, left=left), copy_checkpoint(config, hf_config, tokenizer, directory)
    shards = Shards(directory)
    try:
        model: Any = model_on_meta(config, tokenizer, dtype)
        own = model.dtype
        weights = Layerwise(model, world.device, shards)
    except ConfigError as error:
        if world.size > 1:
            raise
        logger.info("rotated in memory, as a whole: %s", error)
        return _rotate_in_memory(directory, config, tokenizer, dtype, how, seed, world)

    def act() -> Rotation:
        logger.info("%s = %r is rotated block by block, on %s", KEY, config.hf_model_path, world.device)
        rotation = rotate(model, how, seed, weights)
        weights.write_rest()
        shards.finish()
        save_settings(model, own, directory, tokenizer)
        return rotation

    return world.once(act, patient=True), dtype_name(own)


def _rotate_in_memory(
    directory: Path, config: ModelConfig, tokenizer: Any, dtype: str | None, how: How, seed: int, world: World
) -> tuple[Rotation, str]:
    model: Any = load_model(config, tokenizer, dtype, 0)
    own = model.dtype
    rotation = rotate(model.float(), how, seed)
    save_model(model.to(own), directory, tokenizer, world, _WHAT)
    return rotation, dtype_name(own)
