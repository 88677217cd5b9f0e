"""Faults that are not new, independent flips: maps of defects, single bits, bursts, bad rows, and protection.

Written in integer operations of torch alone, so that one text runs on every device and gives the same bits on each. The
cost grows with the number of flips, apart from some twenty Philox calls for each bit plane of 8192 elements.

**Levels.** Every bit of a memory has a level, the rate λ from which on it is wrong, and is inverted at probability p
where its level is at most λ(p) = −ln(1 − p). So what a seed flips at a lower p is a subset of what it flips at a
higher one, as in a memory whose voltage drops, for each bit by itself, whatever other bits do. The levels are the
lowest points of a Poisson process of intensity 1 in (bit, λ): none is below λ with probability e^(−λ) = 1 − p, exactly.
The process is cut into bands, (1/2, 1], (1/4, 1/2], … and the rest below 2⁻²⁰, and each band into bit planes of blocks
of 8192 elements. How many points a piece has is a 63-bit uniform looked up in a Poisson table (Philox purpose
LEVEL_COUNTS, two bands a call); where each is and at which level within its band takes two words (purpose LEVELS, two
points a call). Only bands that begin below λ(p) are drawn. A probability is met to 2⁻³² of itself, and
below 2⁻²⁰ to 2⁻⁵².

**Bursts.** A point inverts a run of L bits in memory order, from the lowest bit of an element up and on into the next;
with λ = −ln(1 − p) / L each bit is still wrong with probability p. What begins before the first element counts, too.

**Bad rows.** Levels once more, a "bit" being a row of ``row_bytes`` of the whole tensor; in a bad row each bit is
inverted by a fair coin (purpose ROW_COINS) besides what else happens to it.

**Protection** looks at the stored word, whose check bits have faults of their own, at the mean rate of the bits that
they check. SECDED is Hsiao's code (A class of optimal minimum odd-weight-column SEC-DED codes, 1970) over the 64 bits
of four 16-bit or two 32-bit neighbours, or of the codes of a quantised weight as they lie packed, 16 of 4 bits or 8 of
8: one wrong bit is corrected; an error whose syndrome is that of no single bit is found, and the word zeroed (codes
become those of 0, ``Layout.lost``); three or more wrong bits may pass for one, and then a right bit is inverted on top.
Parity adds a bit to each value and zeroes it where the number of wrong bits is odd. The code is linear, so what a
decoder does depends on the wrong bits alone, and words without any are never looked at. Bits stored three times
(``protected_bits``) come in as a lower probability (``Pattern.bit_probabilities``).

**Kept maps.** The draw of a persistent fault is kept and applied again: as positions and bits to invert where these are
few, else as the bits to invert of every element, so in no more bytes than what it is for. What does not fit into the
room for all maps is drawn anew in each pass (``_KeptMaps``).
"""

import decimal
import math
from functools import lru_cache
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from flipproof.faults.cpu import flip_marked_by_, merge_by, new_marks, new_zeroed
from flipproof.faults.draw import Draw
from flipproof.faults.dtypes import INTEGERS
from flipproof.faults.fault import SECDED_CHECK_BITS, Stored
from flipproof.faults.guard import guard_
from flipproof.faults.philox import (
    CHECK_COUNTS,
    CHECK_LEVELS,
    LEVEL_COUNTS,
    LEVELS,
    MAX_BLOCK,
    MULTIPLIERS,
    ROUNDS,
    ROW_COINS,
    ROW_COUNTS,
    ROW_LEVELS,
    WEYL,
    check_tick,
)
from flipproof.faults.poisson import BLOCK, BLOCK_LOG2, poisson_cdf

_BANDS = 21
_CHUNK = {"cpu": BLOCK << 8, "cuda": BLOCK << 12}
"""Elements drawn at a time, at most: on a CPU they stay in the cache, on a GPU calls cost most."""
_CHUNK_WRONG = 2**22
"""Wrong bits drawn at a time, about."""
_KEPT_BYTES = 2**31
"""Of the draws of persistent faults that are kept, on all devices."""
_INTEGERS = {4: torch.uint8, 8: torch.uint8, 16: torch.int16, 32: torch.int32}
"""By the bits of an element."""
_LOW_32 = 0xFFFFFFFF
__all__ = ["flip", "flip_", "flip_marked", "merge", "new_marks", "new_zeroed"]  # what a backend has


class Flips(NamedTuple):
    """What a draw does to a flat tensor of ``length`` elements; no index comes twice."""

    element: Tensor | None
    """Indices of elements with wrong bits, ascending, int32 where that suffices; None: ``mask`` has all elements."""
    mask: Tensor
    """The bits to invert, as integers of an element's width."""
    zeroed: Tensor
    """Indices of elements that a protection zeroes, ascending."""
    length: int

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self[:3] if tensor is not None)

    def first(self, count: int) -> "Flips":
        """What it does to the first ``count`` elements."""
        if count == self.length:
            return self
        zeroed = self.zeroed[: _below(self.zeroed, count)]
        if self.element is None:
            return Flips(None, self.mask[:count], zeroed, count)
        few = _below(self.element, count)
        return Flips(self.element[:few], self.mask[:few], zeroed, count)

    def smallest(self) -> "Flips":
        """The same in the form that takes the fewest bytes."""
        if self.element is None or self.element.nbytes + self.mask.nbytes <= self.length * self.mask.itemsize:
            return self
        mask = self.mask.new_zeros(self.length)
        mask[self.element] = self.mask
        return self._replace(element=None, mask=mask)

    def apply(self, bits: Tensor, lost: int) -> None:
        """Do it to the elements' bit patterns, integers of an element's width, in place. What a protection zeroes
        becomes ``lost``."""
        if self.element is None:
            bits ^= self.mask
        else:
            bits[self.element] ^= self.mask
        bits[self.zeroed] = lost


def _below(ascending: Tensor, limit: int) -> int:
    return int(torch.searchsorted(ascending, limit))


def flip(x: Tensor, grad: Tensor | None, draw: Draw) -> Tensor:
    """guard(flip(x)) as a contiguous tensor; the arguments are those of ``flip_``."""
    y = x.clone(memory_format=torch.contiguous_format)
    flip_(y, grad, draw)
    return y


def flip_(x: Tensor, grad: Tensor | None, draw: Draw) -> None:
    """Invert bits of a contiguous tensor in place, zero what protection and guard zero.

    The arguments are those of ``cpu.flip_``. Waits for the device.
    """
    if x.numel() == 0:
        return
    stored, key, offset = draw.drawn().stored, draw.key, draw.offset
    assert stored is not None
    tick = 0 if stored.persistent else check_tick(int(draw.tick))
    if offset < 0 or (offset + x.numel()) >> BLOCK_LOG2 >= MAX_BLOCK - 1:
        raise ValueError(f"offset = {offset}: an element's index runs from 0 to 2^61 - 1")
    where = (x.dtype, x.device, offset)
    kept = _kept_maps.get(key, where, stored) if stored.persistent else None
    if kept is None or kept.length < x.numel():
        # What has grown is drawn to the end of its last block, for a cache grows by a token each time.
        count = x.numel() if kept is None else -(-x.numel() // BLOCK) * BLOCK
        kept = _Memory(stored, int(key), tick, x.device).flips(offset, count)
        if stored.persistent:
            _kept_maps.put(key, where, stored, kept)
    flips = kept.first(x.numel())
    flat, flat_grad = x.detach().view(-1), None if grad is None else grad.view(-1)
    flips.apply(flat.view(INTEGERS[x.dtype]), stored.lost)
    if flat_grad is not None:
        flat_grad[flips.zeroed] = 0
    if draw.limits is not None:
        guard_(x.detach(), draw.limits, grad)


def flip_marked(x: Tensor, zeroed: Tensor, draw: Draw) -> Tensor:
    """The same, and what was zeroed; the arguments are those of ``cpu.flip_marked``."""
    y = x.clone(memory_format=torch.contiguous_format)
    flip_marked_by_(flip_, y, zeroed, draw)
    return y


def merge(weight: Tensor, *rest: Any) -> Tensor:
    """guard(flip(W + scaling·B·A)); the arguments are those of ``cpu.merge``."""
    return merge_by(flip_, weight, *rest)


class _Memory:
    """The memory that holds one operand of one layer during one draw."""

    def __init__(self, stored: Stored, key: int, tick: int, device: torch.device) -> None:
        self.stored, self.p_bits, self.key, self.tick, self.device = stored, stored.p_bits, key, tick, device
        self.bits = len(stored.p_bits)
        """Of an element."""
        self.per_word = 64 // self.bits

    def flips(self, offset: int, count: int) -> Flips:
        """What happens to ``count`` elements from ``offset`` on; indices count from there."""
        # whole words, since a decoder sees the neighbours
        begin, end = offset // self.per_word * self.per_word, -(-(offset + count) // self.per_word) * self.per_word
        a_block = BLOCK * (math.fsum(self.p_bits) + self.stored.p_row * self.bits / 2)  # has so many wrong bits
        chunk = min(_CHUNK.get(self.device.type, _CHUNK["cpu"]), BLOCK * max(1, int(_CHUNK_WRONG / max(a_block, 1))))
        index_dtype, mask_dtype = torch.int32 if count <= 2**31 else torch.int64, _INTEGERS[self.bits]
        parts = []
        for first in range(begin, end, chunk):
            element, mask, zeroed = self._decoded(first, min(chunk, end - first))
            element, zeroed = element + (first - offset), zeroed + (first - offset)
            inside, there = (element >= 0) & (element < count), (zeroed >= 0) & (zeroed < count)
            parts.append((element[inside].to(index_dtype), mask[inside].to(mask_dtype), zeroed[there].to(index_dtype)))
        element, mask, zeroed = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
        return Flips(element, mask, zeroed, count)

    def _decoded(self, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """(elements with bits to invert, these bits, elements to zero) after the decoder, all int64: what happens to
        ``count`` elements from ``first`` on, which are whole words. Indices count from ``first``."""
        wrong = self._wrong(first, count)
        element, mask = _gather(wrong // self.bits, torch.ones_like(wrong) << wrong % self.bits)
        if self.stored.protection == "secded":
            return self._secded(element, mask, first, count)
        if self.stored.protection == "parity":
            check, _ = self._points(CHECK_COUNTS, CHECK_LEVELS, (self._check_rate(),), first, count)
            element, both = _gather(torch.cat([element, check]), torch.cat([mask, torch.ones_like(check) << self.bits]))
            found = _odd(both)
            return element[~found], both[~found] & (1 << self.bits) - 1, element[found]
        return element, mask, element[:0]

    def _secded(self, element: Tensor, mask: Tensor, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """What a SECDED decoder makes of wrong data bits, and of wrong check bits besides."""
        slot = element % self.per_word * self.bits
        rates = (self._check_rate(),) * SECDED_CHECK_BITS
        check, plane = self._points(CHECK_COUNTS, CHECK_LEVELS, rates, first // self.per_word, count // self.per_word)
        word, where = torch.unique(torch.cat([element // self.per_word, check]), return_inverse=True)
        data, checks = torch.zeros_like(word), torch.zeros_like(word)
        # no bit comes twice, so sums are unions
        data.index_add_(0, where[: len(element)], mask << slot)
        checks.index_add_(0, where[len(element) :], torch.ones_like(plane) << plane)
        syndrome = checks
        for row, columns in enumerate(_SECDED_ROWS):
            syndrome = syndrome ^ (_odd(data & columns).long() << row)
        what = torch.tensor(_SECDED_DECODER, device=word.device)[syndrome]
        corrected = torch.where(what < 64, data ^ (1 << what.clamp(max=63)), data)
        slots = torch.arange(self.per_word, device=word.device)
        elements = word[:, None] * self.per_word + slots  # (words, per_word)
        masks = corrected[:, None] >> slots * self.bits & (1 << self.bits) - 1
        found = what == _FOUND
        masks[found] = 0
        return elements[masks != 0], masks[masks != 0], elements[found].flatten()

    def _check_rate(self) -> tuple[int, ...]:
        return thresholds(math.fsum(self.p_bits) / self.bits, 1)

    def _wrong(self, first: int, count: int) -> Tensor:
        """The wrong bits of ``count`` elements from ``first`` on: ascending addresses, in bits from ``first``."""
        burst = self.stored.burst
        rates = tuple(thresholds(p, burst) for p in self.p_bits)
        before = -(-(burst - 1) // self.bits)  # a burst may begin so many elements ahead
        element, plane = self._points(LEVEL_COUNTS, LEVELS, rates, first - before, count + before)
        address = (element - before) * self.bits + plane
        if burst > 1:
            address = (address[:, None] + torch.arange(burst, device=address.device)).flatten()
            address = address[(address >= 0) & (address < count * self.bits)]
        if self.stored.p_row:
            address = torch.cat([address, self._bad_rows(first, count)])
        return torch.unique(address) if burst > 1 or self.stored.p_row else address

    def _bad_rows(self, first: int, count: int) -> Tensor:
        """Addresses of the bits that bad rows invert, in bits from element ``first``."""
        length = self.stored.row_bytes * 8 // self.bits  # elements
        first_row, last_row = first // length, (first + count - 1) // length
        rows, _ = self._points(
            ROW_COUNTS, ROW_LEVELS, (thresholds(self.stored.p_row, 1),), first_row, last_row - first_row + 1
        )
        words = length * self.bits // 32
        begin = (rows + first_row) * words  # 32-bit words of the whole tensor
        word = (begin[:, None] + torch.arange(words, device=begin.device)).flatten()
        in_block = BLOCK * self.bits // 32
        coins = _philox(ROW_COINS, word % in_block // 4, word // in_block, self.tick, self.key)
        coin = torch.stack(coins).gather(0, (word % 4)[None])[0]
        lanes = torch.arange(32, device=word.device)
        address = ((word - first * self.bits // 32) * 32)[:, None] + lanes
        inverted = (coin[:, None] >> lanes & 1).bool() & (address >= 0) & (address < count * self.bits)
        return address[inverted]

    def _points(
        self, counts_purpose: int, levels_purpose: int, rates: tuple[tuple[int, ...], ...], first: int, count: int
    ) -> tuple[Tensor, Tensor]:
        """(unit, plane), each once, that have a point below their plane's rate, in ``count`` units from ``first`` on.

        ``rates`` are ``thresholds``, one for each plane; units count from ``first``, which may be just below 0.
        """
        device = self.device
        blocks = torch.arange(first >> BLOCK_LOG2, (first + count - 1 >> BLOCK_LOG2) + 1, device=device)
        limits = torch.tensor(rates, device=device)  # (planes, bands)
        bands = [band for band in range(_BANDS) if any(rate[band] for rate in rates)]
        if not bands:
            return blocks[:0], blocks[:0]
        pairs = torch.arange(bands[0] // 2, _BANDS // 2 + 1, device=device)
        planes = torch.arange(len(rates), device=device)
        low_a, high_a, low_b, high_b = _philox(
            counts_purpose, planes[:, None] << 8 | pairs, blocks[:, None, None], self.tick, self.key
        )  # each (blocks, planes, pairs)
        uniform = torch.stack([_uniform_63(low_a, high_a), _uniform_63(low_b, high_b)], dim=-1).flatten(2)
        counts = torch.zeros(len(blocks), len(rates), _BANDS, dtype=torch.int64, device=device)
        for band in bands:
            drawn = uniform[..., band - bands[0] // 2 * 2].contiguous()
            counts[..., band] = torch.searchsorted(_band_table(band, device), drawn, right=True)
        counts *= limits > 0
        piece = counts.flatten().nonzero()[:, 0]
        thrown = counts.flatten()[piece]
        owner = piece.repeat_interleave(thrown)
        nth = torch.arange(len(owner), device=device) - (thrown.cumsum(0) - thrown).repeat_interleave(thrown)
        of_band, plane, block = owner % _BANDS, owner // _BANDS % len(rates), blocks[owner // (_BANDS * len(rates))]
        words = torch.stack(_philox(levels_purpose, plane << 22 | of_band << 17 | nth // 2, block, self.tick, self.key))
        half = (nth % 2 * 2)[None]
        where, level = words.gather(0, half)[0], words.gather(0, half + 1)[0]
        unit = (block << BLOCK_LOG2) + (where >> 32 - BLOCK_LOG2) - first
        wanted = (level < limits[plane, of_band]) & (unit >= 0) & (unit < count)
        hit = torch.unique(unit[wanted] * len(rates) + plane[wanted])
        return hit // len(rates), hit % len(rates)


def _gather(index: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Each index once, with the union of its masks, which have no bit in common."""
    once, where = torch.unique(index, return_inverse=True)
    return once, torch.zeros_like(once).index_add_(0, where, mask)


def _odd(bits: Tensor) -> Tensor:
    """Whether the number of ones of each int64 is odd."""
    for shift in (32, 16, 8, 4, 2, 1):
        bits = bits ^ bits >> shift
    return (bits & 1).bool()


@lru_cache(maxsize=1024)
def thresholds(p: float, burst: int) -> tuple[int, ...]:
    """For each band, below which 32-bit level a point inverts bits at probability p: 0 for none, 2^32 for all."""
    with decimal.localcontext() as context:  # correctly rounded, the same on every machine
        context.prec = 60
        rate = -(1 - decimal.Decimal(p)).ln() / burst
        found = []
        for band in range(_BANDS):
            low, width = _band(band)
            found.append(min(max(int((rate - low) / width * 2**32), 0), 2**32))
    return tuple(found)


def _band(band: int) -> tuple[decimal.Decimal, decimal.Decimal]:
    """(lower end, width) of a band of levels."""
    if band == _BANDS - 1:
        return decimal.Decimal(0), decimal.Decimal(2) ** -band
    return (decimal.Decimal(2) ** -(band + 1),) * 2


@lru_cache(maxsize=256)
def _band_table(band: int, device: torch.device) -> Tensor:
    """Poisson table of the number of points of one plane of one block in a band, int64."""
    return torch.from_numpy(poisson_cdf(_band(band)[1] * BLOCK)).to(device)


def _uniform_63(low: Tensor, high: Tensor) -> Tensor:
    return (high << 31) | (low >> 1)


def _philox(purpose: int, index: Tensor, block: Tensor, tick: int, key: int) -> tuple[Tensor, ...]:
    """``philox.philox`` at ``philox.counter`` on int64 tensors of any device; a block of -1 is the last there is."""
    block = block % MAX_BLOCK
    c0, c1 = index | purpose << 28, block & _LOW_32
    c2, c3 = block >> 32 | tick >> 32 << 16, torch.full((), tick & _LOW_32, dtype=torch.int64, device=block.device)
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
    k0, k1 = key & _LOW_32, key >> 32 & _LOW_32
    m0, m1 = MULTIPLIERS
    for _ in range(ROUNDS):
        a, b = c0 * m0, c2 * m1  # the low 64 bits, of which int64 keeps all
        c0, c1, c2, c3 = (b >> 32 & _LOW_32) ^ c1 ^ k0, b & _LOW_32, (a >> 32 & _LOW_32) ^ c3 ^ k1, a & _LOW_32
        k0, k1 = k0 + WEYL[0] & _LOW_32, k1 + WEYL[1] & _LOW_32
    return c0, c1, c2, c3


def _secded_columns() -> list[int]:
    """The syndromes of the 64 data bits: all of weight 3, and the eight turns of 00011111."""
    three = [v for v in range(256) if v.bit_count() == 3]
    return three + [(0b11111 << turn | 0b11111 >> 8 - turn) & 0xFF for turn in range(8)]


def _signed(bits: int) -> int:
    return bits - 2**64 if bits >> 63 else bits


_SECDED_ROWS = tuple(
    _signed(sum((column >> row & 1) << bit for bit, column in enumerate(_secded_columns()))) for row in range(8)
)
"""Which data bits each check bit covers."""
_NOTHING, _FOUND = 64, 65


def _secded_decoder() -> list[int]:
    """Syndrome -> the data bit to invert, or that there is nothing to do for the data, or that the word is lost."""
    decoder = [_FOUND] * 256
    for syndrome in (0, *(1 << check for check in range(SECDED_CHECK_BITS))):
        decoder[syndrome] = _NOTHING
    for bit, syndrome in enumerate(_secded_columns()):
        decoder[syndrome] = bit
    return decoder


_SECDED_DECODER = _secded_decoder()


class _KeptMaps:
    """Draws of persistent faults, in ``_KEPT_BYTES`` at most.

    A map belongs to the key that it was drawn with and goes when that goes: with its model, or when its layer takes
    another seed. Until then it stays, and what finds no room is not kept: a model asks for its maps in the same order
    in each pass, so if the oldest made room for the next, one with more maps than fit would never find any. A key has
    one map for each place, that of the rates asked for last.
    """

    def __init__(self) -> None:
        self.maps = WeakIdKeyDictionary()
        """Key, or whoever it names as its ``owner`` -> {place: (rates, flips)}."""
        self.lock = RLock()  # a collection of garbage within may take maps out

    @property
    def size(self) -> int:
        """Bytes held."""
        return sum(flips.nbytes for places in self.maps.values() for _, flips in places.values())

    def get(self, key: Tensor, where: Any, rates: Any) -> Flips | None:
        with self.lock:
            kept_rates, flips = self.maps.get(_owner(key), {}).get(where, (None, None))
        return flips if kept_rates == rates else None

    def put(self, key: Tensor, where: Any, rates: Any, flips: Flips) -> None:
        """Keep them, unless a protection zeroes so much that they are larger than their elements: then drawing anew is
        the better bargain."""
        flips = flips.smallest()
        with self.lock:
            places = self.maps.setdefault(_owner(key), {})
            places.pop(where, None)
            if flips.nbytes <= min(flips.length * flips.mask.itemsize, _KEPT_BYTES - self.size):
                places[where] = rates, flips


def _owner(key: Tensor) -> Any:
    return getattr(key, "owner", key)


_kept_maps = _KeptMaps()
