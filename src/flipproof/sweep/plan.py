"""Which points a sweep measures, and in which order: pure functions of a table and of what is known so far.

``SweepConfig`` is the ``[sweep]`` table of a run's config. It spans a grid, flip probability × sites × layers × bits ×
protection; a **cell** of it is one set of faults, a **point** is one cell under one fault seed, and a **curve** is the
cells that differ in the probability alone.

**Order.** A sweep may be stopped at any time, so what tells most comes first. Curves share turns, and with the first
seed each gets its two ends, then the middle between those neighbours whose losses differ most: bisection, which
closes in on the cliff where a model breaks. Beyond ``_BROKEN`` nats all losses count as one, since how much worse than
guessing a model is tells nothing. When every cell has one trial, the next goes where the standard error of the mean is
largest; a cell with a single trial is taken to scatter by what its loss differs from its neighbours'.

Points that other processes work on count as measured, with a loss between their neighbours' and an error that shrinks,
so processes that share a sweep spread out.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from flipproof.spec import OPERANDS, BitFlipSpec, Operand

MAX_SEEDS = 1_000_000
"""More fault seeds than anybody has time for: an interval from that many is as narrow as its rounding."""
MAX_POINTS = 10_000_000
"""Of a sweep: about as many as a plan can be made of."""
Axis = list[str | int | float] | str | int | float

_BROKEN = 16.0
"""Nats: guessing evenly among the tokens of the largest vocabularies costs 12.5."""


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


class Rate(NamedTuple):
    """A value of the probability's axis."""

    p: float
    voltage: float | None
    p_exp: float
    p_frac: float


@dataclass(frozen=True)
class Cell:
    """One set of faults."""

    rate: Rate
    sites: str
    layers: str
    bits: str
    protection: str

    @cached_property
    def id(self) -> str:
        """A hash of the faults, equal on every machine."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def curve(self) -> tuple[str, str, str, str]:
        """What the cells of a curve have in common."""
        return self.sites, self.layers, self.bits, self.protection

    def point_id(self, seed: int) -> str:
        return f"{self.id}/{seed}"


class Point(NamedTuple):
    """One measurement: a cell under a fault seed."""

    cell: Cell
    seed: int

    @property
    def id(self) -> str:
        return self.cell.point_id(self.seed)


@dataclass(frozen=True)
class Plan:
    """All points of a sweep."""

    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]

    @cached_property
    def curves(self) -> list[list[Cell]]:
        """Cells by curve, by rising probability within each."""
        curves: dict[tuple[str, str, str, str], list[Cell]] = {}
        for cell in self.cells:
            curves.setdefault(cell.curve, []).append(cell)
        return [sorted(curve, key=lambda cell: cell.rate) for curve in curves.values()]

    @cached_property
    def points(self) -> dict[str, Point]:
        """By id."""
        return {(point := Point(cell, seed)).id: point for cell in self.cells for seed in self.seeds}


def next_point(plan: Plan, losses: Mapping[str, float], busy: Collection[str] = ()) -> Point | None:
    """The point to measure next, or None where all are measured or busy.

    Args:
        losses: id of a measured point -> its loss in nats; infinite for a broken model.
        busy: ids of points that others are measuring.
    """
    return _of_first_seed(plan, losses, busy) or _of_further_seeds(plan, losses, busy)


def _level(loss: float) -> float:
    return min(loss, _BROKEN) if not math.isnan(loss) else _BROKEN


def _of_first_seed(plan: Plan, losses: Mapping[str, float], busy: Collection[str]) -> Point | None:
    seed = plan.seeds[0]
    turn: tuple[int, list[Cell], dict[int, float], list[int]] | None = None
    for curve in plan.curves:
        ids = [cell.point_id(seed) for cell in curve]
        known = {i: _level(losses[name]) for i, name in enumerate(ids) if name in losses}
        taken = [i for i, name in enumerate(ids) if i in known or name in busy]
        if len(taken) < len(curve) and (turn is None or len(taken) < turn[0]):
            turn = len(taken), curve, known, taken
    if turn is None:
        return None
    _, curve, known, taken = turn
    return Point(curve[_most_telling(len(curve), known, taken)], seed)


def _most_telling(n: int, known: Mapping[int, float], taken: Sequence[int]) -> int:
    """Which of ``n`` values of p to measure next on a curve, where those of ``taken`` are measured (``known``) or
    about to be."""
    for end in (n - 1, 0):
        if end not in taken:
            return end
    levels = np.interp(taken, list(known), list(known.values())).tolist() if known else [0.0] * len(taken)
    gaps = [
        (abs(levels[k + 1] - levels[k]), taken[k + 1] - taken[k], -k)
        for k in range(len(taken) - 1)
        if taken[k + 1] - taken[k] > 1
    ]
    _, width, k = max(gaps)
    return taken[-k] + width // 2


def _of_further_seeds(plan: Plan, losses: Mapping[str, float], busy: Collection[str]) -> Point | None:
    best, largest = None, -1.0
    for curve in plan.curves:
        trials = [
            [_level(losses[name]) for seed in plan.seeds if (name := cell.point_id(seed)) in losses] for cell in curve
        ]
        for i, cell in enumerate(curve):
            ids = {seed: cell.point_id(seed) for seed in plan.seeds}
            free = [seed for seed, name in ids.items() if name not in losses and name not in busy]
            if not free:
                continue
            pending = sum(name in busy and name not in losses for name in ids.values())
            error = _scatter(trials, i) / math.sqrt(max(1, len(trials[i]) + pending))
            if error > largest:
                best, largest = Point(cell, free[0]), error
    return best


def _scatter(trials: list[list[float]], i: int) -> float:
    """The standard deviation between seeds of the i-th cell of a curve; of a single trial a guess."""
    if len(trials[i]) > 1:
        return float(np.std(trials[i], ddof=1))
    means = [float(np.mean(values)) if values else None for values in trials]
    near = [mean for mean in (*means[max(0, i - 1) : i], *means[i + 1 : i + 2]) if mean is not None]
    here = means[i]
    return max((abs(mean - here) for mean in near), default=0.0) if here is not None else 0.0


def cell_spec(base: BitFlipSpec, cell: Cell, skip: Sequence[str] = ()) -> BitFlipSpec:
    """The faults of a cell: those of ``base`` with other probabilities, sites, layers and protection; persistence,
    bursts, rows and thresholds stay.

    Args:
        skip: more patterns of layers to leave alone.

    Raises:
        ValueError: where ``base`` does not go with the cell, such as bursts with single bits.
    """
    protection = parse_protection(cell.protection)
    flipping = operands_of(cell.sites)
    changes: dict[str, Any] = {}
    for operand in OPERANDS:
        flips = operand in flipping
        everywhere = flips and cell.bits == "all"
        changes[f"{operand}_p_exp"] = cell.rate.p_exp if everywhere else None
        changes[f"{operand}_p_frac"] = cell.rate.p_frac if everywhere else None
        bits_p = cell.rate.p_frac if cell.bits == "frac" else cell.rate.p_exp
        changes[f"{operand}_p_bits"] = {cell.bits: bits_p} if flips and not everywhere else {}
        changes[f"{operand}_protection"] = protection.code if flips else "none"
        changes[f"{operand}_protected_bits"] = protection.tripled if flips else ()
        if not flips:
            changes[f"{operand}_p_row"] = None
        if not protection.guard:
            changes[f"{operand}_zero_out_t"] = None
    drop: set[str] = set()
    if not protection.guard:
        drop = {f"{operand}_zero_out_t" for operand in OPERANDS}
    drop |= {f"{operand}_p_row" for operand in OPERANDS if operand not in flipping}
    changes["layer_name_to_config"] = {
        pattern: {key: value for key, value in override.items() if key not in drop}
        if isinstance(override, Mapping)
        else override
        for pattern, override in base.layer_name_to_config.items()
    }
    if cell.sites in ("head", "embedding"):  # asked for by name
        changes |= {"sites": (cell.sites,), "include_patterns": (), "skip_patterns": ()}
    elif cell.layers != "all":
        changes |= {"include_patterns": (cell.layers,), "skip_patterns": (*base.skip_patterns, *skip)}
    return replace(base, **changes)
