"""A part of a page: what it says, its tables and pictures; and the cells that tables of all parts share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from flipproof.measure.arms import Arm, Cost
from flipproof.report.table import Table

PERPLEXITY = ("PPL", "95% low", "95% high")
COST = ("cost", "cost low", "cost high")


@dataclass
class Drawing:
    """A picture, and what became of it."""

    draw: Callable[[], Figure]
    svg: str = ""
    png: str = ""
    """Where it lies, as a URL relative to the page; both are filled in when it is drawn."""


@dataclass
class Section:
    """A part of the page; its id is also the name of its files."""

    id: str
    title: str
    caption: str
    tables: list[Table] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)
    """The first is shown at once."""
    finding: str = ""
    """Two sentences."""
    texts: Mapping[str, str] = field(default_factory=dict)


def perplexity_cells(arm: Arm) -> list[float | None]:
    return [arm.perplexity, *(arm.perplexity_interval or (None, None))]


def cost_cells(cost: Cost | None) -> list[float | None]:
    return [cost.cost, *(cost.interval or (None, None))] if cost else [None] * 3
