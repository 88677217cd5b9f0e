"""Which points a sweep measures, and in which order: pure functions of a table and of what is known so far.

The ``[sweep]`` table spans a grid, flip probability × sites × layers × bits × protection; a **cell** of it is one set
of faults, a **trial** one cell under one fault seed, which is a point when it is measured, and a **curve** the cells of
one setting, which differ in the probability alone.

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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from flipproof.measure.points import Setting

_BROKEN = 16.0
"""Nats: guessing evenly among the tokens of the largest vocabularies costs 12.5."""


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
    def setting(self) -> Setting:
        """What the cells of a curve have in common."""
        return Setting(self.sites, self.layers, self.bits, self.protection)

    def point_id(self, seed: int) -> str:
        return f"{self.id}/{seed}"


class Trial(NamedTuple):
    """A cell under a fault seed: what becomes one point."""

    cell: Cell
    seed: int

    @property
    def id(self) -> str:
        return self.cell.point_id(self.seed)


@dataclass(frozen=True)
class Plan:
    """All trials of a sweep."""

    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]

    @cached_property
    def curves(self) -> list[list[Cell]]:
        """Cells by curve, by rising probability within each."""
        curves: dict[Setting, list[Cell]] = {}
        for cell in self.cells:
            curves.setdefault(cell.setting, []).append(cell)
        return [sorted(curve, key=lambda cell: cell.rate) for curve in curves.values()]

    @cached_property
    def trials(self) -> dict[str, Trial]:
        """By the id of the point that each becomes."""
        return {(trial := Trial(cell, seed)).id: trial for cell in self.cells for seed in self.seeds}


def next_trial(plan: Plan, losses: Mapping[str, float], busy: Collection[str] = ()) -> Trial | None:
    """The trial to measure next, or None where all are measured or busy.

    Args:
        losses: id of a measured point -> its loss in nats; infinite for a broken model.
        busy: ids of those that others are measuring.
    """
    return _of_first_seed(plan, losses, busy) or _of_further_seeds(plan, losses, busy)


def _level(loss: float) -> float:
    return min(loss, _BROKEN) if not math.isnan(loss) else _BROKEN


def _of_first_seed(plan: Plan, losses: Mapping[str, float], busy: Collection[str]) -> Trial | None:
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
    return Trial(curve[_most_telling(len(curve), known, taken)], seed)


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


def _of_further_seeds(plan: Plan, losses: Mapping[str, float], busy: Collection[str]) -> Trial | None:
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
                best, largest = Trial(cell, free[0]), error
    return best


def _scatter(trials: list[list[float]], i: int) -> float:
    """The standard deviation between seeds of the i-th cell of a curve; of a single trial a guess."""
    if len(trials[i]) > 1:
        return float(np.std(trials[i], ddof=1))
    means = [float(np.mean(values)) if values else None for values in trials]
    near = [mean for mean in (*means[max(0, i - 1) : i], *means[i + 1 : i + 2]) if mean is not None]
    here = means[i]
    return max((abs(mean - here) for mean in near), default=0.0) if here is not None else 0.0
