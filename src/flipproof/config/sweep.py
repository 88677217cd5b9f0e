"""The ``[sweep]`` table: which values each axis of a grid of faults has."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from flipproof.faults.spec import OPERANDS, BitFlipSpec, Operand

MAX_SEEDS = 1_000_000
"""More fault seeds than anybody has time for: an interval from that many is as narrow as its rounding."""
MAX_POINTS = 10_000_000
"""Of a sweep: about as many as a plan can be made of."""
Axis = list[str | int | float] | str | int | float


@dataclass(frozen=True)
class SweepConfig:
    """The grid of ``flipproof sweep``; lists are TOML arrays or words with commas between them."""

    p: Axis | None = None
    """Flip probabilities: numbers, and ranges a:b:n of n values from a to b in equal ratios (1e-7:1e-3:9)."""
    voltage: str | None = None
    """Instead of p, a CSV file with the columns voltage and ber (the probability), and maybe p_exp and p_frac."""
    sites: Axis = "wx"
    """What flips: w (weights), x (inputs of linear layers), kv (keys and values), together (wx, wxkv), or the weights
    of the output head or the embedding alone (head, embedding)."""
    layers: Axis = "all"
    """all, block (each repeated block by itself), kind (each last name, such as q_proj), or substrings of names."""
    bits: Axis = "all"
    """all, sign, exp (the exponent), frac, each (every bit of the dtype by itself), or bits such as 15 and 7-14."""
    protection: Axis | None = None
    """none, guard (bitflip's thresholds), secded, parity, tmr-sign, tmr-exp, tmr-sign+exp (stored three times), or
    several such as secded+guard. Default: guard where bitflip has thresholds, else none."""
    seeds: int = 5
    """Fault seeds for each cell of the grid."""
    budget_minutes: float | None = None
    """Stop after so many minutes; the points that tell most come first, and a later start goes on. Default: measure
    all."""

    def __post_init__(self) -> None:
        if self.voltage is not None:
            object.__setattr__(self, "voltage", os.path.expanduser(self.voltage))

    def problems(self) -> list[str]:
        problems = []
        for parse in (self.probabilities, self.site_names, self.bit_names, self.protections):
            try:
                parse()
            except ValueError as error:
                problems.append(str(error))
        if self.p is not None and self.voltage is not None:
            problems.append(
                f"voltage = {self.voltage!r}: gives the probabilities, and so does p = {self.p!r}; drop one"
            )
        if not 1 <= self.seeds <= MAX_SEEDS:
            problems.append(f"seeds = {self.seeds!r}: from 1 to {MAX_SEEDS:,} is allowed")
        if self.budget_minutes is not None and not self.budget_minutes > 0:
            problems.append(f"budget_minutes = {self.budget_minutes!r}: a positive number is allowed")
        return problems

    def probabilities(self) -> list[float]:
        """In rising order; none where ``p`` is not given."""
        return sorted({p for item in _items(self.p) for p in _probabilities(item)})

    def site_names(self) -> list[str]:
        """Each once, its operands in one order."""
        return _unique(_site_name(item) for item in _items(self.sites))

    def layer_names(self) -> list[str]:
        return _unique(_items(self.layers))

    def bit_names(self) -> list[str]:
        """Each once; "all" and "each" as they are."""
        names = _unique(_items(self.bits))
        for name in names:
            if name not in ("all", "each"):
                _check_bits("bits", name, "'all', 'each', ")
        return names

    def protections(self) -> list[str]:
        """Each once; none where ``protection`` is not given."""
        names = _unique(_items(self.protection))
        for name in names:
            parse_protection(name)
        return names


def _items(axis: Axis | None) -> list[str]:
    if axis is None:
        return []
    return [item.strip() for value in (axis if isinstance(axis, list) else [axis]) for item in str(value).split(",")]


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


_MOST_VALUES = 10_000
"""Of a range of probabilities."""


def _probabilities(item: str) -> list[float]:
    first, *more = item.split(":")
    try:
        low = float(first)
        if not more:
            values = [low]
        else:
            high, n = float(more[0]), int(more[1])
            if len(more) != 2 or not 2 <= n <= _MOST_VALUES or not 0 < low < high:
                raise ValueError
            import numpy as np  # which takes as long to import as all else of a config

            # rounded, so that all machines have the same numbers, and 1e-05 for what is nearly that
            values = [low, *(float(f"{p:.12g}") for p in np.geomspace(low, high, n)[1:-1].tolist()), high]
    except (ValueError, IndexError):
        raise ValueError(
            f"p = {item!r}: a number is allowed, or a:b:n, n values from a > 0 up to b, from 2 to {_MOST_VALUES:,}"
        ) from None
    if not all(0 <= p <= 0.5 for p in values):
        raise ValueError(f"p = {item!r}: a flip probability from 0 to 0.5 is allowed")
    return values


def _site_name(item: str) -> str:
    if item in ("head", "embedding"):
        return item
    operands = re.findall("w|x|kv", item)
    if not item or "".join(operands) != item or len(operands) > len(set(operands)):
        raise ValueError(f"sites = {item!r}: w, x, kv, several of these together (wx), head and embedding are allowed")
    return "".join(operand for operand in OPERANDS if operand in operands)


def _check_bits(key: str, name: str, also: str = "") -> None:
    try:
        BitFlipSpec(w_protected_bits=(name,))
    except ValueError:
        allowed = f"{also}'sign', 'exp', 'frac', a bit ('15') and a range of bits ('7-14')"
        raise ValueError(f"{key} = {name!r}: {allowed} are allowed") from None


def operands_of(sites: str) -> tuple[Operand, ...]:
    """The operands that flip at a site of the grid."""
    return ("w",) if sites in ("head", "embedding") else tuple(o for o in OPERANDS if o in re.findall("w|x|kv", sites))


class ProtectionParts(NamedTuple):
    """What a protection of the grid, such as "tmr-sign+exp+guard", is made of."""

    guard: bool
    code: str
    """"none", "secded" or "parity"."""
    tripled: tuple[str, ...]
    """Bits that are stored three times."""


def parse_protection(name: str) -> ProtectionParts:
    """Raises ValueError for what is no protection."""
    guard, code = False, "none"
    tripled: list[str] = []
    for part in [] if name == "none" else name.split("+"):
        if part == "guard" and not guard:
            guard = True
        elif part in ("secded", "parity") and code == "none":
            code = part
        elif part.startswith("tmr-") or (tripled and part not in ("guard", "secded", "parity")):
            _check_bits(f"protection = {name!r}: tmr", bits := part.removeprefix("tmr-"))
            tripled.append(bits)
        else:
            raise ValueError(
                f"protection = {name!r}: none, guard, secded, parity, tmr-BITS (tmr-sign+exp) and several of them with "
                "+ between them (secded+guard) are allowed"
            )
    return ProtectionParts(guard, code, tuple(tripled))
