"""The kernels of `triton.py` for the codec `dictionary` and for dense matrices; importing needs the package triton.

`gpu_dictionary.py` says how they work.

Tiles have codewords along the first axis and rows along the second: where nothing else decides, Triton puts
neighbouring lanes along the first, so that a scan over codewords stays inside a warp.
"""

import triton
import triton.language as tl

from qmoe_jax.kernels.compressed_ragged_dot import gpu, gpu_dictionary

MAX_NONZEROS = tl.constexpr(gpu_dictionary.MAX_NONZEROS)
FIELD_BITS = tl.constexpr(gpu_dictionary.FIELD_BITS)
LENGTH_SHIFT = tl.constexpr(gpu_dictionary.LENGTH_SHIFT)
PLACE, EXISTS, MAXIMUM = (
    tl.constexpr(bits) for bits in (gpu_dictionary.PLACE, gpu_dictionary.EXISTS, gpu_dictionary.MAXIMUM)
)
EXPERT, RANK, START, SIZE, FIRST, TABLE, ITEM_COLUMNS = (tl.constexpr(i) for i in range(gpu.ITEM_COLUMNS + 1))


@triton.jit
def multiply_few(
    lhs,  # [tokens, WIDTH]
    blocks,  # [items, WIDTH, TOKENS]
    codewords,
    row_offsets,  # [experts, OUT + 1]
    levels,  # [experts, OUT, 2]
    table,
    items,  # [items, ITEM_COLUMNS]
    product,  # out: [tokens, OUT]
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    PER_ITEM: tl.constexpr,
    ROWS: tl.constexpr,
    CODEWORDS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """A block of rows of one expert, times the tokens of one item."""
    i = tl.program_id(0) // PER_ITEM
    item = items + i * ITEM_COLUMNS
    rows = tl.program_id(0) % PER_ITEM * ROWS + tl.arange(0, ROWS)
    start, size = tl.load(item + START).to(tl.int64), tl.load(item + SIZE)
    y = product + start * OUT
    if size == 1:
        x = lhs + start * WIDTH
        _multiply_rows(x, codewords, row_offsets, levels, table, item, rows, y, size, OUT, CODEWORDS, 1)
    if TOKENS > 1:
        if size > 1:
            x = blocks + i.to(tl.int64) * WIDTH * TOKENS
            _multiply_rows(x, codewords, row_offsets, levels, table, item, rows, y, size, OUT, CODEWORDS, TOKENS)


@triton.jit
def _multiply_rows(
    x,  # [WIDTH, TOKENS]
    codewords,
    row_offsets,
    levels,
    table,
    item,
    rows,
    y,  # [size, OUT]
    size,
    OUT: tl.constexpr,
    CODEWORDS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    begin, end, low, high = _streams(row_offsets, levels, item, rows, OUT)
    low, high = low.to(tl.float32), high.to(tl.float32)
    ROWS: tl.constexpr = rows.shape[0]
    token = tl.arange(0, TOKENS)
    accumulator = tl.zeros((CODEWORDS, ROWS, TOKENS), tl.float32)
    position = tl.zeros((ROWS,), tl.int32)
    own = begin + tl.arange(0, CODEWORDS)[:, None]  # [CODEWORDS, ROWS]
    entry = _look_up(table, _load(codewords, own, end), own < end)
    codeword = _load(codewords, own + CODEWORDS, end)
    for k in range(0, tl.max(end - begin), CODEWORDS):
        # The next gather from the table, and the codewords after that, are under way meanwhile.
        next_entry = _look_up(table, codeword, own + (k + CODEWORDS) < end)
        codeword = _load(codewords, own + (k + 2 * CODEWORDS), end)
        length = (entry >> LENGTH_SHIFT).to(tl.int32)
        starts = position + tl.cumsum(length, 0) - length  # [CODEWORDS, ROWS]
        for n in tl.static_range(MAX_NONZEROS):
            columns, exists, is_high = _nonzero(entry, starts, n)
            weights = tl.where(is_high, high, low)
            values = tl.load(x + (columns[:, :, None] * TOKENS + token), mask=exists[:, :, None], other=0)
            accumulator += weights[:, :, None] * values.to(tl.float32)
        position += tl.sum(length, 0)
        entry = next_entry
    mask = (rows < OUT)[:, None] & (token < size)
    tl.store(y + token * OUT + rows[:, None], tl.sum(accumulator, 0).to(y.dtype.element_ty), mask=mask)


@triton.jit
def decode(
    zeros,
    codewords,
    row_offsets,  # [experts, OUT + 1]
    levels,  # [experts, OUT, 2]
    table,
    items,  # [items, ITEM_COLUMNS]
    dense,  # out, the same buffer as zeros: [items, OUT, WIDTH]
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    PER_ITEM: tl.constexpr,
    ROWS: tl.constexpr,
    CODEWORDS: tl.constexpr,
):
    """A block of rows of one expert, to places that hold zeros."""
    i = tl.program_id(0) // PER_ITEM
    item = items + i * ITEM_COLUMNS
    rows = tl.program_id(0) % PER_ITEM * ROWS + tl.arange(0, ROWS)
    if tl.load(item + SIZE) > 0:
        begin, end, low, high = _streams(row_offsets, levels, item, rows, OUT)
        position = (i * OUT + rows) * WIDTH
        own = begin + tl.arange(0, CODEWORDS)[:, None]  # [CODEWORDS, ROWS]
        entry = _look_up(table, _load(codewords, own, end), own < end)
        codeword = _load(codewords, own + CODEWORDS, end)
        for k in range(0, tl.max(end - begin), CODEWORDS):
            next_entry = _look_up(table, codeword, own + (k + CODEWORDS) < end)
            codeword = _load(codewords, own + (k + 2 * CODEWORDS), end)
            length = (entry >> LENGTH_SHIFT).to(tl.int32)
            starts = position + tl.cumsum(length, 0) - length
            for n in tl.static_range(MAX_NONZEROS):
                columns, exists, is_high = _nonzero(entry, starts, n)
                tl.store(dense + columns, tl.where(is_high, high, low), mask=exists)
            position += tl.sum(length, 0)
            entry = next_entry


@triton.jit
def multiply_dense(
    lhs,  # [tokens, WIDTH]
    dense,  # [ranks, OUT, WIDTH]
    items,  # [items, ITEM_COLUMNS]
    before,
    product,  # out, the same buffer as before: [tokens, OUT]
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    PER_ITEM: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of tokens of one expert x a tile of its rows."""
    item = items + tl.program_id(0) // PER_ITEM * ITEM_COLUMNS
    rows = tl.program_id(0) % PER_ITEM * ROWS + tl.arange(0, ROWS)
    start, size = tl.load(item + START).to(tl.int64), tl.load(item + SIZE)
    if size > 0:
        token = tl.arange(0, TOKENS)
        x_rows = lhs + (start + token) * WIDTH
        W_rows = dense + (tl.load(item + RANK) * OUT + rows) * WIDTH
        accumulator = tl.zeros((TOKENS, ROWS), tl.float32)
        for k in range(0, WIDTH, COLUMNS):
            columns = k + tl.arange(0, COLUMNS)
            inside = columns < WIDTH
            x = tl.load(x_rows[:, None] + columns, mask=(token < size)[:, None] & inside, other=0)
            W = tl.load(W_rows + columns[:, None], mask=inside[:, None] & (rows < OUT), other=0)
            if x.dtype == tl.bfloat16:
                accumulator = tl.dot(x, W, accumulator)
            else:
                # Three times eight bits are float32's 24: the parts are exact in bfloat16.
                for _ in tl.static_range(3):
                    part = (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
                    accumulator = tl.dot(part.to(tl.bfloat16), W, accumulator)
                    x -= part
        y = product + (start + token)[:, None] * OUT + rows
        mask = (token < size)[:, None] & (rows < OUT)
        tl.store(y, accumulator.to(product.dtype.element_ty), mask=mask)


@triton.jit
def _streams(row_offsets, levels, item, rows, OUT: tl.constexpr):
    """First codeword of each row, the one after its last, and its levels; rows beyond the last have none."""
    expert, first = tl.load(item + EXPERT), tl.load(item + FIRST)
    mask = rows < OUT
    offsets = row_offsets + expert * (OUT + 1) + rows
    begin = first + tl.load(offsets, mask=mask, other=0)
    end = first + tl.load(offsets + 1, mask=mask, other=0)
    row_levels = levels + (expert * OUT + rows) * 2
    return begin, end, tl.load(row_levels, mask=mask, other=0), tl.load(row_levels + 1, mask=mask, other=0)


@triton.jit
def _load(codewords, k, end):
    return tl.load(codewords + k, mask=k < end, other=0)


@triton.jit
def _look_up(table, codeword, exists):
    return tl.load(table + codeword.to(tl.int32), mask=exists, other=0)


@triton.jit
def _nonzero(entry, starts, n: tl.constexpr):
    """Non-zero number n of each codeword: its column, whether it exists, whether it is its row's maximum."""
    shift: tl.constexpr = FIELD_BITS * n
    columns = starts + ((entry >> shift) & PLACE).to(tl.int32)
    return columns, (entry & (EXISTS << shift)) != 0, (entry & (MAXIMUM << shift)) != 0
