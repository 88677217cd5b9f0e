"""What is written so that it can be read again: training checkpoints (DCP), PEFT adapters, Hugging Face models.

A training checkpoint is a directory ``checkpoints/step-N`` that holds what training changes (trainable parameters,
optimizer state, the global RNG for models with dropout) and a manifest with the size and hash of each file. It is
written under another name and renamed when it is complete, so a crash while saving never costs the last good one.
Everything else that a resumed run needs (learning rate, data order, ticks) is a function of the step.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from flipproof.config import ConfigError
from flipproof.inject import faulty_layers, iter_faulty
from flipproof.runlog import write_json
from flipproof.spec import LoraSpec

MANIFEST = "manifest.json"
_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
_TRAINABLE = StateDictOptions(ignore_frozen_params=True, strict=False)


def save_checkpoint(
    directory: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, keep_last: int
) -> Path:
    """Write ``directory/step-N`` completely or not at all, then delete all but the last ``keep_last``."""
    final, unfinished = directory / f"step-{step}", directory / f".step-{step}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    with _one_process():
        dcp.save(_state(model, optimizer), checkpoint_id=unfinished, no_dist=True)
    files = {file.name: _fingerprint(file) for file in sorted(unfinished.iterdir())}
    write_json(unfinished / MANIFEST, {"step": step, "files": files})
    for file in unfinished.iterdir():
        _sync(file)
    if final.exists():  # left by a run that resumed from an earlier step
        shutil.rmtree(final)
    os.rename(unfinished, final)
    _sync(directory)
    for old in list_checkpoints(directory)[:-keep_last]:
        shutil.rmtree(old)
    return final


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in directory.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=_step)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore trainable parameters, optimizer and RNG in place; returns the step.

    Raises:
        ConfigError: naming the file, where one is missing, damaged or does not fit the model.
    """
    state = _state(model, optimizer)
    _load(state, path)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=_TRAINABLE
    )
    torch.set_rng_state(state["rng"])
    return _step(path)


def load_trained_weights(path: Path, model: nn.Module) -> int:
    """Restore the trainable parameters alone; returns the step. Raises as ``load_checkpoint`` does."""
    state = {"model": get_model_state_dict(model, options=_TRAINABLE)}
    _load(state, path)
    set_model_state_dict(model, state["model"], options=_TRAINABLE)
    return _step(path)


def _load(state: dict[str, Any], path: Path) -> None:
    if problems := checkpoint_problems(path):
        earlier = [other.name for other in list_checkpoints(path.parent) if _step(other) < _step(path)]
        way_out = f"; delete {path} to resume from {earlier[-1]}" if earlier else ""
        raise ConfigError([f"checkpoint {path}: {problem}{way_out}" for problem in problems])
    try:
        with _one_process():
            dcp.load(state, checkpoint_id=path, no_dist=True)
    except (CheckpointException, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError([f"checkpoint {path} does not fit this model and config ({reason})"]) from error


def checkpoint_problems(path: Path) -> list[str]:
    """What keeps a checkpoint from being read, one line per file."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return [f"{MANIFEST} is missing or damaged"]
    problems = []
    for name, expected in files.items():
        if not (path / name).exists():
            problems.append(f"{name} is missing")
        elif _fingerprint(path / name) != expected:
            problems.append(f"{name} is damaged (size or hash differ from the manifest)")
    return problems


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer, options=_TRAINABLE)
    return {"model": model_state, "optimizer": optimizer_state, "rng": torch.get_rng_state()}


@contextmanager
def _one_process() -> Iterator[None]:
    """DCP warns that there is one process, which is what was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _fingerprint(file: Path) -> str:
    with file.open("rb") as stream:
        return f"{file.stat().st_size}:{hashlib.file_digest(stream, 'blake2b').hexdigest()[:32]}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_adapter(model: nn.Module, directory: Path, base_model: str | None) -> None:
    """Write the adapters as PEFT does, so that ``PeftModel.from_pretrained(base, directory)`` opens them."""
    from safetensors.torch import save_file

    layers = faulty_layers(model)
    lora = next(iter(layers.values())).lora
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if layer.lora_A is None or layer.lora_B is None:
            raise ConfigError([f"{name} has no adapter (lora.r = 0): there is none to write"])
        tensors[f"{_PEFT_PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().contiguous()
        tensors[f"{_PEFT_PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / _ADAPTER_WEIGHTS, metadata={"format": "pt"})
    write_json(
        directory / _ADAPTER_CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": lora.r,
            "lora_alpha": lora.lora_alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
            # whole names: a suffix such as "q_proj" would also match layers that were skipped
            "target_modules": sorted(layers),
        },
    )


def adapter_spec(directory: Path) -> LoraSpec:
    """Rank and scaling of a PEFT adapter. Raises ConfigError where the directory holds no plain LoRA."""
    try:
        config = json.loads((directory / _ADAPTER_CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError([f"adapter {directory}: {_ADAPTER_CONFIG} is missing or damaged"]) from error
    unsupported = [
        key
        for key in (
            "use_dora",
            "use_rslora",
            "rank_pattern",
            "alpha_pattern",
            "modules_to_save",
            "fan_in_fan_out",
        )
        if config.get(key)
    ]
    if config.get("peft_type") != "LORA" or unsupported:
        what = f"it uses {', '.join(unsupported)}" if unsupported else f"peft_type is {config.get('peft_type')!r}"
        raise ConfigError([f"adapter {directory}: plain LoRA is read; {what}"])
    return LoraSpec(r=config["r"], lora_alpha=config["lora_alpha"])


@torch.no_grad()
def load_adapter(model: nn.Module, directory: Path) -> None:
    """Load a PEFT adapter into the model's faulty layers.

    Raises:
        ConfigError: naming what does not fit, and nothing is changed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(directory / _ADAPTER_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ConfigError([f"adapter {directory}: {_ADAPTER_WEIGHTS} is missing or damaged"]) from error
    targets: dict[str, Tensor] = {}
    for name, layer in faulty_layers(model).items():
        for matrix in ("lora_A", "lora_B"):
            parameter = getattr(layer, matrix)
            if parameter is not None:
                targets[f"{_PEFT_PREFIX}{name}.{matrix}.weight"] = parameter
    problems = [f"the model has no layer for {key}" for key in tensors.keys() - targets.keys()]
    problems += [f"{key} is missing" for key in targets.keys() - tensors.keys()]
    problems += [
        f"{key} has shape {tuple(tensors[key].shape)}, the model's layer has {tuple(targets[key].shape)}"
        for key in tensors.keys() & targets.keys()
        if tensors[key].shape != targets[key].shape
    ]
    if problems:
        problems.sort()
        more = f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""
        raise ConfigError([f"adapter {directory} does not fit this model: {problems[0]}{more}"])
    for key, parameter in targets.items():
        parameter.copy_(tensors[key])


@torch.no_grad()
def save_model(model: nn.Module, directory: Path, tokenizer: Any) -> None:
    """Write a Hugging Face model with the adapters merged, which ``AutoModelForCausalLM`` opens. The model stays as
    it is.
    """
    merged = {f"{name}.weight": layer.merged_weight() for name, layer in iter_faulty(model)}
    state = {
        name: merged.get(name, tensor)
        for name, tensor in model.state_dict().items()
        if not name.endswith((".lora_A", ".lora_B"))
    }
    model.save_pretrained(directory, state_dict=state)  # type: ignore[operator]
    tokenizer.save_pretrained(directory)
