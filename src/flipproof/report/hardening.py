"""What hardening a model did: what flips cost before and after, what was rotated, what was left and why.

The table of costs is the same on the page, in the terminal and in the README of the directory: ``cost_table``.
"""

import math
from functools import partial
from typing import Any

from flipproof.measure.arms import Cost
from flipproof.report import figures, finding
from flipproof.report.analyse import p_text
from flipproof.report.read import Hardened
from flipproof.report.section import COST, Drawing, Section, cost_cells
from flipproof.report.table import Table


def cost_table(of: Hardened) -> tuple[list[str], list[list[str]]]:
    """(columns, rows of as many cells): for each probability what flips cost behind each guard before and after, with
    its interval; p = 0 is the guard alone."""
    columns = ["p of every bit", *(f"{model}, {guard}" for model, guard in of.costs)]
    rows = [
        [p_text(p) if p else "0, the guard alone", *(_cell(costs.get(p)) for costs in of.costs.values())]
        for p in of.probabilities
    ]
    return columns, rows


def _cell(cost: Cost | None) -> str:
    if cost is None:
        return "–"
    ends = " ({} to {})".format(*map(_nats, cost.interval)) if cost.interval else ""
    return f"{_nats(cost.cost)}{ends}"


def _nats(cost: float) -> str:
    return "∞" if math.isinf(cost) else f"{round(cost, 4) + 0.0:.4f}".replace("-", "−")  # and no zero below zero


def rotated(of: Hardened) -> list[tuple[str, int]]:
    """What is in another basis, in words, and how many modules or norms that is."""
    rotation = of.rotation
    return [
        ("modules on the residual stream", len(rotation["stream"])),
        ("norms, their gains folded", len(rotation["folded"])),
        ("attention modules, their values", len(rotation["values"])),
        ("inputs, when the model runs", len(rotation["online"])),
    ]


def in_words(of: Hardened) -> str:
    """How the model was hardened, in a few sentences."""
    rotation = of.rotation
    if rotation["how"] == "none":
        why = "; ".join(f"{name} are {reason}" for name, reason in rotation["left"].items())
        words = f"Nothing was rotated: {why}." if why else "Nothing was rotated (--rotate none)."
    else:
        words = (
            f"Rotated with --rotate {rotation['how']}, bases of seed {rotation['seed']}; logits of the float32 model "
            f"moved by {rotation['difference']:.1g} of the largest."
        )
        words += "" if rotation["stream"] else " The residual stream is as it was."
        words += " Head and embedding were one weight and are two now." if rotation["untied"] else ""
    words += f" Measured with weights in {of.format}, whose stored bits flip." if of.format else ""
    fitted = " and ".join(f"{text['tokens']:,} tokens of {text['source']}" for text in of.fitted)
    return words + (f" Guards by {of.guards} were fitted to {fitted}." if fitted else "")


def section(of: Hardened) -> Section:
    columns, rows = cost_table(of)
    points: list[list[Any]] = [
        [model, guard, p, *cost_cells(cost)] for (model, guard), costs in of.costs.items() for p, cost in costs.items()
    ]
    tables = [
        Table("hardening.csv", columns, rows, title="What flips cost, before and after"),
        Table("hardening-points.csv", ["model", "protection", "p", *COST], points, shown=False),
    ]
    if of.rotation["how"] != "none":
        tables.append(Table("hardening-rotated.csv", ["what", "how many"], rotated(of), title="What was rotated"))
    if left := of.rotation["left"]:
        tables.append(
            Table("hardening-left.csv", ["module", "why"], list(left.items()), title="What was left as it is")
        )
    drawn = any(p > 0 and cost.cost > 0 for costs in of.costs.values() for p, cost in costs.items())
    return Section(
        "hardening",
        "Hardened, without training",
        "Loss less the clean loss of the model as it was, in nats per token, where every bit of weights and inputs "
        "flips with probability p: "
        "of that model and of the hardened one, each behind fitted guards; 95% intervals over fault seeds. The guard "
        "alone is what thresholds cost before any bit flips, and of quantised weights what rounding them in another "
        f"basis does. {in_words(of)}",
        tables,
        [Drawing(partial(figures.cost_curves, of.costs))] if drawn else [],
        finding.of_hardening(of),
    )
