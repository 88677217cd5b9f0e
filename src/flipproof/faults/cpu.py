"""The definition of a flip in NumPy, which is also the CPU path. Other backends must equal it bit for bit.

``poisson.py`` explains the algorithm and ``philox.py`` the counters; here they are carried out, blocks in chunks so
that temporary memory stays bounded whatever the size of the tensor.
"""

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Any

import numpy as np
import torch

from flipproof.faults.draw import Draw
from flipproof.faults.dtypes import INTEGERS
from flipproof.faults.guard import channels_of, guard_, magnitude_bits
from flipproof.faults.philox import BALLS, COINS, COUNTS, DIGITS, MAX_BLOCK, Words, check_tick, counter, philox
from flipproof.faults.poisson import BLOCK, BLOCK_LOG2, FlipPlan, flip_plan
from flipproof.formats.fields import from_bytes
from flipproof.formats.quantise import multiplied
from flipproof.formats.spec import Format

_CHUNK_BALLS = 1 << 14  # temporaries of one chunk stay in the cache
_CHUNK_DENSE_BLOCKS = 32


def flip(x: torch.Tensor, grad: torch.Tensor | None, draw: Draw) -> torch.Tensor:
    """guard(flip(x)) as a contiguous tensor; the arguments are those of ``flip_``."""
    y = x.clone(memory_format=torch.contiguous_format)
    flip_(y, grad, draw)
    return y


def flip_(x: torch.Tensor, grad: torch.Tensor | None, draw: Draw) -> None:
    """Invert bits of a contiguous CPU tensor in place, then guard it; one of uint8 has no guard.

    ``grad``, where given, is a contiguous tensor of the same shape that becomes 0 where the guard zeroed the value.
    """
    limits, offset = draw.limits, draw.offset
    key_number, tick_number = int(draw.key), int(draw.tick)
    check_tick(tick_number)
    if offset < 0 or (offset + x.numel()) >> BLOCK_LOG2 >= MAX_BLOCK:
        raise ValueError(f"offset = {offset}: an element's index runs from 0 to 2^61 - 1")
    if x.numel() == 0:
        return
    rates = draw.drawn()
    plan = flip_plan(rates.layout or x.dtype, rates.p_exp, rates.p_frac)
    channels, inner = (1, 1) if limits is None else channels_of(limits, x.shape)
    flat = x.detach().view(-1)
    bits = flat.view(INTEGERS[x.dtype]).numpy().view(plan.unsigned)
    in_range = limits is not None and not plan.dense and _all_below(x.detach(), limits)
    flipped = flip_bits_(bits, plan, key_number, tick_number, offset)
    if limits is None:
        return
    if not in_range:
        guard_(x.detach(), limits, grad)
        return
    # Nothing was out of range before, so only what was flipped can be now.
    limit = limits.reshape(-1).numpy()
    magnitude = plan.unsigned(2 ** (plan.element_bits - 1) - 1)
    for index in flipped:
        its_limit = limit[0] if channels == 1 else limit[index // inner % channels]
        out = index[(bits[index] & magnitude) >= its_limit]
        bits[out] = 0
        if grad is not None:
            grad.view(-1).index_fill_(0, torch.from_numpy(out), 0)


def merge(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    zeroed: torch.Tensor | None,
    draw: Draw,
) -> torch.Tensor:
    """guard(flip(W + scaling·B·A)) in W's dtype, the product in the adapters'.

    weight (out, in), lora_A (r, in), lora_B (out, r). ``zeroed``, where given, is as ``new_zeroed`` made it and then
    says what the guard zeroed.
    """
    return merge_by(flip_, weight, lora_A, lora_B, scaling, zeroed, draw)


def merge_by(
    flip_in_place: Callable[..., None],
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    zeroed: torch.Tensor | None,
    draw: Draw,
) -> torch.Tensor:
    """``merge`` on any device, with what flips there."""
    with torch.autocast(weight.device.type, enabled=False):  # which forward may run in, but not backward
        y = torch.addmm(weight.to(lora_A.dtype), lora_B, lora_A, alpha=scaling).to(weight.dtype)
    if zeroed is None:
        flip_in_place(y, None, draw)
    else:
        flip_marked_by_(flip_in_place, y, zeroed, draw)
    return y


def unpack(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Codes of 4 bits, (rows, columns) uint8, of two in each byte of a row, the first in its low half."""
    return from_bytes(packed, 4)[:, :columns].contiguous()


def dequantise(
    code: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    g_idx: torch.Tensor | None,
    limits: torch.Tensor | None,
    format: Format,
    columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """guard(code · scale), (rows, columns) of ``dtype``: ``formats.quantise.multiplied``, whose arguments the first
    are, of codes a byte each, (rows, columns), or of 4 bits packed as ``unpack`` has them."""
    codes = code if code.shape[1] == columns else unpack(code, columns)
    weight = multiplied(codes, scale, zero, g_idx, format, dtype)
    if limits is not None:
        guard_(weight, limits)
    return weight


def flip_marked(x: torch.Tensor, zeroed: torch.Tensor, draw: Draw) -> torch.Tensor:
    """``flip``; ``zeroed`` is as ``new_marks`` made it and then says what the guard zeroed."""
    y = x.clone(memory_format=torch.contiguous_format)
    flip_marked_by_(flip_, y, zeroed, draw)
    return y


def flip_marked_by_(flip_in_place: Callable[..., None], x: torch.Tensor, zeroed: torch.Tensor, draw: Draw) -> None:
    """``flip_marked`` in place and on any device, with what flips there; ``zeroed`` is a mask."""
    kept = torch.ones_like(zeroed)
    flip_in_place(x, kept, draw)
    torch.logical_not(kept, out=zeroed)


def new_zeroed(x: torch.Tensor) -> torch.Tensor:
    """Room for which elements of ``x`` the guard zeroed: here a mask."""
    return torch.zeros(x.shape, dtype=torch.bool, device=x.device)


new_marks = new_zeroed  # a GPU keeps the two differently


def zeroed_correction(
    zeroed: torch.Tensor,
    _rates: torch.Tensor,
    grad_y: torch.Tensor,
    x: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What to add to dA = scaling·Bᵀ·dW and dB = scaling·dW·Aᵀ, dW = dYᵀ·X, to make dW 0 at the ``zeroed`` positions.

    grad_y (n, out), x (n, in), lora_A (r, in) and lora_B (out, r); returns float64 of the adapters' shapes.
    """
    out, column = zeroed.nonzero(as_tuple=True)
    if len(out) > sum(zeroed.shape) // 4:  # dearer one by one than all at once
        return zeroed_correction_dense(zeroed, grad_y, x, lora_A, lora_B, scaling)
    more_A, more_B = (torch.zeros_like(adapter, dtype=torch.float64) for adapter in (lora_A, lora_B))
    for o, i in zip(out.split(256), column.split(256), strict=True):  # the gathered columns stay small
        g = torch.linalg.vecdot(grad_y[:, o].T, x[:, i].T).double() * -scaling  # (zeroed,)
        more_A.index_add_(1, i, lora_B[o].T * g)
        more_B.index_add_(0, o, lora_A[:, i].T * g[:, None])
    return more_A, more_B


def zeroed_correction_dense(
    zeroed: torch.Tensor,
    grad_y: torch.Tensor,
    x: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``zeroed_correction`` by the full gradient of the weight, on any device; ``zeroed`` is a mask."""
    full = (grad_y.T @ x).masked_fill_(~zeroed, 0).to(lora_A.dtype)
    return (lora_B.T @ full).double() * -scaling, (full @ lora_A.T).double() * -scaling


def _all_below(x: torch.Tensor, limits: torch.Tensor) -> bool:
    if limits.dim():
        return bool((magnitude_bits(x) < limits).all())
    low, high = torch.aminmax(x)  # NaN makes both NaN, which is below nothing
    t = float(limits.view(x.dtype))
    return -float(low) < t and float(high) < t


def flip_bits_(bits: np.ndarray, plan: FlipPlan, key: int, tick: int, offset: int) -> list[np.ndarray]:
    """Invert bits of the elements' bit patterns, a 1-D unsigned array; returns the indices that balls hit."""
    first = offset >> BLOCK_LOG2
    last = (offset + len(bits) - 1) >> BLOCK_LOG2
    if plan.dense:
        for start in range(first, last + 1, _CHUNK_DENSE_BLOCKS):
            blocks = np.arange(start, min(start + _CHUNK_DENSE_BLOCKS, last + 1))
            _apply_dense(bits, dense_masks(plan, blocks, key, tick), start, offset)
    if not plan.sparse:
        return []
    hit = []
    step = max(1, _CHUNK_BALLS // (1 + plan.likely_balls))
    for start in range(first, last + 1, step):
        name = (plan, key, tick, offset, len(bits), start)
        draw = _recent_draws.get(name)
        if draw is None:
            blocks = np.arange(start, min(start + step, last + 1))
            draw = sparse_flips(plan, blocks, key, tick, offset, len(bits))
            _recent_draws.put(name, draw)
        index, mask = draw
        np.bitwise_xor.at(bits, index, mask)
        hit.append(index)
    return hit


def _apply_dense(bits: np.ndarray, masks: np.ndarray, first_block: int, offset: int) -> None:
    """XOR the masks of consecutive whole blocks into the part of them that ``bits`` holds."""
    begin = first_block * BLOCK - offset  # where the first block starts in bits, negative if before it
    flat = masks.reshape(-1)
    low, high = max(begin, 0), min(begin + len(flat), len(bits))
    bits[low:high] ^= flat[low - begin : high - begin]


def dense_masks(plan: FlipPlan, blocks: np.ndarray, key: int, tick: int) -> np.ndarray:
    """Bits to invert by the dense digits: (len(blocks), 8192), unsigned, as wide as an element."""
    groups = np.arange(BLOCK * plan.element_bits // 128)  # (G,)
    words = [np.zeros((len(blocks), len(groups)), dtype=np.uint64) for _ in range(4)]
    for i in reversed(range(len(plan.digits))):
        digit = np.uint64(plan.digits[i])
        uniform = philox(*counter(np.array(DIGITS), i << 16 | groups, blocks[:, None], tick), key)
        for c in range(4):
            # majority(u, b, d): u OR b where the digit is 1, u AND b where it is 0
            words[c] = uniform[c] & words[c] | digit & (uniform[c] | words[c])
    if plan.coins:
        coins = np.uint64(plan.coins)
        uniform = philox(*counter(np.array(COINS), groups, blocks[:, None], tick), key)
        words = [coin & ~word & coins | word & ~coins for coin, word in zip(uniform, words, strict=True)]
    masks = np.stack(words, axis=1).astype("<u4").view(plan.unsigned)  # (blocks, 4, …): a block's words in order
    if plan.element_bits == 4:
        masks = np.stack([masks & 15, masks >> 4], axis=-1)
    return masks.reshape(len(blocks), BLOCK)


def ball_counts(plan: FlipPlan, words: Words) -> tuple[np.ndarray, np.ndarray]:
    """(K of the exponent field, K of the mantissa field), int64 of the shape of each of the four COUNTS words."""
    w0, w1, w2, w3 = words
    counts = []
    for field, low, high in ((plan.exponent, w0, w1), (plan.mantissa, w2, w3)):
        if field.cdf is None:
            counts.append(np.zeros(low.shape, dtype=np.int64))
        else:
            uniform = ((high << np.uint64(32) | low) >> np.uint64(1)).astype(np.int64)
            counts.append(np.searchsorted(field.cdf, uniform, side="right"))
    return counts[0], counts[1]


def sparse_flips(
    plan: FlipPlan, blocks: np.ndarray, key: int, tick: int, offset: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """(indices, one-bit masks) of the balls of ``blocks`` that fall into [offset, offset + length), counted from
    offset.

    An index may come more than once.
    """
    # Counts and balls in one call, since calls cost most: each block gets as many balls as are likely enough for the
    # busiest one, and those beyond its count are dropped. A rectangle needs no bookkeeping.
    guess = plan.likely_balls
    purpose = np.array([COUNTS] + [BALLS] * guess)
    number = np.array([0, *range(guess)])
    words = philox(*counter(purpose, number, blocks[:, None], tick), key)  # (blocks, 1 + guess)
    both_counts = ball_counts(plan, (words[0][:, 0], words[1][:, 0], words[2][:, 0], words[3][:, 0]))
    balls = [word[:, 1:] for word in words]
    most = int(np.maximum(*both_counts).max())
    if most > guess:
        more = philox(*counter(np.array(BALLS), np.arange(guess, most), blocks[:, None], tick), key)
        balls = [np.concatenate(pair, axis=1) for pair in zip(balls, more, strict=True)]
    ball = np.arange(balls[0].shape[1])
    start = blocks[:, None] * BLOCK - offset
    indices, masks = [], []
    for field, counts, where, what in zip(
        (plan.exponent, plan.mantissa), both_counts, balls[::2], balls[1::2], strict=True
    ):
        thrown = ball < counts[:, None]
        element = (where >> np.uint64(32 - BLOCK_LOG2)).view(np.int64)
        index = (start + element)[thrown]
        bit = what[thrown] * np.uint64(field.bits) >> np.uint64(32)
        mask = (np.uint64(1 << field.first_bit) << bit).astype(plan.unsigned)
        if plan.coins >> field.first_bit & 1:
            mask &= _coins(plan, np.broadcast_to(blocks[:, None], thrown.shape)[thrown], element[thrown], key, tick)
        if start[0] < 0 or start[-1] + BLOCK > length:
            inside = (index >= 0) & (index < length)
            index, mask = index[inside], mask[inside]
        indices.append(index)
        masks.append(mask)
    return np.concatenate(indices), np.concatenate(masks)


def _coins(plan: FlipPlan, block: np.ndarray, element: np.ndarray, key: int, tick: int) -> np.ndarray:
    """The coins for all bits of single elements, given by block and position in it."""
    lanes = 32 // plan.element_bits
    word, lane = np.divmod(element, lanes)
    c, group = np.divmod(word, BLOCK // lanes // 4)
    words = np.choose(c, philox(*counter(np.array(COINS), group, block, tick), key))
    return (words >> (lane * plan.element_bits).astype(np.uint64)).astype(plan.unsigned)


class _RecentDraws:
    """Sparse draws of late, so many at most and with so many bytes of flips. A draw is a function of its key, so this
    changes nothing but time: backward finds the draw of its forward, and a persistent fault that of the pass before."""

    def __init__(self, entries: int, capacity: int) -> None:
        self.entries, self.capacity, self.size = entries, capacity, 0
        self.draws: OrderedDict[tuple[Any, ...], tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self.lock = Lock()

    def get(self, name: tuple[Any, ...]) -> tuple[np.ndarray, np.ndarray] | None:
        with self.lock:
            if name in self.draws:
                self.draws.move_to_end(name)
            return self.draws.get(name)

    def put(self, name: tuple[Any, ...], draw: tuple[np.ndarray, np.ndarray]) -> None:
        with self.lock:
            if self._bytes(draw) > self.capacity or name in self.draws:
                return
            self.draws[name] = draw
            self.size += self._bytes(draw)
            while self.size > self.capacity or len(self.draws) > self.entries:
                self.size -= self._bytes(self.draws.popitem(last=False)[1])

    @staticmethod
    def _bytes(draw: tuple[np.ndarray, np.ndarray]) -> int:
        return sum(array.nbytes for array in draw)


# a forward pass of a model that a CPU trains has some hundred draws; without a flip each takes about 1 KiB all the same
_recent_draws = _RecentDraws(entries=4096, capacity=64 * 2**20)
