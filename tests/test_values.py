"""What declarations allow, each against the same rule written out, and what is said of all else."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from flipproof.config.texts import parse_yaml
from flipproof.errors import ConfigError
from flipproof.values import (
    Between,
    Count,
    Positive,
    Seed,
    Table,
    Texts,
    Whole,
    bare,
    check_all,
    checked,
    described,
    shown,
)

MOST = 2**63 - 1
INTS = {Whole: (0, MOST), Count: (1, MOST), Seed: (0, MOST), Annotated[int, Between(8, 4096)]: (8, 4096)}


@dataclass(frozen=True)
class Pair(Table):
    low: Count = 1
    high: Count | None = None
    names: Texts = ()

    def __post_init__(self):
        self.check()

    def problems(self):
        return [f"high = {self.high}: below low"] if self.high is not None and self.high < self.low else []


def allows(declared, value):
    try:
        checked("key", value, declared)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("declared", INTS)
def test_whole_numbers_are_allowed_from_the_lowest_to_the_highest(declared):
    low, high = INTS[declared]
    for value in (-(2**70), -1, 0, 1, 7, 8, 4096, 4097, MOST, MOST + 1, 10**400):
        assert allows(declared, value) == (low <= value <= high), value
    for value in (8.0, "8", True, None, [8], math.nan):
        assert not allows(declared, value)


def test_a_positive_number_is_finite_and_comes_as_a_float():
    for value in (5e-324, 1, 1e308, 2**63):
        assert checked("key", value, Positive) == value
        assert type(checked("key", value, Positive)) is float
    for value in (0, -1, math.inf, math.nan, True, "1", None, 10**400):
        assert not allows(Positive, value)


@pytest.mark.parametrize(
    ("declared", "value", "expected"),
    [
        (tuple[str, ...], ["a"], ("a",)),
        (list[int], (1, 2), [1, 2]),
        (Mapping[str, float], {15: 1}, {"15": 1.0}),
        (Mapping[str, Any], {"a": "null"}, {"a": "null"}),
        (Literal[False] | None, False, None),
        (Annotated[Mapping[str, Any], Pair], {"low": 2, "high": False}, {"low": 2, "high": None}),
        (Annotated[Mapping[str, Any], Pair], {}, {}),
        (float | None, None, None),
        (int | float, 3, 3),
    ],
)
def test_values_are_what_is_declared(declared, value, expected):
    assert repr(checked("key", value, declared)) == repr(expected)


@pytest.mark.parametrize(
    ("declared", "value"),
    [
        (str, ""),
        (str | None, ""),
        (Literal[False] | None, 0),
        (Literal["a"], ["a"]),
        (bool, 1),
        (bool, "true"),
        (int, "1"),
        (float | None, "None"),
        (tuple[str, ...], "a"),
        (tuple[str, ...], {"a": 1}),
        (Mapping[str, Any], [("a", 1)]),
        (Literal["a"] | None, np.array(["a", "b"])),
        (float | str | tuple[int, ...], np.zeros(2)),
    ],
)
def test_from_python_nothing_stands_for_something_else(declared, value):
    assert not allows(declared, value)


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        (Count, "a whole number from 1 to 2^63 - 1"),
        (Annotated[int, Between(0, 2**31 - 1)], "a whole number from 0 to 2^31 - 1"),
        (Annotated[int, Between(1, 1_000_000), "a number of seeds"], "a number of seeds from 1 to 1,000,000"),
        (Annotated[float, Between(0, 0.5)] | None, "a number from 0 to 0.5 or None"),
        (Annotated[Positive, "more than nothing"], "more than nothing"),
        (Literal["a", "b"] | Count, "'a', 'b' or a whole number from 1 to 2^63 - 1"),
        (Literal["a"], "'a'"),
        (Literal[False] | bool | None, "false, true, false or None"),
        (tuple[str, ...] | Mapping[str, int], "a list or a table"),
    ],
)
def test_declarations_in_words(declared, words):
    assert described(declared) == words


def test_a_condition_gives_its_reason_and_a_lone_item_its_list():
    def even(value):
        if value % 2:
            raise ValueError(f"{value} is odd")
        return True

    with pytest.raises(ConfigError, match=r"^key = 3: an even number or None is allowed \(3 is odd\)$"):
        checked("key", 3, Annotated[int, even, "an even number"] | None)
    assert checked("key", 4, Annotated[int, even, "an even number"] | None) == 4
    with pytest.raises(ConfigError, match=r"^key = 'a': a list of texts, such as \['a'\], is allowed$"):
        checked("key", "a", Texts)


def test_a_table_is_checked_key_by_key_and_then_as_a_whole():
    assert Pair(names=["a"]) == Pair(1, None, ("a",))
    with pytest.raises(ConfigError) as error:
        Pair(low=0, high=-1, names=[1, "a", 2])
    assert [problem.split(" = ")[0] for problem in error.value.problems] == ["low", "high", "names[0]", "names[2]"]
    with pytest.raises(ConfigError, match=r"^high = 1: below low$"):
        Pair(low=2, high=1)
    with pytest.raises(ConfigError) as error:
        checked("x", {"low": False, "height": 1}, Annotated[Mapping[str, Any], Pair])
    assert error.value.problems == [
        "x.height: unknown key; known are low, high, names",
        "x.low = False: a whole number from 1 to 2^63 - 1 is allowed",
    ]
    good, problems = check_all({"low": ("x.low", 3, Count), "high": ("x.high", "3", Count)})
    assert good == {"low": 3}
    assert problems == ["x.high = '3': a whole number from 1 to 2^63 - 1 is allowed"]


def test_what_declarations_come_down_to():
    assert bare(Literal["a"] | Count | None) == [Literal["a"], int]
    assert bare(Annotated[list[int] | str, "several"] | None) == [list[int], str]
    assert bare(type(None)) == []


def test_a_value_is_shown_in_a_line_of_bearable_length():
    assert shown("a\nb") == r"'a\nb'"
    bomb = parse_yaml("a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghi", "bcdefghij")))  # noqa: B905
    assert len(shown(bomb)) < 500
    assert len(shown("x" * 10**6)) <= 120
