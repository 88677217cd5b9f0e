import numpy as np
import pytest

from flipproof.faults.philox import BALLS, COUNTS, DIGITS, counter, derive_key, philox

# Random123's known answers for philox4x32-10: counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("count", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_known_answers(count, key, expected):
    words = philox(*(np.array([c], dtype=np.uint64) for c in count), key[1] << 32 | key[0])
    assert [int(word[0]) for word in words] == list(expected)


def test_a_negative_key_is_the_same_64_bits():
    zeros = [np.zeros(1, dtype=np.uint64)] * 4
    assert [int(w[0]) for w in philox(*zeros, -1)] == [int(w[0]) for w in philox(*zeros, 2**64 - 1)]


def test_counters_of_different_purpose_index_block_and_tick_differ():
    tuples = set()
    index, block = np.array([0, 1, 2**28 - 1]), np.array([0, 1, 2**32, 2**48 - 1])
    for purpose in (COUNTS, BALLS, DIGITS):
        for tick in (0, 1, 2**32, 2**48 - 1):
            words = np.broadcast_arrays(*counter(np.array(purpose), index[:, None], block[None], tick))
            tuples |= {tuple(int(word[i, j]) for word in words) for i in range(3) for j in range(4)}
    assert len(tuples) == 3 * 4 * 3 * 4
    assert all(0 <= word < 2**32 for words in tuples for word in words)


def test_keys_depend_on_seed_and_on_site():
    keys = {derive_key(seed, site) for seed in (0, 1, 2**63 - 1) for site in ("", "a/x", "a/w", "b/x")}
    assert len(keys) == 12
    assert all(-(2**63) <= key < 2**63 for key in keys)
    # the definition itself: a changed derivation is a changed draw everywhere
    assert derive_key(0, "layers.0.q_proj/x") == -7402908813813318341
