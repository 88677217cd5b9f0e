"""The merged weight W + s·B·A in Triton, which ``triton_kernels.py``'s flips then meet in place, and what its gradients
leave out.

``W + s·B·A`` is made tile by tile, tiles being squares for the product and blocks of a flip runs of a row, so the flips
follow in a second launch. Each program of the first notes whether it met a value out of range; where one did, the
programs of the second that share rows with it look at all of their elements again.
"""

import triton
import triton.language as tl

from flipproof.faults.triton_kernels import guarded, magnitude


@triton.jit
def _halves(x):
    """float32 as the sum of two bfloat16, to about 2⁻¹⁷."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit(do_not_specialize=["limit"])
def merge_tiles(
    w_ptr, a_ptr, b_ptr, y_ptr, far_ptr, list_ptr, scaling, limit, rows, columns, r,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, R: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
    FAR: tl.constexpr, GUARD: tl.constexpr, LIST: tl.constexpr, HALVES: tl.constexpr, BY: tl.constexpr,
):  # fmt: skip
    """y <- w + scaling · b · a for TILES tiles one below the other; the loads of the next tiles run ahead.

    FAR: note whether the guard would zero any of them; GUARD: zero it; LIST: empty the list for the next launch.
    HALVES: the product as three of bfloat16 halves, which keep what one would round away from a small adapter and still
    cost less than the memory that the tile waits for.
    """
    if LIST:  # for Triton not one condition: one half is known when compiling
        if tl.program_id(0) == 0:
            tl.store(list_ptr, 0)
    tile_columns = tl.cdiv(columns, TILE_COLUMNS)
    column = tl.program_id(0) % tile_columns * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    k = tl.arange(0, R)
    in_columns = (column < columns)[None, :]
    a_index = k.to(tl.int64)[:, None] * columns + column[None, :]
    a = tl.load(a_ptr + a_index, mask=(k < r)[:, None] & in_columns, other=0.0).to(tl.float32) * scaling
    if HALVES:
        a_high, a_low = _halves(a)
    first_tile = tl.program_id(0) // tile_columns * TILES
    largest = tl.zeros((TILE_ROWS,), dtype=tl.int32)  # by row of a tile: no thread waits for another until the end
    for tile in tl.range(first_tile, tl.minimum(first_tile + TILES, tl.cdiv(rows, TILE_ROWS)), num_stages=STAGES):
        row = (tile * TILE_ROWS + tl.arange(0, TILE_ROWS)).to(tl.int64)
        in_rows = (row < rows)[:, None]
        inside = in_rows & in_columns
        index = row[:, None] * columns + column[None, :]
        w = tl.load(w_ptr + index, mask=inside, other=0.0)
        b = tl.load(b_ptr + row[:, None] * r + k[None, :], mask=in_rows & (k < r)[None, :], other=0.0).to(tl.float32)
        if HALVES:
            b_high, b_low = _halves(b)
            product = tl.dot(b_high, a_high)
            product = tl.dot(b_low, a_high, product)
            product = tl.dot(b_high, a_low, product)
        else:
            product = tl.dot(b, a, input_precision="ieee")
        y = (w.to(tl.float32) + product).to(w.dtype)
        if BY == "row":
            row_limit = tl.load(limit + row, mask=row < rows, other=1).to(tl.int32)
            if GUARD:
                y = guarded(y, y_ptr, index, inside, row_limit[:, None], False)
        elif GUARD:
            y = guarded(y, y_ptr, index, inside, limit, False)
        tl.store(y_ptr + index, y, mask=inside)
        if FAR:  # what is not inside is zero
            high = tl.max(magnitude(y).to(tl.int32), axis=1)
            if BY == "row":
                high = (high >= row_limit).to(tl.int32)
            largest = tl.maximum(largest, high)
    if FAR:
        if BY == "row":
            limit = 1
        tl.store(far_ptr + tl.program_id(0), (tl.max(largest) >= limit).to(tl.int8))


@triton.jit(do_not_specialize=["room", "n"])
def zeroed_correction(
    list_ptr, room, grad_y_ptr, x_ptr, a_ptr, b_ptr, more_a_ptr, more_b_ptr, scaling, n, rows, columns, r,
    ENTRIES: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Add to more_a and more_b, float64, what takes the listed weights out of the gradients of a and b.

    One item of work is ENTRIES neighbours of the list, whose columns of grad_y often share a sector of memory, and
    CHUNKS times CHUNK rows of the batch, all of whose loads are under way at once. Sums within an item are float32, and
    float64 beyond it, where the order of addition no longer shows in a float32 result.
    """
    count = tl.load(list_ptr)
    count = tl.where(count > room, 0, count)  # a part of them would be another part each time
    groups = tl.cdiv(count, ENTRIES)
    k = tl.arange(0, R).to(tl.int64)
    for item in range(tl.program_id(0).to(tl.int64), groups * tl.cdiv(n, CHUNKS * CHUNK), tl.num_programs(0)):
        entry = item % groups * ENTRIES + tl.arange(0, ENTRIES)
        there = entry < count
        index = tl.load(list_ptr + 1 + entry, mask=there, other=0)
        out = index // columns
        column = index % columns
        products = tl.zeros((CHUNK, ENTRIES), dtype=tl.float32)
        used = there[:, None] & (k < r)[None, :]
        b_index = out[:, None] * r + k[None, :]
        a_index = k[None, :] * columns + column[:, None]
        b = tl.load(b_ptr + b_index, mask=used, other=0.0)
        a = tl.load(a_ptr + a_index, mask=used, other=0.0)
        for chunk in tl.static_range(CHUNKS):
            row = (item // groups * CHUNKS + chunk) * CHUNK + tl.arange(0, CHUNK)
            seen = (row < n)[:, None] & there[None, :]
            grad_y = tl.load(grad_y_ptr + row[:, None] * rows + out[None, :], mask=seen, other=0.0)
            x = tl.load(x_ptr + row[:, None] * columns + column[None, :], mask=seen, other=0.0)
            products += grad_y.to(tl.float32) * x.to(tl.float32)
        g = tl.sum(products, axis=0) * -scaling
        tl.atomic_add(more_a_ptr + a_index, (g[:, None] * b).to(tl.float64), mask=used, sem="relaxed")
        tl.atomic_add(more_b_ptr + b_index, (g[:, None] * a).to(tl.float64), mask=used, sem="relaxed")
