"""The weight that codes and scales stand for, in Triton: code × scale behind a guard, each read once and written once.

What a code stands for is looked up in a table of all patterns, which stays in the cache, or is the pattern less that of
0. So numbers and products are those of ``formats/quantise.py``, and their rounding is. Flips are in the codes and the
scales already: those of one code may come from several balls, and all must be there before it is read.
"""

import triton
import triton.language as tl

from flipproof.faults.triton_kernels import guarded


@triton.jit
def unpack(packed_ptr, y_ptr, n, BYTES: tl.constexpr):
    """y <- both halves of each of n bytes, the low one first."""
    first = tl.program_id(0).to(tl.int64) * BYTES
    index = first + tl.arange(0, BYTES)
    byte = tl.load(packed_ptr + index, mask=index < n, other=0)
    place = 2 * first + tl.arange(0, 2 * BYTES)
    tl.store(y_ptr + place, tl.interleave(byte & 15, byte >> 4), mask=place < 2 * n)


@triton.jit(do_not_specialize=["limit"])
def dequantise(
    code_ptr, table_ptr, scale_ptr, zero_ptr, group_ptr, y_ptr, limit, columns, row_bytes, groups,
    TABLE: tl.constexpr, ZERO: tl.constexpr, MIDDLE: tl.constexpr, PACKED: tl.constexpr, GROUP: tl.constexpr,
    LISTED: tl.constexpr, GUARD: tl.constexpr, BY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """y <- guard(code · scale) for TILE codes of a row.

    Codes have a byte each, or with PACKED half of one, ``row_bytes`` to a row. TABLE: their numbers are in a table;
    else they are integers, less the zero point of their scale (ZERO) or MIDDLE. GROUP codes share a scale, counted over
    the ends of rows, or 0: a row does; with LISTED ``group_ptr`` says which of its row's ``groups`` a column's is.
    """
    tiles = tl.cdiv(columns, TILE)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * TILE
    column = first + tl.arange(0, TILE)
    inside = column < columns
    index = row * columns + column
    if PACKED:
        at = first // 2 + tl.arange(0, TILE // 2)
        byte = tl.load(code_ptr + row * row_bytes + at, mask=at < row_bytes, other=0)
        code = tl.interleave(byte & 15, byte >> 4)
    else:
        code = tl.load(code_ptr + row * row_bytes + column, mask=inside, other=0)
    if LISTED:
        place = row * groups + tl.load(group_ptr + column, mask=inside, other=0)
    elif GROUP == 0:
        place = row + column * 0
    else:
        place = index // GROUP
    scale = tl.load(scale_ptr + place, mask=inside, other=0.0)
    if TABLE:
        number = tl.load(table_ptr + code.to(tl.int32)).to(tl.float32)
    elif ZERO:
        number = code.to(tl.float32) - tl.load(zero_ptr + place, mask=inside, other=0.0).to(tl.float32)
    else:
        number = code.to(tl.float32) - MIDDLE
    y = (number * scale.to(tl.float32)).to(scale.dtype).to(y_ptr.dtype.element_ty)
    if GUARD:
        if BY == "row":
            limit = tl.load(limit + row).to(tl.int32)
        y = guarded(y, y_ptr, index, inside, limit, False)
    tl.store(y_ptr + index, y, mask=inside)
