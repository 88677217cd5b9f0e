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
from typing import NamedTuple

from flipproof.measure.arms import Arm
from flipproof.measure.points import Point, Setting

CLIFF_THRESHOLD = 0.10
"""Perplexity over the clean one's, as a share, that makes the cliff."""
_SITES = {"w": "weights", "x": "inputs", "kv": "keys and values", "head": "output head", "embedding": "embedding"}
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

    @property
    def positive(self) -> list[float]:
        """The p that a logarithmic axis can show."""
        return [p for p in self.arms if p > 0]

    @property
    def finite(self) -> list[float]:
        """The positive p with a perplexity that is a number."""
        return [p for p in self.positive if math.isfinite(self.arms[p].perplexity)]

    @property
    def broken(self) -> list[float]:
        return [p for p in self.positive if not math.isfinite(self.arms[p].perplexity)]


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
        curves.append(Curve(setting, arms, voltages.get(setting, {}), cliff))
    return curves


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


class Cost(NamedTuple):
    """What faults cost: mean loss less the clean loss, in nats per token, infinity where the model is broken."""

    mean: float
    interval: tuple[float, float] | None
    """95% over fault seeds. The clean loss has none of its own."""
    trials: int


def cost_of(arm: Arm, clean_loss: float) -> Cost:
    interval = arm.loss_interval and (arm.loss_interval[0] - clean_loss, arm.loss_interval[1] - clean_loss)
    return Cost(arm.loss - clean_loss, interval, arm.trials)


@dataclass(frozen=True)
class CostMap:
    """Costs by layer and bits, at one p, all else equal. Cells that were not measured are missing."""

    p: float
    sites: str
    protection: str
    layers: tuple[str, ...]
    bits: tuple[str, ...]
    costs: Mapping[tuple[str, str], Cost]
    """(layers, bits) -> cost."""

    @property
    def label(self) -> str:
        return f"p = {p_text(self.p)}, {sites_in_words(self.sites)}, {protection_in_words(self.protection)}"


def cost_maps(curves: Sequence[Curve], clean_loss: float) -> list[CostMap]:
    """One map for each (sites, protection, p) that was measured at several layers or bits; the most telling one first:
    most cells with a finite loss, then the largest p. Layers and bits keep the curves' order. None where the clean
    model is broken itself, over which nothing has a cost."""
    if not math.isfinite(clean_loss):
        return []
    groups: dict[tuple[str, str, float], dict[tuple[str, str], Cost]] = {}
    for curve in curves:
        sites, layers, bits, protection = curve.setting
        for p, arm in curve.arms.items():
            groups.setdefault((sites, protection, p), {})[layers, bits] = cost_of(arm, clean_loss)
    all_layers = list(dict.fromkeys(curve.setting.layers for curve in curves))
    all_bits = list(dict.fromkeys(curve.setting.bits for curve in curves))
    maps = []
    for (sites, protection, p), costs in groups.items():
        layers_here, bits_here = {layers for layers, _ in costs}, {bits for _, bits in costs}
        rows = tuple(layers for layers in all_layers if layers in layers_here)
        columns = tuple(bits for bits in all_bits if bits in bits_here)
        if len(costs) > 1:
            maps.append(CostMap(p, sites, protection, rows, columns, costs))
    return sorted(maps, key=lambda m: (-sum(math.isfinite(cost.mean) for cost in m.costs.values()), -m.p))


@dataclass(frozen=True)
class Ranking:
    """Layers by what faults in each of them alone cost, the worst first; all else equal."""

    label: str
    p: float
    sites: str
    bits: str
    protection: str
    rows: tuple[tuple[str, Cost], ...]


def rankings(maps: Sequence[CostMap]) -> list[Ranking]:
    """One ranking for each map and bits in which several single layers were measured, in the maps' order, and in each
    the bits that cost most first."""
    found = []
    for of in maps:
        worst = {bits: max(cost.mean for (_, b), cost in of.costs.items() if b == bits) for bits in of.bits}
        for bits in sorted(of.bits, key=lambda bits: -worst[bits]):
            layers = [layers for layers in of.layers if layers != "all" and (layers, bits) in of.costs]
            if len(layers) > 1:
                rows = sorted(((name, of.costs[name, bits]) for name in layers), key=lambda row: -row[1].mean)
                found.append(
                    Ranking(f"{of.label}, {bits_in_words(bits)}", of.p, of.sites, bits, of.protection, tuple(rows))
                )
    return found
