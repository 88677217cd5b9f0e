"""What a value may be: from what a file holds, or a flag's text, to the type that its key declares.

Strict, since every leniency hides a slip: a whole number is written as one (not ``1e3``), a truth value is ``true`` or
``false`` (not ``yes`` or 1), and ``1:30`` is no number, though YAML 1.1 takes it for 90. The same text means the same
in TOML, in YAML and in a flag.
"""

import re
import reprlib
import tomllib
import types
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from itertools import islice
from typing import Any, Literal, Union, get_args, get_origin

import yaml

_WHOLE = r"[-+]?[0-9]+"
_NUMBER = r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?"
_NO_NUMBER = r"([-+]?inf|nan)"
NULL = ("null", "None")

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 120
_short.maxlevel = 3


def shown(value: Any) -> str:
    """A value as a message shows it: on one line, and not all of one that is long or deep."""
    return _short.repr(value)


def convert(value: Any, declared: Any) -> Any:
    """``value`` as the declared type.

    Args:
        value: what TOML or YAML gave, or the text of a flag.
        declared: str, int, float, bool, None, a Literal of texts, a tuple or list of one type, a Mapping from texts, or
            a union of these.

    Raises:
        ValueError: where it cannot be; the message is what is allowed.
    """
    try:
        return _converted(value, declared)
    except (ValueError, OverflowError, RecursionError):
        raise ValueError(described(declared)) from None


def _converted(value: Any, declared: Any) -> Any:
    origin, arguments = get_origin(declared), get_args(declared)
    if origin in (Union, types.UnionType):
        return _of_union(value, arguments)
    if origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
    elif origin is tuple:
        value = _words(value) if isinstance(value, str) else value
        if isinstance(value, list | tuple):
            return tuple(_converted(item, arguments[0]) for item in value)
    elif origin is list:
        value = structure(value) if isinstance(value, str) and value.startswith("[") else value
        if isinstance(value, list | tuple):
            return [_converted(item, arguments[0]) for item in value]
    elif origin is Mapping or declared is Mapping:
        value = structure(value) if isinstance(value, str) else value
        if isinstance(value, Mapping):
            kind = arguments[1] if arguments else Any
            return {str(key): item if kind is Any else _converted(item, kind) for key, item in value.items()}
    else:
        return _SCALARS[declared](value)
    raise ValueError


def _of_union(value: Any, members: tuple[Any, ...]) -> Any:
    for member in sorted(members, key=lambda member: member is not types.NoneType):  # null is None rather than a text
        try:
            return _converted(value, member)
        except (ValueError, OverflowError):
            continue
    raise ValueError


def _none(value: Any) -> None:
    if value is not None and value not in NULL:
        raise ValueError


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    value.encode()  # what no file can hold: bytes of a command line that are no text
    return value


def _whole_number(value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(_WHOLE, value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError
    return value


def _number(value: Any) -> float:
    if isinstance(value, str) and re.fullmatch(f"{_NUMBER}|{_NO_NUMBER}", value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError
    try:
        return float(value)
    except OverflowError:  # a whole number of more than 308 digits
        raise ValueError from None


def _truth(value: Any) -> bool:
    value = {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value
    if not isinstance(value, bool):
        raise ValueError
    return value


_SCALARS = {types.NoneType: _none, str: _text, int: _whole_number, float: _number, bool: _truth}


def _words(text: str) -> Any:
    """A flag's list: words with commas between, or ``[…]`` as in TOML or YAML."""
    if text.lstrip().startswith("["):
        return structure(text)
    return [word.strip() for word in text.split(",")]


def structure(text: str) -> Any:
    """A list or table in the words of TOML, JSON or YAML. Raises ValueError where it is none."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        try:
            return parse_yaml(text)
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error


def described(declared: Any) -> str:
    """What is allowed, in the words of a message."""
    origin, arguments = get_origin(declared), get_args(declared)
    if origin in (Union, types.UnionType):
        return " | ".join(described(member) for member in arguments)
    if origin is Literal:
        return " | ".join(map(repr, arguments))
    if origin is tuple:
        words = ", ".join(get_args(arguments[0]))
        return "a list" + (f" of {words}" if words else "")
    if origin is list:
        return "a list"
    if origin is Mapping:
        example = '{ exp = 1e-5, "15" = 0 }' if arguments[1] is float else '{ "model.layers.0.*" = false }'
        return f"a table, such as {example},"
    return {types.NoneType: "None", Mapping: "a table"}.get(declared) or str(declared.__name__)


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
