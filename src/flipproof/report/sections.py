"""The sections of a report: what there is to show, as tables, pictures, charts and captions.

A section is made of tables, a picture for print (``figures.py``), the same as a chart for the screen (``charts.py``),
and a caption that says what is measured. What was not measured has no section.
"""

import csv
import io
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from flipproof.measure.arms import ARM_ROWS, Arm
from flipproof.report import charts, draw
from flipproof.report.analyse import (
    CLIFF_THRESHOLD,
    Cost,
    Curve,
    Setting,
    bits_in_words,
    cost_maps,
    curves_of,
    labels_of,
    protection_in_words,
    rankings,
    sites_in_words,
)
from flipproof.report.read import Sources, Sweep

_MOST_CURVES = 14
"""On one chart; twice the palette."""
_LONGEST_SLUG = 50
_MOST_PICTURES = 6
"""Of one section that has many views."""


@dataclass(frozen=True)
class Table:
    """Rows of text, numbers and None. ``file`` is its CSV, which has all columns; the page leaves out ``only_csv``."""

    file: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""
    shown: bool = True
    only_csv: frozenset[str] = frozenset()

    @property
    def _places(self) -> list[tuple[int, bool]]:
        """(place of a column on the page, whether it holds numbers)."""
        return [
            (i, any(isinstance(row[i], int | float) for row in self.rows))
            for i, name in enumerate(self.columns)
            if name not in self.only_csv
        ]

    @property
    def head(self) -> list[tuple[str, bool]]:
        return [(self.columns[i], numeric) for i, numeric in self._places]

    @property
    def body(self) -> list[list[tuple[str, bool]]]:
        return [[(_shown(row[i]), numeric) for i, numeric in self._places] for row in self.rows]

    def to_csv(self) -> bytes:
        buffer = io.StringIO(newline="")
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerows([_no_formula(cell) for cell in row] for row in (self.columns, *self.rows))
        return buffer.getvalue().encode()


def _no_formula(cell: Any) -> Any:
    """A name that a spreadsheet would run, with an apostrophe before it, which spreadsheets take for "this is text"."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        if math.isfinite(value) and 0 < abs(value) < 1e-3:
            digits, exponent = f"{value:.3e}".split("e")
            return f"{digits.rstrip('0').rstrip('.')}e{exponent}"
        return "∞" if math.isinf(value) else f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


@dataclass
class Section:
    """A part of the page; its id is also the name of its files."""

    id: str
    title: str
    caption: str
    tables: list[Table] = field(default_factory=list)
    chart: charts.Chart | None = None
    drawings: list[Callable[[], Figure]] = field(default_factory=list)
    """The picture of each view of the chart, or of the first few."""
    texts: Mapping[str, str] = field(default_factory=dict)
    pictures: list[str] = field(default_factory=list)
    """Where the drawings lie, as URLs relative to the page; filled in when they are made."""


def sections_of(sources: Sources) -> list[Section]:
    """What there is to show, in the page's order."""
    sections = []
    if sources.arms:
        sections.append(_arms(sources.arms))
    if sources.tasks:
        sections.append(_tasks(sources.tasks))
    for make in (_perplexity, _heat_map, _ranking, _protection, _voltage):
        for name, sweep in sources.sweeps.items():
            curves = curves_of(sweep.points, sweep.clean_loss, sweep.axes)
            if section := make(sweep, curves):
                sections.append(_named(section, name, len(sources.sweeps), sections))
    for name, profile in sources.profiles.items():
        sections.append(_named(_magnitudes(profile), name, len(sources.profiles), sections))
    if sources.training:
        sections.append(_training(sources.training))
    for name, texts in sources.texts.items():
        sections.append(_named(_texts(texts), name, len(sources.texts), sections))
    return sections


def _named(section: Section, name: str, of: int, before: Sequence[Section]) -> Section:
    """Sections of one kind are told apart by the directory they are from, which their ids are made of."""
    if of > 1:
        # a file's name has so many bytes; and "a b" is another directory than "a-b"
        slug = "".join(letter if letter.isalnum() else "-" for letter in name.lower())[-_LONGEST_SLUG:]
        slug = free_name(f"{section.id}-{slug}", {one.id for one in before}).removeprefix(f"{section.id}-")
        section.tables = [
            replace(one, file=one.file.replace(section.id, f"{section.id}-{slug}", 1)) for one in section.tables
        ]
        section.id, section.title = f"{section.id}-{slug}", f"{section.title} ({name})"
    return section


def free_name(name: str, taken: Collection[str]) -> str:
    """``name``, with a number before its ending where it is taken, in whichever case."""
    stem, dot, ending = name.partition(".")
    folded = {other.casefold() for other in taken}
    numbered = (name, *(f"{stem}_{n}{dot}{ending}" for n in range(2, len(folded) + 3)))
    return next(one for one in numbered if one.casefold() not in folded)


def _arms(found: Mapping[str, Mapping[str, Arm]]) -> Section:
    rows = []
    for run, arms in found.items():
        for name, arm in arms.items():
            flipped, tuned = ARM_ROWS.get(name, (None, None))
            rows.append([run, name, flipped, tuned, *_perplexity_cells(arm), arm.loss, arm.trials, arm.tokens])
    columns = ["run", "arm", "Bitflipped", "Fine-tuned", *_PERPLEXITY, "loss", "trials", "tokens"]
    hidden = frozenset() if len(found) > 1 else frozenset({"run"})
    return Section(
        "arms",
        "Arms side by side",
        "Perplexity on the same held-out text without faults (clean), with the range guard alone (guard), with bit "
        "flips (flipped), and after training with flips on (recovered) and off (recovered_clean). Intervals are over "
        "fault seeds.",
        [Table("arms.csv", columns, rows, only_csv=hidden)],
    )


def _tasks(found: Mapping[str, Mapping[str, Any]]) -> Section:
    rows = [
        [run, task, metric.split(",")[0], arm, values["mean"], *(values["interval"] or (None, None)), values["stderr"],
         len(values["trials"]), result["questions"]]
        for run, tasks in found.items()
        for task, result in tasks.items()
        for arm, metrics in result["arms"].items()
        for metric, values in metrics.items()
    ]  # fmt: skip
    columns = ["run", "task", "metric", "arm", "mean", "95% low", "95% high", "standard error", "seeds", "questions"]
    hidden = frozenset() if len(found) > 1 else frozenset({"run"})
    return Section(
        "tasks",
        "Tasks",
        "Tasks of lm-eval in each arm: mean over fault seeds with its 95% interval, and beside it lm-eval's standard "
        "error, which is about the choice of questions.",
        [Table("tasks.csv", columns, rows, only_csv=hidden)],
    )


_PERPLEXITY = ("PPL", "95% low", "95% high")


def _perplexity_cells(arm: Arm) -> list[float | None]:
    return [arm.perplexity, *(arm.perplexity_interval or (None, None))]


def _cost_cells(cost: Cost) -> list[float | int | None]:
    return [cost.mean, *(cost.interval or (None, None)), cost.trials]


_SETTING = Setting._fields


def _perplexity(sweep: Sweep, curves: Sequence[Curve]) -> Section | None:
    measured = [curve for curve in curves if len(curve.positive) > 1]
    if not measured:
        return None
    views, more = _views(measured)
    about = ", ".join(_constant(measured))
    points = [
        [
            *curve.setting,
            p,
            curve.voltages.get(p),
            *_perplexity_cells(arm),
            arm.loss,
            *(arm.loss_interval or (None, None)),
            arm.loss - sweep.clean_loss if math.isfinite(sweep.clean_loss) else None,
            arm.trials,
            arm.tokens,
        ]
        for curve in curves
        for p, arm in curve.arms.items()
    ]
    columns = [*_SETTING, "p", "voltage", *_PERPLEXITY, "loss", "loss low", "loss high", "cost", "seeds", "tokens"]
    cliffs = [
        [*curve.setting, str(curve.cliff), curve.cliff.p, curve.cliff.above, curve.cliff.up_to] for curve in measured
    ]
    return Section(
        "perplexity",
        "Perplexity against the flip probability",
        f"Perplexity with bits flipping with probability p{f' ({about})' if about else ''}: mean over fault seeds, "
        "95% intervals; dashed: clean; open markers at the top edge: infinite loss. Dotted: the cliff, the smallest p "
        f"at which perplexity exceeds the clean one by more than {CLIFF_THRESHOLD:.0%}, interpolated in log p between "
        f"measured points.{more}",
        [
            Table(
                "perplexity-cliffs.csv",
                [*_SETTING, "cliff", "cliff p", "measured below", "measured past"],
                cliffs,
                title=f"Cliffs (+{CLIFF_THRESHOLD:.0%} perplexity over {sweep.clean_perplexity:.5g})",
                only_csv=frozenset({"cliff p"}),
            ),
            Table("perplexity.csv", columns, points, shown=False),
        ],
        charts.perplexity_curves(views, sweep.clean_perplexity),
        [
            partial(draw.perplexity_curves, group, names, sweep.clean_perplexity)
            for group, names in list(views.values())[:_MOST_PICTURES]
        ],
    )


def _views(curves: Sequence[Curve]) -> tuple[dict[str, tuple[list[Curve], list[str]]], str]:
    """(name -> curves and their labels, what the caption says of curves that are left out). One view for all, or for
    each protection where they are too many to be told apart; in a view the curves that fall off first."""
    chosen = _widest(curves)
    groups: dict[str, list[Curve]] = {}
    for curve in chosen:
        split = len(chosen) > draw.SHOWN_CURVES
        groups.setdefault(protection_in_words(curve.setting.protection) if split else "", []).append(curve)
    views, shown = {}, 0
    for name, group in groups.items():
        if len(group) > draw.SHOWN_CURVES:
            group.sort(key=lambda curve: curve.cliff.p or curve.cliff.up_to or math.inf)
        labels = labels_of([curve.setting for curve in group])
        drawn = group[:_MOST_CURVES]
        views[name] = (drawn, [labels[curve.setting] for curve in drawn])
        shown += len(drawn)
    more = f" {shown} of {len(curves)} curves are drawn; the tables have all." if shown < len(curves) else ""
    if any(len(drawn) > draw.SHOWN_CURVES for drawn, _ in views.values()):
        more += f" A picture has {draw.SHOWN_CURVES}, and so has the chart until its legend is clicked."
    return views, more


def _widest(curves: Sequence[Curve]) -> list[Curve]:
    """What flips everywhere is the story; single layers and bits are details, which the heat map shows."""
    everywhere = [curve for curve in curves if curve.setting.layers == "all" and curve.setting.bits == "all"]
    return (
        everywhere or [curve for curve in curves if "all" in (curve.setting.layers, curve.setting.bits)] or list(curves)
    )


def _constant(curves: Sequence[Curve]) -> list[str]:
    """In words, what all curves have in common and their labels therefore do not say."""
    words: dict[str, Callable[[str], str]] = {
        "sites": sites_in_words,
        "layers": lambda layers: "all layers but the output head" if layers == "all" else layers,
        "bits": bits_in_words,
        "protection": protection_in_words,
    }
    values = {name: {getattr(curve.setting, name) for curve in curves} for name in _SETTING}
    return [words[name](min(found)) for name, found in values.items() if len(found) == 1 and min(found) != "head"]


def _heat_map(sweep: Sweep, curves: Sequence[Curve]) -> Section | None:
    maps = cost_maps(curves, sweep.clean_loss)
    if not maps:
        return None
    rows = [
        [of.p, of.sites, of.protection, layers, bits, *_cost_cells(of.costs[layers, bits])]
        for of in maps
        for layers in of.layers
        for bits in of.bits
        if (layers, bits) in of.costs
    ]
    columns = ["p", "sites", "protection", "layers", "bits", "cost", "95% low", "95% high", "seeds"]
    return Section(
        "heat-map",
        "Sensitivity by layer and bit",
        "Mean loss less the clean loss, in nats per token, where flips hit only these layers and bits, at the same p. "
        f"The colour is logarithmic from {draw.COST_FLOOR:g} nats; ∞ is a model without finite loss, blank was not "
        "measured. Bit 0 is the lowest of the mantissa.",
        [Table("heat-map.csv", columns, rows, shown=False)],
        charts.cost_heat_maps(maps),
        [partial(draw.cost_heat_map, of) for of in maps[:_MOST_PICTURES]],
    )


def _ranking(sweep: Sweep, curves: Sequence[Curve]) -> Section | None:
    found = rankings(cost_maps(curves, sweep.clean_loss))
    if not found:
        return None
    rows = [
        [one.p, one.sites, one.bits, one.protection, rank, layers, *_cost_cells(cost)]
        for one in found
        for rank, (layers, cost) in enumerate(one.rows, 1)
    ]
    columns = ["p", "sites", "bits", "protection", "rank", "layers", "cost", "95% low", "95% high", "seeds"]
    most = max(len(one.rows) for one in found)
    more = f" The {draw.SHOWN_LAYERS} worst of {most} are drawn." if most > draw.SHOWN_LAYERS else ""
    return Section(
        "ranking",
        "Layers by sensitivity",
        "Mean loss less the clean loss, in nats per token, where flips hit one layer, or group of layers, alone; 95% "
        f"intervals over fault seeds; hatched: infinite.{more}",
        [Table("ranking.csv", columns, rows, title="All rankings, the most telling first")],
        charts.ranking_bars(found),
        [partial(draw.ranking_bars, one) for one in found[:_MOST_PICTURES]],
    )


def _protection(sweep: Sweep, curves: Sequence[Curve]) -> Section | None:
    groups: dict[Setting, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(curve.setting._replace(protection=""), []).append(curve)
    groups = {setting: group for setting, group in groups.items() if len(group) > 1}
    if not groups:
        return None
    rows = []
    for group in groups.values():
        bare = next((curve.cliff.p for curve in group if curve.setting.protection == "none"), None)
        for curve in group:
            cliff, overhead = curve.cliff, sweep.overhead.get(curve.setting.protection)
            gain = cliff.p / bare if cliff.p and bare else None
            rows.append([*curve.setting, None if overhead is None else 100 * overhead, str(cliff), cliff.p, gain])
    labels = labels_of(list(groups))
    views = {
        labels[setting]: (group, [protection_in_words(curve.setting.protection) for curve in group])
        for setting, group in groups.items()
    }
    return Section(
        "protection",
        "What protects, and what it costs",
        "Perplexity against p under each protection, all else equal; 95% intervals over fault seeds. Extra storage is "
        "in per cent of the bits stored. p is the rate at which the memory itself flips bits, before any correction.",
        [
            Table(
                "protection.csv",
                [*_SETTING, "extra storage (%)", "cliff", "cliff p", "cliff over none"],
                rows,
                only_csv=frozenset({"cliff p"}),
            )
        ],
        charts.perplexity_curves(views, sweep.clean_perplexity),
        [
            partial(draw.perplexity_curves, group, names, sweep.clean_perplexity)
            for group, names in list(views.values())[:_MOST_PICTURES]
        ],
    )


def _voltage(sweep: Sweep, curves: Sequence[Curve]) -> Section | None:
    measured = [curve for curve in curves if curve.voltages]
    if not (sweep.voltages and measured):
        return None
    drawn = _widest(measured)
    names = labels_of([curve.setting for curve in drawn])
    labels = [names[curve.setting] for curve in drawn]
    rows = [
        [volts, ber, *curve.setting, *_perplexity_cells(curve.arms[ber]), curve.arms[ber].trials]
        for volts, ber in sorted(sweep.voltages, reverse=True)
        for curve in measured
        if ber in curve.arms
    ]
    return Section(
        "voltage",
        "From voltage to perplexity",
        "Bit-error rate of the memory at each supply voltage, as given to the sweep, and the perplexity of the model "
        "there; 95% intervals over fault seeds, dashed: clean.",
        [Table("voltage.csv", ["voltage (V)", "bit-error rate", *_SETTING, *_PERPLEXITY, "seeds"], rows)],
        charts.voltage_panels(sweep.voltages, drawn[:_MOST_CURVES], labels[:_MOST_CURVES], sweep.clean_perplexity),
        [partial(draw.voltage_panels, sweep.voltages, drawn, labels, sweep.clean_perplexity)],
    )


def _magnitudes(profile: Mapping[str, Any]) -> Section:
    layers: dict[str, Mapping[str, Any]] = {"all layers": profile["all"], **profile["layers"]}
    operands = ("weights", "inputs")
    quantiles = list(profile["all"]["weights"]["quantiles"])
    rows, histogram_rows = [], []
    for layer, both in layers.items():
        for operand in operands:
            one = both[operand]
            rows.append([layer, operand, *(one["quantiles"].get(name) for name in quantiles), one["maximum"],
                         one["zero_out_t"], one["clipped"], one["proposed_t"], one["count"]])  # fmt: skip
            histogram_rows += [[layer, operand, exponent, count] for exponent, count in one["histogram"]]
    histograms = {
        layer: {operand: both[operand]["histogram"] for operand in operands} for layer, both in layers.items()
    }
    thresholds = {
        layer: {
            operand: {
                name: one[key]
                for name, key in (("configured", "zero_out_t"), ("proposed", "proposed_t"))
                if (one := both[operand])[key]
            }
            for operand in operands
        }
        for layer, both in layers.items()
    }
    return Section(
        "magnitudes",
        "Magnitudes of weights and inputs",
        "How large the values of the clean model are, by power of two: weights and inputs of linear layers, zeros left "
        "out. Lines: the guard threshold that is configured, and the one proposed, which stands clear of the maximum.",
        [
            Table(
                "magnitudes.csv",
                ["layer", "operand", *quantiles, "maximum", "configured t", "clipped", "proposed t", "values"],
                rows,
            ),
            Table(
                "magnitudes-histogram.csv",
                ["layer", "operand", "binary exponent", "values"],
                histogram_rows,
                shown=False,
            ),
        ],
        charts.magnitude_panels(histograms, thresholds),
        [partial(draw.magnitude_panels, histograms["all layers"], thresholds["all layers"], "all layers")],
    )


def _training(runs: Mapping[str, Sequence[tuple[int, float]]]) -> Section:
    rows = [[run, step, loss] for run, steps in runs.items() for step, loss in steps]
    return Section(
        "training",
        "Training",
        "Training loss by optimizer step, as logged; with flips on where the run has them.",
        [Table("training.csv", ["run", "step", "loss"], rows, shown=False)],
        charts.training_curves(runs),
        [partial(draw.training_curves, runs)],
    )


def _texts(texts: Mapping[str, str]) -> Section:
    return Section(
        "texts",
        "Samples of text",
        "The same prompts continued with the same random numbers: without faults, with bit flips, and with flips after "
        "training, as far as each is there.",
        [Table("texts.csv", ["arm", "text"], list(texts.items()), shown=False)],
        texts=texts,
    )
