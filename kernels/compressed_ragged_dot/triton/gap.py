"""Triton kernels for the codec `gap`; `gpu/gap.py` says how they work, `gpu.multiply` what they take.

Importing needs the package triton.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from qmoe_jax.kernels.compressed_ragged_dot import gpu
from qmoe_jax.kernels.compressed_ragged_dot.triton.shared import EXPERT, FIRST, ITEM_COLUMNS, SIZE, START, TABLE

SEGMENT, WINDOW, LOOKUPS = (tl.constexpr(i) for i in (gpu.gap.SEGMENT, gpu.gap.WINDOW, gpu.gap.LOOKUPS))
WINDOW_MASK = tl.constexpr((1 << gpu.gap.WINDOW) - 1)
USED_MASK, WEIGHTS_SHIFT = tl.constexpr(gpu.gap.USED_MASK), tl.constexpr(gpu.gap.WEIGHTS_SHIFT)
NONZEROS = tl.constexpr(len(gpu.gap.NONZEROS))
# Of each non-zero of an entry.
SHIFTS, MASKS, SECONDS, THIRDS = (tl.constexpr(field) for field in zip(*gpu.gap.NONZEROS, strict=True))


def multiply_few(launch, lhs, blocks, rhs, items, config):
    options = _options(rhs, items, config)
    parts = launch(
        _multiply_few,
        *(lhs, lhs if blocks is None else blocks, *gpu.gap.arrays(rhs), items),
        out_shape=jax.ShapeDtypeStruct((options["SEGMENTS"], lhs.shape[0], rhs.shape[1]), jnp.float32),
        **options,
        **{"ALL_TOKENS": lhs.shape[0], "TOKENS": config.tokens},
    )
    return jnp.sum(parts, axis=0).astype(lhs.dtype)


def decode(launch, rhs, items, config):
    zeros = gpu.zeros(rhs, items)
    return launch(
        _decode,
        *(zeros, *gpu.gap.arrays(rhs), items),
        out_shape=jax.ShapeDtypeStruct(zeros.shape, zeros.dtype),
        input_output_aliases={0: 0},
        **_options(rhs, items, config),
    )


def _options(rhs, items, config):
    _, out, width = rhs.shape
    segments, row_blocks, programs = gpu.gap.launches(config, rhs.shape, items.shape[0])
    launch = {"grid": (programs,), "num_warps": config.warps, "num_stages": 1}
    sizes = {"WORDS": rhs.data["words"].size, "OUT": out, "WIDTH": width, "LEVELS": rhs.levels.shape[2]}
    return launch | sizes | {"SEGMENTS": segments, "ROW_BLOCKS": row_blocks, "ROWS": config.rows}


@triton.jit
def _multiply_few(
    lhs,  # [ALL_TOKENS, WIDTH]
    blocks,  # [items, WIDTH, TOKENS]
    words,  # [WORDS]
    starts,  # [experts, OUT, SEGMENTS]
    skips,  # [experts, OUT, SEGMENTS]
    levels,  # [experts, OUT, LEVELS]
    table,  # [parameters, 2^WINDOW]
    items,  # [items, ITEM_COLUMNS]
    parts,  # out: [SEGMENTS, ALL_TOKENS, OUT]
    WORDS: tl.constexpr,
    ALL_TOKENS: tl.constexpr,
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """A segment of a block of rows of one expert, times the tokens of one item."""
    i, segment, rows = _place(SEGMENTS, ROW_BLOCKS, ROWS)
    item = items + i * ITEM_COLUMNS
    start, size = tl.load(item + START).to(tl.int64), tl.load(item + SIZE)
    first = segment * SEGMENT
    stream = _stream(words, starts, skips, item, segment, rows, WORDS, OUT, WIDTH, SEGMENTS)
    low_level, middle_level, high_level = _levels(levels, item, rows, OUT, LEVELS)
    row_levels = (low_level.to(tl.float32), middle_level.to(tl.float32), high_level.to(tl.float32))
    own_table = table + (tl.load(item + TABLE) << WINDOW)
    y = parts + (segment.to(tl.int64) * ALL_TOKENS + start) * OUT
    if size == 1:
        x = lhs + start * WIDTH + first
        _multiply_rows(x, words, stream, row_levels, own_table, rows, y, size, WORDS, OUT, LEVELS, 1)
    if TOKENS > 1:
        if size > 1:
            x = blocks + (i.to(tl.int64) * WIDTH + first) * TOKENS
            _multiply_rows(x, words, stream, row_levels, own_table, rows, y, size, WORDS, OUT, LEVELS, TOKENS)


@triton.jit
def _multiply_rows(
    x,  # [columns, TOKENS]
    words,
    stream,
    levels,
    table,
    rows,
    y,  # [size, OUT]
    size,
    WORDS: tl.constexpr,
    OUT: tl.constexpr,
    LEVELS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    column, position, index, low, high, following, end = stream
    ROWS: tl.constexpr = rows.shape[0]
    token = tl.arange(0, TOKENS)
    accumulator = tl.zeros((ROWS, TOKENS), tl.float32)
    while tl.min(column) < end:
        more = column < end
        window = _window(low, high, position)
        for _ in tl.static_range(LOOKUPS):
            entry = _look_up(table, window, more)
            for n in tl.static_range(NONZEROS):
                own, exists, weights = _nonzero(entry, column, end, levels, LEVELS, n)
                values = tl.load(x + (own[:, None] * TOKENS + token), mask=exists[:, None], other=0)
                accumulator += weights[:, None] * values.to(tl.float32)
            column, position, window = _skip(entry, column, position, window)
        position, index, low, high, following = _refill(words, position, index, low, high, following, WORDS)
    mask = (rows < OUT)[:, None] & (token < size)
    tl.store(y + token * OUT + rows[:, None], accumulator, mask=mask)


@triton.jit
def _decode(
    zeros,
    words,  # [WORDS]
    starts,  # [experts, OUT, SEGMENTS]
    skips,  # [experts, OUT, SEGMENTS]
    levels,  # [experts, OUT, LEVELS]
    table,  # [parameters, 2^WINDOW]
    items,  # [items, ITEM_COLUMNS]
    dense,  # out, the same buffer as zeros: [items, OUT, WIDTH]
    WORDS: tl.constexpr,
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A segment of a block of rows of one expert, to places that hold zeros."""
    i, segment, rows = _place(SEGMENTS, ROW_BLOCKS, ROWS)
    item = items + i * ITEM_COLUMNS
    if tl.load(item + SIZE) > 0:
        stream = _stream(words, starts, skips, item, segment, rows, WORDS, OUT, WIDTH, SEGMENTS)
        row_levels = _levels(levels, item, rows, OUT, LEVELS)
        own_table = table + (tl.load(item + TABLE) << WINDOW)
        first = (i * OUT + rows) * WIDTH + segment * SEGMENT
        column, position, index, low, high, following, end = stream
        while tl.min(column) < end:
            more = column < end
            window = _window(low, high, position)
            for _ in tl.static_range(LOOKUPS):
                entry = _look_up(own_table, window, more)
                for n in tl.static_range(NONZEROS):
                    own, exists, weights = _nonzero(entry, column, end, row_levels, LEVELS, n)
                    tl.store(dense + (first + own), weights, mask=exists)
                column, position, window = _skip(entry, column, position, window)
            position, index, low, high, following = _refill(words, position, index, low, high, following, WORDS)


@triton.jit
def _place(SEGMENTS: tl.constexpr, ROW_BLOCKS: tl.constexpr, ROWS: tl.constexpr):
    """Item, segment and rows of a program."""
    i = tl.program_id(0)
    rows = i % ROW_BLOCKS * ROWS + tl.arange(0, ROWS)
    return i // (SEGMENTS * ROW_BLOCKS), i // ROW_BLOCKS % SEGMENTS, rows


@triton.jit
def _stream(
    words,
    starts,
    skips,
    item,
    segment,
    rows,
    WORDS: tl.constexpr,
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Column of the segment, bit in the first of three words, index of the next one, these words; the last column.

    Rows beyond the last are at their end.
    """
    expert, first = tl.load(item + EXPERT), tl.load(item + FIRST)
    real = rows < OUT
    place = (expert * OUT + rows) * SEGMENTS + segment
    start = tl.load(starts + place, mask=real, other=0)
    skip = tl.load(skips + place, mask=real, other=0).to(tl.int32)
    index = first + (start >> 5).to(tl.int32)
    column = tl.where(real, -skip, SEGMENT)
    low, high, following = (
        _fetch(words, index, real, 0, WORDS),
        _fetch(words, index + 1, real, 0, WORDS),
        _fetch(words, index + 2, real, 0, WORDS),
    )
    return column, start & 31, index + 3, low, high, following, tl.minimum(WIDTH - segment * SEGMENT, SEGMENT)


@triton.jit
def _fetch(words, index, mask, other, WORDS: tl.constexpr):
    return tl.load(words + tl.minimum(tl.maximum(index, 0), WORDS - 1), mask=mask, other=other)


@triton.jit
def _levels(levels, item, rows, OUT: tl.constexpr, LEVELS: tl.constexpr):
    """The rows' levels; the last one twice where there are two."""
    own = levels + (tl.load(item + EXPERT) * OUT + rows) * LEVELS
    mask = rows < OUT
    return (
        tl.load(own, mask=mask, other=0),
        tl.load(own + 1, mask=mask, other=0),
        tl.load(own + (LEVELS - 1), mask=mask, other=0),
    )


@triton.jit
def _window(low, high, position):
    return (low >> position) | ((high << 1) << (position ^ 31))


@triton.jit
def _look_up(table, window, mask):
    return tl.load(table + (window & WINDOW_MASK).to(tl.int32), mask=mask, other=0)


@triton.jit
def _nonzero(entry, column, end, levels, LEVELS: tl.constexpr, n: tl.constexpr):
    """Non-zero number n of each entry: column of the segment, whether it exists and lies in the segment, weight."""
    own = column + ((entry >> SHIFTS[n]) & MASKS[n]).to(tl.int32)
    weights = tl.where(((entry >> SECONDS[n]) & 1) != 0, levels[1], levels[0])
    if LEVELS == 3:
        weights = tl.where(((entry >> THIRDS[n]) & 1) != 0, levels[2], weights)
    return own, own.to(tl.uint32) < end.to(tl.uint32), weights


@triton.jit
def _skip(entry, column, position, window):
    used = entry & USED_MASK
    return column + (entry >> WEIGHTS_SHIFT).to(tl.int32), position + used, window >> used


@triton.jit
def _refill(words, position, index, low, high, following, WORDS: tl.constexpr):
    """Makes the word that holds the next bit the first one."""
    next_word = position > 31
    low, high = tl.where(next_word, high, low), tl.where(next_word, following, high)
    following = _fetch(words, index, next_word, following, WORDS)  # Nothing waits for it before the next step.
    return position & 31, index + next_word.to(tl.int32), low, high, following
