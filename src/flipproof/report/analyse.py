"""What a sweep says: perplexity against p, where it falls off, and which layer and bit it hurts to lose.

A sweep is a grid of flip probabilities and **settings** (sites, layers, bits, protection), measured once per fault
seed. The points of one setting are a **curve**: at each p an arm with Student's t interval over the seeds.

The **cliff** of a curve is the smallest p at which the mean loss exceeds the clean loss by more than ln(1 + threshold)
nats, that is, at which perplexity exceeds the clean one by more than the threshold. Between the last measured point
below and the first above, cost is taken as linear in log p. Where one of the two is missing, or the model is broken
beyond numbers at the upper one, the cliff is a bound, not a number.

The **cost** of a point is its mean loss less the clean loss, in nats per token.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flipproof.measure.arms import Arm, Cost
from flipproof.measure.points import Point, Setting

CLIFF_THRESHOLD = 0.10
"""Perplexity over the clean one's, as a share, that makes the cliff."""
CEILING = 14.0
"""Nats: guessing evenly among the tokens of the largest vocabularies costs 12.5, so what is above is as good as broken,
and no axis goes there."""
_SITES = {"w": "weights", "x": "inputs", "kv": "keys and values", "head": "output head", "embedding": "embedding",
          "code": "codes", "scale": "scales"}  # fmt: skip
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Cliff:
    """A flip probability, or what is known of it: between ``above`` and ``up_to``, either of which may be missing."""

    p: float | None
    """Interpolated; None where there is only a bound."""
    above: float | None
    """Largest measured p before the cliff."""
    up_to: float | None
    """Smallest measured p past it; None where the curve never falls off."""

    def __str__(self) -> str:
        if self.p is not None:
            return f"{self.p:.2e}"
        if self.up_to is None:
            return f"above {self.above:.2e}" if self.above is not None else "not measured"
        return f"{self.above:.2e} to {self.up_to:.2e}" if self.above is not None else f"below {self.up_to:.2e}"


@dataclass(frozen=True)
class Curve:
    """The points of one setting."""

    setting: Setting
    arms: Mapping[float, Arm]
    """p -> the arm over its fault seeds, in ascending order of p."""
    voltages: Mapping[float, float]
    """p -> the voltage in volts it stands for, where there is one."""
    cliff: Cliff
    cliff_interval: tuple[float, float] | None
    """Where the ends of the 95% intervals of the loss cross the threshold; None where one of the two does not, or a
    point beside the cliff has no interval."""

    @property
    def positive(self) -> list[float]:
        """The p that a logarithmic axis can show."""
        return [p for p in self.arms if p > 0]

    @property
    def shown(self) -> list[float]:
        """The positive p whose loss has a place on an axis."""
        return [p for p in self.positive if self.arms[p].loss <= CEILING]

    @property
    def broken(self) -> list[float]:
        return [p for p in self.positive if not self.arms[p].loss <= CEILING]


def find_cliff(clean_loss: float, losses: Mapping[float, float], threshold: float = CLIFF_THRESHOLD) -> Cliff:
    """The cliff of mean losses (p -> nats per token) against the clean loss; p of 0 does not count. A clean model that
    is broken itself has none."""
    if not math.isfinite(clean_loss):
        return Cliff(None, None, None)
    limit = math.log1p(threshold)
    before: tuple[float, float] | None = None  # (p, cost)
    for p in sorted(p for p in losses if p > 0):
        cost = losses[p] - clean_loss
        if cost <= limit:
            before = p, cost
        elif before is None:
            return Cliff(None, None, p)
        elif math.isinf(cost):
            return Cliff(None, before[0], p)
        else:
            share = (limit - before[1]) / (cost - before[1])
            return Cliff(before[0] * (p / before[0]) ** share, before[0], p)
    return Cliff(None, before and before[0], None)


def curves_of(points: Iterable[Point], clean_loss: float, axes: Mapping[str, Sequence[object]]) -> list[Curve]:
    """One curve for each setting, in the order of the sweep's axes."""
    losses: dict[Setting, dict[float, list[float]]] = {}
    tokens: dict[Setting, int] = {}
    voltages: dict[Setting, dict[float, float]] = {}
    for point in points:
        losses.setdefault(point.setting, {}).setdefault(point.p, []).append(point.loss)
        tokens[point.setting] = point.tokens
        if point.voltage is not None:
            voltages.setdefault(point.setting, {})[point.p] = point.voltage
    curves = []
    for setting in in_order(losses, axes):
        arms = {p: Arm.from_losses(losses[setting][p], tokens[setting]) for p in sorted(losses[setting])}
        cliff = find_cliff(clean_loss, {p: arm.loss for p, arm in arms.items()})
        curves.append(Curve(setting, arms, voltages.get(setting, {}), cliff, _cliff_interval(clean_loss, arms)))
    return curves


def _cliff_interval(clean_loss: float, arms: Mapping[float, Arm]) -> tuple[float, float] | None:
    ends = []
    for end in (1, 0):  # the upper ends of the losses cross first
        known = {p: arm.loss_interval[end] for p, arm in arms.items() if arm.loss_interval}
        ends.append(find_cliff(clean_loss, {p: known.get(p, arm.loss) for p, arm in arms.items()}))
        if not {ends[-1].above, ends[-1].up_to} <= known.keys():
            return None
    low, high = ends
    return (low.p, high.p) if low.p is not None and high.p is not None else None


def in_order(settings: Iterable[Setting], axes: Mapping[str, Sequence[object]]) -> list[Setting]:
    """Settings in the order of the axes that span them; what is not on an axis comes last."""
    places = {name: {str(value): i for i, value in enumerate(axes.get(name, ()))} for name in Setting._fields}
    return sorted(
        settings,
        key=lambda setting: [
            (places[name].get(value, math.inf), value) for name, value in zip(Setting._fields, setting, strict=True)
        ],
    )


def labels_of(settings: Sequence[Setting]) -> dict[Setting, str]:
    """A name for each setting that says only in what they differ; in words where all are alike."""
    differ = [i for i in range(len(Setting._fields)) if len({setting[i] for setting in settings}) > 1]
    return {setting: ", ".join(_in_words(setting, i) for i in differ or [0]) for setting in settings}


def _in_words(setting: Setting, i: int) -> str:
    name, value = Setting._fields[i], setting[i]
    words = {"sites": sites_in_words, "bits": bits_in_words, "protection": protection_in_words}
    return words[name](value) if name in words else "all layers" if value == "all" else value


def bits_in_words(bits: str) -> str:
    names = {"all": "all bits", "sign": "sign", "exp": "exponent bits", "frac": "mantissa bits"}
    return names.get(bits, f"bits {bits}" if "-" in bits else f"bit {bits}")


def apart(one: tuple[float, float] | None, other: tuple[float, float] | None) -> bool:
    """Whether two intervals tell two numbers apart: both are there, and they do not overlap."""
    return one is not None and other is not None and (one[1] < other[0] or other[1] < one[0])


def protection_in_words(protection: str) -> str:
    return "no protection" if protection == "none" else protection


def sites_in_words(sites: str) -> str:
    """``wx`` -> ``weights + inputs``."""
    left, words = sites, []
    while left:
        site = next((site for site in sorted(_SITES, key=len, reverse=True) if left.startswith(site)), None)
        if site is None:
            return sites
        words.append(_SITES[site])
        left = left[len(site) :].lstrip("+,")
    return " + ".join(words)


def is_power_of_two(p: float) -> bool:
    return p > 0 and math.frexp(p)[0] == 0.5


def p_text(p: float) -> str:
    """A probability as people write it: a power of two where it is one, else of ten."""
    if is_power_of_two(p):
        return "2" + str(math.frexp(p)[1] - 1).translate(_SUPERSCRIPTS)
    if p == 0:
        return "0"
    digits, exponent = f"{p:.2e}".split("e")
    digits = digits.rstrip("0").rstrip(".")
    return ("" if digits == "1" else f"{digits}·") + "10" + str(int(exponent)).translate(_SUPERSCRIPTS)


def cost_of(arm: Arm, clean_loss: float) -> Cost:
    """What faults cost at a point of a sweep, with its 95% interval over fault seeds alone: the clean loss is one
    number there."""
    cost = arm.loss - clean_loss
    interval = arm.loss_interval and (arm.loss_interval[0] - clean_loss, arm.loss_interval[1] - clean_loss)
    return Cost(cost if math.isfinite(cost) else math.inf, interval)


@dataclass(frozen=True)
class CostMap:
    """Costs by layer and bits, at one p, all else equal. Cells that were not measured are missing."""

    p: float
    sites: str
    protection: str
    layers: tuple[str, ...]
    bits: tuple[str, ...]
    arms: Mapping[tuple[str, str], Arm]
    """(layers, bits) -> the arm over its fault seeds."""
    clean_loss: float

    @property
    def label(self) -> str:
        return f"p = {p_text(self.p)}, {sites_in_words(self.sites)}, {protection_in_words(self.protection)}"

    @property
    def costs(self) -> dict[tuple[str, str], Cost]:
        """(layers, bits) -> its cost, the largest first."""
        costs = {cell: cost_of(arm, self.clean_loss) for cell, arm in self.arms.items()}
        return dict(sorted(costs.items(), key=lambda item: -item[1].cost))

    @property
    def grid(self) -> np.ndarray:
        """Costs in nats, (layers, bits), float64; NaN where not measured, infinity where broken."""
        grid = np.full((len(self.layers), len(self.bits)), np.nan)
        for (layers, bits), cost in self.costs.items():
            grid[self.layers.index(layers), self.bits.index(bits)] = cost.cost
        return grid


def cost_maps(curves: Sequence[Curve], clean_loss: float) -> list[CostMap]:
    """One map for each (sites, protection, p) that was measured at several layers or bits; the most telling one first:
    most cells with a finite loss, then the largest p. Layers and bits keep the curves' order. None where the clean
    model is broken itself, over which nothing has a cost."""
    if not math.isfinite(clean_loss):
        return []
    groups: dict[tuple[str, str, float], dict[tuple[str, str], Arm]] = {}
    for curve in curves:
        sites, layers, bits, protection = curve.setting
        for p, arm in curve.arms.items():
            groups.setdefault((sites, protection, p), {})[layers, bits] = arm
    maps = []
    for (sites, protection, p), arms in groups.items():
        rows, columns = (tuple(dict.fromkeys(cell[side] for cell in arms)) for side in (0, 1))
        if len(arms) > 1:
            maps.append(CostMap(p, sites, protection, rows, columns, arms, clean_loss))
    return sorted(maps, key=lambda m: (-np.isfinite(m.grid).sum(), -m.p))
