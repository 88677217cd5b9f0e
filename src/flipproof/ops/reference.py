"""The definition of a flip in NumPy, which is also the CPU path. Other backends must equal it bit for bit.

``parity.py`` explains the algorithm and ``philox.py`` the counters; here they are carried out, blocks in chunks so
that temporary memory stays bounded whatever the size of the tensor.
"""

import numpy as np
import torch

from flipproof.ops.parity import BLOCK, BLOCK_LOG2, FlipPlan, flip_plan, guard_bits, magnitude_bits
from flipproof.ops.philox import BALLS, COUNTS, DIGITS, MAX_BLOCK, MAX_TICK, counter, philox

_CHUNK_BLOCKS = 16384  # counts of one chunk: a few MB of temporaries
_CHUNK_BALLS = 1 << 14  # so do sparse ones
_CHUNK_DENSE_BLOCKS = 32  # dense temporaries of one chunk stay in the cache
_CHUNK_GUARD = 1 << 18


def flip_(x: torch.Tensor, p_exp: float, p_frac: float, key: int, tick: int, offset: int) -> None:
    """Invert bits of a contiguous CPU tensor in place. ``offset`` is its first element's index in the whole tensor."""
    if x.numel() == 0 or (p_exp == 0 and p_frac == 0):
        return
    if not 0 <= tick < MAX_TICK:
        raise ValueError(f"tick = {tick}: ticks run from 0 to 2^48 - 1")
    if offset < 0 or (offset + x.numel()) >> BLOCK_LOG2 >= MAX_BLOCK:
        raise ValueError(f"offset = {offset}: an element's index runs from 0 to 2^61 - 1")
    plan = flip_plan(x.dtype, p_exp, p_frac)
    integers = x.detach().view(torch.int32 if plan.element_bits == 32 else torch.int16)
    bits = integers.numpy().reshape(-1).view(np.uint32 if plan.element_bits == 32 else np.uint16)
    flip_bits_(bits, plan, key, tick, offset)


def flip_bits_(bits: np.ndarray, plan: FlipPlan, key: int, tick: int, offset: int) -> None:
    """The same on the elements' bit patterns, a 1-D unsigned array."""
    first = offset >> BLOCK_LOG2
    last = (offset + len(bits) - 1) >> BLOCK_LOG2
    if plan.digits:
        for start in range(first, last + 1, _CHUNK_DENSE_BLOCKS):
            blocks = np.arange(start, min(start + _CHUNK_DENSE_BLOCKS, last + 1))
            _apply_dense(bits, dense_masks(plan, blocks, key, tick), start, offset)
    if plan.sparse:
        for start in range(first, last + 1, _CHUNK_BLOCKS):
            blocks = np.arange(start, min(start + _CHUNK_BLOCKS, last + 1))
            _apply_sparse(bits, plan, blocks, key, tick, offset)


def _apply_dense(bits: np.ndarray, masks: np.ndarray, first_block: int, offset: int) -> None:
    """XOR the masks of consecutive whole blocks into the part of them that ``bits`` holds."""
    begin = first_block * BLOCK - offset  # where the first block starts in bits, negative if before it
    flat = masks.reshape(-1)
    low, high = max(begin, 0), min(begin + len(flat), len(bits))
    bits[low:high] ^= flat[low - begin : high - begin]


def dense_masks(plan: FlipPlan, blocks: np.ndarray, key: int, tick: int) -> np.ndarray:
    """Bits to invert by the dense digits: (len(blocks), 8192), unsigned, as wide as an element."""
    lanes = plan.lanes
    groups = np.arange(BLOCK // (4 * lanes))  # (G,)
    words = [np.zeros((len(blocks), len(groups)), dtype=np.uint64) for _ in range(4)]
    for i in reversed(range(len(plan.digits))):
        digit = np.uint64(plan.digits[i])
        uniform = philox(*counter(DIGITS, i << 16 | groups, blocks[:, None], tick), key)
        for c in range(4):
            # majority(u, b, d): u OR b where the digit is 1, u AND b where it is 0
            words[c] = uniform[c] & words[c] | digit & (uniform[c] | words[c])
    width = np.uint32 if plan.element_bits == 32 else np.uint16
    masks = np.empty((len(blocks), 4, lanes, len(groups)), dtype=width)
    for c in range(4):
        for h in range(lanes):
            masks[:, c, h] = (words[c] >> np.uint64(h * plan.element_bits)).astype(width)
    return masks.reshape(len(blocks), BLOCK)


def ball_counts(plan: FlipPlan, blocks: np.ndarray, key: int, tick: int) -> tuple[np.ndarray, np.ndarray]:
    """(K of the exponent field, K of the mantissa field), each int64 of shape (len(blocks),)."""
    w0, w1, w2, w3 = philox(*counter(COUNTS, np.zeros(1), blocks, tick), key)
    one, thirty_two = np.uint64(1), np.uint64(32)
    counts = []
    for field, low, high in ((plan.exponent, w0, w1), (plan.mantissa, w2, w3)):
        if field.cdf is None:
            counts.append(np.zeros(len(blocks), dtype=np.int64))
        else:
            uniform = ((high << thirty_two | low) >> one).astype(np.int64)
            counts.append(np.searchsorted(field.cdf, uniform, side="right"))
    return counts[0], counts[1]


def _apply_sparse(bits: np.ndarray, plan: FlipPlan, blocks: np.ndarray, key: int, tick: int, offset: int) -> None:
    """Throw the balls of ``blocks``, dropping those that fall outside ``bits``."""
    exponent_counts, mantissa_counts = ball_counts(plan, blocks, key, tick)
    throws = np.maximum(exponent_counts, mantissa_counts)
    # Only blocks with balls, in chunks of about _CHUNK_BALLS.
    hit = np.flatnonzero(throws)
    chunk_of_block = np.cumsum(throws[hit]) // _CHUNK_BALLS
    for chunk in np.split(hit, np.flatnonzero(np.diff(chunk_of_block)) + 1):
        n = throws[chunk]
        which = np.repeat(chunk, n)
        ball = np.arange(len(which)) - np.repeat(np.cumsum(n) - n, n)
        words = philox(*counter(BALLS, ball, blocks[which], tick), key)
        start = blocks[which] * BLOCK - offset
        for field, counts, where, what in (
            (plan.exponent, exponent_counts, words[0], words[1]),
            (plan.mantissa, mantissa_counts, words[2], words[3]),
        ):
            index = start + (where >> np.uint64(32 - BLOCK_LOG2)).astype(np.int64)
            bit = np.uint64(field.first_bit) + (what * np.uint64(field.bits) >> np.uint64(32))
            thrown = (ball < counts[which]) & (index >= 0) & (index < len(bits))
            flips = (np.uint64(1) << bit[thrown]).astype(bits.dtype)
            np.bitwise_xor.at(bits, index[thrown], flips)


def guard_(x: torch.Tensor, zero_out_t: float) -> None:
    """Zero, in place, every element of a contiguous ``x`` for which |v| < zero_out_t is not true."""
    limit = guard_bits(x.dtype, zero_out_t)
    # Chunks stay in the cache, and where nothing is out of range, one reduction is all that it takes.
    for chunk in x.detach().view(-1).split(_CHUNK_GUARD):
        magnitudes = magnitude_bits(chunk)
        if len(chunk) and magnitudes.max() >= limit:
            chunk.masked_fill_(magnitudes >= limit, 0)
