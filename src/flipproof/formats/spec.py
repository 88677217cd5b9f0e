"""The formats of quantised weights, by name: what a code is, what a scale is, how many codes share one.

A weight (out, in) is held as **codes**, one for each of its elements, and **scales**, one for each group of codes that
lie beside one another in a row. What is computed with is code × scale. Formats differ in what a code is, in what a
scale is, and in how many codes share one:

| name | code | scale | codes to a scale | further operands |
|---|---|---|---|---|
| int8 | integer of 8 bits | the weight's dtype | a row | |
| int4 | integer of 4 bits | the weight's dtype | 128 | |
| int4-asym | integer of 4 bits | the weight's dtype | 128 | zero: the code of 0, 4 bits for each scale |
| fp8, fp8-e5m2 | float of 8 bits | the weight's dtype | a row | |
| mxfp8 | e4m3 | E8M0, a power of 2 in 8 bits | 32 | |
| mxfp4 | e2m1, a float of 4 bits | E8M0 | 32 | |
| nvfp4 | e2m1 | e4m3 | 16 | global: a float32 by which all scales are divided |
| nf4 | which of 16 quantiles of a normal distribution | which of 256 numbers | 64 | nested, offset, map |

The scale of an nf4 block is ``map[scale] * nested + offset``: ``map`` holds the 256 numbers, there is one ``nested``
for 256 scales, and one ``offset``. Its blocks are cut from the weight row by row and run over the ends of rows. nf4
whose scales are not quantised once more (``scale`` "float32") is the same without the further operands.

Integers are in offset binary, the number plus half of the range, as compressed-tensors' packed layout, GPTQ and AWQ
hold them. Two's complement differs from it in the top bit alone, so a flip of any bit does the same in both.

Nothing here needs torch, as reading a config does not.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from flipproof.errors import ConfigError


@dataclass(frozen=True)
class Format:
    """How a weight is stored. ``format_of`` gives one by name."""

    name: str
    code: Literal["int", "e4m3", "e5m2", "e2m1", "nf4"]
    bits: int
    """Of a code."""
    group: int | None
    """Codes of a row that share a scale; None is all of them. For nf4 the codes of a block."""
    scale: Literal["float", "e8m0", "e4m3", "nested", "float32"]
    """What a scale is: "float" has the weight's dtype, "nested" is nf4's with its further operands."""
    zero: bool = False
    """Whether each scale has a zero point, the code that stands for 0; it is the middle of the range otherwise."""
    zero_plus: int = 0
    """What is added to a stored zero point: 1 in GPTQ's first version, which stores one less."""

    @property
    def ungrouped(self) -> str:
        """The name without a group size, of ``FORMATS``."""
        return _parts(self.name)[0]


FORMATS: Mapping[str, Format] = {
    each.name: each
    for each in (
        Format("int8", "int", 8, None, "float"),
        Format("int4", "int", 4, 128, "float"),
        Format("int4-asym", "int", 4, 128, "float", zero=True),
        Format("fp8", "e4m3", 8, None, "float"),
        Format("fp8-e5m2", "e5m2", 8, None, "float"),
        Format("nf4", "nf4", 4, 64, "nested"),
        Format("mxfp8", "e4m3", 8, 32, "e8m0"),
        Format("mxfp4", "e2m1", 4, 32, "e8m0"),
        Format("nvfp4", "e2m1", 4, 16, "e4m3"),
    )
}
"""By the name that a user gives."""

NAMES = f"{', '.join(FORMATS)}; of integers and nf4 with -gN for groups of N, of nf4 even ones (int4-g64),"
"""For people."""

_NAME = re.compile(r"(.*?)(?:-g([1-9][0-9]*)|-(row))?", re.DOTALL)
_WHOLE_ROW = -1
"""The group size that checkpoints write for one scale a row."""


def format_of(name: str, group: int | None = None) -> Format:
    """The format of this name, its own name being the one that it has among all that say the same.

    Args:
        name: a key of ``FORMATS``, or one with the number of codes that share a scale where that is not the usual one:
            int4-g64; int4-row is a whole row.
        group: the same number, whatever the name says; -1 is a whole row. Integers may have any, nf4 an even one.

    Raises:
        ConfigError: for another name, or a group size that the format cannot have.
    """
    base, size, row = _parts(name)
    if base not in FORMATS:
        raise ConfigError([f"format = {name!r}: {NAMES} is allowed"])
    found = FORMATS[base]
    if group is None and not (size or row):
        return found
    group = group if group is not None else _WHOLE_ROW if row else int(size)
    codes = None if group == _WHOLE_ROW else group
    if codes == found.group:
        return found
    good = {"int": codes is None or codes > 0, "nf4": codes is not None and codes > 0 and codes % 2 == 0}
    if not good.get(found.code, False):
        allowed = {"int": "a whole number from 1, or -1 for a whole row,", "nf4": "an even number from 2"}
        usual = f"{found.group or 'a whole row'}, and nothing else,"
        raise ConfigError([f"group size {group} of {base}: {allowed.get(found.code, usual)} is allowed"])
    return replace(found, group=codes, name=f"{base}-g{codes}" if codes else f"{base}-row")


def _parts(name: str) -> tuple[str, str, str]:
    """(key of ``FORMATS``, digits of a group size, "row"), the last two empty where the name does not say them."""
    found = _NAME.fullmatch(name)
    assert found  # it fits whatever there is
    base, size, row = found.groups(default="")
    return base, size, row


def is_format(name: str) -> bool:
    """Whether ``format_of`` knows it. Raises ValueError for a group size that the format cannot have."""
    if _parts(name)[0] not in FORMATS:
        return False
    try:
        format_of(name)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return True
