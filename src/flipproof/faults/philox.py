"""Philox4x32-10, the counter RNG behind every draw, and how a draw's key and counter are laid out.

A counter RNG is a function from (key, counter) to 128 random bits. Nothing is stored and nothing advances, so any
backend can compute any part of a draw, in any order, on any rank, and get the same bits. Philox is a bijection of
its counter for each key, so two different counters never collide (Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", SC'11, whose known answers are the test).

**Key** (64 bits): BLAKE2b-64 of (seed, site), made once per layer and operand on the host. ``site`` names the layer
and the operand, "model.layers.0.self_attn.q_proj/w".

**Counter** (four 32-bit words)::

    c0   purpose (4 bits) | index within the block (28 bits)
    c1   block number, low 32 bits
    c2   block number, high 16 bits | tick, high 16 bits << 16
    c3   tick, low 32 bits

The *block* is the element's index in the whole tensor divided by 8192, so a slice of the tensor asks for the same
numbers as the whole. The *tick* counts forward passes. It sits in the counter, not in the key, so that a GPU kernel
can read it from device memory: ticks advance without recompilation and under CUDA graphs, while the key stays a
constant of the layer. Purposes: how many flips a block gets (0), where the i-th of them falls (1), and the digit
planes of dense draws (2) and the fair coins of the largest probabilities (3), for which see ``poisson.py``; 4 to 10 are
those of ``memory.py``.
"""

import hashlib

import numpy as np

COUNTS, BALLS, DIGITS, COINS, LEVEL_COUNTS, LEVELS, ROW_COUNTS, ROW_LEVELS, ROW_COINS, CHECK_COUNTS, CHECK_LEVELS = (
    range(11)
)
"""Purposes, the top four bits of c0."""

MAX_TICK = 2**48
MAX_BLOCK = 2**48

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW_32 = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
ROUNDS = 10

Words = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def tick_problem(tick: int) -> str | None:
    """One line naming what is wrong with a tick, or None where it is fine."""
    whole = isinstance(tick, int) and not isinstance(tick, bool)
    return None if whole and 0 <= tick < MAX_TICK else f"tick = {tick!r}: ticks are integers from 0 to 2^48 - 1"


def check_tick(tick: int) -> int:
    """``tick`` itself, or a ValueError that says what a tick is."""
    if problem := tick_problem(tick):
        raise ValueError(problem)
    return tick


def derive_key(seed: int, site: str) -> int:
    """The 64-bit Philox key of one operand of one layer, as a signed integer (what an int64 tensor holds)."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + site.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def counter(purpose: np.ndarray, index: np.ndarray, block: np.ndarray, tick: int) -> Words:
    """The four counter words, uint64 arrays with values below 2^32 that broadcast against each other.

    ``index`` must be below 2^28, ``block`` and ``tick`` below 2^48.
    """
    block = block.astype(np.uint64)
    return (
        index.astype(np.uint64) | purpose.astype(np.uint64) << np.uint64(28),
        block & _LOW_32,
        (block >> _32) | np.uint64(tick >> 32 << 16),
        np.array(tick & 0xFFFFFFFF, dtype=np.uint64),
    )


def philox(c0: np.ndarray, c1: np.ndarray, c2: np.ndarray, c3: np.ndarray, key: int) -> Words:
    """Philox4x32-10 of broadcastable uint64 arrays (values below 2^32): four arrays of uniform 32-bit words."""
    shape = np.broadcast_shapes(c0.shape, c1.shape, c2.shape, c3.shape)
    # Two words a row, so that each step of a round is one NumPy call; the calls, not the arithmetic, cost most.
    even, odd, product = (np.empty((2, *shape), dtype=np.uint64) for _ in range(3))
    even[0], even[1], odd[0], odd[1] = c0, c2, c1, c3
    column = (2,) + (1,) * len(shape)
    multipliers = np.array(MULTIPLIERS, dtype=np.uint64).reshape(column)
    keys = np.empty(column, dtype=np.uint64)
    k0, k1 = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(ROUNDS):
        # c0, c1, c2, c3 <- high(M1·c2) ^ c1 ^ k0, low(M1·c2), high(M0·c0) ^ c3 ^ k1, low(M0·c0)
        np.multiply(multipliers, even, out=product)
        np.right_shift(product, _32, out=even)
        odd ^= even[::-1]
        keys[0], keys[1] = k0, k1
        np.bitwise_xor(odd, keys, out=even)
        np.bitwise_and(product[::-1], _LOW_32, out=odd)
        k0, k1 = k0 + WEYL[0] & 0xFFFFFFFF, k1 + WEYL[1] & 0xFFFFFFFF
    return even[0], odd[0], even[1], odd[1]
