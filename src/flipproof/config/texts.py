"""What a text may stand for: the text of a flag, and texts in TOML and YAML; and YAML itself.

The same text means the same in TOML, in YAML and in a flag. Strict, as values are: a whole number is written as one
(not ``1e3``), a truth value is ``true`` or ``false`` (not ``yes``), and ``1:30`` is no number, though YAML 1.1 takes it
for 90.
"""

import re
import tomllib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

import yaml

from flipproof.values import shown

_WHOLE = r"[-+]?[0-9]+"
_NUMBER = r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?"
_NO_NUMBER = r"([-+]?inf|nan)"
NULL = ("null", "None")


def readings(text: str) -> Iterator[Any]:
    """The values that a text may stand for, those first that are meant where a key allows several.

    Raises:
        ValueError: after all of them, where what looks like a list is none.
    """
    if text in NULL:
        yield None
    bracketed = re.fullmatch(_BRACKETED, text)
    lists = _lists(text.strip(), bracketed[1] if bracketed else "")
    yield from lists
    yield text
    for words, value in _WORDS.items():
        if re.fullmatch(words, text):
            with suppress(ValueError):  # of more digits than Python reads
                yield value(text)
    with suppress(ValueError):
        yield structure(text)
    if not lists:
        if bracketed or text.count("[") != text.count("]"):
            raise ValueError("a bracket or a quote is not closed")
        yield _words(text)


_BRACKETED = r"\s*\[((?:[^][]|\[[^][]*\])*)\]\s*"
"""Brackets around all of it, and maybe others within: [qk]_proj,[ab] are two words."""


def _lists(text: str, within: str) -> list[list[Any]]:
    """The lists that a text in brackets may stand for: of values, and of the texts that they are written as; where it
    is none in TOML, JSON or YAML, of the words ``within``, such as regular expressions."""
    lists: list[list[Any]] = []
    if not text.startswith("["):
        return lists
    with suppress(ValueError):
        lists.append(structure(text))  # type: ignore[arg-type]
    with suppress(yaml.YAMLError, RecursionError):
        texts = yaml.load(text, yaml.BaseLoader)
        lists += [texts] if all(isinstance(item, str) for item in texts) else []
    if within and not lists and not re.search("['\"]", within):
        lists.append(_words(within))
    return lists


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


_WORDS: dict[str, Callable[[str], Any]] = {
    "(?ai:true|false)": lambda text: text.lower() == "true",
    _WHOLE: int,
    f"{_NUMBER}|{_NO_NUMBER}": float,
}


def structure(text: str) -> list[Any] | dict[str, Any]:
    """A list or table in the words of TOML, JSON or YAML. Raises ValueError where it is none."""
    try:
        found = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        try:
            found = parse_yaml(text)
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error
    if not isinstance(found, list | dict):
        raise ValueError(f"{shown(text)} is no list or table")
    return found


_MOST_PARTS = 100_000
_TOO_MANY = f"with its anchors and aliases it comes to more than {_MOST_PARTS:,} values"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's words, which are TOML's and those of flags: no yes, no 1:30, and 1e-5 is a number. No key twice."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's way to say which words are what)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, times in counts.items() if times > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{shown(twice[0])} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > _MOST_PARTS:  # merges of merges double it with each line
            raise yaml.YAMLError(_TOO_MANY)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", _WHOLE, list("-+0123456789")),
    ("float", rf"{_NUMBER}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+0123456789.")),
    ("merge", "<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda _, node: float(re.sub(r"\.(?=[a-zA-Z])", "", node.value)))


def parse_yaml(text: str) -> Any:
    """A YAML document. Raises yaml.YAMLError."""
    try:
        document = yaml.load(text, _Loader)
    except (ValueError, RecursionError) as error:  # tags that their values contradict; nesting without end
        raise yaml.YAMLError(str(error)) from error
    if next(islice(_parts(document), _MOST_PARTS, None), None) is not None:
        raise yaml.YAMLError(_TOO_MANY)
    return document


def _parts(value: Any) -> Iterator[Any]:
    """A value and all within it, as often as they are there: ten short lines of aliases may come to billions."""
    waiting = [value]
    while waiting:
        yield (item := waiting.pop())
        waiting += item.values() if isinstance(item, dict) else item if isinstance(item, list | tuple | set) else ()
