from dataclasses import replace

import pytest

from flipproof.errors import ConfigError
from flipproof.formats.spec import FORMATS, format_of


def test_the_name_decides_and_a_group_size_changes_nothing_else():
    for name, known in FORMATS.items():
        assert format_of(name) is known
        assert known.name == name
        assert format_of(name, known.group or -1) is known
    changed = format_of("int4-asym", 32)
    assert (changed.name, changed.group, changed.bits, changed.zero) == ("int4-asym-g32", 32, 4, True)
    assert format_of("int4", -1) == replace(FORMATS["int4"], group=None, name="int4-row")


def test_a_name_may_say_the_group_size():
    named = format_of("int4-asym-g64")
    assert (named.name, named.group, named.bits, named.zero) == ("int4-asym-g64", 64, 4, True)
    assert named == format_of("int4-asym", 64) == format_of("int4-asym-g32", 64) == format_of(named.name, named.group)
    assert (format_of("nf4-g128").group, format_of("int8-g8").group) == (128, 8)
    assert format_of("int4-row") == format_of("int4", -1) == format_of("int4-row", -1)
    for usual in ("int4-g128", "nf4-g64", "mxfp4-g32", "int8-row"):
        assert format_of(usual) is FORMATS[usual.split("-")[0]]
    assert format_of("int4-asym-g64").ungrouped == "int4-asym"


@pytest.mark.parametrize(("name", "group", "message"), [
    ("int5", None, r"format = 'int5': int8, int4, int4-asym, fp8, .* \(int4-g64\), is allowed$"),
    ("int4-g0", None, r"format = 'int4-g0': int8, "),
    ("int4-g032", None, r"format = 'int4-g032': int8, "),
    ("int4-g٣٢", None, r"format = 'int4-g٣٢': int8, "),
    ("nf4-g63", None, r"group size 63 of nf4: an even number from 2 is allowed$"),
    ("fp8-g64", None, r"group size 64 of fp8: a whole row, and nothing else, is allowed$"),
    ("int4-g", None, r"format = 'int4-g': int8, "),
    ("int4-g-1", None, r"format = 'int4-g-1': int8, "),
    ("mxfp4", 16, r"group size 16 of mxfp4: 32, and nothing else, is allowed$"),
    ("mxfp8", -1, r"group size -1 of mxfp8: 32, and nothing else, is allowed$"),
    ("fp8", 128, r"group size 128 of fp8: a whole row, and nothing else, is allowed$"),
    ("int4", 0, r"group size 0 of int4: a whole number from 1, or -1 for a whole row, is allowed$"),
    ("nf4", -1, r"group size -1 of nf4: an even number from 2 is allowed$"),
    ("nf4", 63, r"group size 63 of nf4: an even number from 2 is allowed$"),
])  # fmt: skip
def test_others_are_refused(name, group, message):
    with pytest.raises(ConfigError, match=message):
        format_of(name, group)
