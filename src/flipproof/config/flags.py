"""Every key of a config as a flag, ``--section.key``: what ``--help-all`` says of it, and what a command line sets."""

import argparse
import dataclasses
import logging
from functools import cache
from typing import Any

import docstring_parser

from flipproof.config.names import keys_meant, nearest
from flipproof.config.schema import SECTIONS
from flipproof.config.values import described, shown
from flipproof.errors import ConfigError

logger = logging.getLogger("flipproof")


def describe_keys(parser: argparse.ArgumentParser) -> None:
    """Add every key to the parser's help: its docstring, which values are allowed, and the default."""
    parser.usage = parser.format_usage().removeprefix("usage: ")  # without a hundred more flags
    for name, section in SECTIONS.items():
        meanings = {param.arg_name: param.description for param in _documented(section).params}
        group = parser.add_argument_group(f"[{name}] {_purpose(section).rstrip('.')}")
        for field in dataclasses.fields(section):
            default = "" if (value := _default(field)) in (None, (), {}) else f" [{value}]"
            text = f"{meanings[field.name]}{default}".replace("`", "").replace("%", "%%")
            group.add_argument(f"--{name}.{field.name}", metavar=_values(field.type), help=text)


def sections_help() -> str:
    """A line for each table of a config."""
    lines = [f"  --{name}.…".ljust(18) + _purpose(section) for name, section in SECTIONS.items()]
    return "Keys of a config are flags too (--training.lr 1e-4). --help-all says what each means:\n" + "\n".join(lines)


def _purpose(section: type) -> str:
    return str(_documented(section).short_description).replace("`", "")


@cache
def _documented(section: type) -> docstring_parser.Docstring:
    return docstring_parser.parse_from_object(section)


def _default(field: Any) -> Any:
    return field.default_factory() if field.default is dataclasses.MISSING else field.default


def _values(declared: Any) -> str:
    kinds = described(declared).replace(" | None", "").replace("'", "")
    return kinds.split(" of ")[0].split(", such")[0].replace("a ", "").replace(" | ", "|")


def split_overrides(argv: list[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """(section -> key -> text, the other arguments) of a command line, where ``--section.key`` names a config key.

    Raises:
        ConfigError: for flags of no section, or without a value.
    """
    overrides: dict[str, dict[str, Any]] = {}
    rest: list[str] = []
    problems: list[str] = []
    waiting = list(argv)
    while waiting:
        argument = waiting.pop(0)
        flag, equals, value = argument.partition("=")
        section, dot, key = flag.removeprefix("--").partition(".")
        if not (flag.startswith("--") and dot):
            rest.append(argument)
            continue
        if not equals and waiting and not waiting[0].startswith("--"):
            value = waiting.pop(0)
        if section not in SECTIONS:
            problems.append(f"{flag}: unknown flag{_near_section(section, key)}")
        elif not value:
            problems.append(f"{flag}: a value is missing")
        else:
            if key in overrides.get(section, {}):
                warn_of_two(flag, overrides[section][key], value)
            overrides.setdefault(section, {})[key] = value
    if problems:
        raise ConfigError(problems)
    return overrides, rest


def warn_of_two(flag: str, first: object, last: object) -> None:
    """Scripts append flags to those that they have, so that is no error; but it may be a slip."""
    if first != last:
        logger.warning("%s: given twice, %s and %s; the last one counts", flag, shown(str(first)), shown(str(last)))


def _near_section(section: str, key: str) -> str:
    if meant := keys_meant(key):
        return f"; did you mean {' or '.join(f'--{name}' for name in meant)}?"
    near = nearest(section, SECTIONS)
    return f"; did you mean --{near}.{key}?" if near else f"; known are {', '.join(f'--{name}.…' for name in SECTIONS)}"
