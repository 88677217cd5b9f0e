"""What a value may be: each key is declared once, and one function checks whatever is given for it.

A key is a field of a ``Table``, and its type says all that is allowed of the value by itself. Behind a type in
``Annotated`` stand a range (``Between``) or another condition, which may raise ValueError with a reason, and what a
message calls it: ``Annotated[float, Between(0, 0.5), "a flip probability"]``. Behind ``Mapping`` a ``Table`` may stand,
of which it has some keys. ``Literal[False]`` is TOML's word for None. What several keys must be together is code:
``problems``.

Strict, since every leniency hides a slip: 3.0 and True are no whole numbers, 1 is no truth value, a text is no list.
What a text that is not from Python may stand for, ``config/texts.py`` says.
"""

import math
import reprlib
import types
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from flipproof.errors import ConfigError

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 120
_short.maxlevel = 3


def shown(value: Any) -> str:
    """A value as a message shows it: on one line, and not all of one that is long or deep."""
    return _short.repr(value)


class Between(NamedTuple):
    """The numbers from ``low`` to ``high``, both allowed."""

    low: float
    high: float = 2**63 - 1

    def __call__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        bits = int(self.high).bit_length()
        long = bits > 30 and self.high == 2**bits - 1
        return f"from {self.low} to " + (f"2^{bits} - 1" if long else f"{self.high:,}")


Whole = Annotated[int, Between(0)]
Count = Annotated[int, Between(1)]
Seed = Annotated[int, Between(0), "a seed"]
Positive = Annotated[float, lambda value: 0 < value < math.inf, "a positive number"]
Texts = Annotated[tuple[str, ...], "a list of texts"]

Readings = Callable[[str], Iterable[Any]]
"""The values that a text may stand for; the first that its key allows is meant."""


def itself(text: str) -> Iterable[Any]:
    """From Python a text is a text."""
    return (text,)


def checked(name: str, value: Any, declared: Any, readings: Readings = itself) -> Any:
    """``value`` as its key, called ``name``, declares it: whole numbers as floats, lists as tuples where it says so.

    Raises:
        ConfigError: naming each part that it may not be, what it is and what is allowed.
    """
    meant = readings(value) if isinstance(value, str) and declared is not Any else (value,)
    try:
        return _first(name, ((reading, declared) for reading in meant), readings)
    except ConfigError:  # of what is in a list or table
        raise
    except (ValueError, OverflowError) as error:
        reason = f" ({error})" if str(error) else ""
    allowed, seen = described(declared), f" = {shown(value)}"
    if isinstance(value, str) and not value:
        seen = " is empty"
    if isinstance(value, str) and not reason:
        with suppress(ValueError):
            _as_declared(name, [value], declared, readings)
            allowed += f", such as {shown([value])},"
    raise ConfigError([f"{name}{seen}: {allowed} is allowed{reason}"])


def check_all(
    parts: Mapping[Any, tuple[str, Any, Any]], readings: Readings = itself
) -> tuple[dict[Any, Any], list[str]]:
    """What is right of several values, as declared, and what is wrong with the others.

    Args:
        parts: key -> what ``checked`` takes: name, value, declaration.
        readings: what texts may stand for.
    """
    good, problems = {}, []
    for key, part in parts.items():
        try:
            good[key] = checked(*part, readings)
        except ConfigError as error:
            problems += error.problems
    return good, problems


def _as_declared(name: str, value: Any, declared: Any, readings: Readings) -> Any:
    """Raises ConfigError for what is in a list or table, ValueError with a reason, if any, for all else."""
    origin, arguments = get_origin(declared), get_args(declared)
    if origin is Annotated:
        value = _as_declared(name, value, arguments[0], readings)
        if isinstance(keys := arguments[1], type) and issubclass(keys, Table):
            kinds = keys.declared()  # false is TOML's word for None
            none = {k: None for k, v in value.items() if v is False and types.NoneType in get_args(kinds.get(k))}
            return _good(keys.checked_keys(value | none, f"{name}.", readings))
        if all(condition(value) for condition in arguments[1:] if callable(condition)):
            return value
    elif origin in (Union, types.UnionType):
        return _first(name, ((value, member) for member in arguments), readings)
    elif origin is Literal:
        if any(type(value) is type(member) and value == member for member in arguments):
            return None if value is False else value
    elif origin in (tuple, list):
        if isinstance(value, list | tuple):
            items = {i: (f"{name}[{i}]", item, arguments[0]) for i, item in enumerate(value)}
            return origin(_good(check_all(items, readings)).values())
    elif origin is Mapping:
        if isinstance(value, Mapping):
            parts = {("key", key): (f"{name} key", str(key), arguments[0]) for key in value}
            parts |= {("item", key): (f"{name} {key!r}", item, arguments[1]) for key, item in value.items()}
            good = _good(check_all(parts, readings))
            return {good["key", key]: good["item", key] for key in value}
    elif declared is Any:
        return value
    elif declared is str:
        if isinstance(value, str) and value.encode():  # which what no file can hold does not have
            return value
    elif declared is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, declared) and isinstance(value, bool) == (declared is bool):
        return value
    raise ValueError


def _first(name: str, attempts: Iterable[tuple[Any, Any]], readings: Readings) -> Any:
    """The first of several (value, declaration) that fits; else raises the first error that says something."""
    errors: list[Exception] = []
    for value, declared in attempts:
        try:
            return _as_declared(name, value, declared, readings)
        except (ValueError, OverflowError) as error:
            errors.append(error)
    raise next((error for error in errors if str(error)), ValueError())


def _good(found: tuple[dict[Any, Any], list[str]]) -> dict[Any, Any]:
    good, problems = found
    if problems:
        raise ConfigError(problems)
    return good


def described(declared: Any) -> str:
    """What is allowed, in the words of a message."""
    *most, last = _choices(declared)
    return f"{', '.join(most)} or {last}" if most else last


def _choices(declared: Any) -> list[str]:
    origin, arguments = get_origin(declared), get_args(declared)
    if origin in (Union, types.UnionType):
        return [choice for member in arguments for choice in _choices(member)]
    if origin is Literal:
        return ["false" if word is False else repr(word) for word in arguments]
    if origin is Annotated:
        nouns = [word for word in arguments[1:] if isinstance(word, str)] or [described(arguments[0])]
        return [" ".join([nouns[-1], *(str(word) for word in arguments[1:] if isinstance(word, Between))])]
    return _NOUNS[origin or declared]


_NOUNS = {
    str: ["a text"],
    int: ["a whole number"],
    float: ["a number"],
    bool: ["true", "false"],
    types.NoneType: ["None"],
    tuple: ["a list"],
    list: ["a list"],
    Mapping: ["a table"],
}


def bare(declared: Any) -> list[Any]:
    """The types that a declaration comes down to: without what is said of them, and without None."""
    if get_origin(declared) is Annotated:
        return bare(get_args(declared)[0])
    if get_origin(declared) in (Union, types.UnionType):
        return [kind for member in get_args(declared) for kind in bare(member)]
    return [] if declared is types.NoneType else [declared]


@dataclass(frozen=True)
class Table:
    """A dataclass whose fields are keys."""

    def problems(self) -> list[str]:
        """What is wrong of keys together, each by itself being as declared: a line each, the key first."""
        return []

    @classmethod
    def declared(cls) -> dict[str, Any]:
        """Key -> what its value may be."""
        return {f.name: f.type for f in fields(cls)}

    @classmethod
    def checked_keys(
        cls,
        values: Mapping[str, Any],
        where: str = "",
        readings: Readings = itself,
        hint: Callable[[str], str] | None = None,
    ) -> tuple[dict[str, Any], list[str]]:
        """What is right of some of the keys, and what is wrong with the others and with those that there are not.

        Args:
            values: key -> value.
            where: what stands before a key in messages.
            readings: what texts may stand for.
            hint: the end of the message about an unknown key. Default: all that there are.
        """
        declared = cls.declared()
        known = {key: (where + key, value, declared[key]) for key, value in values.items() if key in declared}
        good, problems = check_all(known, readings)
        hint = hint or (lambda _: f"; known are {', '.join(declared)}")
        return good, [f"{where}{key}: unknown key{hint(key)}" for key in values if key not in known] + problems

    def check(self) -> None:
        """Make the values what their keys declare. Raises ConfigError with every problem."""
        good, problems = self.checked_keys(vars(self))
        vars(self).update(good)  # which no frozen dataclass minds
        if problems := problems or self.problems():
            raise ConfigError(problems)
