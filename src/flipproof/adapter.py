"""LoRA adapters as PEFT writes and reads them."""

import json
from pathlib import Path

from torch import Tensor, nn

from flipproof.errors import ConfigError, first_of
from flipproof.files import write_json
from flipproof.inject import faulty_layers
from flipproof.shards import assign_, whole
from flipproof.spec import LoraSpec

_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."


def save_adapter(model: nn.Module, directory: Path, base_model: str | None, writes: bool = True) -> None:
    """Write the adapters as PEFT does, so that ``PeftModel.from_pretrained(base, directory)`` opens them.

    Of a sharded model all processes must call, and the one that ``writes`` writes.
    """
    from safetensors.torch import save_file

    layers = faulty_layers(model)
    lora = next(iter(layers.values())).lora
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if layer.lora_A is None or layer.lora_B is None:
            raise ConfigError([f"{name} has no adapter (lora.r = 0): there is none to write"])
        for matrix in ("lora_A", "lora_B"):
            tensor = whole(getattr(layer, matrix).detach())
            if writes:
                tensors[f"{_PEFT_PREFIX}{name}.{matrix}.weight"] = tensor.cpu().contiguous()
    if not writes:
        return
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
        raise ConfigError([f"adapter {directory} does not fit this model: {first_of(problems)}"])
    for key, parameter in targets.items():
        assign_(parameter, tensors[key])
