"""Patterns of a config: the layers that they name, which of them match nothing, and what those may have meant."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from flipproof import regexes
from flipproof.errors import ConfigError, first_of
from flipproof.faults.spec import BitFlipSpec, LoraSpec

_ALL_LINEAR = "all-linear"
_SHOWN = 12


def adapter_layers(target_modules: Sequence[str], linear: Mapping[str, bool]) -> list[str]:
    """The linear layers that ``lora.target_modules`` names. Whatever PEFT finds by a list is among them, since the end
    of a name is a part of it.

    Args:
        linear: name of each -> whether it is the output head.

    Raises:
        ConfigError: where one of the patterns names none, with what there is.
    """
    found: dict[str, None] = {}
    problems = []
    for pattern in target_modules:
        if pattern.lower() == _ALL_LINEAR:
            own = [name for name, is_head in linear.items() if not is_head]
        else:
            own = [name for name in linear if f".{pattern}." in f".{name}." or regexes.fullmatch(pattern, name)]
        if not own:
            ends = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            more = f" and {len(ends) - _SHOWN} more" if len(ends) > _SHOWN else ""
            there = f"; there are {', '.join(ends[:_SHOWN])}{more}" if ends else "; the model has none"
            problems.append(f"lora.target_modules: {pattern!r} names no nn.Linear{there}")
        found |= dict.fromkeys(own)
    if problems:
        raise ConfigError(problems)
    return list(found)


def adapters_by_layer(
    lora: LoraSpec | Mapping[str, LoraSpec], linear: Mapping[str, bool]
) -> LoraSpec | Mapping[str, LoraSpec]:
    """The adapters by layer, where ``target_modules`` says which layers have one. Raises as ``adapter_layers``."""
    if isinstance(lora, Mapping) or not lora or lora.target_modules is None:
        return lora
    return dict.fromkeys(adapter_layers(lora.target_modules, linear), lora)


def check_layers_of_adapters(names: Iterable[str], linear: set[str]) -> None:
    """Raises ConfigError where an adapter is meant for what is no linear layer of the model."""
    if others := [name for name in names if name not in linear]:
        raise ConfigError([f"adapters are of linear layers, and here is one of {first_of(others)} (no such nn.Linear)"])


def unmatched_patterns(spec: BitFlipSpec, names: Iterable[str]) -> list[str]:
    """A line for each pattern of ``spec`` that changes nothing, since no name has it.

    Args:
        names: of all that the patterns may be about.
    """
    names = list(names)
    lines = []
    for key in ("include_patterns", "skip_patterns"):
        for pattern in getattr(spec, key):
            if not any(pattern in name for name in names):
                lines.append(f"bitflip.{key}: {pattern!r} is in no layer's name{_nearest(pattern, names)}")
    for pattern in spec.layer_name_to_config:
        if any(regexes.fullmatch(pattern, name) for name in names):
            continue
        within = [name for name in names if regexes.search(pattern, name)]
        hint = (
            f"; it is found within {within[0]}: did you mean '.*{pattern}.*'?" if within else _nearest(pattern, names)
        )
        lines.append(f"bitflip.layer_name_to_config: {pattern!r} is no layer's whole name{hint}")
    return lines


def _nearest(pattern: str, names: list[str]) -> str:
    """The names, and ends and parts of names, that are spelled most like the pattern."""
    plain = re.sub(r"\\(.)", r"\1", pattern.replace(".*", "")).strip(".^$")
    ends = {".".join(parts[i:]) for name in names for parts in [name.split(".")] for i in range(len(parts))}
    known = ends | {part for name in names for part in name.split(".") if not part.isdigit()}
    near = difflib.get_close_matches(plain, sorted(known), n=3)
    return f"; the nearest are {', '.join(near)}" if near else ""
