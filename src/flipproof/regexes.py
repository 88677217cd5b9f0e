"""Regular expressions of users and of adapters from strangers, as ``re`` has them, in bounded time: on such a one as
``(.*)*[!?]`` ``re`` tries more ways than there are atoms.

The package ``regex`` gives time limits, and more syntax. What ``re`` does not know is refused, and so are braces and
brackets that mean something else there (``{e}``, ``[[:alpha:]]``): no module's name has any.
"""

import re
from collections.abc import Callable
from typing import Any

import regex

from flipproof.errors import ConfigError

_OTHERS = re.compile(r"(?<!\\)\{(?!\d*(,\d*)?\})|\[\[|\[:")
_SECONDS = 0.5
"""A name has some hundred letters: what is no trap takes microseconds."""


def check(pattern: str) -> None:
    """Raises ValueError where a pattern is no regular expression."""
    try:
        if _OTHERS.search(pattern):
            raise ValueError("braces that hold no count, or a class in two pairs of brackets")
        re.compile(pattern)
        regex.compile(pattern)
    except (re.error, regex.error, TypeError, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(str(error)) from error


def fullmatch(pattern: str, name: str) -> regex.Match[str] | None:
    """The match of a whole name. Raises ConfigError where it cannot be found in time."""
    return _in_time(regex.fullmatch, pattern, name)


def match(pattern: str, name: str) -> regex.Match[str] | None:
    """The match of a name's beginning. Raises ConfigError where it cannot be found in time."""
    return _in_time(regex.match, pattern, name)


def search(pattern: str, name: str) -> regex.Match[str] | None:
    """The first match within a name. Raises ConfigError where it cannot be found in time."""
    return _in_time(regex.search, pattern, name)


def _in_time(how: Callable[..., Any], pattern: str, name: str) -> Any:
    try:
        return how(pattern, name, timeout=_SECONDS)
    except TimeoutError:
        raise ConfigError(
            [f"the pattern {pattern!r} takes more than {_SECONDS} s on {name!r}; leave out repeats of repeats"]
        ) from None
