"""The flip in Triton: the same draw as ``cpu.py``, bit for bit, at the speed of memory.

``poisson.py`` explains the algorithm, ``philox.py`` the counters. A tensor has one program, or a few lanes, per block
of 8192 elements, and what a block does depends on nothing but its own elements and its own numbers.

**Order within a block.** Elements are copied; a barrier; the balls are XORed into memory by relaxed atomics on 32-bit
words, since two balls may hit one word and the order of XORs does not matter; a barrier; the guard. While copying, the
block notes whether any clean value is out of the guard's range. That is rare where the threshold suits the model. Then
only what balls hit can be out of range, and of that only what was so after some ball, which the atomic tells; so
only that is looked at again. Otherwise the whole block is. Where there are dense digits, they are drawn while the
atomics work, and XORed and guarded on the way through registers.

**In place** without a guard nothing but the flipped words is touched, and a few lanes serve one block, so that a weight
of 235 million elements is 1792 programs and not 28672.

**Codes and scales** of 4 and 8 bits are bytes here, each with its BITS real bits in the low ones; four share the word
that an atomic XORs. They are drawn as numbers are, by the bits that are real: of 4, eight to a word of digits or coins.
A guard is of numbers alone.

**Thresholds by channel** come as limits, integers of the dtype's own bits. Those of features are read like the values
beside them; a long row has one, so a block meets two at most.

``triton_launch.py`` launches them. Key and tick may be device tensors, which a CUDA graph or a compiled graph can hold
while they advance, or CPU tensors, whose values go along with the launch. Nothing waits for the device.

Run on CPU tensors by Triton's interpreter, TRITON_INTERPRET=1, the kernels are what they are on a GPU.
"""

import triton
import triton.language as tl

from flipproof.faults.philox import BALLS, COINS, COUNTS, DIGITS
from flipproof.faults.poisson import BLOCK, BLOCK_LOG2

_COUNTS, _BALLS, _DIGITS, _COINS = (tl.constexpr(purpose) for purpose in (COUNTS, BALLS, DIGITS, COINS))
_BLOCK, _BLOCK_LOG2 = tl.constexpr(BLOCK), tl.constexpr(BLOCK_LOG2)


# -- the counter RNG ----------------------------------------------------------------------------------------------


@triton.jit
def _scalar(value):
    """A kernel argument that is a number or a pointer to one."""
    return tl.load(value) if value.dtype.is_ptr() else value


@triton.jit
def _philox(PURPOSE: tl.constexpr, index, block, tick, key):
    """Four uniform 32-bit words for each of the broadcast (index, block): Philox4x32-10, counter as in philox.py."""
    c0 = (index | (PURPOSE << 28)).to(tl.uint32)
    c1 = block.to(tl.uint32)
    c2 = ((block >> 32) | ((tick >> 32) << 16)).to(tl.uint32)
    c3 = tick.to(tl.uint32)
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _count(table_ptr, entries, steps, low, high):
    """How many of the ascending ``entries`` at ``table_ptr`` are not above the 63-bit uniform of two words."""
    uniform = (((high.to(tl.uint64) << 32) | low.to(tl.uint64)) >> 1).to(tl.int64)
    first = (uniform * 0).to(tl.int32)
    last = first + entries
    for _ in range(steps):  # bisection; steps is the bit length of the longer table
        middle = (first + last) >> 1
        entry = tl.load(table_ptr + middle, mask=middle < last, other=0x7FFFFFFFFFFFFFFF)
        below = (middle < last) & (entry <= uniform)
        first = tl.where(below, middle + 1, first)
        last = tl.where(below, last, middle)
    return first


@triton.jit
def _counts(table_ptr, n_exp, n_frac, steps, block, tick, key):
    """(balls in the sign and exponent field, balls in the mantissa field) of each block."""
    w0, w1, w2, w3 = _philox(_COUNTS, block * 0, block, tick, key)
    return _count(table_ptr, n_exp, steps, w0, w1), _count(table_ptr + n_exp, n_frac, steps, w2, w3)


# -- limits of the guard ----------------------------------------------------------------------------------------------


@triton.jit
def _phase(start, period):
    """(start // period, start % period), rounded down, where an element before the tensor's first one has its place."""
    whole = start // period
    rest = start - whole * period
    whole = tl.where(rest < 0, whole - 1, whole)
    return whole, tl.where(rest < 0, rest + period, rest).to(tl.int32)


@triton.jit
def _limits(limit, start, position, there, period, n, BY: tl.constexpr, LONG: tl.constexpr, EVEN: tl.constexpr):
    """The limits of the elements ``position`` after ``start``, which magnitudes must be below.

    BY "": ``limit`` is that of all. Else it points to limits: BY "feature" the i-th is that of elements i, i + period,
    i + 2·period, …; BY "row" that of ``period`` elements from i·period on. ``position`` is below 8192. LONG: the period
    is not. EVEN: start and period are multiples of 8.
    """
    if BY == "":
        return limit
    else:
        whole, rest = _phase(start, period)
        place = rest + position
        if LONG:
            turns = (place >= period).to(tl.int32)
        else:  # exact, since place + 1/2 is further from a multiple of the period than float32 rounds
            turns = ((place.to(tl.float32) + 0.5) * (1.0 / period)).to(tl.int32)
        if BY == "feature":
            channel = place - turns * period
            if EVEN:
                channel = tl.max_contiguous(tl.multiple_of(channel, 8), 8)
            return tl.load(limit + channel, eviction_policy="evict_last").to(tl.int32)
        elif LONG:  # two at most
            first = tl.load(limit + whole, mask=(whole >= 0) & (whole * period < n), other=0).to(tl.int32)
            second = tl.load(limit + whole + 1, mask=(whole + 1) * period < n, other=0).to(tl.int32)
            return tl.where(turns > 0, second, first)
        else:
            return tl.load(limit + whole + turns, mask=there, other=0).to(tl.int32)


# -- balls --------------------------------------------------------------------------------------------------------


@triton.jit
def _ball(
    where, what, block, tick, key, coins,
    FIRST_BIT: tl.constexpr, FIELD_BITS: tl.constexpr, BITS: tl.constexpr, COIN: tl.constexpr,
):  # fmt: skip
    """(position in the block, bits to invert) of the balls that the words ``where`` and ``what`` place in one field."""
    position = (where >> (32 - _BLOCK_LOG2)).to(tl.int32)
    bit = ((what.to(tl.uint64) * FIELD_BITS) >> 32).to(tl.uint32) + FIRST_BIT
    flips = (what * 0 + 1) << bit
    if COIN:
        LANES: tl.constexpr = 32 // BITS
        GROUPS: tl.constexpr = _BLOCK // LANES // 4
        word = position // LANES
        c = word // GROUPS
        u0, u1, u2, u3 = _philox(_COINS, word % GROUPS, block, tick, key)
        coin = tl.where(c == 0, u0, tl.where(c == 1, u1, tl.where(c == 2, u2, u3)))
        flips &= (coin >> (position % LANES * BITS).to(tl.uint32)) | ~coins
    return position, flips.to(tl.int32, bitcast=True)


@triton.jit
def _balls(
    i, block, tick, key, k_exp, k_frac, start, n, coins, BITS: tl.constexpr, MANTISSA: tl.constexpr, COIN: tl.constexpr,
):  # fmt: skip
    """The i-th balls of both fields of each block: for each field index in the tensor, bits to invert, and whether
    there is such a ball and such an element."""
    w0, w1, w2, w3 = _philox(_BALLS, i, block, tick, key)
    e_position, e_flips = _ball(w0, w1, block, tick, key, coins, MANTISSA, BITS - MANTISSA, BITS, COIN)
    f_position, f_flips = _ball(w2, w3, block, tick, key, coins, 0, MANTISSA, BITS, COIN)
    e_index = start + e_position
    f_index = start + f_position
    e_hit = (i < k_exp) & (e_index >= 0) & (e_index < n)
    f_hit = (i < k_frac) & (f_index >= 0) & (f_index < n)
    return e_index, e_flips, e_hit, f_index, f_flips, f_hit


@triton.jit
def _word(y_ptr, odd, index):
    """(pointer to the 32-bit word that holds each element ``index``, place of the element's lowest bit in the word).

    ``odd`` is how many elements of the word in which y begins lie before it."""
    int32_ptr = tl.pointer_type(tl.int32)
    slot = index + odd
    if y_ptr.dtype.element_ty.primitive_bitwidth == 8:
        return (y_ptr - odd).to(int32_ptr, bitcast=True) + (slot >> 2), ((slot & 3) << 3).to(tl.int32)
    elif y_ptr.dtype.element_ty.primitive_bitwidth == 16:
        return (y_ptr - odd).to(int32_ptr, bitcast=True) + (slot >> 1), ((slot & 1) << 4).to(tl.int32)
    else:
        return y_ptr.to(int32_ptr, bitcast=True) + index, (index * 0).to(tl.int32)


@triton.jit
def _invert(y_ptr, odd, index, flips, hit, limit, GUARD: tl.constexpr):
    """XOR ``flips`` into the elements ``index``, where ``hit``. With GUARD: which elements were out of range right
    afterwards; the last of several balls on one element sees what they made of it together."""
    word_ptr, shift = _word(y_ptr, odd, index)
    flips = flips << shift
    before = tl.atomic_xor(word_ptr, flips, mask=hit, sem="relaxed")
    if GUARD:
        MAGNITUDE: tl.constexpr = (1 << (y_ptr.dtype.element_ty.primitive_bitwidth - 1)) - 1
        hit = hit & ((((before ^ flips) >> shift) & MAGNITUDE) >= limit)
    return hit


@triton.jit
def magnitude(x):
    """Bit patterns of |x|: integers in the order of the magnitudes, NaN last."""
    if x.dtype.primitive_bitwidth == 16:
        return x.to(tl.int16, bitcast=True) & 0x7FFF
    else:
        return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _guard(y_ptr, grad_ptr, marks_ptr, index, looked_at, limit, GRAD: tl.constexpr, MARK: tl.constexpr):
    """Zero the elements ``index``, where ``looked_at``, whose magnitude is not below the guard's ``limit``; with GRAD
    the gradient with them. With MARK, mark them."""
    # .cg: the atomics wrote to L2, so a line of L1 may be old
    y = tl.load(y_ptr + index, mask=looked_at, other=0.0, cache_modifier=".cg")
    out = looked_at & (magnitude(y) >= limit)
    tl.store(y_ptr + index, tl.zeros_like(y), mask=out)
    if GRAD:
        zero = tl.zeros(out.shape, dtype=grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + index, zero, mask=out)
    if MARK:
        _mark(marks_ptr, index, out)


@triton.jit
def _mark(marks_ptr, index, marked):
    """Set the bits of the elements ``index``, where ``marked``."""
    word_ptr = marks_ptr + (index >> 5)
    tl.atomic_or(word_ptr, (tl.full(index.shape, 1, tl.int32) << (index & 31).to(tl.int32)), mask=marked, sem="relaxed")


@triton.jit
def zero_marked_(marks_ptr, grad_ptr, n, WORDS: tl.constexpr):
    """grad <- 0 where a bit is set."""
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    bits = tl.load(marks_ptr + word, mask=word * 32 < n, other=0)
    if tl.max((bits != 0).to(tl.int32)) != 0:
        for bit in range(32):
            zero = tl.zeros(bits.shape, dtype=grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + word * 32 + bit, zero, mask=((bits >> bit) & 1) != 0)


@triton.jit
def _guard_and_list(y_ptr, odd, list_ptr, room, index, looked_at, limit):
    """``_guard``, and append the index of each element it zeroes, once, to the list: the count, then up to ``room``
    indices in no order."""
    y = tl.load(y_ptr + index, mask=looked_at, other=0.0, cache_modifier=".cg")
    out = looked_at & (magnitude(y) >= limit)
    word_ptr, shift = _word(y_ptr, odd, index)
    BITS: tl.constexpr = y_ptr.dtype.element_ty.primitive_bitwidth
    keep = ~(0xFFFF << shift) if BITS == 16 else shift
    MAGNITUDE: tl.constexpr = (1 << (BITS - 1)) - 1
    before = tl.atomic_and(word_ptr, keep, mask=out, sem="relaxed")
    mine = out & (((before >> shift) & MAGNITUDE) >= limit)  # and no other ball's on the same element
    place = tl.atomic_add(list_ptr + index * 0, mine.to(tl.int64), mask=mine, sem="relaxed")
    tl.store(list_ptr + 1 + place, index, mask=mine & (place < room))


@triton.jit
def guarded(y, grad_ptr, index, inside, limit, GRAD: tl.constexpr):
    """``y`` with zero where its magnitude is not below ``limit``; the gradient at ``index`` is zeroed in memory."""
    out = magnitude(y) >= limit
    if GRAD:
        tl.store(grad_ptr + index, tl.zeros(out.shape, dtype=grad_ptr.dtype.element_ty), mask=out & inside)
    return tl.where(out, tl.zeros_like(y), y)


# -- dense digits ---------------------------------------------------------------------------------------------------


@triton.jit
def _no_digits(BITS: tl.constexpr):
    zero = tl.zeros((_BLOCK * BITS // 128,), dtype=tl.uint32)
    return zero, zero, zero, zero


@triton.jit
def _digits(table_ptr, digits, coins, block, tick, key, BITS: tl.constexpr, COIN: tl.constexpr):
    """The bits to invert by the dense digits, and the coins, as a quarter of the block's 32-bit words each: word c of
    group g is the c·G + g-th."""
    group = tl.arange(0, _BLOCK * BITS // 128)
    m0, m1, m2, m3 = _no_digits(BITS)
    for back in range(digits):
        i = digits - 1 - back
        d = tl.load(table_ptr + i).to(tl.uint32)
        u0, u1, u2, u3 = _philox(_DIGITS, (i << 16) | group, block, tick, key)
        # majority(u, m, d)
        m0 = (u0 & m0) | (d & (u0 | m0))
        m1 = (u1 & m1) | (d & (u1 | m1))
        m2 = (u2 & m2) | (d & (u2 | m2))
        m3 = (u3 & m3) | (d & (u3 | m3))
    if COIN:
        u0, u1, u2, u3 = _philox(_COINS, group, block, tick, key)
        m0 = (coins & u0 & ~m0) | (m0 & ~coins)
        m1 = (coins & u1 & ~m1) | (m1 & ~coins)
        m2 = (coins & u2 & ~m2) | (m2 & ~coins)
        m3 = (coins & u3 & ~m3) | (m3 & ~coins)
    return m0, m1, m2, m3


@triton.jit
def _by_element(words, BITS: tl.constexpr):
    """32-bit words as the elements that they hold, lowest first; elements of 4 bits are in bytes."""
    if BITS <= 16:
        words = tl.interleave(words.to(tl.uint16), (words >> 16).to(tl.uint16))
    if BITS <= 8:
        words = tl.interleave(words.to(tl.uint8), (words >> 8).to(tl.uint8))
    if BITS == 4:
        words = tl.interleave(words & 15, words >> 4)
    return words


# -- a program for each block: copy, dense digits, guard ------------------------------------------------------------


@triton.jit(do_not_specialize=["n_exp", "n_frac", "steps", "digits", "limit", "period", "key", "tick"])
def flip_block(
    x_ptr, y_ptr, grad_ptr, key, tick, table_ptr, n_exp, n_frac, steps, digits, limit, period, odd, n, offset,
    first_block, marks_ptr,
    BITS: tl.constexpr, MANTISSA: tl.constexpr, LANES: tl.constexpr, DENSE: tl.constexpr, COIN: tl.constexpr,
    SPARSE: tl.constexpr, COPY: tl.constexpr, GUARD: tl.constexpr, GRAD: tl.constexpr, MARK: tl.constexpr,
    BY: tl.constexpr, LONG: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """y <- guard(flip(x)) for one block; x and y may be the same (not COPY).

    BITS: of an element, the real ones. GRAD: zero the gradient where the guard zeroes. MARK: set the bit of what it
    zeroes, without dense digits.
    """
    block = first_block + tl.program_id(0).to(tl.int64)
    start = block * _BLOCK - offset  # index in x of the block's first element; negative where x begins within it
    key = _scalar(key).to(tl.int64)
    tick = _scalar(tick).to(tl.int64)
    coins = tl.load(table_ptr + n_exp + n_frac + digits).to(tl.uint32) if COIN else 0

    if not DENSE or (COPY and SPARSE):
        index = start + tl.arange(0, _BLOCK)
        inside = (index >= 0) & (index < n)
        x = tl.load(x_ptr + index, mask=inside, other=0.0)
        if GUARD and not DENSE:
            own_limit = _limits(limit, start, tl.arange(0, _BLOCK), inside, period, n, BY, LONG, EVEN)
            if not SPARSE:
                if MARK:
                    _mark(marks_ptr, index, (magnitude(x) >= own_limit) & inside)
                x = guarded(x, grad_ptr, index, inside, own_limit, GRAD)

    if SPARSE:  # drawn while x is under way
        k_exp, k_frac = _counts(table_ptr, n_exp, n_frac, steps, block, tick, key)
        lane = tl.arange(0, LANES)
        e_index, e_flips, e_hit, f_index, f_flips, f_hit = _balls(
            lane, block, tick, key, k_exp, k_frac, start, n, coins, BITS, MANTISSA, COIN
        )
        e_limit, f_limit = limit, limit
        if GUARD and not DENSE:
            e_limit = _limits(limit, start, (e_index - start).to(tl.int32), e_hit, period, n, BY, LONG, False)
            f_limit = _limits(limit, start, (f_index - start).to(tl.int32), f_hit, period, n, BY, LONG, False)

    again = 0  # whether the whole block has to be looked at after the balls
    if not DENSE or (COPY and SPARSE):
        if COPY or not SPARSE:
            tl.store(y_ptr + index, x, mask=inside)
        if GUARD and SPARSE and not DENSE:
            if BY == "":
                again = (tl.max(magnitude(x).to(tl.int32)) >= limit).to(tl.int32)
            else:
                again = tl.max((magnitude(x).to(tl.int32) >= own_limit).to(tl.int32))

    if SPARSE:
        tl.debug_barrier()
        LOOK: tl.constexpr = GUARD and not DENSE
        e_far = _invert(y_ptr, odd, e_index, e_flips, e_hit, e_limit, LOOK)
        f_far = _invert(y_ptr, odd, f_index, f_flips, f_hit, f_limit, LOOK)
        for first in range(LANES, tl.maximum(k_exp, k_frac), LANES):
            e_more, e_flips, e_hit, f_more, f_flips, f_hit = _balls(
                first + lane, block, tick, key, k_exp, k_frac, start, n, coins, BITS, MANTISSA, COIN
            )
            _invert(y_ptr, odd, e_more, e_flips, e_hit, 0, False)
            _invert(y_ptr, odd, f_more, f_flips, f_hit, 0, False)

    if DENSE:
        m0, m1, m2, m3 = _digits(table_ptr + n_exp + n_frac, digits, coins, block, tick, key, BITS, COIN)
        from_ptr = x_ptr
        if SPARSE:
            from_ptr = y_ptr
            tl.debug_barrier()
        for c in tl.static_range(4):
            mask = _by_element((m0, m1, m2, m3)[c], BITS)
            position = c * (_BLOCK // 4) + tl.arange(0, _BLOCK // 4)
            part = start + position
            there = (part >= 0) & (part < n)
            # .cg: the atomics wrote to L2, so a line of L1 may be old
            v = tl.load(from_ptr + part, mask=there, other=0.0, cache_modifier=".cg")
            v = (v.to(mask.dtype, bitcast=True) ^ mask).to(v.dtype, bitcast=True)
            if GUARD:
                part_limit = _limits(limit, start, position, there, period, n, BY, LONG, EVEN)
                v = guarded(v, grad_ptr, part, there, part_limit, GRAD)
            tl.store(y_ptr + part, v, mask=there)
    elif GUARD and SPARSE:
        tl.debug_barrier()
        if again != 0:
            for chunk in range(0, _BLOCK, 2048):
                position = chunk + tl.arange(0, 2048)
                whole = start + position
                there = (whole >= 0) & (whole < n)
                whole_limit = _limits(limit, start, position, there, period, n, BY, LONG, EVEN)
                _guard(y_ptr, grad_ptr, marks_ptr, whole, there, whole_limit, GRAD, MARK)
        else:
            _guard(y_ptr, grad_ptr, marks_ptr, e_index, e_far, e_limit, GRAD, MARK)
            _guard(y_ptr, grad_ptr, marks_ptr, f_index, f_far, f_limit, GRAD, MARK)
            for first in range(LANES, tl.maximum(k_exp, k_frac), LANES):
                e_more, e_flips, e_hit, f_more, f_flips, f_hit = _balls(
                    first + lane, block, tick, key, k_exp, k_frac, start, n, coins, BITS, MANTISSA, COIN
                )
                e_limit = _limits(limit, start, (e_more - start).to(tl.int32), e_hit, period, n, BY, LONG, False)
                f_limit = _limits(limit, start, (f_more - start).to(tl.int32), f_hit, period, n, BY, LONG, False)
                _guard(y_ptr, grad_ptr, marks_ptr, e_more, e_hit, e_limit, GRAD, MARK)
                _guard(y_ptr, grad_ptr, marks_ptr, f_more, f_hit, f_limit, GRAD, MARK)


# -- a few lanes for each block: balls in place ---------------------------------------------------------------


@triton.jit(do_not_specialize=["n_exp", "n_frac", "steps", "limit", "key", "tick", "blocks", "room"])
def flip_sparse_(
    y_ptr, key, tick, table_ptr, n_exp, n_frac, steps, limit, odd, n, offset, first_block, blocks,
    far_ptr, columns, tile_columns, list_ptr, room,
    BITS: tl.constexpr, MANTISSA: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, GUARD: tl.constexpr,
    STRIP_ROWS: tl.constexpr, LIST: tl.constexpr, BY: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """y <- flip(y) for GROUP blocks, no dense digits. With GUARD, also guard what was hit, and every element where
    ``far_ptr``, one byte for each program of the merge, says that its STRIP_ROWS rows hold a clean value out of range.
    With LIST, list what the guard zeroed. A guard is one for all or by row."""
    group = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    block = first_block + group
    key = _scalar(key).to(tl.int64)
    tick = _scalar(tick).to(tl.int64)
    k_exp, k_frac = _counts(table_ptr, n_exp, n_frac, steps, block, tick, key)
    k_exp = tl.where(group < blocks, k_exp, 0)[:, None]
    k_frac = tl.where(group < blocks, k_frac, 0)[:, None]
    most = tl.max(tl.maximum(k_exp, k_frac))
    start = (block * _BLOCK - offset)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    for first in range(0, most, LANES):
        e_index, e_flips, e_hit, f_index, f_flips, f_hit = _balls(
            first + lane, block[:, None], tick, key, k_exp, k_frac, start, n, 0, BITS, MANTISSA, False
        )
        _invert(y_ptr, odd, e_index, e_flips, e_hit, 0, False)
        _invert(y_ptr, odd, f_index, f_flips, f_hit, 0, False)
    if GUARD:
        first_element = (first_block + tl.program_id(0).to(tl.int64) * GROUP) * _BLOCK - offset
        last_element = tl.minimum(first_element + GROUP * _BLOCK, n) - 1
        first_element = tl.maximum(first_element, 0)
        first_tile = first_element // columns // STRIP_ROWS * tile_columns
        last_tile = (last_element // columns // STRIP_ROWS + 1) * tile_columns
        far = 0
        for tile in range(first_tile, last_tile, 256):
            tiles = tile + tl.arange(0, 256)
            far = tl.maximum(far, tl.max(tl.load(far_ptr + tiles, mask=tiles < last_tile, other=0).to(tl.int32)))
        tl.debug_barrier()
        if far != 0:
            for element in range(first_element, last_element + 1, 1024):
                index = element + tl.arange(0, 1024)
                there = index <= last_element
                own_limit = _limits(limit, element, tl.arange(0, 1024), there, columns, n, BY, LONG, False)
                if LIST:
                    _guard_and_list(y_ptr, odd, list_ptr, room, index, there, own_limit)
                else:
                    _guard(y_ptr, y_ptr, y_ptr, index, there, own_limit, False, False)
        else:
            for first in range(0, most, LANES):
                e_index, e_flips, e_hit, f_index, f_flips, f_hit = _balls(
                    first + lane, block[:, None], tick, key, k_exp, k_frac, start, n, 0, BITS, MANTISSA, False
                )
                e_limit = _limits(limit, start, (e_index - start).to(tl.int32), e_hit, columns, n, BY, LONG, False)
                f_limit = _limits(limit, start, (f_index - start).to(tl.int32), f_hit, columns, n, BY, LONG, False)
                if LIST:
                    _guard_and_list(y_ptr, odd, list_ptr, room, e_index, e_hit, e_limit)
                    _guard_and_list(y_ptr, odd, list_ptr, room, f_index, f_hit, f_limit)
                else:
                    _guard(y_ptr, y_ptr, y_ptr, e_index, e_hit, e_limit, False, False)
                    _guard(y_ptr, y_ptr, y_ptr, f_index, f_hit, f_limit, False, False)
