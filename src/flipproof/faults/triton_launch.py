"""The flip on a GPU: which kernel of ``triton_kernels.py``, ``triton_merge.py`` or ``triton_dequantise.py`` to launch,
with what. The same functions as ``cpu.py``, of the same tensors: numbers, and bytes of codes and scales, which have no
guard."""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from flipproof.faults import triton_dequantise as dequantising
from flipproof.faults import triton_kernels as kernels
from flipproof.faults import triton_merge as merging
from flipproof.faults.cpu import zeroed_correction_dense
from flipproof.faults.draw import Draw
from flipproof.faults.guard import channels_of, guard_
from flipproof.faults.layouts import Layout
from flipproof.faults.poisson import BLOCK, BLOCK_LOG2, flip_plan
from flipproof.faults.triton_compiled import INTERPRETED, launch
from flipproof.formats.codes import numbers
from flipproof.formats.spec import Format

_WORDS = 256
"""Of marks to a program."""


class _DevicePlan(NamedTuple):
    """A ``FlipPlan`` as the kernels take it."""

    table: Tensor
    """int64: the CDF of the exponent field, that of the mantissa field, the lane masks of the dense digits and
    coins."""
    n_exp: int
    n_frac: int
    steps: int
    digits: int
    coin: bool
    bits: int
    """Of an element, the real ones."""
    mantissa: int
    likely_balls: int

    @property
    def dense(self) -> bool:
        return self.digits > 0 or self.coin

    @property
    def sparse(self) -> bool:
        return self.n_exp + self.n_frac > 0


@cache  # without bound: a CUDA graph may hold the table's address
def _device_plan(element: torch.dtype | Layout, p_exp: float, p_frac: float, device: torch.device) -> _DevicePlan:
    plan = flip_plan(element, p_exp, p_frac)
    exp, frac = ([] if field.cdf is None else field.cdf.tolist() for field in (plan.exponent, plan.mantissa))
    table = torch.tensor([*exp, *frac, *plan.digits, plan.coins], dtype=torch.int64).to(device)
    steps = max(len(exp), len(frac)).bit_length()
    digits, bits = (len(plan.digits), plan.coins != 0), (plan.element_bits, plan.exponent.first_bit)
    return _DevicePlan(table, len(exp), len(frac), steps, *digits, *bits, plan.likely_balls)


def _plan_of(draw: Draw, y: Tensor) -> _DevicePlan:
    rates = draw.drawn()
    return _device_plan(rates.layout or y.dtype, rates.p_exp, rates.p_frac, y.device)


class _Guard(NamedTuple):
    """A guard as the kernels take it."""

    limit: Tensor | int
    """That of all, or those of the channels."""
    period: int = 1
    by: str = ""
    """"", "feature" or "row"."""


def _guard_of(limits: Tensor | None, shape: torch.Size) -> _Guard:
    """The guard of these limits for a tensor of this shape; without one the limit is 0."""
    if limits is None:
        return _Guard(0)
    if limits.dim() == 0:
        return _Guard(int(limits))
    channels, inner = channels_of(limits, shape)
    by_row = limits.shape[-1] == 1 and channels * inner == shape.numel()
    return _Guard(limits.contiguous(), inner if by_row else channels, "row" if by_row else "feature")


def _value(number: Tensor) -> Tensor | int:
    """A number that is in CPU memory goes along with the launch; the interpreter takes it from where it is, since it
    does not get numbers from 2^31 to 2^32 right."""
    return int(number) if number.device.type == "cpu" and not INTERPRETED else number


def _blocks(n: int, offset: int) -> range:
    """The blocks of n elements from ``offset``."""
    return range(offset >> BLOCK_LOG2, ((offset + n - 1) >> BLOCK_LOG2) + 1)


def _odd(y: Tensor) -> int:
    """How many elements of the 32-bit word in which a tensor begins lie before it."""
    return (y.data_ptr() & 3) // y.dtype.itemsize


# -- flips ------------------------------------------------------------------------------------------------------------


def flip(x: Tensor, grad: Tensor | None, draw: Draw) -> Tensor:
    """guard(flip(x)) as a contiguous tensor; ``grad``, contiguous and of x's shape, becomes 0 where the guard zeroed.
    The other arguments are those of ``flip_into``."""
    dense = x.contiguous()
    y = torch.empty_like(x) if dense is x else dense
    flip_into(y, dense, grad, draw)
    return y


def flip_(x: Tensor, grad: Tensor | None, draw: Draw) -> None:
    """x <- guard(flip(x)), contiguous x; the other arguments are those of ``flip``."""
    flip_into(x, x, grad, draw)


def flip_marked(x: Tensor, zeroed: Tensor, draw: Draw) -> Tensor:
    """``flip``; ``zeroed`` is as ``new_marks`` made it and then says what the guard zeroed."""
    dense = x.contiguous()
    y = torch.empty_like(x) if dense is x else dense
    if _plan_of(draw, y).dense:
        kept = torch.ones_like(y, dtype=torch.bool)
        flip_into(y, dense, kept, draw)
        _pack(kept.logical_not_(), zeroed)
    else:
        flip_into(y, dense, None, draw, zeroed)
    return y


def zero_marked_(zeroed: Tensor, grad: Tensor) -> None:
    """grad <- 0 where ``flip_marked`` says; contiguous ``grad``."""
    if grad.numel():
        programs = triton.cdiv(zeroed.numel(), _WORDS)
        launch(kernels.zero_marked_, programs, 4, (zeroed, grad, grad.numel()), (_WORDS,))


def new_marks(x: Tensor) -> Tensor:
    """Room for which elements of ``x`` the guard zeroed, int32: a bit for each."""
    return torch.zeros(triton.cdiv(x.numel(), 32), dtype=torch.int32, device=x.device)


def flip_into(
    y: Tensor,
    x: Tensor,
    grad: Tensor | None,
    draw: Draw,
    zeroed: Tensor | None = None,
    blocks: range | None = None,
    lanes: int | None = None,
) -> None:
    """y <- guard(flip(x)), both contiguous, or one tensor. Tests choose the blocks and the number of lanes.

    ``zeroed``, where given and digits are not dense, gets the bits set of what the guard zeroes.
    """
    key, tick, offset = draw.key, draw.tick, draw.offset
    n = y.numel()
    if n == 0:
        return
    plan = _plan_of(draw, y)
    blocks = blocks or _blocks(n, offset)
    if y is x and not (draw.limits is not None or plan.dense):
        if plan.sparse:
            flip_sparse_(y, plan, None, draw, blocks)
        return
    guard = _guard_of(draw.limits, y.shape)
    grad = None if draw.limits is None else grad
    if grad is not None and grad.dtype == torch.bool:
        grad = grad.view(torch.uint8)
    launch(
        kernels.flip_block,
        len(blocks),
        4 if plan.dense else 8,
        (
            x,
            y,
            y if grad is None else grad,
            _value(key),
            _value(tick),
            plan.table,
            plan.n_exp,
            plan.n_frac,
            plan.steps,
            plan.digits,
            guard.limit,
            guard.period,
            _odd(y),
            n,
            offset,
            blocks.start,
            plan.table if zeroed is None else zeroed,
        ),
        (
            plan.bits,
            plan.mantissa,
            lanes or (128 if plan.dense else 256),
            plan.dense,
            plan.coin,
            plan.sparse,
            y is not x,  # COPY
            draw.limits is not None,
            grad is not None,
            zeroed is not None,  # MARK
            guard.by,
            guard.period >= BLOCK,
            guard.period % 8 == 0 and offset % 8 == 0,
        ),
        # so few registers that enough blocks share a multiprocessor for one's memory to hide another's arithmetic
        **({"maxnreg": 80 if plan.dense or guard.by else 48} if y.dtype.itemsize <= 2 else {}),
    )


class _Far(NamedTuple):
    """Where the merged weight holds values out of the guard's range, by program of the merge."""

    guard: "_Guard"
    programs: Tensor
    columns: int
    tile_columns: int
    zeroed: Tensor | None
    """Where to list what the guard zeroes, as ``new_zeroed`` made it."""


def flip_sparse_(
    y: Tensor,
    plan: _DevicePlan,
    far: _Far | None,
    draw: Draw,
    blocks: range | None = None,
) -> None:
    """y <- flip(y), contiguous y, a plan without dense digits; guarded where ``far`` is given."""
    blocks = blocks or _blocks(y.numel(), draw.offset)
    lanes = 8 if plan.likely_balls <= 32 else 16 if plan.likely_balls <= 128 else 64
    group = 128 // lanes
    zeroed = far.zeroed if far else None
    launch(
        kernels.flip_sparse_,
        triton.cdiv(len(blocks), group),
        4,
        (
            y,
            _value(draw.key),
            _value(draw.tick),
            plan.table,
            plan.n_exp,
            plan.n_frac,
            plan.steps,
            far.guard.limit if far else 0,
            _odd(y),
            y.numel(),
            draw.offset,
            blocks.start,
            len(blocks),
            far.programs if far else y,
            far.columns if far else 1,
            far.tile_columns if far else 1,
            plan.table if zeroed is None else zeroed,
            0 if zeroed is None else zeroed.numel() - 1,
        ),
        (
            *(plan.bits, plan.mantissa, group, lanes, far is not None, _TILES * _TILE_ROWS, zeroed is not None),
            far.guard.by if far else "",
            far is not None and far.columns >= BLOCK,
        ),
    )


# -- weights of codes and scales ---------------------------------------------------------------------------------------

_TILE = 1024


@cache  # without bound: a CUDA graph may hold the table's address
def _numbers(code: str, bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What each pattern stands for."""
    return numbers(torch.arange(2**bits, dtype=torch.uint8), code, dtype).to(device)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """Codes of 4 bits, (rows, columns) uint8, of two in each byte of a row."""
    packed = packed.contiguous()
    codes = packed.new_empty(len(packed), 2 * packed.shape[1])
    launch(dequantising.unpack, triton.cdiv(packed.numel(), _TILE), 4, (packed, codes, packed.numel()), (_TILE,))
    return codes[:, :columns].contiguous()


def dequantise(
    code: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    g_idx: Tensor | None,
    limits: Tensor | None,
    format: Format,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """guard(code · scale), (rows, columns); the arguments are those of ``cpu.dequantise``."""
    y = torch.empty(len(code), columns, dtype=dtype, device=code.device)
    guard = _guard_of(limits, y.shape)
    fused = limits is not None and guard.by != "feature"
    looked_up = format.code != "int"
    table = _numbers(format.code, format.bits, scale.dtype, code.device) if looked_up else scale
    code, scale = code.contiguous(), scale.contiguous()
    launch(
        dequantising.dequantise,
        len(code) * triton.cdiv(columns, _TILE),
        4,
        (
            code,
            table,
            scale,
            scale if zero is None else zero.contiguous(),
            code if g_idx is None else g_idx,
            y,
            guard.limit if fused else 0,
            columns,
            code.shape[1],
            scale.shape[-1],
        ),
        (
            *(looked_up, zero is not None, 2 ** (format.bits - 1), code.shape[1] != columns),
            *(format.group or 0, g_idx is not None, fused, guard.by, _TILE),
        ),
    )
    if limits is not None and not fused:
        guard_(y, limits)
    return y


# -- the merged weight ----------------------------------------------------------------------------------------------

_TILE_ROWS, _TILE_COLUMNS = 64, 64
_TILES = 8
"""Tiles to a program."""
_STAGES = 3
_MAX_RANK = 128
"""Adapters of a larger rank do not fit beside a tile in every GPU's shared memory; torch merges them."""
_MAX_LISTED = 1 / 256
"""Share of the weights up to which those that flips may have zeroed are listed; beyond it, one by one costs more than
the full gradient."""


def merge(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    zeroed: Tensor | None,
    draw: Draw,
) -> Tensor:
    """guard(flip(W + scaling·B·A)) in W's dtype: weight (rows, columns), lora_A (r, columns), lora_B (rows, r),
    float32.

    ``zeroed``, where given, is as ``new_zeroed`` made it and then says what the guard zeroed.
    """
    weight, lora_A, lora_B = weight.contiguous(), lora_A.contiguous(), lora_B.contiguous()
    rows, columns = weight.shape
    y = torch.empty_like(weight)
    if y.numel() == 0:
        if zeroed is not None:
            zeroed.zero_()
        return y
    plan, guard, guarded = _plan_of(draw, y), _guard_of(draw.limits, y.shape), draw.limits is not None
    masked = zeroed is not None and _as_mask(weight.dtype, draw.rates)
    whole = plan.dense or masked  # every element is looked at again
    tile_columns = triton.cdiv(columns, _TILE_COLUMNS)
    programs = triton.cdiv(rows, _TILE_ROWS * _TILES) * tile_columns
    r_tile = max(16, triton.next_power_of_2(lora_A.shape[0]))
    tiled = r_tile <= _MAX_RANK
    far = None
    if guarded and not whole and (plan.sparse or zeroed is not None or not tiled):
        # of a product that torch makes nobody says what it holds, so all of it counts as out of range
        programs_far = (torch.empty if tiled else torch.ones)(programs, dtype=torch.int8, device=y.device)
        far = _Far(guard, programs_far, columns, tile_columns, zeroed)
    listed = far is not None and zeroed is not None
    if tiled:
        launch(
            merging.merge_tiles,
            programs,
            4,
            (
                weight,
                lora_A,
                lora_B,
                y,
                far.programs if far else y,
                zeroed if listed else plan.table,
                scaling,
                guard.limit,
                rows,
                columns,
                lora_A.shape[0],
            ),
            (
                _TILE_ROWS,
                _TILE_COLUMNS,
                r_tile,
                _TILES,
                _STAGES if r_tile <= 64 else 1,  # shared memory holds them
                far is not None,
                guarded and not (plan.sparse or whole or far),
                listed,
                weight.dtype != torch.float32 and not INTERPRETED,  # the interpreter cannot multiply bfloat16
                guard.by,
            ),
        )
    else:
        y = torch.addmm(weight.float(), lora_B.float(), lora_A.float(), alpha=scaling).to(weight.dtype)
        if zeroed is not None and listed:
            zeroed[:1].zero_()
    if whole:
        kept = torch.ones_like(y, dtype=torch.bool) if masked else None
        flip_(y, kept, draw)
        if zeroed is not None and kept is not None:
            _pack(kept.logical_not_(), zeroed)
    elif far or plan.sparse:
        flip_sparse_(y, plan, far, draw)
    return y


def new_zeroed(weight: Tensor) -> Tensor:
    """Room for which elements of a weight the guard zeroed, int64: a list (its length first) where flips are few, else
    a bit for each element. Its size does not depend on the rates, which a compiled graph does not know.

    The list has room for every element that flips can send out of range, and then some. If a threshold lies so deep in
    the clean weights' range that it overflows (4096 and 1/64 of all), the gradient passes straight through.
    """
    return torch.empty(1 + 4096 + triton.cdiv(weight.numel(), 64), dtype=torch.int64, device=weight.device)


def _as_mask(dtype: torch.dtype, rates: Tensor) -> bool:
    """Whether flips are so many that what the guard zeroes is not listed."""
    return dtype.itemsize * 8 * float(rates[:2].max()) > _MAX_LISTED


def _pack(mask: Tensor, zeroed: Tensor) -> None:
    """Write a mask into what ``new_zeroed`` or ``new_marks`` made, a bit for each element."""
    flat = F.pad(mask.flatten(), (0, -mask.numel() % 8)).view(-1, 8)
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    packed = (flat.to(torch.uint8) << places).sum(1, dtype=torch.uint8)
    zeroed.view(torch.uint8)[: len(packed)] = packed


def _unpacked(zeroed: Tensor, shape: tuple[int, int]) -> Tensor:
    """The mask again."""
    rows, columns = shape
    packed = zeroed.view(torch.uint8)[: triton.cdiv(rows * columns, 8), None]
    places = torch.arange(8, dtype=torch.uint8, device=zeroed.device)
    return (packed >> places & 1).bool().view(-1)[: rows * columns].view(shape)


_ENTRIES, _CHUNK, _CHUNKS = 16, 32, 8


def zeroed_correction(
    zeroed: Tensor, rates: Tensor, grad_y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """What to add to dA = scaling·Bᵀ·dW and dB = scaling·dW·Aᵀ, dW = dYᵀ·X, to make dW 0 at the ``zeroed`` positions.

    grad_y (n, out), x (n, in), lora_A (r, in) and lora_B (out, r); returns float64 of the adapters' shapes.
    """
    if zeroed.dtype == torch.bool or _as_mask(x.dtype, rates):
        mask = zeroed if zeroed.dtype == torch.bool else _unpacked(zeroed, (lora_B.shape[0], lora_A.shape[1]))
        return zeroed_correction_dense(mask, grad_y, x, lora_A, lora_B, scaling)
    grad_y, x = grad_y.contiguous(), x.contiguous()
    more = torch.zeros(lora_A.numel() + lora_B.numel(), dtype=torch.float64, device=x.device)
    more_A, more_B = more[: lora_A.numel()].view(lora_A.shape), more[lora_A.numel() :].view(lora_B.shape)
    launch(
        merging.zeroed_correction,
        1024,
        4,
        (
            zeroed,
            zeroed.numel() - 1,
            grad_y,
            x,
            lora_A.contiguous(),
            lora_B.contiguous(),
            more_A,
            more_B,
            scaling,
            grad_y.shape[0],
            grad_y.shape[1],
            x.shape[1],
            lora_A.shape[0],
        ),
        (_ENTRIES, _CHUNK, _CHUNKS, triton.next_power_of_2(lora_A.shape[0])),
    )
    return more_A, more_B
