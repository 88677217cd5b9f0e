"""LoRA adapters of a model: written as PEFT does, and loaded from what PEFT wrote (``peft_format.py``)."""

import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flipproof.dtensor import assign_, whole
from flipproof.errors import ConfigError, first_of
from flipproof.faults.inject import faulty_layers, output_head
from flipproof.faults.linear import FaultyLinear
from flipproof.faults.spec import LoraSpec
from flipproof.files import share, write_json
from flipproof.models.peft_format import CONFIG, PREFIX, WEIGHTS, PeftAdapter, read_adapter


def save_adapter(
    model: nn.Module, directory: Path, base_model: str | None, writes: bool = True, what: str = "the trained adapter"
) -> None:
    """Write the adapters as PEFT does, so that ``PeftModel.from_pretrained(base, directory)`` opens them.

    Of a sharded model all processes must call, and the one that ``writes`` writes.

    Args:
        what: what a message calls the adapters.

    Raises:
        ConfigError: where there is none, or one is not finite; nothing is written then.
    """
    from safetensors.torch import save_file

    layers = {name: layer for name, layer in faulty_layers(model).items() if layer.lora}
    if not layers:
        raise ConfigError(["the model has no adapter (lora.r = 0): there is none to write"])
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for matrix in ("lora_A", "lora_B"):
            tensor = whole(getattr(layer, matrix).detach())
            tensors[f"{PREFIX}{name}.{matrix}.weight"] = tensor.cpu().contiguous()
    broken = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ConfigError([f"{what} is not finite and is not written: {first_of(broken)} holds NaN or infinity"])
    if not writes:
        return
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    share(directory / WEIGHTS)
    write_json(directory / CONFIG, _config({name: layer.lora for name, layer in layers.items()}, base_model))


def _config(specs: dict[str, LoraSpec], base_model: str | None) -> dict[str, Any]:
    """What PEFT is to know of adapters: the most frequent rank and scaling, and by pattern what differs."""
    usual = Counter(specs.values()).most_common(1)[0][0]

    def alpha(spec: LoraSpec) -> float:
        """Its lora_alpha by the rule of the usual one."""
        if spec.use_rslora == usual.use_rslora:
            return spec.lora_alpha
        return spec.scaling * (math.sqrt(spec.r) if usual.use_rslora else spec.r)

    def others(value: Callable[[LoraSpec], float]) -> dict[str, float]:
        values = {name: value(spec) for name, spec in specs.items()}
        return {f"^{re.escape(name)}": own for name, own in values.items() if own != value(usual)}

    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": usual.r,
        "lora_alpha": usual.lora_alpha,
        "use_rslora": usual.use_rslora,
        "rank_pattern": others(lambda spec: spec.r),
        "alpha_pattern": others(alpha),
        "lora_dropout": usual.dropout,
        "bias": "none",
        "inference_mode": True,
        # whole names: a suffix such as "q_proj" would also match layers that were skipped
        "target_modules": sorted(specs),
    }


def adapter_spec(adapter: str | Path) -> dict[str, LoraSpec]:
    """Rank, scaling and dropout of each layer that a PEFT adapter has, by the layer's name in the base model; for
    ``inject``.

    Args:
        adapter: a directory, or a name on the Hub.

    Raises:
        ConfigError: where there is no adapter, it is damaged, or it is more than LoRA on linear layers.
    """
    return read_adapter(adapter).specs


def load_adapter(model: nn.Module, adapter: str | Path) -> None:
    """Load a PEFT adapter into the model's faulty layers. Of a sharded model all processes must call.

    Raises:
        ConfigError: as ``adapter_spec`` does; or naming what does not fit, and nothing is changed.
    """
    found = read_adapter(adapter)
    given = {f"{name}.lora_{matrix}": both[matrix] for name, both in found.matrices.items() for matrix in "AB"}
    targets: dict[str, Tensor] = {
        f"{layer.site}.{matrix}": getattr(layer, matrix)
        for layer in faulty_layers(model).values()
        if layer.lora
        for matrix in ("lora_A", "lora_B")
    }
    problems = [f"the model has no layer for {key}" for key in given.keys() - targets.keys()]
    problems += [f"{key} is missing" for key in (targets.keys() | _promised(found, model)) - given.keys()]
    problems += [
        f"{key} has shape {tuple(given[key].shape)}, the model's layer has {tuple(targets[key].shape)}"
        for key in given.keys() & targets.keys()
        if given[key].shape != targets[key].shape
    ]
    problems += _other_base(found, model)
    if problems:
        base = found.config.get("base_model_name_or_path")
        made_for = f"; it was made for {base!r}" if base else ""
        raise ConfigError([f"adapter {adapter} does not fit this model: {first_of(problems)}{made_for}"])
    for key, parameter in targets.items():
        assign_(parameter, given[key])


def _promised(adapter: PeftAdapter, model: nn.Module) -> set[str]:
    """The matrices that the adapter's config promises for this model's linear layers."""
    head = output_head(model)
    layers = {
        module.site if isinstance(module, FaultyLinear) else name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    wanted = [name for name, module in layers.items() if adapter.targets(name, module is head)]
    return {f"{name}.lora_{matrix}" for name in wanted for matrix in "AB"}


@torch.no_grad()
def _other_base(adapter: PeftAdapter, model: nn.Module) -> list[str]:
    """Where the base model's weights, of which PEFT adds some that it trains beside, are not this model's."""
    problems = []
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, theirs in sorted(adapter.others.items()):
        if name not in own:
            problems.append(f"the model has no {name}")
            continue
        mine = whole(own[name]).cpu()
        if mine.shape != theirs.shape:
            problems.append(f"{name} has shape {tuple(theirs.shape)}, the model's has {tuple(mine.shape)}")
        # one of the two may have been rounded
        elif not (torch.equal(mine, theirs.to(mine.dtype)) or torch.equal(mine.to(theirs.dtype), theirs)):
            problems.append(f"{name} is another one than the model's, so that more was trained than adapters")
    return problems
