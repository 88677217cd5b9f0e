"""An independent, scalar implementation of the definition of a flip."""

import numpy as np

from flipproof.faults.poisson import BLOCK, ball_cdf, split


def scalar_philox(counter, key):
    c, k = list(counter), [key % 2**32, key >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def scalar_masks(layout, p_exp, p_frac, n, key, tick, offset):
    """Which bits of n elements flip, integers of shape (n,). ``layout``: (bits of an element, of its mantissa)."""
    bits, mantissa = layout
    lanes = 32 // bits
    group_count = BLOCK // (4 * lanes)
    fields = [(p_exp, mantissa, bits - mantissa), (p_frac, 0, mantissa)]

    def draw(purpose, index, block):
        return scalar_philox((purpose << 28 | index, block % 2**32, block >> 32 | tick >> 32 << 16, tick % 2**32), key)

    out = [0] * n
    for block in range(offset // BLOCK, (offset + n - 1) // BLOCK + 1):
        block_mask = [0] * BLOCK
        counts = draw(0, 0, block)
        for f, (p, first, width) in enumerate(fields):
            coin, k, j, rest = split(p)
            coins = [draw(3, g, block) for g in range(group_count)]

            def coin_of(e, coins=coins):
                word, h = divmod(e, lanes)
                c, g = divmod(word, group_count)
                return coins[g][c] >> (h * bits)

            for e in range(BLOCK):  # digit by digit, each bit: u < q where u = 0.u1 u2 ... uk
                if not 0 <= block * BLOCK + e - offset < n:
                    continue
                word, h = divmod(e, lanes)
                c, g = divmod(word, group_count)
                words = [draw(2, i << 16 | g, block)[c] for i in range(k)]
                for bit in range(first, first + width):
                    u = 0
                    for word in words:
                        u = u << 1 | (word >> (h * bits + bit) & 1)
                    # b <- majority(u, b, digit) from the last digit on is the comparison (complement of u) < j
                    if (2**k - 1 - u) < j:
                        block_mask[e] ^= 1 << bit
                if coin:
                    field_bits = ((1 << width) - 1) << first
                    block_mask[e] ^= (block_mask[e] ^ coin_of(e) & ~block_mask[e]) & field_bits
            table = ball_cdf(rest, width)
            if table is None:
                continue
            uniform = (counts[2 * f] | counts[2 * f + 1] << 32) >> 1
            for i in range(sum(1 for entry in table.tolist() if entry <= uniform)):
                words = draw(1, i, block)
                ball = 1 << (first + (words[2 * f + 1] * width >> 32))
                e = words[2 * f] >> 19
                block_mask[e] ^= ball & coin_of(e) if coin else ball
        for e in range(BLOCK):
            if 0 <= block * BLOCK + e - offset < n:
                out[block * BLOCK + e - offset] = block_mask[e]
    return np.array(out)
