"""From files, presets and flags to a ``RunConfig``.

Reading collects every error of a file (unknown keys with the nearest known one, wrong types, values out of range) and
reports them together.

Two older dialects are read wherever ``[bitflip]`` is: ``transform_cfg.toml`` (``use_lora``, ``[fc]``, ``[lora]``),
and the YAML ``layer_name_to_config`` (regular expression -> fault, "default" for the rest, null = leave alone).
"""

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from flipproof.config.schema import SECTIONS, RunConfig
from flipproof.errors import ConfigError
from flipproof.spec import field_names


def add_overrides(parser: jsonargparse.ArgumentParser) -> None:
    """Give ``parser`` every key of the tree as ``--section.key``, with its docstring as help."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    for name, section in SECTIONS.items():
        parser.add_class_arguments(section, name)


def split_overrides(argv: list[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """(section -> key -> text, the other arguments) of a command line, where ``--section.key`` names a config key."""
    overrides: dict[str, dict[str, Any]] = {}
    rest: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        section, dot, key = flag.removeprefix("--").partition(".")
        if not (flag.startswith("--") and dot):
            rest.append(argument)
            continue
        if not equals and (value := next(arguments, "")) == "":
            raise ConfigError([f"{flag}: a value is missing"])
        if section not in SECTIONS:
            raise ConfigError([f"{flag}: unknown flag{_nearest(section, SECTIONS)}"])
        overrides.setdefault(section, {})[key] = value
    return overrides, rest


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
    for path in paths:
        # a run is called after its first config, unless something else is said
        tree["logging"].setdefault("run_dir", f"runs/{Path(path).stem}")
        document, found = _read(path)
        problems += found
        _merge_into(tree, document)
    _merge_into(tree, overrides or {})
    sections = {}
    for name, section in SECTIONS.items():
        values, found = _checked_values(name, section, tree[name])
        problems += found
        try:
            built = section(**values)
            found = built.problems()
        except ValueError as error:
            found = str(error).split("; ")
        problems += [f"{name}.{problem}" for problem in found]
        sections[name] = built if not found else None
    if problems:
        raise ConfigError(problems)
    return RunConfig(**sections)  # type: ignore[arg-type]


def _merge_into(tree: dict[str, dict[str, Any]], other: Mapping[str, Mapping[str, Any]]) -> None:
    for section, values in other.items():
        tree.setdefault(section, {}).update(values)


def _read(path: str | Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """(section -> key -> value, problems) of one file or preset."""
    if str(path) in preset_names():
        text, name = preset_text(str(path)), f"{path}.toml"
    else:
        name = str(path)
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a text file"
            raise ConfigError(
                [f"{path}: {reason}; a config is a TOML or YAML file or a preset ({', '.join(preset_names())})"]
            ) from error
    try:
        document = yaml.safe_load(text) if name.endswith((".yaml", ".yml")) else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise ConfigError([f"{path}: {' '.join(str(error).split())}"]) from error
    if not isinstance(document, dict):
        raise ConfigError([f"{path}: holds no tables; known are {', '.join(SECTIONS)}"])
    document, problems = _translate_dialects(document)
    sections: dict[str, dict[str, Any]] = {}
    for section, values in document.items():
        if section not in SECTIONS:
            problems.append(f"[{section}]: unknown table{_nearest(section, SECTIONS)}")
        elif not isinstance(values, dict):
            problems.append(f"{section} = {values!r}: a table is allowed")
        else:
            sections[section] = values
    return sections, [f"{path}: {problem}" for problem in problems]


def _translate_dialects(document: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The older dialects' words as [bitflip] and [lora]; anything else unchanged."""
    document = dict(document)
    problems = []
    if isinstance(document.get("fc"), dict):
        document["bitflip"] = document.pop("fc") | document.get("bitflip", {})
    use_lora = document.pop("use_lora", True)
    if not isinstance(use_lora, bool):
        problems.append(f"use_lora = {use_lora!r}: true or false is allowed")
    elif not use_lora:
        document["lora"] = {"r": 0}
    if isinstance(document.get("default"), dict):  # the bare mapping
        layers = {k: document.pop(k) for k in list(document) if k not in SECTIONS}
        document["layer_name_to_config"] = layers
    if isinstance(document.get("layer_name_to_config"), dict):
        layers = dict(document.pop("layer_name_to_config"))
        if (flavor := document.pop("transform_flavor", "fc")) not in ("fc", None):
            problems.append(f"transform_flavor = {flavor!r}: 'fc' is allowed")
        if not document.pop("use_regex", True):
            layers = {name if name == "default" else re.escape(name): config for name, config in layers.items()}
        bitflip = dict(layers.pop("default", None) or {})
        # There, every entry was complete: a key that it does not name is off, not inherited.
        off = dict.fromkeys(f"{operand}_{key}" for operand in "wx" for key in ("p_exp", "p_frac", "zero_out_t"))
        overrides = {name: config if config is None else off | _seedless(config) for name, config in layers.items()}
        document["bitflip"] = _seedless(bitflip) | {"layer_name_to_config": overrides} | document.get("bitflip", {})
    return document, problems


def _seedless(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the reference's per-field seeds: each layer, operand and field has a stream of its own here."""
    return {k: v for k, v in config.items() if not re.fullmatch(r"[wx]_seed_(exp|frac)", k)}


def _checked_values(name: str, section: type, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The values of one table as their declared types, and one problem per unknown or ill-typed key."""
    known = field_names(section)
    types = {f.name: f.type for f in dataclasses.fields(section)}
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(section, name)
    good, problems = {}, []
    for key, value in values.items():
        if key not in known:
            problems.append(f"{name}.{key}: unknown key{_nearest(key, known, name)}")
            continue
        seen = value
        try:
            if value in ("nan", "inf", "-inf"):  # as TOML writes them; YAML, which jsonargparse reads, does not
                value = float(value)
            value = _collection(value, str(types[key]))
            if isinstance(value, str):  # from the command line, or what YAML takes for text, such as 1e-05
                parsed = parser.parse_args([f"--{name}.{key}={value}"], defaults=False)
            else:
                parsed = parser.parse_object({name: {key: value}}, defaults=False)
            good[key] = parsed[name].as_dict()[key]
        except (jsonargparse.ArgumentError, ValueError, TypeError):
            wanted = getattr(types[key], "__name__", str(types[key])).replace("typing.", "")
            if hasattr(types[key], "__args__"):
                wanted = str(types[key]).replace("typing.", "").replace("collections.abc.", "")
            if str(types[key]).startswith("tuple["):
                of = f" of {words}" if (words := ", ".join(re.findall(r"'(\w+)'", wanted))) else ""
                wanted = f"a list{of}"
            elif "Mapping[" in str(types[key]):
                wanted = 'a table, such as { exp = 1e-5, "15" = 0 },'
            problems.append(f"{name}.{key} = {seen!r}: {wanted} is allowed")
    return good, problems


def _collection(value: Any, declared: str) -> Any:
    """The words of a command line as a list or a table, where one is declared: head,embedding or { exp = 1e-5 }."""
    if not isinstance(value, str) or not value.strip():
        return value
    if declared.startswith("tuple[") and not value.lstrip().startswith("["):
        return [word.strip() for word in value.split(",")]
    if "Mapping[" in declared:
        try:
            return tomllib.loads(f"table = {value}")["table"]
        except tomllib.TOMLDecodeError:
            return value  # YAML and JSON are read by jsonargparse
    return value


def _nearest(key: str, known: Iterable[str], section: str | None = None) -> str:
    known = list(known)
    elsewhere = [f"{other}.{key}" for other, cls in SECTIONS.items() if key in field_names(cls)]
    if section is not None and elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    if near := difflib.get_close_matches(key, known, n=1):
        return f"; did you mean {near[0]}?"
    return f"; known are {', '.join(known)}"


def preset_names() -> list[str]:
    return sorted(file.name.removesuffix(".toml") for file in _presets().iterdir() if file.name.endswith(".toml"))


def preset_text(name: str) -> str:
    """A preset's TOML, comments included. Raises ConfigError for an unknown name."""
    if name not in preset_names():
        raise ConfigError([f"no preset is called {name!r}{_nearest(name, preset_names())}"])
    return (_presets() / f"{name}.toml").read_text()


def _presets() -> Any:
    return resources.files("flipproof") / "presets"
