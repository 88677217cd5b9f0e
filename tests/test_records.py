import json
import math

import pytest

from flipproof.errors import ConfigError
from flipproof.records import (
    HASH,
    append_line,
    check_toml,
    lines,
    read_record,
    sealed,
    unsealed,
    write_record,
    write_toml,
)

VALUES = {"loss": 1.5, "name": "größer", "parts": [1, {"a": None}], "step": 10}


def flipped(data, at, bit):
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def test_a_record_says_what_was_written(tmp_path):
    path = tmp_path / "record.json"
    write_record(path, VALUES | {"broken": math.inf, "table": {2: (0.1, math.nan)}})
    assert read_record(path) == VALUES | {"broken": None, "table": {"2": [0.1, None]}}
    assert json.loads(path.read_text())[HASH] == sealed(read_record(path))[HASH]


def test_each_flipped_bit_of_a_record_is_seen_or_changes_nothing(tmp_path):
    path = tmp_path / "record.json"
    write_record(path, VALUES)
    whole, seen = path.read_bytes(), 0
    for at in range(len(whole)):
        for bit in range(8):
            path.write_bytes(flipped(whole, at, bit))
            try:
                # a flip in the name of the hash leaves another key in its place
                assert {key: value for key, value in read_record(path).items() if key in VALUES} == VALUES
            except ValueError:
                seen += 1
    assert seen > 4 * len(whole)
    for kept in range(len(whole) - 2):
        path.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=r"."):
            read_record(path)


def test_layout_and_clocks_are_not_in_the_hash():
    values = VALUES | {"seconds": 1.0, "tokens_per_second": 5.0}
    mark = sealed(values)[HASH]
    assert sealed(dict(reversed(values.items())))[HASH] == mark
    assert sealed(values | {"seconds": 2.0, "tokens_per_second": None})[HASH] == mark
    assert sealed(values | {"loss": 1.25})[HASH] != mark
    assert unsealed(json.dumps(sealed(values), indent=7)) == values


def test_what_has_no_hash_is_read():
    assert unsealed(json.dumps(VALUES)) == VALUES


@pytest.mark.parametrize(
    "text",
    ["", "[]", "1", "null", '{"a": 1', "[" * 100_000, '{"blake2b": 1, "a":' * 980 + "1" + "}" * 980, b"\xff{}"],
)
def test_what_is_no_record_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"."):
        unsealed(text)


def test_lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_line(path, {"step": 1, "loss": math.inf})
    append_line(path, {"step": 2})
    assert [*lines(path.read_bytes())] == [(1, {"step": 1, "loss": None}), (2, {"step": 2})]
    (first, value), (second, problem) = lines(path.read_bytes().replace(b'"step": 2', b'"step": 3'))
    assert (first, value["step"], second, type(problem)) == (1, 1, 2, ValueError)
    assert [number for number, _ in lines(path.read_bytes() + b'\n\n{"ha')] == [1, 2, 5]


def test_each_flipped_bit_of_a_config_is_seen_or_leaves_its_tables_whole(tmp_path):
    path, text = tmp_path / "config.toml", '[training]\nlr = 0.001\nsteps = 40\n\n[data]\nsource = "größer"\n'
    write_toml(path, text)
    check_toml(path)
    whole, seen = path.read_bytes(), 0
    for at in range(len(whole)):
        for bit in range(8):
            path.write_bytes(flipped(whole, at, bit))
            try:
                check_toml(path)
            except ConfigError:
                seen += 1
            else:
                assert path.read_text().endswith(text)
    assert seen > 7 * len(text)
    for left in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:left])
        if left != 1:  # a comment alone, which is read as it always was
            with pytest.raises(ConfigError, match=r"config\.toml: it is not what was written"):
                check_toml(path)
    path.write_text(text)
    check_toml(path)
