"""Pallas kernels for the codec `gap`; `gpu/gap.py` says how they work, `gpu.multiply` what they take."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from qmoe_jax.codecs.gap import segment_columns
from qmoe_jax.kernels.compressed_ragged_dot import gpu
from qmoe_jax.kernels.compressed_ragged_dot.gpu.gap import (
    LEVEL_MASK,
    LEVEL_SHIFTS,
    LOOKUPS,
    NO_SECOND,
    PLACE_MASK,
    PLACE_SHIFT,
    USED_MASK,
    WEIGHTS_SHIFT,
    WINDOW,
)


def multiply_few(launch, lhs, blocks, rhs, items, config):
    segments, row_blocks, programs = gpu.gap.launches(config, rhs, items.shape[0])
    parts = launch(
        functools.partial(_multiply_few, segments=segments, row_blocks=row_blocks, config=config),
        *(lhs, lhs if blocks is None else blocks, *gpu.gap.arrays(rhs), items),
        out=jax.ShapeDtypeStruct((segments, lhs.shape[0], rhs.shape[1]), jnp.float32),
        grid=(programs,),
        compiler_params=plgpu.CompilerParams(num_warps=config.warps, num_stages=1),
        name="multiply_few",
    )
    return jnp.sum(parts, axis=0).astype(lhs.dtype)


def decode(launch, rhs, items, config):
    segments, row_blocks, programs = gpu.gap.launches(config, rhs, items.shape[0])
    zeros = gpu.zeros(rhs, items)
    return launch(
        functools.partial(_decode, width=rhs.shape[2], segments=segments, row_blocks=row_blocks, config=config),
        *(zeros, *gpu.gap.arrays(rhs), items),
        out=zeros,
        input_output_aliases={0: 0},
        grid=(programs,),
        compiler_params=plgpu.CompilerParams(num_warps=config.warps, num_stages=1),
        name="decode",
    )


def _multiply_few(lhs, blocks, words, starts, skips, levels, table, items, parts, *, segments, row_blocks, config):
    """A segment of a block of rows of one expert, times the tokens of one item."""
    item, segment, rows = _place(segments, row_blocks, config.rows)
    start, size = items[item, gpu.START], items[item, gpu.SIZE]
    first_column = segment * segment_columns(lhs.shape[1], segments)
    for_nonzeros = functools.partial(_for_nonzeros, words, starts, skips, levels, table, items, item, segment)

    def multiply_by(load, tokens):
        """load(columns [rows], mask) -> [rows, tokens]."""

        def add(columns, exists, weights, accumulator):
            x = load(columns[:, None], exists[:, None]).astype(jnp.float32)
            return accumulator + weights[:, None] * x

        accumulator = jnp.zeros((config.rows, tokens), jnp.float32)
        accumulator = for_nonzeros(rows, lhs.shape[1], jnp.float32, add, accumulator)
        token = jnp.arange(tokens)[None, :]
        mask = (rows < parts.shape[2])[:, None] & (token < size)
        plgpu.store(parts.at[segment, start + token, rows[:, None]], accumulator, mask=mask)

    @pl.when(size == 1)
    def one_token():
        multiply_by(lambda c, mask: plgpu.load(lhs.at[start, first_column + c], mask=mask, other=0), 1)

    if config.tokens > 1:

        @pl.when(size > 1)
        def several_tokens():
            token = jnp.arange(config.tokens)[None, :]

            def load(columns, mask):
                mask = jnp.broadcast_to(mask, (config.rows, config.tokens))
                return plgpu.load(blocks.at[item, first_column + columns, token], mask=mask, other=0)

            multiply_by(load, config.tokens)


def _decode(_, words, starts, skips, levels, table, items, dense, *, width, segments, row_blocks, config):
    """A segment of a block of rows of one expert, to places that hold zeros."""
    item, segment, rows = _place(segments, row_blocks, config.rows)

    @pl.when(items[item, gpu.SIZE] > 0)
    def some_tokens():
        first = (item * levels.shape[1] + rows) * width + segment * segment_columns(width, segments)

        def write(columns, exists, weights, nothing):
            # Interpreted, a masked store writes back what it found: not to places that other lanes write.
            index = jnp.where(exists, first + columns, dense.shape[0] - 1)
            plgpu.store(dense.at[index], weights, mask=exists)
            return nothing

        stream = words, starts, skips, levels, table, items
        _for_nonzeros(*stream, item, segment, rows, width, dense.dtype, write, 0)


def _place(segments, row_blocks, block):
    """Item, segment and rows of a program."""
    i = pl.program_id(0)
    return i // (segments * row_blocks), i // row_blocks % segments, i % row_blocks * block + jnp.arange(block)


def _for_nonzeros(words, starts, skips, levels, table, items, item, segment, rows, width, dtype, visit, state):
    """state = visit(columns of the segment, exists, weights of dtype, state), all [rows], for all non-zeros.

    Where nothing exists, the column is arbitrary and not to be used.
    """
    of_class = starts.shape[2] // (items.shape[1] - gpu.TABLE)  # segments
    expert, slot = items[item, gpu.EXPERT], items[item, gpu.TABLE + segment // of_class]
    real = rows < levels.shape[1]
    start = plgpu.load(starts.at[expert, rows, segment], mask=real, other=0)
    skip = plgpu.load(skips.at[expert, rows, segment], mask=real, other=0).astype(jnp.int32)
    level = [plgpu.load(levels.at[expert, rows, i], mask=real, other=0).astype(dtype) for i in range(levels.shape[2])]
    length = segment_columns(width, starts.shape[2])
    end = jnp.minimum(width - segment * length, length)  # of the columns

    def fetch(index, mask, other):
        return plgpu.load(words.at[jnp.clip(index, 0, words.shape[0] - 1)], mask=mask, other=other)

    def step(carried):
        column, position, index, low, high, following, state = carried
        more = column < end
        window = (low >> position) | ((high << 1) << (position ^ 31))
        for _ in range(LOOKUPS):
            key = (window & ((1 << WINDOW) - 1)).astype(jnp.int32)
            entry = plgpu.load(table.at[slot, key], mask=more, other=NO_SECOND)
            after = column + (entry >> WEIGHTS_SHIFT).astype(jnp.int32)
            first = column + ((entry >> PLACE_SHIFT) & PLACE_MASK).astype(jnp.int32)
            second = (after - 1) | (entry & NO_SECOND).astype(jnp.int32)
            for own, shift in zip((first, second), LEVEL_SHIFTS, strict=True):
                weights = level[0]
                for k in range(1, len(level)):
                    weights = jnp.where(((entry >> shift) & LEVEL_MASK) == k, level[k], weights)
                state = visit(own, own.astype(jnp.uint32) < end.astype(jnp.uint32), weights, state)
            used = entry & USED_MASK
            window, position = window >> used, position + used
            column = after
        next_word = position > 31
        low, high = jnp.where(next_word, high, low), jnp.where(next_word, following, high)
        following = fetch(index, next_word, following)  # Nothing waits for it before the next step.
        index += next_word.astype(jnp.int32)
        return column, position & 31, index, low, high, following, state

    index = items[item, gpu.FIRST] + (start >> 5).astype(jnp.int32)
    low, high, following = (fetch(index + i, real, 0) for i in range(3))
    carried = (jnp.where(real, -skip, length), start & 31, index + 3, low, high, following, state)
    return jax.lax.while_loop(lambda carried: jnp.min(carried[0]) < end, step, carried)[-1]
