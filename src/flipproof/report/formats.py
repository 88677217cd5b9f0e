"""Formats of weights side by side, at equal exposure: one picture for each protection, and the tables of its curves.

Two exposures are equal where p is, the flip probability of each stored bit, or where as many flips are expected for a
weight in each read of the model, p times the bits that are stored for it. What codes and scales do alone is beside it.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from flipproof.measure.points import Setting
from flipproof.report import figures, finding
from flipproof.report.analyse import CEILING, CLIFF_THRESHOLD, Curve, cost_of, protection_in_words
from flipproof.report.read import Sweep
from flipproof.report.section import COST, PERPLEXITY, Drawing, Section, cost_cells, perplexity_cells
from flipproof.report.table import Table

_WHAT = {"w": "all", "code": "codes", "scale": "scales"}
_P, _FLIPS = "flip probability p of each stored bit", "flips expected for a weight in a read"
_PANELS = (
    ("All that is stored", "w", _P, False),
    ("All that is stored", "w", _FLIPS, True),
    ("Codes alone", "code", _P, False),
    ("Scales alone", "scale", _P, False),
)
"""(title, site, axis, whether it counts flips)."""


def section(compared: Mapping[str, tuple[Sweep, Sequence[Curve]]]) -> Section | None:
    """Of format -> (its sweep, the curves of it); None where nothing is measured."""
    found: dict[tuple[str, Setting], Curve] = {
        (name, curve.setting): curve for name, (_, curves) in compared.items() for curve in curves
    }
    if not found:
        return None
    protections = list(dict.fromkeys(setting.protection for _, setting in found))
    drawn = [protection for protection in protections if _panels(compared, protection)]
    more = f" The first {figures.SHOWN_CURVES} formats are drawn." if len(compared) > figures.SHOWN_CURVES else ""
    names = [name for name, (_, curves) in compared.items() if curves]
    return Section(
        "formats",
        "Formats of weights at equal exposure",
        "Perplexity where stored bits of the linear layers' weights flip: all that is stored (codes, scales, and what "
        "else a format has) against p, and against the flips that are expected for a weight each time that the model "
        "is read, p times the bits stored for it, those of its protection among them; codes and scales alone. Means "
        f"and 95% intervals over fault seeds; dashed: clean; open markers above the axes: a loss above {CEILING:g} "
        "nats. The cliff is where perplexity exceeds the format's own clean one by more than "
        f"{CLIFF_THRESHOLD:.0%}.{more}",
        [_cliffs(compared), _points(compared)],
        [
            Drawing(
                partial(
                    figures.exposure_panels,
                    _panels(compared, protection),
                    names,
                    protection_in_words(protection) if len(protections) > 1 or protection != "none" else "",
                )
            )
            for protection in drawn
        ],
        _finding(compared, protections[0]),
    )


def _bits(sweep: Sweep, setting: Setting) -> float:
    """Stored for a weight, of what flips."""
    return sweep.stored_bits[setting.protection][setting.sites]


def _panels(compared: Mapping[str, tuple[Sweep, Sequence[Curve]]], protection: str) -> list[figures.Panel]:
    panels = []
    for title, site, axis, counts in _PANELS:
        curves = {
            name: (curve, _bits(sweep, curve.setting) if counts else 1.0, sweep.clean_perplexity)
            for name, (sweep, own) in compared.items()
            for curve in own
            if (curve.setting.sites, curve.setting.protection) == (site, protection) and len(curve.positive) > 1
        }
        if curves:
            panels.append(figures.Panel(title, axis, curves))
    return panels


def _cliffs(compared: Mapping[str, tuple[Sweep, Sequence[Curve]]]) -> Table:
    rows: list[list[Any]] = []
    for name, (sweep, curves) in compared.items():
        for curve in curves:
            bits, cliff, setting = _bits(sweep, curve.setting), curve.cliff, curve.setting
            extra = 100 * sweep.overhead[setting.protection]
            flips = None if cliff.p is None else cliff.p * bits
            rows.append([name, _WHAT[setting.sites], setting.protection, bits, extra, sweep.clean_perplexity,
                         str(cliff), cliff.p, *(curve.cliff_interval or (None, None)), flips])  # fmt: skip
    columns = ["format", "what flips", "protection", "bits/weight", "extra storage (%)", "clean PPL", "cliff",
               "cliff p", "95% low", "95% high", "flips/weight there"]  # fmt: skip
    title = f"Cliffs (+{CLIFF_THRESHOLD:.0%} perplexity over the format's own clean one)"
    return Table("formats-cliffs.csv", columns, rows, title=title, only_csv=frozenset({"cliff p"}))


def _points(compared: Mapping[str, tuple[Sweep, Sequence[Curve]]]) -> Table:
    rows = [
        [name, _WHAT[curve.setting.sites], curve.setting.protection, p, p * _bits(sweep, curve.setting),
         sweep.clean_perplexity, *perplexity_cells(arm),
         *cost_cells(cost_of(arm, sweep.clean_loss) if math.isfinite(sweep.clean_loss) else None), arm.trials,
         arm.tokens]
        for name, (sweep, curves) in compared.items()
        for curve in curves
        for p, arm in curve.arms.items()
    ]  # fmt: skip
    columns = ["format", "what flips", "protection", "p", "flips/weight", "clean PPL", *PERPLEXITY, *COST, "seeds",
               "tokens"]  # fmt: skip
    return Table("formats.csv", columns, rows, shown=False)


def _finding(compared: Mapping[str, tuple[Sweep, Sequence[Curve]]], protection: str) -> str:
    """Which format falls off first and which last where all that is stored flips; no winner where intervals overlap."""
    known = {
        name: curve
        for name, (_, curves) in compared.items()
        for curve in curves
        if (curve.setting.sites, curve.setting.protection) == ("w", protection) and curve.positive
    }
    fallen = [name for name, curve in known.items() if curve.cliff.up_to is not None]
    where = f"Where all stored bits of weights flip ({protection_in_words(protection)}),"
    much = f"{CLIFF_THRESHOLD:.0%} above its clean one"
    if not fallen:
        return (
            f"{where} no format's perplexity is {much} up to the largest p measured. So none can be called the first."
        )
    order = sorted(known, key=lambda name: known[name].cliff.p or known[name].cliff.up_to or math.inf)
    first, last = order[0], order[-1]
    # of what cannot be told from the first or the last none is called so alone
    firsts = [name for name in order if not finding.falls_before(known[first], known[name])]
    lasts = [name for name in order if not finding.falls_before(known[name], known[last])]
    if set(firsts) & set(lasts):
        return f"{where} perplexity is {much} with {_with_places(known, order)}. Not all of these can be told apart."
    return (
        f"{where} perplexity is {much} first with {_with_places(known, firsts)}. Last is {_with_places(known, lasts)}."
    )


def _with_places(known: Mapping[str, Curve], names: Sequence[str]) -> str:
    return " and ".join(f"{name} ({finding.places_of([known[name].cliff])})" for name in names)
