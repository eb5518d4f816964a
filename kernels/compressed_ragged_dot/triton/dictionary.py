"""Triton kernels for the codec `dictionary`; `gpu/dictionary.py` says how they work, `gpu.multiply` what they take.

Importing needs the package triton.

Tiles have codewords along the first axis and rows along the second: where nothing else decides, Triton puts
neighbouring lanes along the first, so that a scan over codewords stays inside a warp.
"""

import jax
import triton
import triton.language as tl

from qmoe_jax.kernels.compressed_ragged_dot import gpu
from qmoe_jax.kernels.compressed_ragged_dot.triton.shared import EXPERT, FIRST, ITEM_COLUMNS, SIZE, START

MAX_NONZEROS = tl.constexpr(gpu.dictionary.MAX_NONZEROS)
FIELD_BITS = tl.constexpr(gpu.dictionary.FIELD_BITS)
LENGTH_SHIFT = tl.constexpr(gpu.dictionary.LENGTH_SHIFT)
PLACE, EXISTS, MAXIMUM = (
    tl.constexpr(bits) for bits in (gpu.dictionary.PLACE, gpu.dictionary.EXISTS, gpu.dictionary.MAXIMUM)
)


def multiply_few(launch, lhs, blocks, rhs, items, config):
    return launch(
        _multiply_few,
        *(lhs, lhs if blocks is None else blocks, *gpu.dictionary.arrays(rhs), items),
        out_shape=jax.ShapeDtypeStruct((lhs.shape[0], rhs.shape[1]), lhs.dtype),
        **_options(rhs, items, config),
        **{"TOKENS": config.tokens},
    )


def decode(launch, rhs, items, config):
    zeros = gpu.zeros(rhs, items)
    return launch(
        _decode,
        *(zeros, *gpu.dictionary.arrays(rhs), items),
        out_shape=jax.ShapeDtypeStruct(zeros.shape, zeros.dtype),
        input_output_aliases={0: 0},
        **_options(rhs, items, config),
    )


def _options(rhs, items, config):
    _, out, width = rhs.shape
    per_item, programs = gpu.launches(config, out, items.shape[0])
    launch = {"grid": (programs,), "num_warps": config.warps, "num_stages": 1}
    return launch | {
        "OUT": out,
        "WIDTH": width,
        "PER_ITEM": per_item,
        "ROWS": config.rows,
        "CODEWORDS": config.codewords,
    }


@triton.jit
def _multiply_few(
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
def _decode(
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
