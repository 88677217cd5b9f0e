"""The ``[sweep]`` table: which values each axis of a grid of faults has."""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from flipproof.errors import ConfigError
from flipproof.faults.fault import GRANULARITIES, Granularity
from flipproof.faults.layouts import is_bits
from flipproof.faults.spec import OPERANDS, Bits, Operand
from flipproof.formats.spec import NAMES, format_of, is_format
from flipproof.values import Between, Table, checked

MAX_POINTS = 10_000_000
"""Of a sweep: about as many as a plan can be made of."""
_MOST_VALUES = 10_000
"""Of a range of probabilities."""
PLAIN = "bf16"
"""What the formats' axis calls weights that are not quantised."""
STORED = ("code", "scale")
"""Sites that only quantised weights have: one of the operands of a weight."""


def _items(axis: Any) -> list[str]:
    if axis is None:
        return []
    return [item.strip() for value in (axis if isinstance(axis, list) else [axis]) for item in str(value).split(",")]


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _each(parse: Callable[[str], Any]) -> Callable[[Any], bool]:
    """The condition that ``parse`` raises ValueError for no item of an axis."""

    def parsed(axis: Any) -> bool:
        for item in _items(axis):
            try:
                parse(item)
            except ValueError as error:
                raise ValueError(error if isinstance(error, ConfigError) else f"not {item!r}") from None
        return True

    return parsed


def _probabilities(item: str) -> list[float]:
    first, *more = item.split(":")
    values = [low := float(first)]
    if more:
        if len(more) != 2:
            raise ValueError
        high, n = float(more[0]), int(more[1])
        if not 2 <= n <= _MOST_VALUES or not 0 < low < high:
            raise ValueError
        import numpy as np  # which takes as long to import as all else of a config

        # rounded, so that all machines have the same numbers, and 1e-05 for what is nearly that
        values = [low, *(float(f"{p:.12g}") for p in np.geomspace(low, high, n)[1:-1].tolist()), high]
    if not all(0 <= p <= 0.5 for p in values):
        raise ValueError
    return values


def _site_name(item: str) -> str:
    if item in ("head", "embedding", *STORED):
        return item
    operands = re.findall("w|x|kv", item)
    if not item or "".join(operands) != item or len(operands) > len(set(operands)):
        raise ValueError
    return "".join(operand for operand in OPERANDS if operand in operands)


def _bit_name(item: str) -> str:
    if item not in ("all", "each") and not is_bits(item):
        raise ValueError
    return item


def _layer_name(item: str) -> str:
    if not item or re.search(r"[][]", item):  # which no module's name has
        raise ValueError
    return item


def _format_name(item: str) -> str:
    if item == PLAIN:
        return item
    if not is_format(item):
        raise ValueError
    return format_of(item).name


class ProtectionParts(NamedTuple):
    """What a protection of the grid, such as "tmr-sign+exp+guard", is made of."""

    guard: bool
    code: str
    """"none", "secded" or "parity"."""
    tripled: tuple[str, ...]
    """Bits that are stored three times."""
    by: Granularity | None
    """Of a fitted guard; None where it is the one that is configured."""


def parse_protection(name: str) -> ProtectionParts:
    """Raises ValueError for what is no protection."""
    guard, by, code = False, None, "none"
    fitted = {f"guard-{granularity}": granularity for granularity in GRANULARITIES}
    tripled: list[str] = []
    for part in [] if name == "none" else name.split("+"):
        if part in ("guard", *fitted) and not guard:
            guard, by = True, fitted.get(part)
        elif part in ("secded", "parity") and code == "none":
            code = part
        elif part.startswith("tmr-") or (tripled and part not in ("guard", *fitted, "secded", "parity")):
            tripled.append(checked("tmr", part.removeprefix("tmr-"), Bits))
        else:
            raise ValueError
    return ProtectionParts(guard, code, tuple(tripled), by)


Trials = Annotated[int, Between(1, 1_000_000)]
"""More fault seeds than anybody has time for: an interval from that many is as narrow as its rounding."""
Axis = list[str | int | float] | str | int | float
Probabilities = Annotated[
    Axis,
    _each(_probabilities),
    f"a flip probability from 0 to 0.5, or a:b:n, n of them from a > 0 up to b, from 2 to {_MOST_VALUES:,},",
]
Sites = Annotated[Axis, _each(_site_name), "w, x, kv, several of these together (wx), head, embedding, code, scale"]
Formats = Annotated[Axis, _each(_format_name), f"{PLAIN}, {NAMES} or several of these"]
BitNames = Annotated[Axis, _each(_bit_name), "'all', 'each', 'sign', 'exp', 'frac', a bit ('15') or a range ('7-14')"]
Layers = Annotated[Axis, _each(_layer_name), "all, block, kind or substrings of layers' names"]
Protections = Annotated[
    Axis,
    _each(parse_protection),
    "none, guard, guard-layer, guard-channel, guard-tensor, secded, parity, tmr-BITS (tmr-sign+exp) or several with + "
    "between them (secded+guard)",
]


@dataclass(frozen=True)
class SweepConfig(Table):
    """The grid of ``flipproof sweep``; lists are TOML arrays or words with commas between them."""

    p: Probabilities | None = None
    """Flip probabilities: numbers, and ranges a:b:n of n values from a to b in equal ratios (1e-7:1e-3:9)."""
    voltage: str | None = None
    """Instead of p, a CSV file with the columns voltage and ber (the probability), and maybe p_exp and p_frac."""
    formats: Formats | None = None
    """Compare how weights are stored: bf16 (plain, in bfloat16), int8, int4, int4-asym, fp8, fp8-e5m2, nf4, mxfp8,
    mxfp4, nvfp4, all quantised from the same checkpoint. What flips are bits of the stored weights. bitflip.guards may
    be a directory with guards of each format in one of its name."""
    sites: Sites | None = None
    """What flips: w (weights), x (inputs of linear layers), kv (keys and values), together (wx, wxkv), or the weights
    of the output head or the embedding alone (head, embedding); of quantised weights w is all that is stored, code and
    scale one of its parts. Default: wx, and with formats w,code,scale."""
    layers: Layers = "all"
    """all, block (each repeated block by itself), kind (each last name, such as q_proj), or substrings of names."""
    bits: BitNames = "all"
    """all, sign, exp (the exponent), frac, each (every bit of the dtype by itself), or bits such as 15 and 7-14."""
    protection: Protections | None = None
    """none, guard (bitflip's thresholds), guard-tensor, guard-layer or guard-channel (those of bitflip.guards), secded,
    parity, tmr-sign, tmr-exp, tmr-sign+exp (stored three times), or several such as secded+guard. Default: guard where
    bitflip has thresholds, else none."""
    seeds: Trials = 5
    """Fault seeds for each cell of the grid."""
    budget_minutes: Annotated[float, lambda minutes: minutes > 0, "a positive number"] | None = None
    """Stop after so many minutes; the points that tell most come first, and a later start goes on. Default: measure
    all."""

    def __post_init__(self) -> None:
        if self.voltage is not None:
            object.__setattr__(self, "voltage", os.path.expanduser(self.voltage))

    def problems(self) -> list[str]:
        problems = []
        if self.p is not None and self.voltage is not None:
            problems.append(
                f"voltage = {self.voltage!r}: gives the probabilities, and so does p = {self.p!r}; drop one"
            )
        names = _items(self.formats)
        problems += [
            f"formats = {self.formats!r}: names {name} {names.count(name)} times; once is allowed"
            for name in _unique(names)
            if names.count(name) > 1
        ]
        return problems

    def probabilities(self) -> list[float]:
        """In rising order; none where ``p`` is not given."""
        return sorted({p for item in _items(self.p) for p in _probabilities(item)})

    def site_names(self) -> list[str]:
        """Each once, its operands in one order."""
        default = "wx" if self.formats is None else "w,code,scale"
        return _unique(_site_name(item) for item in _items(default if self.sites is None else self.sites))

    def format_names(self) -> list[str]:
        """In the order given; none where ``formats`` is not given."""
        return _items(self.formats)

    def layer_names(self) -> list[str]:
        return _unique(_items(self.layers))

    def bit_names(self) -> list[str]:
        """Each once; "all" and "each" as they are."""
        return _unique(_items(self.bits))

    def protections(self) -> list[str]:
        """Each once; none where ``protection`` is not given."""
        return _unique(_items(self.protection))


def operands_of(sites: str) -> tuple[Operand, ...]:
    """The operands that flip at a site of the grid."""
    return (
        ("w",)
        if sites in ("head", "embedding", *STORED)
        else tuple(o for o in OPERANDS if o in re.findall("w|x|kv", sites))
    )
