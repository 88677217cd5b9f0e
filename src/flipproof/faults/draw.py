"""A draw: what is to happen to a tensor, and the key, tick and offset that say which random numbers decide it.

Rates and limits are tensors, like key and tick, so that a compiled graph does not hold them: layers that differ in
nothing else compile as one, and other rates compile nothing. (A CUDA graph holds what they were when it was captured.)
"""

from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flipproof.faults.dtypes import DTYPES, dtype_name
from flipproof.faults.fault import PROTECTIONS, Fault, Stored
from flipproof.faults.guard import guard_of, limits_of
from flipproof.faults.layouts import FLOATS, LAYOUTS, Layout

_NEXT_RUN = 0x9E3779B97F4A7C15


class Rates(NamedTuple):
    """How often bits are inverted."""

    p_exp: float
    p_frac: float
    stored: Stored | None
    """None: flips are independent, and new at each tick."""
    layout: Layout | None = None
    """Of elements that are uint8 and flip independently."""


class Draw(NamedTuple):
    """All that a flip needs beside its tensor."""

    rates: Tensor
    """float64 in CPU memory, as ``rates_of`` makes them."""
    limits: Tensor | None
    """Of the guard (``guard.py``); one for all in CPU memory, others on the device of what is guarded. None: no
    guard."""
    key: Tensor
    """() int64, of ``philox.derive_key``."""
    tick: Tensor
    """() int64."""
    offset: int
    """Index of the tensor's first element in the whole tensor."""
    flips: bool = True
    """Whether any rate is not 0."""
    decoder: bool = False
    """Whether a protection has a decoder, which zeroes what it cannot mend."""

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As the operators take them."""
        return self[:5]

    @property
    def active(self) -> bool:
        """Whether it may change anything."""
        return self.flips or self.limits is not None

    @property
    def zeroes(self) -> bool:
        """Whether values may become 0, which stops their gradient."""
        return self.limits is not None or self.decoder

    @property
    def patterned(self) -> bool:
        """Whether flips are other than independent and new at each tick."""
        return self.rates.shape[0] > 4

    def of_nothing(self) -> "Draw":
        """Without flips, guard and protection: for operators that do something else besides."""
        return self._replace(rates=NO_RATES, limits=None, flips=False, decoder=False)

    def drawn(self) -> Rates:
        """The rates as numbers."""
        return _rates(*self.rates.tolist())


def rates_of(fault: Fault, element: torch.dtype | str) -> Tensor:
    """(2,) float64: p_exp and p_frac. Where flips are not independent, the fields of ``Stored`` follow; where they are
    and the element is no dtype, how many bits it has, and how many of these are a mantissa's.

    Args:
        element: a dtype, or one of ``LAYOUTS``.
    """
    name = element if isinstance(element, str) else dtype_name(element)
    stored = fault.stored(name) if fault.pattern else None
    numbers = [fault.p_exp, fault.p_frac]
    if stored is not None:
        how = stored.persistent, stored.burst, stored.p_row, stored.row_bytes, PROTECTIONS.index(stored.protection)
        numbers += [*how, stored.lost, *stored.p_bits]
    elif name not in FLOATS:
        numbers += LAYOUTS[name][:2]
    return torch.tensor(numbers, dtype=torch.float64)


@lru_cache(maxsize=1024)
def _rates(p_exp: float, p_frac: float, *more: float) -> Rates:
    if not more:
        return Rates(p_exp, p_frac, None)
    if len(more) == 2:
        return Rates(p_exp, p_frac, None, Layout(bits=int(more[0]), mantissa=int(more[1])))
    persistent, burst, p_row, row_bytes, protection, lost, *p_bits = more
    how = bool(persistent), int(burst), p_row, int(row_bytes), PROTECTIONS[int(protection)], int(lost)
    return Rates(p_exp, p_frac, Stored(tuple(p_bits), *how))


NO_RATES = rates_of(Fault(), torch.float32)


class FaultData:
    """A fault as data: what is known of one operand of one layer before there is a key."""

    def __init__(self, fault: Fault, guard: Tensor | None = None, element: str | None = None) -> None:
        """
        Args:
            guard: thresholds that were fitted, in the place of the fault's own.
            element: what a uint8 tensor holds, of ``LAYOUTS``; None where tensors are of a dtype to compute with.
        """
        self.fault = fault
        self.flips = fault.flips
        self.persistent = fault.persistent
        self.decoder = fault.pattern is not None and fault.pattern.protection != "none"
        if guard is None and fault.zero_out_t is not None:
            guard = guard_of(fault.zero_out_t)
        self.guarded = guard is not None
        self.thresholds = 0 if guard is None else guard.numel()
        self.one = None if guard is None or guard.numel() > 1 else float(guard)
        self._limits: dict[torch.dtype, Tensor] = {}
        self._rates: dict[torch.dtype, Tensor] = {} if element is None else {torch.uint8: rates_of(fault, element)}
        for dtype in DTYPES:  # all of them now, since what is compiled cannot make more
            if guard is not None:
                self._limits[dtype] = limits_of(guard, dtype)
            with suppress(ValueError):  # a dtype without the bits that the fault names
                self._rates[dtype] = rates_of(fault, dtype)

    @property
    def active(self) -> bool:
        return self.flips or self.guarded

    def move_to(self, device: torch.device) -> None:
        """Keep limits by channel where they are needed."""
        if self.thresholds > 1:
            self._limits = {dtype: limits.to(device) for dtype, limits in self._limits.items()}

    def draw(self, key: Tensor, tick: Tensor, offset: int, x: Tensor, flips: bool = True, guard: bool = True) -> Draw:
        """The draw of a tensor, with ``flips`` and ``guard`` on or off."""
        limits = self._limits.get(x.dtype) if guard else None
        if limits is not None and self.thresholds > 1:
            limits = limits.to(x.device)
        if not (flips and self.flips):
            return Draw(NO_RATES, limits, key, tick, offset, flips=False)
        rates = self._rates[x.dtype] if x.dtype in self._rates else rates_of(self.fault, x.dtype)
        return Draw(rates, limits, key, tick, offset, True, self.decoder)

    def key_of_run(self, key: Tensor, run: int) -> Tensor:
        """The key of a module's ``run``-th run in a pass, counted from 0."""
        if run == 0 or self.persistent:
            return key
        return key + ((run * _NEXT_RUN + 2**63) % 2**64 - 2**63)  # as a signed integer; the sum wraps around

    def __repr__(self) -> str:
        if not self.active:
            return "clean"
        fault = self.fault
        pattern = f", {fault.pattern}" if fault.pattern else ""
        t = f"{self.thresholds:,} thresholds" if self.thresholds > 1 else self.one
        return f"(p_exp={fault.p_exp:.3g}, p_frac={fault.p_frac:.3g}, zero_out_t={t}{pattern})"


def run_name(run: int) -> str:
    return f"#{run + 1}" if run else ""
