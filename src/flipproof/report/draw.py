"""The report's pictures for print: matplotlib figures, one column or two columns of a paper wide.

Colours are Okabe and Ito's (2008), which colour-blind readers tell apart; the heat map's is cividis. Each curve has a
marker of its own as well, for print without colour. Figures are made without pyplot, so no window, backend or global
state is involved; ``png`` renders one.
"""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from flipproof.report.analyse import CostMap, Curve, Ranking, is_power_of_two, p_text

DPI = 200
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6E6E6E")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SHOWN_CURVES, SHOWN_LAYERS = 7, 40
"""More curves or bars than this cannot be told apart in print."""
COST_FLOOR = 1e-3
"""Nats; the heat map's darkest colour. Smaller costs drown in the noise of the seeds."""
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "errorbar.capsize": 2.5,
}


def png(figure: Figure) -> bytes:
    """The figure at 200 dots per inch, without the time of rendering, so that equal data give equal files."""
    buffer = io.BytesIO()
    figure.savefig(
        buffer,
        format="png",
        dpi=DPI,
        facecolor="white",
        bbox_inches="tight",
        pad_inches=0.05,
        metadata={"Software": None},
    )
    return buffer.getvalue()


@contextmanager
def _styled(width: float, height: float, **subplots: Any) -> Iterator[tuple[Figure, Any]]:
    """A figure of so many inches and its axes; what is drawn in the block is in the house style."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        yield figure, figure.subplots(**subplots)


def _label_p_axis(axis: Any, ps: Sequence[float]) -> None:
    """A logarithmic axis of probabilities, labelled with the powers of two where p are such."""
    axis.set_xscale("log")
    if ps and all(is_power_of_two(p) for p in ps):
        shown = sorted(set(ps))[:: max(1, len(set(ps)) // 9)]
        axis.xaxis.set_major_locator(FixedLocator(shown))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda p, _: p_text(p)))


def _label_log_values(axis: Any) -> None:
    """Plain numbers on a logarithmic axis of perplexities, and enough of them where it spans less than a decade or
    two."""
    low, high = axis.get_ylim()
    decades = math.log10(high / low)
    if decades <= 5:
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _legend_columns(labels: Sequence[str]) -> int:
    """As many as fit over 5.5 inches."""
    return max(1, min(4, int(5.5 / (0.6 + 0.065 * max(map(len, labels))))))


def _legend_height(labels: Sequence[str]) -> float:
    """Inches that the legend of these curves and the clean line takes."""
    return 0.18 * math.ceil((len(labels[:SHOWN_CURVES]) + 1) / _legend_columns(labels[:SHOWN_CURVES]))


def _legend_above(axis: Any, of: Any) -> None:
    """What is drawn in the axes ``of``, above ``axis``, clear of markers on its top edge."""
    handles, labels = of.get_legend_handles_labels()
    columns = _legend_columns(labels)
    axis.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1.03), ncols=columns, borderaxespad=0)


def _draw_curve(axis: Any, xs: Sequence[float], curve: Curve, ps: Sequence[float], **style: Any) -> None:
    arms = [curve.arms[p] for p in ps]
    middle = np.array([arm.perplexity if math.isfinite(arm.perplexity) else math.nan for arm in arms])  # a gap
    bounds = np.array([arm.perplexity_interval or (arm.perplexity,) * 2 for arm in arms]).reshape(-1, 2)
    off = np.nan_to_num(np.abs(np.where(np.isfinite(bounds), bounds, middle[:, None]).T - middle))
    axis.errorbar(xs, middle, yerr=off if arms else None, elinewidth=1, **style)


def _draw_clean(axis: Any, perplexity: float) -> None:
    if math.isfinite(perplexity):  # else the clean model is broken itself
        axis.axhline(perplexity, color="#333333", ls="--", lw=1, label="clean")


def perplexity_curves(curves: Sequence[Curve], labels: Sequence[str], clean_perplexity: float) -> Figure:
    """Perplexity against p on logarithmic axes, with 95% intervals, cliffs and the clean perplexity. Broken points are
    open markers at the top edge. The first ``SHOWN_CURVES`` curves are drawn."""
    with _styled(6.5, 3.6 + _legend_height(labels)) as (figure, axis):
        axis.set_yscale("log")
        for i, (curve, label) in enumerate(zip(curves[:SHOWN_CURVES], labels, strict=False)):
            colour, marker = PALETTE[i], MARKERS[i]
            _draw_curve(axis, curve.positive, curve, curve.positive, color=colour, marker=marker, label=label)
            if curve.cliff.p is not None:
                axis.axvline(curve.cliff.p, color=colour, lw=0.9, ls=(0, (1, 2)))
            axis.plot(
                curve.broken, [1.0] * len(curve.broken), color=colour, marker=marker, ls="none", ms=6, mfc="white",
                transform=axis.get_xaxis_transform(), clip_on=False, zorder=5,
            )  # fmt: skip
        _draw_clean(axis, clean_perplexity)
        _label_p_axis(axis, [p for curve in curves for p in curve.arms if p > 0])
        _label_log_values(axis)
        axis.set_xlabel("flip probability p of each bit")
        axis.set_ylabel("perplexity")
        _legend_above(axis, axis)
    return figure


def cost_heat_map(of: CostMap) -> Figure:
    """Layers by bits, coloured by what flips there cost; ∞ where they break the model, blank where not measured."""
    costs = cost_grid(of)
    width = min(11.0, 2.8 + 0.42 * len(of.bits) + 0.075 * max(map(len, of.layers)))
    with _styled(width, max(2.6, min(14.0, 1.4 + 0.3 * len(of.layers)))) as (figure, axis):
        finite = costs[np.isfinite(costs)]
        top = max(COST_FLOOR * 10, float(finite.max(initial=0)))
        norm = LogNorm(COST_FLOOR, top)
        colours = matplotlib.colormaps["cividis"].with_extremes(bad="white", under=matplotlib.colormaps["cividis"](0.0))
        broken = np.isinf(costs)
        shown = np.clip(np.where(broken, top, costs), COST_FLOOR, None)
        image = axis.imshow(np.ma.masked_invalid(shown), cmap=colours, norm=norm, aspect="auto")
        if costs.size <= 320:
            for row, column in np.ndindex(costs.shape):
                value = float(costs[row, column])
                if math.isnan(value):
                    continue
                dark = not broken[row, column] and norm(max(value, COST_FLOOR)) < 0.55
                axis.text(column, row, cost_text(value), ha="center", va="center", fontsize=6,
                          color="white" if dark else "black")  # fmt: skip
        axis.set_xticks(range(len(of.bits)), of.bits)
        axis.set_yticks(range(len(of.layers)), of.layers)
        axis.grid(visible=False)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_xlabel("bits that flip")
        axis.set_title(of.label, loc="left")
        bar = figure.colorbar(image, ax=axis, pad=0.02, label="cost over clean (nats per token)")
        bar.outline.set_visible(False)
    return figure


def cost_grid(of: CostMap) -> np.ndarray:
    """Costs in nats, (layers, bits), float64; NaN where not measured, infinity where broken."""
    costs = np.full((len(of.layers), len(of.bits)), np.nan)
    for (layers, bits), cost in of.costs.items():
        costs[of.layers.index(layers), of.bits.index(bits)] = cost.mean
    return costs


def cost_text(cost: float) -> str:
    """Few digits, for a cell."""
    if math.isinf(cost):
        return "∞"
    text = "0" if abs(cost) < COST_FLOOR else f"{cost:.3f}" if abs(cost) < 0.1 else f"{cost:.2f}"
    return text.replace("-", "−") if abs(cost) < 1 else f"{cost:.1f}"


def ranking_bars(ranking: Ranking) -> Figure:
    """Cost of faults in each layer alone, with 95% intervals, the worst first; the ``SHOWN_LAYERS`` worst."""
    rows = ranking.rows[:SHOWN_LAYERS]
    ends = [cost.interval[1] if cost.interval else cost.mean for _, cost in rows if math.isfinite(cost.mean)]
    edge = max(ends, default=1.0) * 1.05
    with _styled(6.5, 1.2 + 0.22 * len(rows)) as (figure, axis):
        for place, (_, cost) in enumerate(rows):
            broken = math.isinf(cost.mean)
            axis.barh(place, edge if broken else cost.mean, height=0.7, color="white" if broken else PALETTE[0],
                      edgecolor=PALETTE[1] if broken else "none", hatch="////" if broken else None)  # fmt: skip
            if cost.interval:
                off = [[cost.mean - cost.interval[0]], [cost.interval[1] - cost.mean]]
                axis.errorbar(cost.mean, place, xerr=off, color="#222222", elinewidth=1, ls="none")
        axis.set_yticks(range(len(rows)), [layers for layers, _ in rows])
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.grid(visible=False, axis="y")
        axis.tick_params(axis="y", length=0)
        axis.set_xlabel("cost over clean (nats per token)")
        axis.set_title(ranking.label, loc="left")
    return figure


def voltage_panels(voltages: Sequence[tuple[float, float]], curves: Sequence[Curve], labels: Sequence[str],
                   clean_perplexity: float) -> Figure:  # fmt: skip
    """Bit-error rate and perplexity against the supply voltage, one above the other."""
    with _styled(6.5, 4.8 + _legend_height(labels), nrows=2, sharex=True, height_ratios=[1, 1.6]) as (
        figure,
        (upper, lower),
    ):
        volts, rates = zip(*sorted(voltages), strict=True)
        upper.plot(volts, rates, color="#333333", marker=".")
        upper.set_yscale("log")
        upper.set_ylabel("bit-error rate")
        lower.set_yscale("log")
        for i, (curve, label) in enumerate(zip(curves[:SHOWN_CURVES], labels, strict=False)):
            ps = sorted((p for p in curve.positive if p in curve.voltages), key=curve.voltages.__getitem__)
            _draw_curve(
                lower, [curve.voltages[p] for p in ps], curve, ps, color=PALETTE[i], marker=MARKERS[i], label=label
            )
            broken = [curve.voltages[p] for p in curve.broken if p in curve.voltages]
            lower.plot(broken, [1.0] * len(broken), color=PALETTE[i], marker=MARKERS[i], ls="none", ms=6, mfc="white",
                       transform=lower.get_xaxis_transform(), clip_on=False, zorder=5)  # fmt: skip
        _draw_clean(lower, clean_perplexity)
        _label_log_values(lower)
        lower.set_xlabel("supply voltage (V)")
        lower.set_ylabel("perplexity")
        _legend_above(upper, lower)
    return figure


def magnitude_panels(histograms: Mapping[str, Sequence[tuple[int, int]]],
                     thresholds: Mapping[str, Mapping[str, float]], title: str) -> Figure:  # fmt: skip
    """How large values are, by power of two: operand -> [(binary exponent, count)], and operand -> name of a threshold
    -> its value."""
    with _styled(7.0, 2.9, ncols=len(histograms), squeeze=False) as (figure, axes):
        for i, (axis, (operand, histogram)) in enumerate(zip(axes[0], histograms.items(), strict=True)):
            total = sum(count for _, count in histogram)
            exponents = [exponent for exponent, count in histogram if count]
            shares = [count / total for _, count in histogram if count]
            # A bar of exponent e holds magnitudes from 2^e to 2^(e+1). Its foot is far below any share there can be.
            axis.bar(exponents, shares, width=1, align="edge", color=PALETTE[i], edgecolor="white", lw=0.3)
            axis.set_yscale("log")
            for name, t in thresholds.get(operand, {}).items():
                style = "--" if name == "proposed" else "-"
                axis.axvline(math.log2(t), color="#333333", lw=1.1, ls=style, label=f"{name}: {t:g}")
            axis.xaxis.set_major_formatter(FuncFormatter(lambda e, _: p_text(2.0 ** round(e))))
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.set_xlabel(f"magnitude of {operand}")
            axis.set_ylabel("share of values" if i == 0 else "")
            if thresholds.get(operand):
                axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    return figure


def training_curves(runs: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Training loss by step: run -> [(step, loss in nats per token)]."""
    with _styled(6.5, 3.2) as (figure, axis):
        for i, (name, rows) in enumerate(runs.items()):
            steps, losses = zip(*rows, strict=True)
            axis.plot(
                steps, losses, color=PALETTE[i % len(PALETTE)], label=name, marker="." if len(steps) < 40 else None
            )
        axis.set_xlabel("step")
        axis.set_ylabel("training loss (nats per token)")
        if len(runs) > 1:
            axis.legend()
    return figure
