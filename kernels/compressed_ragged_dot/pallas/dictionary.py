"""Pallas kernels for the codec `dictionary`; `gpu/dictionary.py` says how they work, `gpu.multiply` what they take."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from qmoe_jax.kernels.compressed_ragged_dot import gpu
from qmoe_jax.kernels.compressed_ragged_dot.gpu.dictionary import (
    EXISTS,
    FIELD_BITS,
    LENGTH_SHIFT,
    MAX_NONZEROS,
    MAXIMUM,
    PLACE,
)
from qmoe_jax.kernels.compressed_ragged_dot.pallas.shared import rows_of_program


def multiply_few(launch, lhs, blocks, rhs, items, config):
    per_item, programs = gpu.launches(config, rhs.shape[1], items.shape[0])
    return launch(
        functools.partial(_multiply_few, per_item=per_item, config=config),
        *(lhs, lhs if blocks is None else blocks, *gpu.dictionary.arrays(rhs), items),
        out=jax.ShapeDtypeStruct((lhs.shape[0], rhs.shape[1]), lhs.dtype),
        grid=(programs,),
        compiler_params=plgpu.CompilerParams(num_warps=config.warps, num_stages=1),
        name="multiply_few",
    )


def decode(launch, rhs, items, config):
    _, out, width = rhs.shape
    per_item, programs = gpu.launches(config, out, items.shape[0])
    zeros = gpu.zeros(rhs, items)
    return launch(
        functools.partial(_decode, width=width, per_item=per_item, config=config),
        *(zeros, *gpu.dictionary.arrays(rhs), items),
        out=zeros,
        input_output_aliases={0: 0},
        grid=(programs,),
        compiler_params=plgpu.CompilerParams(num_warps=config.warps, num_stages=1),
        name="decode",
    )


def _multiply_few(lhs, blocks, codewords, row_offsets, levels, table, items, product, *, per_item, config):
    """A block of rows of one expert, times the tokens of one item."""
    item, rows = pl.program_id(0) // per_item, rows_of_program(per_item, config.rows)
    start, size = items[item, gpu.START], items[item, gpu.SIZE]

    def multiply_by(load, tokens):
        """load(columns [codewords, rows], mask) -> [codewords, rows, tokens]."""
        begin, end, low, high = _streams(row_offsets, levels, items, item, rows)
        low, high = low.astype(jnp.float32), high.astype(jnp.float32)

        def add(columns, exists, is_high, accumulator):
            weights = jnp.where(is_high, high, low)
            x = load(columns[:, :, None], exists[:, :, None]).astype(jnp.float32)
            return accumulator + weights[:, :, None] * x

        accumulator = jnp.zeros((config.codewords, config.rows, tokens), jnp.float32)
        accumulator = _for_nonzeros(codewords, table, begin, end, config.codewords, add, accumulator)
        y = jnp.sum(accumulator, axis=0).astype(product.dtype)  # [rows, tokens]
        token = jnp.arange(tokens)[None, :]
        mask = (rows < product.shape[1])[:, None] & (token < size)
        plgpu.store(product.at[start + token, rows[:, None]], y, mask=mask)

    @pl.when(size == 1)
    def one_token():
        multiply_by(lambda columns, mask: plgpu.load(lhs.at[start, columns], mask=mask, other=0), 1)

    if config.tokens > 1:

        @pl.when(size > 1)
        def several_tokens():
            token = jnp.arange(config.tokens)[None, None, :]

            def load(columns, mask):
                shape = (*columns.shape[:2], config.tokens)
                return plgpu.load(blocks.at[item, columns, token], mask=jnp.broadcast_to(mask, shape), other=0)

            multiply_by(load, config.tokens)


def _decode(_, codewords, row_offsets, levels, table, items, dense, *, width, per_item, config):
    """A block of rows of one expert, to places that hold zeros."""
    item, rows = pl.program_id(0) // per_item, rows_of_program(per_item, config.rows)

    @pl.when(items[item, gpu.SIZE] > 0)
    def some_tokens():
        begin, end, low, high = _streams(row_offsets, levels, items, item, rows)
        row_start = (item * levels.shape[1] + rows) * width

        def write(columns, exists, is_high, nothing):
            weights = jnp.where(is_high, high, low)
            # Interpreted, a masked store writes back what it found: not to places that other lanes write.
            index = jnp.where(exists, row_start + columns, dense.shape[0] - 1)
            plgpu.store(dense.at[index], weights, mask=exists)
            return nothing

        _for_nonzeros(codewords, table, begin, end, config.codewords, write, 0)


def _streams(row_offsets, levels, items, item, rows):
    """First codeword of each row, the one after its last, and its levels; rows beyond the last have none."""
    expert, first = items[item, gpu.EXPERT], items[item, gpu.FIRST]
    mask = rows < levels.shape[1]
    begin, end = (first + plgpu.load(row_offsets.at[expert, rows + i], mask=mask, other=0) for i in (0, 1))
    low, high = (plgpu.load(levels.at[expert, rows, i], mask=mask, other=0) for i in (0, 1))
    return begin, end, low, high


def _for_nonzeros(codewords, table, begin, end, block, visit, state):
    """state = visit(columns, exists, is_high, state), all [block, rows], until all non-zeros have been visited.

    Codewords run along the first axis: where nothing else decides, Triton puts neighbouring lanes there, and a
    scan stays inside a warp.
    """
    own = begin + jnp.arange(block)[:, None]  # [block, rows]

    def load(i):
        k = own + i * block
        return plgpu.load(codewords.at[k], mask=k < end, other=0)

    def look_up(codeword, i):
        return plgpu.load(table.at[codeword.astype(jnp.int32)], mask=own + i * block < end, other=0)

    def step(i, carried):
        position, entry, codeword, state = carried
        # The next gather from the table, and the codewords after that, are under way meanwhile.
        next_entry = look_up(codeword, i + 1)
        codeword = load(i + 2)
        length = (entry >> LENGTH_SHIFT).astype(jnp.int32)
        starts = position + jnp.cumsum(length, axis=0) - length
        for n in range(MAX_NONZEROS):
            shift = FIELD_BITS * n
            columns = starts + (entry >> shift & PLACE).astype(jnp.int32)
            exists, is_high = ((entry & (bit << shift)) != 0 for bit in (EXISTS, MAXIMUM))
            state = visit(columns, exists, is_high, state)
        return position + jnp.sum(length, axis=0), next_entry, codeword, state

    steps = (jnp.max(end - begin) + block - 1) // block
    carried = (jnp.zeros_like(begin), look_up(load(0), 0), load(1), state)
    return jax.lax.fori_loop(0, steps, step, carried)[-1]
