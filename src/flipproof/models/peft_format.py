"""What a PEFT adapter on disk says, or why it cannot be read.

``adapter_config.json`` says how an adapter is scaled and what it is. Which layers it has is what its tensors say: the
config's ``target_modules`` are patterns, and tell only whether one is missing. Read is whatever adds s·B·A to the
weights of linear layers, however its matrices began. Refused by name is what changes the base model before it trains
(PiSSA), trains something beside A and B, or puts another function in their place (DoRA).
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flipproof import regexes
from flipproof.errors import ConfigError, first_of
from flipproof.faults.spec import LoraSpec
from flipproof.models.hub import expand, from_hub
from flipproof.sums import check_sums

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_OLD_WEIGHTS = "adapter_model.bin"
_MATRIX = re.compile(r"(?P<layer>.+)\.lora_(?P<matrix>[AB])(\.(?P<adapter>[^.]+))?\.weight")
_ALL_LINEAR = "all-linear"

# How A and B began. The others take a part out of the base model's weights, which only PEFT puts back.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_READ = {"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
         "exclude_modules", "layers_to_transform", "layers_pattern", "peft_type", "init_lora_weights", "bias",
         "base_model_name_or_path"}  # fmt: skip
# About training, about files, or of what is refused anyway where it is used.
_WITHOUT_EFFECT = {"auto_mapping", "corda_config", "eva_config", "inference_mode", "loftq_config", "lora_ga_config",
                    "megatron_core", "peft_version", "qalora_group_size", "revision",
                   "runtime_config", "task_type"}  # fmt: skip


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter as its files have it."""

    name: str
    """The directory, or the name on the Hub."""
    config: Mapping[str, Any]
    matrices: Mapping[str, Mapping[str, Tensor]]
    """Name of a layer in the base model -> its lora_A (r, in) and lora_B (out, r), as "A" and "B"."""
    others: Mapping[str, Tensor]
    """What else there is, by the name that it has in the base model: copies of the base model's own weights."""

    @property
    def specs(self) -> dict[str, LoraSpec]:
        """Name of a layer -> rank, scaling and dropout."""
        return {layer: self._spec(layer) for layer in self.matrices}

    def _spec(self, layer: str) -> LoraSpec:
        rank = self._of_layer("rank_pattern", "r", layer)
        alpha = self._of_layer("alpha_pattern", "lora_alpha", layer)
        dropout, use_rslora = self.config.get("lora_dropout") or 0.0, bool(self.config.get("use_rslora"))
        return LoraSpec(r=rank, lora_alpha=alpha, dropout=dropout, use_rslora=use_rslora)

    def _of_layer(self, patterns: str, key: str, layer: str) -> Any:
        """A value that a pattern may change for some layers; the first that matches counts."""
        for pattern, value in (self.config.get(patterns) or {}).items():
            if regexes.match(rf"(.*\.)?({pattern})$", layer):
                return value
        return self.config[key]

    def targets(self, layer: str, is_head: bool) -> bool:
        """Whether the config says that this linear layer has an adapter."""
        wanted = self.config.get("target_modules")
        if wanted is None or _matches(self.config.get("exclude_modules"), layer):
            return False
        if isinstance(wanted, str):
            return not is_head if wanted.lower() == _ALL_LINEAR else bool(regexes.fullmatch(wanted, layer))
        return layer in wanted or (_matches(wanted, layer) and self._in_depth(layer))

    def _in_depth(self, layer: str) -> bool:
        """Whether a layer is in one of the blocks that ``layers_to_transform`` names, which default to all."""
        chosen = self.config.get("layers_to_transform")
        if chosen is None or chosen == []:
            return True
        patterns = _as_list(self.config.get("layers_pattern") or r"[^.]*")
        # the first number is that of the block; a later one may be an expert's
        starts = [rf"(?:^|.*?\.){pattern}\.(?P<block>\d+)\." for pattern in patterns]
        found = [match for start in starts if (match := regexes.match(start, layer))]
        return bool(found) and int(found[0]["block"]) in _as_list(chosen)


def read_adapter(adapter: str | Path) -> PeftAdapter:
    """Read a PEFT adapter: a directory's, or one of the Hub.

    Raises:
        ConfigError: where there is none, it is damaged, or it is more than LoRA on linear layers.
    """
    name = str(adapter)
    directory = _directory(name)
    check_sums(directory, f"adapter {name}")
    config = _config(name, directory)
    matrices: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    strange, adapters = [], set()
    for key, tensor in _tensors(name, directory).items():
        plain = key.removeprefix(PREFIX)
        if match := _MATRIX.fullmatch(plain):
            matrices.setdefault(match["layer"], {})[match["matrix"]] = tensor
            adapters.add(match["adapter"])
        elif re.search(r"lora_|modules_to_save|trainable_tokens", plain):
            strange.append(key)
        else:
            others[plain.replace(".base_layer.", ".")] = tensor
    if strange:
        raise ConfigError([f"adapter {name}: LoRA on linear layers is read; it holds {first_of(strange)}"])
    if len(adapters) > 1:
        raise ConfigError([f"adapter {name}: it holds {len(adapters)} adapters; one is read"])
    if not matrices:
        raise ConfigError([f"adapter {name}: it holds no lora_A and lora_B"])
    found = PeftAdapter(name, config, matrices, others)
    problems = [problem for layer, both in matrices.items() for problem in _matrix_problems(found, layer, both)]
    if problems:
        raise ConfigError([f"adapter {name}: {first_of(problems)}"])
    return found


def _matrix_problems(adapter: PeftAdapter, layer: str, both: Mapping[str, Tensor]) -> list[str]:
    missing = [f"{layer}.lora_{matrix} is missing" for matrix in "AB" if matrix not in both]
    if missing:
        return missing
    a, b = both["A"], both["B"]
    if not (a.is_floating_point() and b.is_floating_point()):
        return [f"{layer} holds {a.dtype} and {b.dtype}, which are no floats"]
    rank = adapter.specs[layer].r
    if a.dim() != 2 or b.dim() != 2 or not len(a) == b.shape[1] == rank:
        shapes = f"lora_A of shape {tuple(a.shape)} and lora_B of shape {tuple(b.shape)}"
        return [f"{layer} has rank {rank} by {CONFIG}, and {shapes}"]
    infinite = [matrix for matrix in "AB" if not both[matrix].isfinite().all()]
    return [f"{layer}.lora_{matrix} holds values that are not finite" for matrix in infinite]


# -- files -------------------------------------------------------------------------------------------------------------


def _directory(name: str) -> Path:
    path = Path(expand(name))
    # owner/name, as on the Hub; whatever else looks like a path is one
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        return path
    return _fetched(name)


@cache
def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download

    def fetch(repo: str, **_: Any) -> str:
        return snapshot_download(repo, allow_patterns=[CONFIG, WEIGHTS, _OLD_WEIGHTS])

    return Path(from_hub(fetch, name, "--adapter", "an adapter"))


def _config(name: str, directory: Path) -> dict[str, Any]:
    def problem(what: str) -> ConfigError:
        return ConfigError([f"adapter {name}: {what}"])

    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        raise problem(f"{CONFIG} is missing or cannot be read ({error.strerror})") from error
    except ValueError as error:  # also where it is no text
        raise problem(f"{CONFIG} is damaged ({error})") from error
    if not isinstance(config, dict):
        raise problem(f"{CONFIG} is damaged: it holds {config!r:.40}, not an object")
    if config.get("peft_type") != "LORA":
        raise problem(f"plain LoRA is read; peft_type is {config.get('peft_type')!r}")
    used = [key for key, value in config.items() if value and key not in _READ | _WITHOUT_EFFECT]
    if config.get("init_lora_weights", True) not in _INITS:
        used.append(f"init_lora_weights = {config['init_lora_weights']!r}, which changes the base model")
    if config.get("bias") not in (None, "none"):
        used.append(f"bias = {config['bias']!r}")
    if used:
        raise problem(f"plain LoRA is read; it uses {', '.join(used)}")
    if problems := _value_problems(config):
        raise ConfigError([f"adapter {name}: {CONFIG}: {problem}" for problem in problems])
    return config


def _value_problems(config: Mapping[str, Any]) -> list[str]:
    problems = []
    for key, patterns, right, allowed in (
        ("r", "rank_pattern", _is_rank, "a positive integer"),
        ("lora_alpha", "alpha_pattern", _is_alpha, "a positive number"),
    ):
        if key not in config:
            problems.append(f"{key} is missing")
        elif not right(config[key]):
            problems.append(f"{key} = {config[key]!r}: {allowed} is allowed")
        of_layers = config.get(patterns) or {}
        if not isinstance(of_layers, dict) or not all(_is_pattern(p) and right(v) for p, v in of_layers.items()):
            problems.append(f"{patterns} = {of_layers!r}: {allowed} by pattern is allowed")
    if not _is_dropout(config.get("lora_dropout") or 0.0):
        problems.append(f"lora_dropout = {config['lora_dropout']!r}: a number of at least 0, below 1, is allowed")
    for key in ("target_modules", "exclude_modules"):
        value = config.get(key)
        names = isinstance(value, list) and all(isinstance(name, str) for name in value)
        if not (value is None or names or (isinstance(value, str) and _is_pattern(value))):
            problems.append(f"{key} = {value!r}: names or a pattern are allowed")
    if not all(isinstance(block, int) for block in _as_list(config.get("layers_to_transform") or [])):
        problems.append(f"layers_to_transform = {config['layers_to_transform']!r}: numbers of blocks are allowed")
    if not all(_is_pattern(pattern) for pattern in _as_list(config.get("layers_pattern") or [])):
        problems.append(f"layers_pattern = {config['layers_pattern']!r}: patterns are allowed")
    return problems


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_alpha(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _is_dropout(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def _is_pattern(value: Any) -> bool:
    try:
        regexes.check(value)
    except ValueError:
        return False
    return True


def _tensors(name: str, directory: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    old = directory / _OLD_WEIGHTS
    file = old if old.exists() and not (directory / WEIGHTS).exists() else directory / WEIGHTS
    try:
        file.open("rb").close()  # safetensors says of whatever it cannot open that it is not there
        tensors = torch.load(file, map_location="cpu", weights_only=True) if file == old else load_file(file)
    except Exception as error:  # of a damaged file many kinds are raised, all meaning this
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError([f"adapter {name}: {file.name} is missing or damaged ({reason})"]) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ConfigError([f"adapter {name}: {file.name} is damaged: it holds something else than tensors by name"])
    return tensors


# -- patterns ----------------------------------------------------------------------------------------------------------


def _matches(wanted: Any, layer: str) -> bool:
    """Whether a pattern matches a whole name, or one of several names is its end."""
    if isinstance(wanted, str):
        return bool(wanted) and bool(regexes.fullmatch(wanted, layer))
    return any(layer == name or layer.endswith(f".{name}") for name in wanted or ())


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
