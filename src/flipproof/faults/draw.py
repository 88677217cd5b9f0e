"""A draw: what is to happen to a tensor, and the key, tick and offset that say which random numbers decide it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flipproof.faults.dtypes import dtype_name
from flipproof.faults.spec import Fault, Stored

_NEXT_RUN = 0x9E3779B97F4A7C15


class Draw(NamedTuple):
    """All that a flip needs beside its tensor."""

    p_exp: float
    p_frac: float
    zero_out_t: float | None
    key: Tensor
    """() int64, of ``philox.derive_key``."""
    tick: Tensor
    """() int64."""
    offset: int
    """Index of the tensor's first element in the whole tensor."""
    stored: Stored | None = None
    """None: flips are independent, and new at each tick."""

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As the operators take them, whose last ones are left out where flips are independent."""
        return (*self[:6], *(self.stored or ()))

    @classmethod
    def of(cls, arguments: tuple[Any, ...]) -> "Draw":
        """What ``arguments`` were of. The dispatcher leaves out last ones that are the default."""
        fault, given = arguments[:6], arguments[6:]
        stored = Stored(tuple(given[0]), *given[1:]) if given and given[0] else None
        return tuple.__new__(cls, (*fault, stored))  # what NamedTuple's own way adds to each call is microseconds

    @property
    def active(self) -> bool:
        """Whether it may change anything."""
        return self.p_exp > 0 or self.p_frac > 0 or self.stored is not None or self.zero_out_t is not None

    def of_nothing(self) -> "Draw":
        """Without flips, guard and protection: for operators that do something else besides."""
        return self._replace(p_exp=0.0, p_frac=0.0, zero_out_t=None, stored=None)

    @property
    def zeroes(self) -> bool:
        """Whether values may become 0, which stops their gradient."""
        return self.zero_out_t is not None or self.decoder

    @property
    def decoder(self) -> bool:
        """Whether a protection has a decoder, which zeroes what it cannot mend."""
        return self.stored is not None and self.stored.protection != "none"


def draw_of(fault: Fault, key: Tensor, tick: Tensor, offset: int, dtype: torch.dtype) -> Draw:
    """The draw of a fault for a tensor of ``dtype``."""
    stored = fault.stored(dtype_name(dtype)) if fault.pattern else None
    return Draw(fault.p_exp, fault.p_frac, fault.zero_out_t, key, tick, offset, stored)


def key_of_run(key: Tensor, fault: Fault, run: int) -> Tensor:
    """The key of a module's ``run``-th run in a pass, counted from 0."""
    if run == 0 or fault.persistent:
        return key
    return key + ((run * _NEXT_RUN + 2**63) % 2**64 - 2**63)  # as a signed integer; the sum wraps around


def run_name(run: int) -> str:
    return f"#{run + 1}" if run else ""
