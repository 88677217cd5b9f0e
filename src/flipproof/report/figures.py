"""The report's pictures of what was measured.

Colours are those of all pictures; the heat map's is cividis. Each curve has a marker of its own as well, for print
without colour. Axes end where numbers stop to mean anything: perplexity is never below 1, and a loss above
``CEILING``, which is worse than guessing, is an open marker on the edge.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from flipproof.measure.arms import Cost
from flipproof.pictures import INK, PALETTE, PAPER, WIDTH, styled
from flipproof.report.analyse import CEILING, CostMap, Curve, is_power_of_two, p_text
from flipproof.report.read import Logged, Validated

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SHOWN_CURVES, SHOWN_BARS = 7, 40
"""More curves or bars than this cannot be told apart."""
_ROW = 0.055
"""From a row of markers above the axes to the next, over the axes' height."""
_VALIDATED = {"flipped": "--", "guard": "-.", "clean": ":"}
"""How lines of validations are drawn."""
COST_FLOOR = 1e-3
"""Nats; the heat map's darkest colour. Smaller costs drown in the noise of the seeds."""


class Panel(NamedTuple):
    """One of several axes that share their perplexities."""

    title: str
    exposure: str
    """What its axis is of, in words."""
    curves: Mapping[str, tuple[Curve, float, float]]
    """Name -> (curve, how much exposure p is, clean perplexity)."""


# -- axes --------------------------------------------------------------------------------------------------------------


def _label_p_axis(axis: Any, ps: Sequence[float]) -> None:
    """A logarithmic axis of probabilities, labelled with powers of two where p are such, else of ten."""
    axis.set_xscale("log")
    axis.set_xlabel("flip probability p of each bit")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda p, _: p_text(p)))
    axis.xaxis.set_minor_locator(NullLocator())
    distinct = sorted(set(ps))
    if distinct and (all(map(is_power_of_two, distinct)) or distinct[-1] < 10 * distinct[0]):
        axis.xaxis.set_major_locator(FixedLocator(distinct[:: math.ceil(len(distinct) / 8)]))


def _label_voltages(axis: Any, voltages: Mapping[float, float]) -> None:
    """The supply voltages that probabilities stand for, along the upper edge."""
    shown = sorted(voltages)[:: math.ceil(len(voltages) / 8)]
    upper = axis.secondary_xaxis("top")
    upper.xaxis.set_minor_locator(NullLocator())
    upper.set_xticks(shown, [f"{voltages[p]:g}" for p in shown])
    upper.set_xlabel("supply voltage (V)")


def _limit_perplexities(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic axis around perplexities, with plain numbers on it, and enough of them."""
    axis.set_yscale("log")
    axis.set_ylabel("perplexity")
    possible = [min(max(value, 1.0), math.exp(CEILING)) for value in values if not math.isnan(value)] or [1.0, 10.0]
    room = max((max(possible) / min(possible)) ** 0.06, 1.005)
    low, high = max(1.0, min(possible) / room), max(possible) * room
    axis.set_ylim(low, high)
    _label_log_values(axis.yaxis, low, high)


def _label_log_values(axis: Any, low: float, high: float) -> None:
    decades = math.log10(high / low)
    if decades < 1:
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axis.set_minor_locator(NullLocator())
    elif decades < 2.5:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}" if 1e-3 <= y < 1e5 else p_text(y)))
    axis.set_minor_formatter(NullFormatter())


def _legend_columns(labels: Sequence[str]) -> int:
    """As many as fit over the axes."""
    return max(1, min(4, int(WIDTH / (0.6 + 0.065 * max(map(len, labels), default=0)))))


def _legend_height(labels: Sequence[str], title: str = "") -> float:
    """Inches that a legend of these takes."""
    return 0.18 * math.ceil(len(labels) / _legend_columns(labels)) + 0.2 * bool(title)


def _legend_above(figure: Figure, axis: Any, title: str = "") -> None:
    """The figure's title belongs to the legend: the layout would lay one of its own over it."""
    handles, labels = axis.get_legend_handles_labels()
    columns = _legend_columns(labels)
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, title=title or None, alignment="left")


def _at_edge(axis: Any, xs: Sequence[float], row: int = 0, **style: Any) -> None:
    """Open markers on the upper edge, or in a row above it, for what has no place on the axis."""
    axis.plot(xs, [1 + _ROW * row] * len(xs), ls="none", ms=6, mfc=PAPER, transform=axis.get_xaxis_transform(),
              clip_on=False, zorder=5, **style)  # fmt: skip


# -- figures -----------------------------------------------------------------------------------------------------------


def perplexity_curves(
    curves: Sequence[Curve], labels: Sequence[str], clean_perplexity: float, title: str = ""
) -> Figure:
    """Perplexity against p on logarithmic axes, with 95% intervals, cliffs and the clean perplexity. The first
    ``SHOWN_CURVES`` curves are drawn."""
    curves, labels = curves[:SHOWN_CURVES], labels[:SHOWN_CURVES]
    voltages = {p: volts for curve in curves for p, volts in curve.voltages.items() if p > 0}
    height = 3.0 + _legend_height([*labels, "clean"], title) + 0.4 * bool(voltages)
    with styled(height) as (figure, axis):
        values = []
        for curve, label, colour, marker in zip(curves, labels, PALETTE, MARKERS, strict=False):
            middle = [curve.arms[p].perplexity if p in curve.shown else math.nan for p in curve.positive]  # a gap
            bounds = [curve.arms[p].perplexity_interval or (value,) * 2
                      for p, value in zip(curve.positive, middle, strict=True)]  # fmt: skip
            known = np.minimum(np.array(bounds).reshape(-1, 2), math.exp(2 * CEILING))  # no figure goes there
            off = np.nan_to_num(np.abs(known.T - middle)) if middle else None
            axis.errorbar(curve.positive, middle, yerr=off, elinewidth=1, color=colour, marker=marker, label=label)
            _at_edge(axis, curve.broken, color=colour, marker=marker)
            values += [
                value for p in curve.shown for value in (curve.arms[p].perplexity, *known[curve.positive.index(p)])
            ]
            if curve.cliff.p is not None:
                axis.axvline(curve.cliff.p, color=colour, lw=0.9, ls=(0, (1, 2)))
            if curve.cliff_interval is not None:
                axis.axvspan(*curve.cliff_interval, color=colour, alpha=0.12, lw=0)
        if math.isfinite(clean_perplexity):  # else the clean model is broken itself
            axis.axhline(clean_perplexity, color=INK, ls="--", lw=1, label="clean")
            values.append(clean_perplexity)
        _limit_perplexities(axis, values)
        _label_p_axis(axis, [p for curve in curves for p in curve.positive])
        if voltages:
            _label_voltages(axis, voltages)
        _legend_above(figure, axis, title)
    return figure


def cost_curves(curves: Mapping[tuple[str, str], Mapping[float, Cost]]) -> Figure:
    """What flips cost against p on logarithmic axes, with 95% intervals: words of a curve -> p -> its cost. What is not
    above 0 has no place there; the first ``SHOWN_CURVES`` are drawn."""
    labels = [", ".join(words) for words in curves][:SHOWN_CURVES]
    with styled(3.0 + _legend_height(labels)) as (figure, axis):
        axis.set_yscale("log", nonpositive="clip")
        values = []
        for label, costs, colour, marker in zip(labels, curves.values(), PALETTE, MARKERS, strict=False):
            ps = sorted(p for p in costs if p > 0)
            middle = [cost if 0 < (cost := costs[p].cost) <= CEILING else math.nan for p in ps]  # a gap
            ends = np.array([costs[p].interval or (cost,) * 2 for p, cost in zip(ps, middle, strict=True)])
            off = np.nan_to_num(np.abs(ends.reshape(-1, 2).T - middle))
            axis.errorbar(ps, middle, yerr=off, elinewidth=1, color=colour, marker=marker, label=label)
            _at_edge(axis, [p for p in ps if not costs[p].cost <= CEILING], color=colour, marker=marker)
            values += [cost for cost in middle if not math.isnan(cost)]
        low, high = min(values, default=COST_FLOOR) / 2, max(values, default=1.0) * 2
        axis.set_ylim(low, high)
        _label_log_values(axis.yaxis, low, high)
        axis.set_ylabel("cost over clean (nats per token)")
        _label_p_axis(axis, [p for costs in curves.values() for p in costs if p > 0])
        _legend_above(figure, axis)
    return figure


def exposure_panels(panels: Sequence[Panel], names: Sequence[str], title: str = "") -> Figure:
    """Perplexity of several models against what their weights are exposed to, on logarithmic axes, with 95% intervals;
    thin: clean. What has no place on the axes is above them, a row for each curve.

    Args:
        names: of the curves in all panels, in the order of their colours; the first ``SHOWN_CURVES`` are drawn.
    """
    names = list(names)[:SHOWN_CURVES]
    rows = math.ceil(len(panels) / 2)
    height = 2.7 * rows + _legend_height(names, title)
    with styled(height, 1.5 * WIDTH, nrows=rows, ncols=2, squeeze=False, sharey=True) as (figure, axes):
        values = []
        for axis, panel in zip(axes.flat, panels, strict=False):
            exposures: list[float] = []
            broken = 0
            for name, colour, marker in zip(names, PALETTE, MARKERS, strict=False):
                if name not in panel.curves:
                    continue
                curve, factor, clean = panel.curves[name]
                xs = [factor * p for p in curve.positive]
                middle = [curve.arms[p].perplexity if p in curve.shown else math.nan for p in curve.positive]  # a gap
                ends = np.array([curve.arms[p].perplexity_interval or (value,) * 2
                                 for p, value in zip(curve.positive, middle, strict=True)]).reshape(-1, 2)  # fmt: skip
                off = np.nan_to_num(np.abs(np.minimum(ends, math.exp(2 * CEILING)).T - middle))
                axis.errorbar(xs, middle, yerr=off, elinewidth=1, color=colour, marker=marker, label=name)
                if curve.broken:  # an empty line is at the figure's corner, and the layout would make room for it
                    _at_edge(axis, [factor * p for p in curve.broken], broken, color=colour, marker=marker)
                    broken += 1
                if math.isfinite(clean):
                    axis.axhline(clean, color=colour, lw=0.6, ls="--")
                exposures += xs
                values += [value for value in (*middle, clean) if math.isfinite(value)]
            axis.set_title(panel.title, loc="left", pad=6 + 100 * _ROW * broken)  # above these rows
            _label_p_axis(axis, exposures)
            axis.set_xlabel(panel.exposure)
        _limit_perplexities(axes[0][0], values)
        for row in axes[1:]:
            row[0].set_ylabel("perplexity")
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        _legend_above(figure, axes[0][0], title)
    return figure


def cost_heat_map(of: CostMap) -> Figure:
    """Layers by bits, coloured by what flips there cost; ∞ where they break the model, blank where not measured."""
    costs = of.grid
    width = min(11.0, max(WIDTH, 1.6 + 0.4 * len(of.bits) + 0.075 * max(map(len, of.layers))))
    with styled(max(2.2, min(14.0, 1.1 + 0.26 * len(of.layers))), width, of.label) as (figure, axis):
        broken = costs > CEILING
        top = max(COST_FLOOR * 10, float(costs[~broken & np.isfinite(costs)].max(initial=0)))
        norm = LogNorm(COST_FLOOR, top)
        shown = np.clip(np.where(broken, top, costs), COST_FLOOR, None)
        colours = matplotlib.colormaps["cividis"].resampled(40)
        mesh = axis.pcolormesh(np.ma.masked_invalid(shown), cmap=colours, norm=norm, edgecolors=PAPER, lw=0.8)
        if costs.size <= 320:
            for row, column in np.argwhere(~np.isnan(costs)):
                light = norm(shown[row, column]) >= 0.55
                axis.text(column + 0.5, row + 0.5, cost_text(float(costs[row, column])), ha="center", va="center",
                          fontsize=6.5, color="#000000" if light else "#ffffff")  # fmt: skip
        axis.set_xticks(np.arange(len(of.bits)) + 0.5, of.bits)
        axis.set_yticks(np.arange(len(of.layers)) + 0.5, of.layers)
        axis.invert_yaxis()
        axis.grid(visible=False)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_xlabel("bits that flip")
        bar = figure.colorbar(mesh, ax=axis, pad=0.02, label="cost (nats per token)")
        bar.outline.set_visible(False)
        bar.ax.collections[0].set(edgecolor="face", linewidth=0.3)
        bar.minorticks_off()
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    return figure


def cost_text(cost: float) -> str:
    """Few digits, for a cell."""
    if math.isinf(cost):
        return "∞"
    text = "0" if abs(cost) < COST_FLOOR else f"{cost:.3f}" if abs(cost) < 0.1 else f"{cost:.2f}"
    return text.replace("-", "−") if abs(cost) < 1 else f"{cost:.1f}"


def cost_bars(costs: Mapping[str, Cost], clean_loss: float, title: str = "") -> Figure:
    """Costs over a clean loss, with 95% intervals: name -> cost; the first ``SHOWN_BARS``. What breaks the model is a
    hatched bar to the edge. No cost is below minus the clean loss, which would be a perplexity below 1."""
    rows = list(costs.items())[:SHOWN_BARS]
    ends = [end for _, cost in rows for end in (cost.cost, *(cost.interval or ())) if cost.cost <= CEILING]
    low, high = max(min(ends, default=0.0), -clean_loss), min(max(ends, default=1.0), CEILING)
    low, high = min(low, 0.0), max(high, 0.0)
    room = 0.05 * (high - low) or 0.001
    with styled(0.65 + 0.22 * len(rows), title=title) as (figure, axis):
        axis.set_xlim(low - room * (low < 0), high + room)
        for place, (_, cost) in enumerate(rows):
            broken = not cost.cost <= CEILING
            axis.barh(place, high + room if broken else cost.cost, height=0.65, color="none" if broken else PALETTE[0],
                      edgecolor=PALETTE[1] if broken else "none", hatch="////" if broken else None)  # fmt: skip
            if cost.interval and not broken:
                off = [[max(cost.cost - cost.interval[0], 0)], [max(cost.interval[1] - cost.cost, 0)]]
                axis.errorbar(cost.cost, place, xerr=off, color=INK, elinewidth=1, ls="none")
        axis.axvline(0, color=INK, lw=0.7)
        axis.set_yticks(range(len(rows)), [name for name, _ in rows])
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.grid(visible=False, axis="y")
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.set_xlabel("cost over clean (nats per token)")
    return figure


def magnitude_panels(histograms: Mapping[str, Sequence[tuple[int, int]]],
                     thresholds: Mapping[str, Mapping[str, float]]) -> Figure:  # fmt: skip
    """How large values are, by power of two: operand -> [(binary exponent, count)], and operand -> name of a threshold
    -> its value."""
    with styled(2.7, ncols=len(histograms), squeeze=False, sharey=True) as (figure, axes):
        for i, (axis, (operand, histogram)) in enumerate(zip(axes[0], histograms.items(), strict=True)):
            total = sum(count for _, count in histogram)
            exponents = [exponent for exponent, count in histogram if count]
            shares = [count / total for _, count in histogram if count]
            # A bar of exponent e holds magnitudes from 2^e to 2^(e+1). Its foot is far below any share there can be.
            axis.bar(exponents, shares, width=1, align="edge", color=PALETTE[i], edgecolor=PAPER, lw=0.3)
            axis.set_yscale("log")
            for name, t in thresholds.get(operand, {}).items():
                style = "--" if name == "proposed" else "-"
                axis.axvline(math.log2(t), color=INK, lw=1.1, ls=style, label=f"{name} guard: {t:g}")
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda e, _: p_text(2.0 ** round(e))))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}" if y >= 0.01 else p_text(y)))
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.set_xlabel(f"magnitude of {operand}")
            axis.set_ylabel("share of values" if i == 0 else "")
            if thresholds.get(operand):
                axis.legend(loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.2)
    return figure


def training_curves(
    runs: Mapping[str, Sequence[Logged]], validation: Mapping[str, Sequence[Validated]] | None = None
) -> Figure:
    """Training loss by step, and what validation found beside it: dashed with flips, dash-dotted behind the guard
    alone, dotted without; the first ``SHOWN_CURVES`` runs."""
    names, validation = list(runs)[:SHOWN_CURVES], validation or {}
    found = {
        (name, kind): [(row.step, loss) for row in validation.get(name, ()) if (loss := getattr(row, kind)) is not None]
        for name in names
        for kind in _VALIDATED
    }
    found = {key: points for key, points in found.items() if points}
    labels = [*(name or "training" for name in names), *(f"{name} validated, {kind}" for name, kind in found)]
    with styled(2.7 + _legend_height(labels) * (len(labels) > 1)) as (figure, axis):
        for name, label, colour, marker in zip(names, labels, PALETTE, MARKERS, strict=False):
            steps = [row.step for row in runs[name]]
            losses = [row.loss if row.loss <= CEILING else math.nan for row in runs[name]]
            axis.plot(steps, losses, color=colour, label=label, marker="." if len(steps) < 40 else None)
            _at_edge(axis, [row.step for row in runs[name] if not row.loss <= CEILING], color=colour, marker=marker)
        for ((name, kind), points), label in zip(found.items(), labels[len(names) :], strict=True):
            colour, marker = PALETTE[names.index(name)], MARKERS[names.index(name)]
            shown = [loss if loss <= CEILING else math.nan for _, loss in points]
            style = {"color": colour, "ls": _VALIDATED[kind], "label": label}
            axis.plot([step for step, _ in points], shown, marker="." if len(points) < 40 else None, **style)
            _at_edge(axis, [step for step, loss in points if not loss <= CEILING], color=colour, marker=marker)
        low, high = axis.get_ylim()
        axis.set_ylim(max(low, 0.0), high)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.set_xlabel("step")
        axis.set_ylabel("loss (nats per token)" if found else "training loss (nats per token)")
        if len(labels) > 1:
            _legend_above(figure, axis)
    return figure
