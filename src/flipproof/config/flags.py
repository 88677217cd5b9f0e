"""Every key of a config as a flag, ``--section.key``: what the help says of it, and what a command line sets."""

import dataclasses
import logging
import re
import textwrap
from collections.abc import Container, Iterable, Mapping
from functools import cache
from typing import Any, Literal, get_args, get_origin

import docstring_parser

from flipproof.config import aliases
from flipproof.config.names import KEYS, keys_meant, nearest, plain
from flipproof.config.schema import SECTIONS
from flipproof.config.texts import NULL
from flipproof.errors import ConfigError
from flipproof.values import bare, shown

logger = logging.getLogger("flipproof")


def described_keys(sections: Iterable[str] = tuple(SECTIONS), only: Container[str] = KEYS) -> str:
    """The keys of sections, or ``only`` some of them: each as a flag with its type, its meaning and its default."""
    lines = []
    for name in sections:
        lines += ["", f"[{name}] {_purpose(SECTIONS[name]).rstrip('.')}"]
        documented = [param for part in SECTIONS[name].__mro__[:-1] for param in _documented(part).params]
        meanings = {param.arg_name: param.description for param in documented}
        for field in dataclasses.fields(SECTIONS[name]):
            if f"{name}.{field.name}" in only:
                default = "" if (value := _default(field)) in (None, (), {}) else f" [{value}]"
                text = _plain_text(f"{meanings[field.name]}{default}")
                lines.append(f"  --{name}.{field.name} {_values(field.type)}")
                lines += textwrap.wrap(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines[1:])


def sections_help() -> str:
    """A line for each table of a config."""
    lines = [f"  --{name}.…".ljust(18) + _purpose(section) for name, section in SECTIONS.items()]
    return "keys of a config are flags too (flipproof keys [SECTION] says what each means):\n" + "\n".join(lines)


def _purpose(section: type) -> str:
    return _plain_text(str(_documented(section).short_description))


def _plain_text(docstring: str) -> str:
    """Words of a docstring on one line."""
    return " ".join(docstring.replace("`", "").split())


@cache
def _documented(section: type) -> docstring_parser.Docstring:
    return docstring_parser.parse_from_object(section)


def _default(field: Any) -> Any:
    return field.default_factory() if field.default is dataclasses.MISSING else field.default


def _values(declared: Any) -> str:
    words: list[str] = []
    for kind in bare(declared):
        origin = get_origin(kind) or kind
        words += get_args(kind) if origin is Literal else [_CALLED.get(origin) or origin.__name__]
    return "|".join(words)


_CALLED = {tuple: "list", Mapping: "table"}
_TRUTHS = ("", "true", "false", *map(str.lower, NULL), "yes", "no", "on", "off")


def split_overrides(
    argv: list[str], words: Mapping[str, str] | None = None
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """(section -> key -> text, the other arguments) of a command line, where ``--section.key`` names a config key, and
    so does each of the ``words``, which are spelled as ``plain`` has them. A truth value without a value is true; what
    comes after it is its value only where it looks like one.

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
        section, dot, key = _key_of(flag, words).partition(".")
        if argument == "--":
            return overrides, [*rest, argument, *waiting]
        if not (flag.startswith("--") and dot):
            rest.append(argument)
            continue
        truth, following = _is_truth(section, key), waiting[0] if waiting else "--"
        if not equals and (is_truth_value(following) if truth else not following.startswith("--")):
            value = waiting.pop(0)
        elif not equals and truth:
            value = "true"
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


def is_truth_value(word: str) -> bool:
    """Whether what stands behind a switch is its value and not MODEL; what is not allowed of it is told so."""
    return word.lower() in _TRUTHS or bool(re.fullmatch(r"[-+]?[0-9.]+", word))


def truth_called(flag: str, words: Mapping[str, str]) -> str | None:
    """The key that a flag sets, as section.key, where that is true or false; ``words`` as in ``split_overrides``."""
    key = _key_of(flag, words)
    return key if flag.startswith("--") and _is_truth(*key.partition(".")[::2]) else None


def _key_of(flag: str, words: Mapping[str, str] | None) -> str:
    return (words or {}).get(plain(flag), flag.removeprefix("--").replace("-", "_"))


def _is_truth(section: str, key: str) -> bool:
    """Whether a key is true or false, so that its flag may be a switch."""
    fields = dataclasses.fields(SECTIONS[section]) if section in SECTIONS else ()
    return any(field.name == key and bool in bare(field.type) for field in fields)


def warn_of_two(flag: str, first: object, last: object) -> None:
    """Scripts append flags to those that they have, so that is no error; but it may be a slip."""
    if first != last:
        logger.warning("%s: given twice, %s and %s; the last one counts", flag, shown(str(first)), shown(str(last)))


def _near_section(section: str, key: str) -> str:
    if answer := aliases.ANSWERS.get(key):
        return f"; {answer}"
    if meant := keys_meant(key):
        return f"; did you mean {' or '.join(f'--{name}' for name in meant)}?"
    near = nearest(section, SECTIONS)
    return f"; did you mean --{near}.{key}?" if near else f"; known are {', '.join(f'--{name}.…' for name in SECTIONS)}"
