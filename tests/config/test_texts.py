"""What a text may stand for, against Python's own reading of it, and against what YAML 1.1 would make of it."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import pytest
import yaml

from flipproof.config.texts import parse_yaml, readings, structure
from flipproof.errors import ConfigError
from flipproof.values import checked, described, shown

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
        (tuple[str, ...], "[q_proj,v_proj]", ("q_proj", "v_proj")),
        (tuple[str, ...], " [ q_proj , 'v,proj', ] ", ("q_proj", "v,proj")),
        (tuple[str, ...], "[15, 7-14, 1e-5, true, '0', null]", ("15", "7-14", "1e-5", "true", "0", "null")),
        (tuple[str, ...], "[q_proj, .*[kv]_proj, *a]", ("q_proj", ".*[kv]_proj", "*a")),
        (tuple[str, ...], "[qk]_proj", ("[qk]_proj",)),
        (tuple[str, ...], "[qk]_proj,layers.[01]", ("[qk]_proj", "layers.[01]")),
        (tuple[str, ...] | None, "null", None),
        (list[str | float] | str | float, "[1e-5,1e-4]", [1e-5, 1e-4]),
        (list[str | float] | str | float, "[1e-7:1e-3:9]", ["1e-7:1e-3:9"]),
        (list[str | float] | str | float, "[a, 1e-3]", ["a", 1e-3]),
        (list[str | float] | str | float, "1e-7:1e-3:9", "1e-7:1e-3:9"),
        (Mapping[str, float], {15: 0, "exp": "1e-5"}, {"15": 0.0, "exp": 1e-5}),
        (Mapping[str, Mapping[str, Any] | bool | None], "{a: null, b: {c: 1}}", {"a": None, "b": {"c": 1}}),
        (Mapping[str, Any], "{a: 'null'}", {"a": "null"}),
        (str, "[x]", "[x]"),
    ],
)
def test_texts_that_stand_for_what_is_declared(declared, value, expected):
    assert repr(checked("key", value, declared, readings)) == repr(expected)


ODD_TEXTS = ["", " ", "1:30", "1_000", "0x10", "1e", "١", "--1", "1 2", "yes", "on", "~", "1,5", "\udcff"]


def refused(value, declared):
    """The lines that say so; one for a value that is no list or table."""
    with pytest.raises(ConfigError) as error:
        checked("key", value, declared, readings)
    return error.value.problems


@pytest.mark.parametrize("text", [*ODD_TEXTS, "1e3", "2.0", "true", "inf", "1" * 5000])
def test_texts_that_are_no_whole_number(text):
    (problem,) = refused(text, int)
    assert problem == f"key {f'= {shown(text)}' if text else 'is empty'}: a whole number is allowed"


@pytest.mark.parametrize("text", [*ODD_TEXTS, "true", "e5", "infinity", "."])
def test_texts_that_are_no_number(text):
    (problem,) = refused(text, float)
    assert problem == f"key {f'= {text!r}' if text else 'is empty'}: a number is allowed"


@pytest.mark.parametrize("value", [*ODD_TEXTS, "1", 1, 0, None, "null"])
def test_values_that_are_no_truth(value):
    (problem,) = refused(value, bool)
    assert problem == f"key {'is empty' if value == '' else f'= {value!r}'}: true or false is allowed"


@pytest.mark.parametrize(
    ("declared", "value", "words"),
    [
        (int, True, "key = True: "),
        (int, 3.0, "key = 3.0: "),
        (float, False, "key = False: "),
        (float, None, "key = None: "),
        (str, 8, "key = 8: "),
        (str, "\udcff", r"key = '\udcff': "),
        (Size, "SMALL", "key = 'SMALL': "),
        (Size, None, "key = None: "),
        (tuple[str, ...], 3, "key = 3: "),
        (Mapping[str, float], "exp=1", "key = 'exp=1': "),
        (Mapping[str, float], [], "key = []: "),
        (Mapping[str, float], "[" * 5000, "key = '[[["),
    ],
)
def test_values_that_are_something_else(declared, value, words):
    (problem,) = refused(value, declared)
    assert problem.startswith(words)
    assert f": {described(declared)} is allowed" in problem


@pytest.mark.parametrize(
    ("declared", "value", "problems"),
    [
        (tuple[Size, ...], "small,huge", ["key[1] = 'huge': 'small' or 'large' is allowed"]),
        (tuple[str, ...], ["a", ""], ["key[1] is empty: a text is allowed"]),
        (tuple[str, ...], "a,,b", ["key[1] is empty: a text is allowed"]),
        (tuple[str, ...], "[a,,b]", ["key[1] is empty: a text is allowed"]),
        (tuple[str, ...], "[[a], b]", ["key[0] = ['a']: a text is allowed"]),
        (tuple[str, ...], "[a: b]", ["key[0] = {'a': 'b'}: a text is allowed"]),
        (
            Mapping[str, float],
            {"exp": "much", "frac": 1, "sign": "1e"},
            ["key 'exp' = 'much': a number is allowed", "key 'sign' = '1e': a number is allowed"],
        ),
    ],
)
def test_items_of_lists_and_tables_are_named(declared, value, problems):
    assert refused(value, declared) == problems


@pytest.mark.parametrize("text", ["[a,b", "a,b]", "[", "[a,[b]", "['a]", '["a", "b]'])
@pytest.mark.parametrize("declared", [tuple[str, ...], tuple[Size, ...] | None, list[str | float] | float])
def test_lists_that_are_not_closed(text, declared):
    (problem,) = refused(text, declared)
    reason = "(a bracket or a quote is not closed)"
    assert problem == f"key = {shown(text)}: {described(declared)} is allowed {reason}"


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


def test_structures_of_a_flag_are_toml_json_or_yaml():
    for text in ('{ a = 1, b = ["x"] }', '{"a": 1, "b": ["x"]}', "{a: 1, b: [x]}"):
        assert structure(text) == {"a": 1, "b": ["x"]}
    with pytest.raises(ValueError, match="found"):
        structure("{a: ")
    with pytest.raises(ValueError, match="'12' is no list or table"):
        structure("12")
