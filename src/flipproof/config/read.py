"""From files, presets and flags to a ``RunConfig``.

Reading collects every error of a file (unknown keys with the nearest known one, wrong types, values out of range) and
reports them together.

Two older dialects are read wherever ``[bitflip]`` is: ``transform_cfg.toml`` (``use_lora``, ``[fc]``, ``[lora]``),
and the YAML ``layer_name_to_config`` (regular expression -> fault, "default" for the rest, null = leave alone). Their
words are complete: what such a file leaves out is off, and not what an earlier file said.
"""

import dataclasses
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w
import yaml

from flipproof.config.aliases import VALUES
from flipproof.config.names import near_key, near_table, nearest
from flipproof.config.schema import SECTIONS, RunConfig
from flipproof.config.texts import NULL, parse_yaml, readings
from flipproof.errors import ConfigError
from flipproof.faults.spec import LAYER_KEYS, BitFlipSpec, LoraSpec
from flipproof.records import check_toml
from flipproof.values import Table, shown


def load_config(
    paths: Iterable[str | Path] = (), overrides: Mapping[str, Mapping[str, Any]] | None = None
) -> RunConfig:
    """Read config files, later ones over earlier ones, then overrides, and validate the whole.

    Args:
        paths: TOML or YAML files, or names of presets.
        overrides: section -> key -> value.

    Raises:
        ConfigError: with every problem found.
    """
    problems: list[str] = []
    tree: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    wants_lora = None
    for path in paths:
        # a run is called after its first config, unless something else is said
        tree["logging"].setdefault("run_dir", f"runs/{Path(path).stem}")
        document, found = _read(path)
        problems += found
        if "use_lora" in document:
            wants_lora = path if document.pop("use_lora") else None
        _merge_into(tree, document)
    _merge_into(tree, overrides or {})
    sections = {}
    for name, section in SECTIONS.items():
        values, found = _checked_values(name, section, tree[name])
        problems += found
        try:
            built = section(**values)
            found = built.problems()
        except ConfigError as error:
            found = error.problems
        # nothing more is said of keys whose own values are wrong
        wrong = (section.declared().keys() & tree[name].keys()) - values.keys()
        problems += [f"{name}.{line}" for line in found if wrong.isdisjoint(re.findall(r"\w+", line))]
        sections[name] = built if not found else None
    if wants_lora and sections["lora"] is not None and not sections["lora"].r:
        problems.append(f"{wants_lora}: use_lora = true: lora.r is not set; the rank of the adapters is needed")
    if problems:
        raise ConfigError(problems)
    return RunConfig(**sections)  # type: ignore[arg-type]


def load_written(path: Path) -> RunConfig:
    """The config that a run or sweep was begun with, from its directory. Raises ConfigError also where the file is not
    what was written there."""
    check_toml(path)
    return load_config([path])


_INSTEAD_OF = {
    "steps": ("epochs",),
    "epochs": ("steps", "tokens_per_parameter"),
    "tokens_per_parameter": ("steps", "epochs"),
    "warmup_steps": ("warmup_ratio",),
    "warmup_ratio": ("warmup_steps",),
    "gradient_accumulation_steps": ("global_batch_size",),
    "global_batch_size": ("gradient_accumulation_steps",),
    "precision": ("dtype", "mixed_precision_param"),
    "dtype": ("precision",),
    "mixed_precision_param": ("precision",),
}
"""Key of [training] -> other words for the same: what an earlier file said by them, a later one has taken back."""


def _merge_into(tree: dict[str, dict[str, Any]], other: Mapping[str, Mapping[str, Any]]) -> None:
    for key, value in other.get("training", {}).items():
        if value not in (None, *NULL):
            for replaced in _INSTEAD_OF.get(key, ()):
                tree["training"].pop(replaced, None)
    for section, values in other.items():
        tree.setdefault(section, {}).update(values)


def _read(path: str | Path) -> tuple[dict[str, Any], list[str]]:
    """(section -> key -> value, problems) of one file or preset; "use_lora" is there where the file sets it."""
    if str(path) in preset_names():
        text, name = preset_text(str(path)), f"{path}.toml"
    else:
        name = str(path)
        if not name:
            raise ConfigError(["--config: the path is empty"])
        try:
            text = Path(os.path.expanduser(name)).read_text("utf-8-sig")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a text file in UTF-8"
            raise ConfigError(
                [f"{path}: {reason}; a config is a TOML or YAML file or a preset ({', '.join(preset_names())})"]
            ) from error
    try:
        document = parse_yaml(text) if name.lower().endswith((".yaml", ".yml", ".json")) else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError([f"{path}: {' '.join(str(error).split())}"]) from error
    if not isinstance(document, dict):
        raise ConfigError([f"{path}: holds no tables; known are {', '.join(SECTIONS)}"])
    document, problems = _translate_dialects({str(key): value for key, value in document.items()})
    sections: dict[str, Any] = {}
    for section, values in document.items():
        if section == "use_lora":
            sections[section] = values
        elif section not in SECTIONS:
            where = f"[{section}]: unknown table" if isinstance(values, dict) else f"{section}: unknown key"
            problems.append(where + near_table(section, is_table=isinstance(values, dict)))
        elif values is None:
            continue  # a YAML table with nothing in it
        elif not isinstance(values, dict):
            problems.append(f"{section} = {shown(values)}: a table is allowed")
        else:
            sections[section] = {str(key): value for key, value in values.items()}
    return sections, [f"{path}: {problem}" for problem in problems]


_OF_PEFT = {"lora_dropout": "dropout", "rslora": "use_rslora"}
"""Keys of [lora] -> what they are called here."""


def _translate_dialects(document: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The older dialects' words as [bitflip] and [lora]; anything else unchanged."""
    problems = []
    use_lora = document.pop("use_lora", None)
    if not isinstance(use_lora, bool | None):
        problems.append(f"use_lora = {shown(use_lora)}: true or false is allowed")
    if isinstance(document.get("fc"), dict):
        document["bitflip"] = _no_faults() | _seedless(document.pop("fc")) | _table(document, "bitflip")
        document["lora"] = dataclasses.asdict(LoraSpec()) | _table(document, "lora")
    if isinstance(document.get("lora"), dict):  # PEFT's own words, as its other keys are
        for word, key in _OF_PEFT.items():
            if document["lora"].keys() >= {word, key}:
                problems.append(f"[lora] {word} is {key}; give one of the two")
        document["lora"] = {_OF_PEFT.get(key, key): value for key, value in document["lora"].items()}
    if use_lora is False:
        document["lora"] = {"r": 0}
    if "default" in document and isinstance(document["default"], dict | None):  # the bare mapping
        layers = {k: document.pop(k) for k in list(document) if k not in SECTIONS}
        document["layer_name_to_config"] = layers
    if isinstance(document.get("layer_name_to_config"), dict):
        layers = {str(name): config for name, config in document.pop("layer_name_to_config").items()}
        if (flavor := document.pop("transform_flavor", "fc")) not in ("fc", None):
            problems.append(f"transform_flavor = {shown(flavor)}: 'fc' is allowed")
        if not document.pop("use_regex", True):
            layers = {name if name == "default" else re.escape(name): config for name, config in layers.items()}
        default = layers.pop("default", None) or {}
        if not isinstance(default, dict):
            problems.append(f"layer_name_to_config default = {shown(default)}: a table, or null, is allowed")
            default = {}
        off = dict.fromkeys(f"{operand}_{key}" for operand in "wx" for key in ("p_exp", "p_frac", "zero_out_t"))
        overrides = {
            name: off | _seedless(config) if isinstance(config, dict) else config for name, config in layers.items()
        }
        said = _seedless(default) | {"layer_name_to_config": overrides}
        document["bitflip"] = _no_faults() | said | _table(document, "bitflip")
    if isinstance(use_lora, bool):
        document["use_lora"] = use_lora
    return document, problems


def _table(document: Mapping[str, Any], name: str) -> dict[str, Any]:
    table = document.get(name)
    return table if isinstance(table, dict) else {}


def _no_faults() -> dict[str, Any]:
    """The keys of [bitflip] that say which bits flip, as they are where nothing is said."""
    nothing = BitFlipSpec()
    return {key: getattr(nothing, key) for key in (*LAYER_KEYS, "layer_name_to_config")}


def _seedless(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the reference's per-field seeds: each layer, operand and field has a stream of its own here."""
    return {k: v for k, v in config.items() if not re.fullmatch(r"[wx]_seed_(exp|frac)", str(k))}


def _checked_values(name: str, section: type[Table], values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The values of one table as their keys declare them, and what is wrong with the others and with unknown keys."""
    given = dict(values)
    for key, value in values.items():
        if isinstance(value, str):
            given[key] = VALUES.get(f"{name}.{key}", {}).get(value, value)
    return section.checked_keys(given, f"{name}.", readings, lambda key: near_key(key, name))


def preset_names() -> list[str]:
    return sorted(file.name.removesuffix(".toml") for file in _presets().iterdir() if file.name.endswith(".toml"))


def preset_text(name: str) -> str:
    """A preset's TOML, comments included. Raises ConfigError for an unknown name."""
    if name not in preset_names():
        near = nearest(name, preset_names())
        hint = f"did you mean {near}?" if near else f"known are {', '.join(preset_names())}"
        raise ConfigError([f"no preset is called {name!r}; {hint}"])
    return (_presets() / f"{name}.toml").read_text("utf-8")


def changed_preset(name: str, overrides: Mapping[str, Mapping[str, Any]]) -> str:
    """The TOML of a preset with other values of some keys (section -> key -> value), without its comments.

    Raises as ``load_config`` and ``preset_text`` do.
    """
    said = tomllib.loads(preset_text(name))
    config = tomllib.loads(load_config([name], overrides).to_toml())
    default = tomllib.loads(RunConfig().to_toml())
    if "run_dir" not in overrides.get("logging", {}):
        del config["logging"]["run_dir"]  # a run is called after the file that this becomes
    tables = {}
    for section, values in config.items():
        named = said.get(section, {}).keys() | overrides.get(section, {}).keys()
        tables[section] = {k: v for k, v in values.items() if k in named or v != default[section].get(k)}
    return f"# The preset {name}, changed.\n\n" + tomli_w.dumps({k: v for k, v in tables.items() if v})


def _presets() -> Any:
    return resources.files("flipproof.config") / "presets"
