"""How all pictures look: matplotlib figures, as wide as the text of a paper.

Each is drawn once and saved twice: ``svg`` for the page, whose text is text and whose ink, grid and paper are the
page's, light or dark; ``png`` for a paper. Both are equal for equal data. Figures are made without pyplot, so no
window, backend or global state is involved.

Colours are Okabe and Ito's (2008), which colour-blind readers tell apart.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure

DPI = 200
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6E6E6E")
WIDTH = 4.8
"""Inches: what LaTeX's article has, and what a phone shows without making letters small."""
_COLOURS = {"#1a1a1b": "var(--ink)", "#dddddc": "var(--grid)", "#fefefe": "var(--paper)"}
"""What stands for the page's own colours."""
INK, GRID, PAPER = _COLOURS
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
    "axes.formatter.useoffset": False,  # nothing to add to a tick's number, and no factor: both are easily missed
    "axes.formatter.limits": (-99, 99),
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "errorbar.capsize": 2.5,
    "hatch.linewidth": 0.5,
    "text.parse_math": False,  # a layer may be called $x
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


def png(figure: Figure) -> bytes:
    """The figure at 200 dots per inch, without the time of rendering."""
    return _saved(figure, "png", facecolor="white", metadata={"Software": None})


def svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an element of an HTML page, in which ``name`` is no other figure's: ids begin with it. ``title`` is
    what screen readers say of it."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        text = _saved(figure, "svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    drawn = text.decode()[text.index(b"<svg") :]
    drawn = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>", "", drawn, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', drawn))
    drawn = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", drawn)
    drawn = re.sub(r'((?:href="|url\()#| id=")', rf"\1{name}-", drawn)
    drawn = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", drawn)  # the family is the page's
    for colour, of_page in _COLOURS.items():
        drawn = drawn.replace(colour, of_page)
    points = figure.get_figwidth() * 72
    size = f'style="min-width: {1.1 * points:.0f}px; max-width: {1.8 * points:.0f}px" role="img"'
    drawn = re.sub(r' width="[^"]*pt"| height="[^"]*pt"', "", drawn, count=2)
    drawn = re.sub(r"\s*\n\s*", "\n", drawn).strip()
    return drawn.replace("<svg", f'<svg {size} aria-label="{escape(title)}"', 1)


def _saved(figure: Figure, kind: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format=kind, dpi=DPI if kind == "png" else 72, **how)
    return buffer.getvalue()


@contextmanager
def styled(height: float, width: float = WIDTH, title: str = "", **subplots: Any) -> Iterator[tuple[Figure, Any]]:
    """A figure of so many inches and its axes; what is drawn in the block is in the house style."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height + 0.2 * bool(title)), dpi=DPI, layout="constrained")
        if title:
            figure.suptitle(title, fontsize=9, x=0.01, ha="left")
        yield figure, figure.subplots(**subplots)
