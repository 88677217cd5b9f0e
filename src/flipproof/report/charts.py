"""The report's charts for the screen: what ``figures.py`` draws for print, as plotly's JSON.

A chart is ``{"views": [{"label", "data", "layout"?}, …], "layout", "log_toggle"}``: the page draws the first view and
offers the others in a list; a view's own layout goes over the chart's. Colours of text, axes and grid are the page's,
which knows whether it is light or dark, and ``ink`` in a colour's place stands for its text colour. Everything is plain
lists and numbers: no array is encoded, and infinity, which JSON does not have, never gets this far.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from flipproof.report.analyse import CostMap, Curve, Ranking, is_power_of_two, p_text
from flipproof.report.draw import COST_FLOOR, PALETTE, SHOWN_CURVES, SHOWN_LAYERS, cost_grid, cost_text

Chart = dict[str, Any]
_SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x")


def _axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title}, "automargin": True, **more}


def _log_p_axis(ps: Sequence[float]) -> dict[str, Any]:
    axis = _axis("flip probability p of each bit", type="log")
    if ps and all(map(is_power_of_two, ps)):
        shown = sorted(set(ps))[:: max(1, len(set(ps)) // 12)]
        return axis | {"tickvals": shown, "ticktext": [p_text(p) for p in shown], "minor": {"ticks": ""}}
    return axis | {"exponentformat": "power", "dtick": 1}


def _ranges(values: Sequence[float]) -> dict[str, Any]:
    """A logarithmic perplexity axis with room for the markers at its top edge, and the range it takes when linear."""
    low, high = min(values), max(values)
    room = 0.04 * max(math.log10(high / low), 0.1)
    log = [math.log10(low) - room, math.log10(high) + 2 * room]
    ticks: dict[str, Any] = {"exponentformat": "power"} | ({"dtick": 1} if log[1] - log[0] <= 12 else {})
    if log[1] - log[0] < 1:  # where plotly would write too few numbers
        shown = [float(value) for value in MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high) if value > 0]
        ticks = {"exponentformat": "none", "tickvals": shown, "ticktext": [f"{value:.4g}" for value in shown]}
    elif log[1] - log[0] <= 5:
        ticks = {"exponentformat": "none", "dtick": "D2" if log[1] - log[0] < 2.5 else 1}
    return _axis("perplexity", type="log", range=log, rangemode="normal", **ticks)


def _curve_traces(curve: Curve, label: str, i: int, xs: Mapping[float, float], top: float, **axes: Any) -> list[Chart]:
    """A curve with its intervals, and its broken points as open markers at ``top``. ``xs``: p -> place on the axis."""
    colour, symbol = PALETTE[i % len(PALETTE)], _SYMBOLS[i % len(_SYMBOLS)]
    ps = [p for p in curve.positive if p in xs]
    arms = [curve.arms[p] for p in ps]
    whole = [math.isfinite(arm.perplexity) for arm in arms]
    bounds = [arm.perplexity_interval or (arm.perplexity,) * 2 for arm in arms]
    common = {
        "name": label,
        "legendgroup": label,
        "mode": "lines+markers",
        "visible": True if i < SHOWN_CURVES else "legendonly",
        **axes,
    }
    hover = [f"p = {p:.4g}<br>loss {curve.arms[p].loss:.4f}, {curve.arms[p].trials} seeds" for p in ps]
    traces = [
        common
        | {
            "type": "scatter",
            "x": [xs[p] for p in ps],
            "y": [arm.perplexity if ok else None for arm, ok in zip(arms, whole, strict=True)],  # None is a gap
            "error_y": {
                "type": "data",
                "symmetric": False,
                "array": [
                    high - arm.perplexity if math.isfinite(high) else 0.0
                    for arm, (_, high) in zip(arms, bounds, strict=True)
                ],
                "arrayminus": [
                    arm.perplexity - low if ok else 0.0 for arm, (low, _), ok in zip(arms, bounds, whole, strict=True)
                ],
                "thickness": 1,
                "width": 3,
            },
            "line": {"color": colour, "width": 2},
            "marker": {"symbol": symbol, "size": 7, "color": colour},
            "text": hover,
            "hovertemplate": "perplexity %{y:.4g}<br>%{text}",
        }
    ]
    if broken := [p for p in curve.broken if p in xs]:
        traces.append(
            common
            | {
                "type": "scatter",
                "mode": "markers",
                "showlegend": not any(whole),
                "x": [xs[p] for p in broken],
                "y": [top] * len(broken),
                "cliponaxis": False,
                "marker": {"symbol": f"{symbol}-open", "size": 10, "color": colour, "line": {"width": 2}},
                "text": [f"p = {p:.4g}" for p in broken],
                "hovertemplate": "infinite loss<br>%{text}",
            }
        )
    return traces


def _clean_line(clean_perplexity: float, xs: Sequence[float], **axes: Any) -> list[Chart]:
    """None for a clean model that is broken itself."""
    ends = [min(xs), max(xs)] if xs else []
    line = {
        "type": "scatter",
        "mode": "lines",
        "name": "clean",
        "x": ends,
        "y": [clean_perplexity] * len(ends),
        "line": {"color": "ink", "dash": "dash", "width": 1.3},
        "hovertemplate": "perplexity %{y:.4g}",
        **axes,
    }
    return [line] if math.isfinite(clean_perplexity) else []


def _finite_perplexities(curves: Sequence[Curve], clean_perplexity: float) -> list[float]:
    arms = [curve.arms[p] for curve in curves for p in curve.finite]
    ends = [high for arm in arms for high in (arm.perplexity_interval or ()) if math.isfinite(high)]
    values = [clean_perplexity, *(arm.perplexity for arm in arms), *ends]
    return [value for value in values if math.isfinite(value)] or [1.0]


def perplexity_curves(groups: Mapping[str, tuple[Sequence[Curve], Sequence[str]]], clean_perplexity: float) -> Chart:
    """Perplexity against p: name of a view -> (curves, their labels). The cliff is a dotted line; a curve beyond the
    ``SHOWN_CURVES``th waits in the legend."""
    views = []
    for name, (curves, labels) in groups.items():
        y_axis = _ranges(_finite_perplexities(curves, clean_perplexity))
        bottom, top = (10**end for end in y_axis["range"])
        ps = [p for curve in curves for p in curve.arms if p > 0]
        data = _clean_line(clean_perplexity, ps)
        for i, (curve, label) in enumerate(zip(curves, labels, strict=True)):
            data += _curve_traces(curve, label, i, {p: p for p in curve.arms}, top)
            if curve.cliff.p is not None:
                data.append(
                    {
                        "type": "scatter",
                        "mode": "lines",
                        "name": f"cliff of {label}",
                        "legendgroup": label,
                        "showlegend": False,
                        "visible": True if i < SHOWN_CURVES else "legendonly",
                        "x": [curve.cliff.p] * 2,
                        "y": [bottom, top],
                        "line": {"color": PALETTE[i % len(PALETTE)], "width": 1.2, "dash": "dot"},
                        "hovertemplate": f"cliff at p = {curve.cliff.p:.3g}",
                    }
                )
        views.append({"label": name, "data": data, "layout": {"xaxis": _log_p_axis(ps), "yaxis": y_axis}})
    layout = {"hovermode": "closest", "height": 460, "legend": _legend_below()}
    return {"views": views, "layout": layout, "log_toggle": ["yaxis"]}


def _legend_below() -> dict[str, Any]:
    return {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "xanchor": "left"}


def cost_heat_maps(maps: Sequence[CostMap]) -> Chart:
    """Layers by bits, one view for each p and what else there is; the colour is logarithmic."""
    costs = [cost_grid(of) for of in maps]
    finite = [cost for grid in costs for cost in grid[np.isfinite(grid)].tolist()]
    low, high = math.log10(COST_FLOOR), math.log10(max(COST_FLOOR * 10, *finite) if finite else COST_FLOOR * 10)
    ticks = list(range(math.ceil(low), math.floor(high) + 1))
    views = []
    for of, grid in zip(maps, costs, strict=True):
        text = [["" if math.isnan(cost) else cost_text(cost) for cost in row] for row in grid.tolist()]
        colour = [
            [
                None if math.isnan(cost) else high if math.isinf(cost) else math.log10(max(cost, COST_FLOOR))
                for cost in row
            ]
            for row in grid.tolist()
        ]
        trace = {
            "type": "heatmap",
            "x": list(of.bits),
            "y": list(of.layers),
            "z": colour,
            "text": text,
            "texttemplate": "%{text}" if grid.size <= 320 else "",
            "textfont": {"size": 10},
            "zmin": low,
            "zmax": high,
            "colorscale": "Cividis",
            "xgap": 1,
            "ygap": 1,
            "hovertemplate": "%{y}<br>bits %{x}<br>cost %{text} nats<extra></extra>",
            "colorbar": {
                "title": {"text": "nats per token", "side": "right"},
                "tickvals": ticks,
                "ticktext": [f"{10.0**tick:g}" for tick in ticks],
                "outlinewidth": 0,
                "thickness": 14,
            },
        }
        rows = {"layout": {"height": 150 + 24 * len(of.layers)}}
        views.append({"label": of.label, "data": [trace], **rows})
    layout = {
        "xaxis": _axis("bits that flip", type="category", showgrid=False),
        "yaxis": _axis("", type="category", autorange="reversed", showgrid=False),
    }
    return {"views": views, "layout": layout, "log_toggle": []}


def ranking_bars(found: Sequence[Ranking]) -> Chart:
    """Cost of faults in each layer alone, the worst first, one view for each ranking."""
    views = []
    for ranking in found:
        rows = ranking.rows[:SHOWN_LAYERS]
        ends = [cost.interval[1] if cost.interval else cost.mean for _, cost in rows if math.isfinite(cost.mean)]
        edge = max(ends, default=1.0) * 1.05
        broken = [math.isinf(cost.mean) for _, cost in rows]
        trace = {
            "type": "bar",
            "orientation": "h",
            "y": [layers for layers, _ in rows],
            "x": [edge if gone else cost.mean for (_, cost), gone in zip(rows, broken, strict=True)],
            "marker": {
                "color": [PALETTE[1] if gone else PALETTE[0] for gone in broken],
                "pattern": {"shape": ["/" if gone else "" for gone in broken]},
            },
            "error_x": {
                "type": "data",
                "symmetric": False,
                "array": [cost.interval[1] - cost.mean if cost.interval else 0.0 for _, cost in rows],
                "arrayminus": [cost.mean - cost.interval[0] if cost.interval else 0.0 for _, cost in rows],
                "color": "ink",
                "thickness": 1,
                "width": 3,
            },
            "text": [
                "infinite loss" if gone else f"{cost.mean:.4g} nats"
                for (_, cost), gone in zip(rows, broken, strict=True)
            ],
            "textposition": "none",
            "hovertemplate": "%{y}<br>%{text}<extra></extra>",
        }
        views.append({"label": ranking.label, "data": [trace], "layout": {"height": 110 + 22 * len(rows)}})
    layout = {
        "xaxis": _axis("cost over clean (nats per token)"),
        "yaxis": _axis("", type="category", autorange="reversed", showgrid=False),
        "bargap": 0.3,
    }
    return {"views": views, "layout": layout, "log_toggle": []}


def voltage_panels(
    voltages: Sequence[tuple[float, float]], curves: Sequence[Curve], labels: Sequence[str], clean_perplexity: float
) -> Chart:
    """Bit-error rate and perplexity against the supply voltage, one above the other."""
    y_axis = _ranges(_finite_perplexities(curves, clean_perplexity))
    lower: dict[str, Any] = {"xaxis": "x", "yaxis": "y"}
    rows = sorted(voltages)
    rate = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": "bit-error rate",
        "showlegend": False,
        "xaxis": "x",
        "yaxis": "y2",
        "x": [volts for volts, _ in rows],
        "y": [ber for _, ber in rows],
        "line": {"color": "ink", "width": 1.5},
        "hovertemplate": "%{x} V: %{y:.3g}<extra></extra>",
    }
    data = [rate, *_clean_line(clean_perplexity, [volts for volts, _ in rows], **lower)]
    for i, (curve, label) in enumerate(zip(curves, labels, strict=True)):
        data += _curve_traces(curve, label, i, curve.voltages, 10 ** y_axis["range"][1], **lower)
    layout = {
        "height": 560,
        "legend": _legend_below(),
        "hovermode": "closest",
        "xaxis": _axis("supply voltage (V)", anchor="y"),
        "yaxis": y_axis | {"domain": [0.0, 0.58]},
        "yaxis2": _axis("bit-error rate", type="log", domain=[0.66, 1.0], exponentformat="power", dtick=1),
    }
    return {"views": [{"label": "", "data": data}], "layout": layout, "log_toggle": ["yaxis"]}


def magnitude_panels(
    layers: Mapping[str, Mapping[str, Sequence[tuple[int, int]]]],
    thresholds: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> Chart:
    """How large values are, by power of two: layer -> operand -> [(binary exponent, count)], one view for each layer;
    layer -> operand -> name of a threshold -> its value."""
    operands = list(dict.fromkeys(operand for histograms in layers.values() for operand in histograms))
    views = []
    for layer, histograms in layers.items():
        data: list[Chart] = []
        for i, operand in enumerate(operands):
            histogram = [(exponent, count) for exponent, count in histograms.get(operand, []) if count]
            total = sum(count for _, count in histogram)
            axes = {"xaxis": f"x{i + 1}", "yaxis": f"y{i + 1}"} if i else {"xaxis": "x", "yaxis": "y"}
            data.append(
                {
                    "type": "bar",
                    "name": operand,
                    "x": [exponent + 0.5 for exponent, _ in histogram],
                    "y": [count / total for _, count in histogram],
                    "marker": {"color": PALETTE[i]},
                    "text": [
                        f"2<sup>{exponent}</sup> to 2<sup>{exponent + 1}</sup>: {count:,}"
                        for exponent, count in histogram
                    ],
                    "textposition": "none",
                    "hovertemplate": "%{text}<extra></extra>",
                    "showlegend": False,
                    **axes,
                }
            )
            low = min((count / total for _, count in histogram), default=1.0)
            for name, t in thresholds.get(layer, {}).get(operand, {}).items():
                data.append(
                    {
                        "type": "scatter",
                        "mode": "lines",
                        "name": f"{operand}, {name}: {t:g}",
                        "x": [math.log2(t)] * 2,
                        "y": [low / 2, 1.0],
                        "line": {"color": "ink", "width": 1.5, "dash": "dash" if name == "proposed" else "solid"},
                        "hovertemplate": f"{name}: {t:g}<extra></extra>",
                        **axes,
                    }
                )
        views.append({"label": layer, "data": data})
    layout: dict[str, Any] = {"height": 380, "bargap": 0.05, "legend": _legend_below()}
    for i, operand in enumerate(operands):
        n, width = (str(i + 1) if i else ""), 1 / len(operands)
        layout[f"xaxis{n}"] = _axis(
            f"magnitude of {operand}", domain=[i * width + 0.04 * (i > 0), (i + 1) * width - 0.04], tickprefix="2<sup>",
            ticksuffix="</sup>", anchor=f"y{n}",
        )  # fmt: skip
        layout[f"yaxis{n}"] = _axis(
            "share of values" if i == 0 else "", type="log", anchor=f"x{n}", exponentformat="power", dtick=2
        )
    return {"views": views, "layout": layout, "log_toggle": []}


def training_curves(runs: Mapping[str, Sequence[tuple[int, float]]]) -> Chart:
    """Training loss by step: run -> [(step, loss in nats per token)]."""
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers" if len(rows) < 40 else "lines",
            "name": name,
            "x": [step for step, _ in rows],
            "y": [loss for _, loss in rows],
            "line": {"color": PALETTE[i % len(PALETTE)], "width": 2},
            "hovertemplate": "step %{x}<br>loss %{y:.4f}",
        }
        for i, (name, rows) in enumerate(runs.items())
    ]
    layout = {
        "height": 380,
        "legend": _legend_below(),
        "showlegend": len(runs) > 1,
        "xaxis": _axis("step"),
        "yaxis": _axis("training loss (nats per token)"),
    }
    return {"views": [{"label": "", "data": data}], "layout": layout, "log_toggle": []}
