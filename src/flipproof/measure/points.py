"""What a grid of faults consists of, and what was measured of it: words that sweep and report share.

A **setting** says where flips fall and what guards against them. With a flip probability, which is all that the points
of one curve differ in, it is a cell of the grid; a cell measured under one fault seed is a **point**. Over its seeds it
is an ``Arm``, and what an arm's loss is above the clean one's is its ``Cost`` (``arms.py``).
"""

from typing import NamedTuple


class Setting(NamedTuple):
    """Where flips fall and what guards against them: everything about a cell of the grid but p."""

    sites: str
    layers: str
    bits: str
    protection: str


class Point(NamedTuple):
    """One cell under one fault seed, measured."""

    p: float
    voltage: float | None
    """In volts, that p stands for."""
    setting: Setting
    seed: int
    loss: float
    """Nats per token; infinite for a broken model."""
    tokens: int
    """Predicted tokens."""
    seconds: float = 0.0
    """What it took to measure."""
