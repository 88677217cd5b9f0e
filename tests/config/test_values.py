"""What a value may be, against Python's own reading of the same text, and against what YAML 1.1 would make of it."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import pytest
import yaml

from flipproof.config.values import convert, described, parse_yaml, shown, structure

Size = Literal["small", "large"]


@pytest.mark.parametrize(
    ("declared", "value", "expected"),
    [
        (int, "12", 12),
        (int, "-3", -3),
        (int, 12, 12),
        (float, "1e-05", 1e-5),
        (float, ".5", 0.5),
        (float, "5.", 5.0),
        (float, "-inf", -math.inf),
        (float, 3, 3.0),
        (bool, "true", True),
        (bool, "False", False),
        (str, "null", "null"),
        (str | None, "null", None),
        (str | None, None, None),
        (float | None, "None", None),
        (Size | int, "3", 3),
        (Size | int, "small", "small"),
        (tuple[Size, ...], "small, large", ("small", "large")),
        (tuple[str, ...], "[]", ()),
        (tuple[str, ...], "[wikitext]", ("wikitext",)),
        (tuple[str, ...], "['a', \"b\"]", ("a", "b")),
        (list[str | float] | str | float, "[a, 1e-3]", ["a", 1e-3]),
        (list[str | float] | str | float, "1e-7:1e-3:9", "1e-7:1e-3:9"),
        (Mapping[str, float], {15: 0, "exp": "1e-5"}, {"15": 0.0, "exp": 1e-5}),
        (Mapping[str, Mapping[str, Any] | bool | None], "{a: null, b: {c: 1}}", {"a": None, "b": {"c": 1}}),
    ],
)
def test_values_that_are_what_is_declared(declared, value, expected):
    assert repr(convert(value, declared)) == repr(expected)


ODD_TEXTS = ["", " ", "1:30", "1_000", "0x10", "1e", "١", "--1", "1 2", "yes", "on", "~", "1,5", "\udcff"]


@pytest.mark.parametrize("text", [*ODD_TEXTS, "1e3", "2.0", "true", "inf"])
def test_texts_that_are_no_whole_number(text):
    with pytest.raises(ValueError, match=r"^int$"):
        convert(text, int)


@pytest.mark.parametrize("text", [*ODD_TEXTS, "true", "e5", "infinity", "."])
def test_texts_that_are_no_number(text):
    with pytest.raises(ValueError, match=r"^float$"):
        convert(text, float)


@pytest.mark.parametrize("value", [*ODD_TEXTS, "1", 1, 0, None, "null"])
def test_values_that_are_no_truth(value):
    with pytest.raises(ValueError, match=r"^bool$"):
        convert(value, bool)


@pytest.mark.parametrize(
    ("declared", "value"),
    [
        (int, True),
        (int, 3.0),
        (float, False),
        (float, None),
        (str, 8),
        (str, "\udcff"),
        (Size, "SMALL"),
        (Size, None),
        (tuple[Size, ...], "small,huge"),
        (tuple[str, ...], 3),
        (tuple[str, ...], ["a", ""]),
        (tuple[str, ...], "a,,b"),
        (Mapping[str, float], "exp=1"),
        (Mapping[str, float], {"exp": "much"}),
        (Mapping[str, float], []),
    ],
)
def test_values_that_are_something_else(declared, value):
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the whole message is compared)
        convert(value, declared)
    assert str(error.value) == described(declared)


def test_yaml_words_are_those_of_toml_and_of_flags():
    text = (
        "a: yes\nb: 1:30\nc: 1e-05\nd:\ne: -.inf\nf: 010\ng: 2020-01-01\nh: true\ni: 1_0\nj: 0x10\nk: '1'\nl: !!str 1\n"
    )
    read = parse_yaml(text)
    assert read == {
        "a": "yes", "b": "1:30", "c": 1e-5, "d": None, "e": -math.inf, "f": 10, "g": "2020-01-01", "h": True,
        "i": "1_0", "j": "0x10", "k": "1", "l": "1",
    }  # fmt: skip
    assert yaml.safe_load(text)["b"] == 90  # what is kept out
    assert parse_yaml("a: &x {b: 1}\nc: {<<: *x, b: 2}")["c"] == {"b": 2}


@pytest.mark.parametrize(
    "text", ["a: 1\na: 2", "a: {b: 1, b: 1}", "{[1]: 2}", "!!int x", "!!python/name:os.system x", "[" * 2000]
)
def test_yaml_that_is_refused(text):
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)


@pytest.mark.parametrize(("first", "more"), [("[x, x]", "[*{0}, *{0}]"), ("{{x: 1}}", "{{<<: [*{0}, *{0}]}}")])
def test_aliases_of_aliases_make_no_billions(first, more):
    lines = [f"a0: &a0 {first.format()}", *(f"a{n}: &a{n} {more.format(f'a{n - 1}')}" for n in range(1, 40))]
    with pytest.raises(yaml.YAMLError, match="anchors and aliases it comes to more than 100,000 values"):
        parse_yaml("\n".join(lines))


def test_a_value_is_shown_in_a_line_of_bearable_length():
    assert shown("a\nb") == r"'a\nb'"
    bomb = parse_yaml("a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghi", "bcdefghij")))  # noqa: B905
    assert len(shown(bomb)) < 500
    assert len(shown("x" * 10**6)) <= 120


def test_structures_of_a_flag_are_toml_json_or_yaml():
    for text in ('{ a = 1, b = ["x"] }', '{"a": 1, "b": ["x"]}', "{a: 1, b: [x]}"):
        assert structure(text) == {"a": 1, "b": ["x"]}
    with pytest.raises(ValueError, match="found"):
        structure("{a: ")
