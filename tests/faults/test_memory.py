"""Patterns against a scalar implementation of their definition, closed forms, and each other.

Statistical bounds: each is passed by a right implementation in all but one of 10^6 draws of the seed, by the binomial
tail; seeds are fixed.
"""

import decimal
import gc
from functools import cache
from itertools import combinations
from math import comb, exp

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import flipproof
from flipproof import BitFlipSpec, Pattern
from flipproof.faults import memory
from flipproof.faults.layouts import LAYOUTS
from flipproof.faults.philox import counter, derive_key, philox
from flipproof.faults.poisson import BLOCK
from flipproof.formats.codes import NF4, dynamic_map

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SITE = {"seed": 7, "site": "layer/w", "tick": 3}
FALSE_ALARM = 1e-6


LOW_BITS = ("integer4", "nf4", "e2m1", "e4m3", "e8m0")


def integers(dtype):
    """(bits of an element, the integers that hold them)."""
    if isinstance(dtype, str):
        return LAYOUTS[dtype].bits, torch.uint8
    return dtype.itemsize * 8, torch.int16 if dtype.itemsize == 2 else torch.int32


def flip(x, dtype, **how):
    return flipproof.flip(x, element=dtype if isinstance(dtype, str) else None, **how)


def masks(p, pattern, n, dtype=torch.bfloat16, p_frac=None, **where):
    """int64 bits that a flip of zeros sets; a value that was zeroed shows none."""
    bits, integer = integers(dtype)
    zeros = torch.zeros(n, dtype=integer if isinstance(dtype, str) else dtype)
    p_frac = p if p_frac is None else p_frac
    y = flip(zeros, dtype, p_exp=p, p_frac=p_frac, pattern=pattern, **SITE | where)
    return y.view(integer).long() & (1 << bits) - 1


def bits_of(mask, bits):
    return (mask[:, None] >> torch.arange(bits) & 1).bool()  # (n, bits)


def in_bounds(hits, trials, p):
    low, high = stats.binom.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], trials, p)
    return low <= hits <= high


# --- the definition, one number at a time


@cache
def words(purpose, index, block, tick, key):
    return [int(w) for w in philox(*counter(np.array(purpose), np.array(index), np.array(block % 2**48), tick), key)]


def poisson(mean, uniform):
    """How many terms of the Poisson distribution's sum are not above a 63-bit uniform."""
    decimal.getcontext().prec = 60
    mass = total = (-mean).exp()
    k = 0
    while int(total * 2**63) <= uniform:
        k += 1
        mass = mass * mean / k
        total += mass
    return k


def levels(counts, where, plane, block, tick, key, below):
    """(unit in the block, level) of all points of one plane of one block, up to the band that ``below`` is in."""
    found = []
    for band in range(21):
        low, width = decimal.Decimal(2) ** -(band + 1), decimal.Decimal(2) ** -(band + 1)
        if band == 20:
            low, width = decimal.Decimal(0), decimal.Decimal(2) ** -20
        if low >= below:
            continue
        w = words(counts, plane * 256 + band // 2, block, tick, key)[2 * (band % 2) :][:2]
        for i in range(poisson(width * BLOCK, (w[1] * 2**32 + w[0]) // 2)):
            v = words(where, plane * 2**22 + band * 2**17 + i // 2, block, tick, key)[2 * (i % 2) :][:2]
            found.append((v[0] // 2**19, low + width * v[1] / 2**32))
    return found


def rate(p, burst=1):
    decimal.getcontext().prec = 60
    return -(1 - decimal.Decimal(p)).ln() / burst


def scalar_wrong_bits(first, last, p_bits, key, tick, burst=1, p_row=0.0, row_bytes=1024):
    """Addresses, in bits of the whole tensor, of the wrong bits of elements ``first`` to ``last``."""
    bits = len(p_bits)
    wrong = set()
    for block in range((first - burst) // BLOCK, (last - 1) // BLOCK + 1):
        for plane, p in enumerate(p_bits):
            if p:
                for unit, level in levels(4, 5, plane, block, tick, key, rate(p, burst)):
                    if level < rate(p, burst):
                        start = (block * BLOCK + unit) * bits + plane
                        wrong |= set(range(start, start + burst))
    length = row_bytes * 8 // bits
    for row in range(first // length, (last - 1) // length + 1) if p_row else ():
        if any(
            unit == row % BLOCK and level < rate(p_row)
            for unit, level in levels(6, 7, 0, row // BLOCK, tick, key, rate(p_row))
        ):
            for element in range(row * length, (row + 1) * length):
                for bit in range(bits):
                    word = (element * bits + bit) // 32 % (BLOCK * bits // 32)
                    coin = words(8, word // 4, element // BLOCK, tick, key)[word % 4]
                    if coin >> (element * bits + bit) % 32 & 1:
                        wrong.add(element * bits + bit)
    return {a for a in wrong if first * bits <= a < last * bits}


def as_masks(wrong, first, count, bits):
    out = [0] * count
    for address in wrong:
        out[address // bits - first] |= 1 << address % bits
    return torch.tensor(out)


@pytest.mark.parametrize("dtype", [*DTYPES, "e4m3", "e2m1"])
@pytest.mark.parametrize(
    ("fault", "p"),
    [
        ({"persistent": True}, 0.001),
        ({"p_bits": (("exp", 0.004), ("0-1", 0.0005), ("sign", 0.0))}, 0.0),
        ({"burst": 37}, 0.05),
        ({"p_row": 0.5, "row_bytes": 32}, 0.0),
        ({"p_row": 0.1, "row_bytes": 1024, "p_bits": (("exp", 0.005),)}, 0.0),
    ],
)
def test_wrong_bits_are_those_of_the_definition(dtype, fault, p):
    bits, _ = integers(dtype)
    offset, count = 8000, 400  # across a border of blocks, inside of rows
    pattern = Pattern(**fault)
    got = masks(p, pattern, count, dtype, offset=offset)
    p_bits = pattern.bit_probabilities(p, p, str(dtype).removeprefix("torch."))
    assert len(p_bits) == bits
    tick = 0 if pattern.persistent else SITE["tick"]
    wrong = scalar_wrong_bits(
        offset, offset + count, p_bits, derive_key(7, "layer/w"), tick, pattern.burst, pattern.p_row, pattern.row_bytes
    )
    assert wrong
    assert torch.equal(got, as_masks(wrong, offset, count, bits))


def test_a_burst_may_begin_before_the_first_element():
    """Else the first bits of a tensor would be safer than the others."""
    hits = sum(int(bits_of(masks(0.2, Pattern(burst=64), 1, seed=seed), 16).sum()) for seed in range(400))
    # bits of one draw are in the same bursts: at least 400, at most 400 * 16 independent ones; the former is the bound
    low, high = stats.binom.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], 400, 0.2)
    assert 16 * low <= hits <= 16 * high


# --- rates


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_bit_has_its_own_rate(dtype):
    bits, n = dtype.itemsize * 8, 2**19
    p_bits = {str(bit): [0.0, 0.5, 0.1, 0.003, 1e-4][bit % 5] for bit in range(bits)}
    hit = bits_of(masks(0.0, Pattern(p_bits=tuple(p_bits.items())), n, dtype), bits).sum(0)
    for bit, p in p_bits.items():
        assert in_bounds(int(hit[int(bit)]), n, p), (bit, p)


@pytest.mark.parametrize("p", [2**-16, 1e-3, 0.02, 0.2, 0.5])
def test_a_persistent_map_has_the_rate_of_independent_flips(p):
    n = 2**22 if p < 0.01 else 2**17
    hits = int(bits_of(masks(p, Pattern(persistent=True), n), 16).sum())
    assert in_bounds(hits, 16 * n, p)


@pytest.mark.parametrize("burst", [2, 16, 100])
def test_bursts_keep_the_rate_of_a_bit_and_come_in_runs(burst):
    p, n = 0.01, 2**19
    bits = bits_of(masks(p, Pattern(burst=burst), n), 16).flatten()
    # runs are independent of each other: as many as a Poisson number, each of ``burst`` bits
    begins = stats.poisson.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], len(bits) * float(rate(p)) / burst)
    assert begins[0] * burst * 0.97 <= bits.sum() <= begins[1] * burst  # overlaps are below 3%
    runs = torch.diff(torch.nn.functional.pad(bits.int(), (1, 1))).nonzero().flatten().view(-1, 2)
    lengths = (runs[:, 1] - runs[:, 0])[1:-1]
    assert int(lengths.min()) == burst
    # a run is longer only where another burst begins within it or right after it
    touched = 1 - exp(-float(rate(p)) / burst * burst)
    assert in_bounds(int((lengths > burst).sum()), len(lengths), touched)


def test_bad_rows():
    rows, length = 8192, 512  # bfloat16 values in 1024 bytes
    mask = masks(0.0, Pattern(p_row=0.05), rows * length).view(rows, length)
    bad = (mask != 0).any(1)
    assert in_bounds(int(bad.sum()), rows, 0.05)
    inside = bits_of(mask[bad].flatten(), 16)
    assert in_bounds(int(inside.sum()), inside.numel(), 0.5)
    for bit in range(16):
        assert in_bounds(int(inside[:, bit].sum()), len(inside), 0.5)


# --- nested, persistent, sliced


def test_a_lower_rate_flips_a_subset():
    n = 2**16
    before = torch.zeros(n, dtype=torch.int64)
    for p in (1e-5, 1e-4, 1.1e-4, 0.003, 0.1, 0.3, 0.5):
        now = masks(p, Pattern(persistent=True), n)
        assert not (before & ~now).any(), p
        assert (now != before).any()
        before = now


def test_nesting_holds_for_each_bit_whatever_the_others_do():
    n = 2**18
    all_bits = masks(0.002, Pattern(persistent=True), n)
    some = masks(0.0, Pattern(persistent=True, p_bits=(("exp", 0.001), ("3", 0.002))), n)
    assert some.any()
    assert not (some & ~all_bits).any()
    assert torch.equal(some & 8, all_bits & 8)


@pytest.mark.parametrize(
    "fault",
    [
        {},
        {"burst": 9},
        {"p_row": 0.02},
        {"protection": "secded"},
        {"protection": "parity"},
        {"protected_bits": ("exp",)},
    ],
)
def test_persistent_faults_forget_the_tick_and_others_do_not(fault):
    n, kept = 30000, Pattern(persistent=True, **fault)
    assert torch.equal(masks(0.01, kept, n, tick=1), masks(0.01, kept, n, tick=2))
    assert not torch.equal(masks(0.01, kept, n, seed=1), masks(0.01, kept, n, seed=2))
    fresh = Pattern(**{"p_row": 0.02} | fault)
    assert not torch.equal(masks(0.01, fresh, n, tick=1), masks(0.01, fresh, n, tick=2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "fault",
    [{"burst": 4096}, {"p_row": 0.1}, {"protection": "secded"}, {"protection": "parity"}, {"persistent": True}],
)
def test_a_slice_of_the_draw_is_the_draw_of_the_slice(dtype, fault, monkeypatch):
    pattern = Pattern(**fault)
    whole = masks(0.01, pattern, 30000, dtype)
    for offset, n in ((0, 5), (1, 8191), (8191, 3), (12345, 10001), (29999, 1)):
        assert torch.equal(masks(0.01, pattern, n, dtype, offset=offset), whole[offset : offset + n])
    monkeypatch.setitem(memory._CHUNK, "cpu", BLOCK)
    memory._kept_maps.maps.clear()
    assert torch.equal(masks(0.01, pattern, 30000, dtype), whole)


# --- kept


@pytest.fixture
def drawn(monkeypatch):
    """(offset, count) of each draw of a map, where none is kept yet."""
    drawn, flips = [], memory._Memory.flips
    monkeypatch.setattr(memory._Memory, "flips", lambda *args: drawn.append(args[1:]) or flips(*args))
    monkeypatch.setattr(memory, "_kept_maps", memory._KeptMaps())
    return drawn


def test_a_map_is_drawn_once_and_kept(drawn):
    kept = Pattern(persistent=True, protection="secded")
    first = masks(0.01, kept, 5000, tick=1)
    assert torch.equal(masks(0.01, kept, 5000, tick=2), first)
    assert torch.equal(masks(0.01, kept, 4999), first[:4999])
    assert drawn == [(0, 5000)]
    others = ({"seed": 8}, {"site": "b/w"}, {"offset": 4}, {"dtype": torch.float16})
    for _ in range(2):
        for other in others:
            masks(0.01, kept, 5000, **other)
    assert len(drawn) == 1 + len(others)


def test_what_grows_is_drawn_anew_once_a_block(drawn):
    kept, p = Pattern(persistent=True), 0.01
    whole = masks(p, Pattern(persistent=True), 3 * BLOCK, seed=SITE["seed"])
    memory._kept_maps.maps.clear()
    drawn.clear()
    for n in range(1000, 2 * BLOCK + 2001, 1000):
        assert torch.equal(masks(p, kept, n), whole[:n])
    assert drawn == [(0, 1000), (0, BLOCK), (0, 2 * BLOCK), (0, 3 * BLOCK)]


def test_other_rates_take_the_place_of_the_last(drawn):
    """A sweep asks for one seed at many rates, one after the other."""
    for p in (0.001, 0.01, 0.1, 0.5):
        masks(p, Pattern(persistent=True), 5000)
    assert memory._kept_maps.size == 5000 * 2  # that of 1/2 alone
    assert len(drawn) == 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [1e-9, 1e-5, 1e-3, 0.01, 0.05, 0.2, 0.5])
def test_a_map_has_a_position_and_a_mask_for_each_faulty_element_or_a_mask_for_each(drawn, p, dtype):
    n = 20000
    wrong = int((masks(p, Pattern(persistent=True), n, dtype) != 0).sum())
    assert in_bounds(wrong, n, 1 - (1 - p) ** (dtype.itemsize * 8))
    assert memory._kept_maps.size == min(wrong * (4 + dtype.itemsize), n * dtype.itemsize)
    masks(p, Pattern(persistent=True), n, dtype)
    assert len(drawn) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("p", [0.001, 0.03, 0.5])
@pytest.mark.parametrize(
    "fault", [{}, {"burst": 64}, {"p_row": 0.5, "row_bytes": 64}, {"protection": "secded"}, {"protection": "parity"}]
)
def test_a_map_is_never_larger_than_its_tensor_and_gives_the_bits_of_a_draw(drawn, monkeypatch, fault, p, dtype):
    pattern = Pattern(persistent=True, **fault)
    for n in (3, 8191, 8193):
        x = torch.full((n,), 1.5, dtype=dtype)
        memory._kept_maps.maps.clear()
        first, again = (flip_bits(x, p, pattern) for _ in range(2))
        assert memory._kept_maps.size <= x.nbytes
        with monkeypatch.context() as patch:
            patch.setattr(memory, "_kept_maps", memory._KeptMaps())
            patch.setattr(memory, "_KEPT_BYTES", -1)
            fresh = flip_bits(x, p, pattern)
            assert memory._kept_maps.size == 0
        assert torch.equal(first, fresh)
        assert torch.equal(again, fresh)


def flip_bits(x, p, pattern):
    y = flipproof.flip(x, p_exp=p, p_frac=p, pattern=pattern, **SITE)
    return y.view(torch.int16 if x.dtype.itemsize == 2 else torch.int32)


def chain(features, layers):
    model = nn.Sequential(*(nn.Linear(features, features, bias=False) for _ in range(layers)))
    flipproof.inject(model, BitFlipSpec(w_p_exp=0.5, w_p_frac=0.5, w_zero_out_t=1.0, w_faults="persistent"))
    return model


def test_a_model_with_more_maps_than_fit_finds_those_that_fit_in_every_pass(drawn, monkeypatch):
    """With the least used making room none would be found, its layers coming in the same order each time."""
    layers, features = 8, 16
    monkeypatch.setattr(memory, "_KEPT_BYTES", layers // 2 * features**2 * 4)  # at 1/2 a map has a mask for each
    model = chain(features, layers)
    x = torch.ones(1, features)
    with torch.no_grad():
        for passes in range(1, 4):
            model(x)
            assert len(drawn) == layers + (passes - 1) * layers // 2
    assert memory._kept_maps.size == memory._KEPT_BYTES


def test_maps_for_one_call_are_found_again_in_the_same_way(drawn, monkeypatch):
    monkeypatch.setattr(memory, "_KEPT_BYTES", 4 * 1000 * 2)
    for _ in range(3):
        for site in range(8):
            masks(0.5, Pattern(persistent=True), 1000, site=f"{site}/w")
    assert len(drawn) == 8 + 4 + 4


def test_maps_go_with_the_seed_and_with_the_model(drawn):
    """Without garbage collection of reference cycles, but for the model's own. That of the seed before waits for its
    return."""
    model, x = chain(16, 3), torch.ones(1, 16, requires_grad=True)
    one = 3 * 16**2 * 4
    model(x).sum().backward()
    assert (len(drawn), memory._kept_maps.size) == (3, one)
    with flipproof.faults(model, seed=5):
        model(x).sum().backward()
        assert (len(drawn), memory._kept_maps.size) == (6, 2 * one)
    assert memory._kept_maps.size == one
    model(x).sum().backward()
    assert (len(drawn), memory._kept_maps.size) == (6, one)
    other = chain(16, 3)
    other(x)
    assert (len(drawn), memory._kept_maps.size) == (9, 2 * one)
    del model
    gc.collect()
    other(x)
    assert (len(drawn), memory._kept_maps.size) == (9, one)
    del other
    gc.collect()
    assert memory._kept_maps.size == 0


# --- protection


def hamming_like(data_errors, check_errors):
    """What a table-driven decoder of the same code, written apart, does: (data errors left, lost)."""
    columns = [sum(1 << i for i in c) for c in combinations(range(8), 3)]
    columns = sorted(columns) + [int(f"{int('00011111', 2) * 257 << turn >> 8 & 0xFF:08b}", 2) for turn in range(8)]
    syndrome = 0
    for bit in data_errors:
        syndrome ^= columns[bit]
    for bit in check_errors:
        syndrome ^= 1 << bit
    if syndrome in columns:
        return set(data_errors) ^ {columns.index(syndrome)}, False
    if syndrome == 0 or syndrome & (syndrome - 1) == 0:
        return set(data_errors), False
    return set(), True


def test_the_code_corrects_one_error_and_finds_two():
    columns = memory._secded_columns() + [1 << i for i in range(8)]
    assert len(set(columns)) == 72
    assert all(column.bit_count() % 2 for column in columns)  # so the sum of two is even, and no column
    for position in range(72):
        data, check = ([position], []) if position < 64 else ([], [position - 64])
        assert hamming_like(data, check) == (set(), False)
    for a, b in combinations(range(72), 2):
        errors = [a, b]
        assert hamming_like([e for e in errors if e < 64], [e - 64 for e in errors if e >= 64])[1]


@pytest.mark.parametrize("dtype", [*DTYPES, *LOW_BITS])
def test_secded_does_to_each_word_what_the_code_says(dtype):
    """The errors of data and check bits by the definition, word by word, through another decoder."""
    (bits, kind), p = integers(dtype), 0.02
    per_word, n = 64 // bits, 1008
    x = torch.ones(n, dtype=kind if isinstance(dtype, str) else dtype)
    y = flip(x, dtype, p_exp=p, p_frac=p, pattern=Pattern(protection="secded"), **SITE)
    null = {"integer4": 8, "nf4": NF4.index(0)}.get(dtype, 0)
    key = derive_key(7, "layer/w")
    wrong = scalar_wrong_bits(0, n, [p] * bits, key, 3)
    checks = {
        (unit, plane)
        for plane in range(8)
        for unit, level in levels(9, 10, plane, 0, 3, key, rate(p))
        if level < rate(p)
    }
    outcomes = set()
    expected = x.view(kind).long() & (1 << bits) - 1
    for word in range(n // per_word):
        data = {a - word * 64 for a in wrong if word * 64 <= a < word * 64 + 64}
        check = {plane for unit, plane in checks if unit == word}
        left, lost = hamming_like(data, check)
        outcomes.add((len(data) + len(check), lost, bool(left)))
        part = slice(word * per_word, (word + 1) * per_word)
        if lost:
            expected[part] = null
        for bit in left:
            expected[word * per_word + bit // bits] ^= 1 << bit % bits
    assert {(0, False, False), (1, False, False), (2, True, False), (3, False, True)} <= outcomes
    assert torch.equal(y.view(kind).long() & (1 << bits) - 1, expected)


@pytest.mark.parametrize(("element", "number"), [("integer8", 128), ("nf4-scale", int((dynamic_map() < 0).sum()))])
def test_a_lost_word_of_codes_becomes_what_stands_for_nothing(element, number):
    x = torch.full((8,), 3, dtype=torch.uint8)
    pattern = Pattern(protection="secded")
    lost = [
        y.unique().tolist()
        for seed in range(40)
        if (y := flip(x, element, p_exp=0.02, p_frac=0.02, pattern=pattern, **SITE | {"seed": seed})).ne(3).all()
    ]
    assert [number] in lost


def test_secded_leaves_what_its_closed_form_says():
    """Of words of 72 bits, 1 - (1-p)^72 - 72 p (1-p)^71 have two or more wrong; all with just two are zeroed."""
    p, n_words = 0.002, 2**18
    x = torch.ones(4 * n_words, dtype=torch.bfloat16)
    y = flipproof.flip(x, p_exp=p, p_frac=p, pattern=Pattern(protection="secded"), **SITE).view(-1, 4)
    zeroed = int((y == 0).all(1).sum())
    damaged = int((y != 1).any(1).sum())
    # Every such word shows: a sum of columns that passes for one, or for none, leaves at least one wrong data bit.
    assert in_bounds(damaged, n_words, 1 - (1 - p) ** 72 - 72 * p * (1 - p) ** 71)
    # and those with an even number of errors, which are two but for one in 3000, are found or sum to nothing
    two = comb(72, 2) * p**2 * (1 - p) ** 70
    assert stats.binom.ppf(FALSE_ALARM, n_words, two) <= zeroed <= damaged


def test_parity_zeroes_odd_errors_and_misses_even_ones():
    p, n = 0.01, 2**18
    x = torch.ones(n, dtype=torch.bfloat16)
    pattern = Pattern(protection="parity")
    y = flipproof.flip(x, p_exp=p, p_frac=p, pattern=pattern, **SITE)
    odd = sum(comb(17, k) * p**k * (1 - p) ** (17 - k) for k in range(1, 18, 2))
    assert in_bounds(int((y == 0).sum()), n, odd)
    even = sum(comb(17, k) * p**k * (1 - p) ** (17 - k) for k in range(2, 18, 2))
    assert in_bounds(int(((y != 0) & (y != 1)).sum()), n, even)
    # exactly: the data's own errors are those without parity, and what is left of them was even or met a wrong check
    plain = bits_of(masks(p, Pattern(persistent=True), n, tick=0), 16).sum(1)
    checked = flipproof.flip(x, p_exp=p, p_frac=p, pattern=Pattern(persistent=True, protection="parity"), **SITE)
    left = (checked != 0) & (checked != 1)
    assert (plain[left] > 0).all()
    assert in_bounds(int((plain[left] % 2 == 1).sum()), int((plain % 2 == 1).sum()), p)


def test_bits_stored_three_times_are_wrong_when_two_copies_are():
    p, n = 0.05, 2**18
    hit = bits_of(masks(p, Pattern(protected_bits=("sign", "10-12")), n), 16).sum(0)
    for bit in range(16):
        assert in_bounds(int(hit[bit]), n, 3 * p**2 * (1 - p) + p**3 if bit in (10, 11, 12, 15) else p)


def test_protection_and_guard_zero_the_gradient_too():
    x = torch.full((4000,), 1.5, requires_grad=True)
    y = flipproof.flip(x, p_exp=0.01, p_frac=0.01, zero_out_t=4.0, pattern=Pattern(protection="secded"), **SITE)
    y.sum().backward()
    assert 0 < int((y == 0).sum()) < 4000
    assert torch.equal(x.grad, (y != 0).float())


def test_philox_is_the_other_philox():
    index, block = torch.arange(100), torch.arange(100) * 2**41 - 1
    ours = memory._philox(10, index, block, 2**47 + 5, -(2**61) - 3)
    theirs = philox(*counter(np.array(10), index.numpy(), block.numpy() % 2**48, 2**47 + 5), -(2**61) - 3)
    assert all(np.array_equal(a.numpy(), b.astype(np.int64)) for a, b in zip(ours, theirs, strict=True))
