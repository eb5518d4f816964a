"""Pallas kernels, on its Triton backend. `gpu.py` says how they work.

Interpreted on the CPU they are the executable reference of the Triton kernels.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels.compressed_ragged_dot import gpu
from qmoe_jax.kernels.compressed_ragged_dot.gpu import FIELD_BITS, LENGTH_SHIFT, MAX_NONZEROS, Config


def why_not(rhs: CompressedExperts) -> str | None:
    """Why this implementation cannot multiply by `rhs` here; None where it can."""
    return gpu.why_not(rhs)


def compressed_ragged_dot(lhs: jax.Array, rhs: CompressedExperts, group_sizes: jax.Array) -> jax.Array:
    """See `api.compressed_ragged_dot`. The streams of `rhs` have to be valid, or it reads out of bounds.

    Raises:
      NotImplementedError: no GPU, another codec, or (when lowered) another platform than CUDA.
    """
    if reason := why_not(rhs):
        raise NotImplementedError(f"implementation 'pallas' cannot run here: {reason}.")
    # Without a default, lowering for another platform raises NotImplementedError.
    return jax.lax.platform_dependent(lhs, rhs, group_sizes, cuda=multiply)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def multiply(
    lhs: jax.Array,
    rhs: CompressedExperts,
    group_sizes: jax.Array,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`compressed_ragged_dot` where `why_not` says None; `interpret` runs the kernels on any platform."""
    return gpu.multiply(
        lhs,
        rhs,
        group_sizes,
        config,
        multiply_few=functools.partial(multiply_few, interpret=interpret),
        decode=functools.partial(decode, interpret=interpret),
        multiply_dense=functools.partial(multiply_dense, interpret=interpret),
    )


# --- Launches: their arguments are described in `gpu.multiply` -----------------------------------------


def multiply_few(lhs, blocks, rhs, items, config, interpret):
    per_item, programs = gpu.launches(config, rhs.shape[1], items.shape[0])
    return _launch(
        functools.partial(_multiply_few, per_item=per_item, config=config),
        *(lhs, lhs if blocks is None else blocks, *_arrays(rhs), items),
        out=jax.ShapeDtypeStruct((lhs.shape[0], rhs.shape[1]), lhs.dtype),
        grid=(programs,),
        compiler_params=plgpu.CompilerParams(num_warps=config.warps, num_stages=1),
        interpret=interpret,
        name="multiply_few",
    )


def decode(rhs, items, config, interpret):
    _, out, width = rhs.shape
    per_item, programs = gpu.launches(config, out, items.shape[0])
    zeros = jnp.zeros((items.shape[0] * out * width + 1,), jnp.bfloat16)
    return _launch(
        functools.partial(_decode, width=width, per_item=per_item, config=config),
        *(zeros, *_arrays(rhs), items),
        out=zeros,
        input_output_aliases={0: 0},
        grid=(programs,),
        compiler_params=plgpu.CompilerParams(num_warps=config.warps, num_stages=1),
        interpret=interpret,
        name="decode",
    )


def multiply_dense(lhs, dense, items, out, config, interpret):
    per_item = pl.cdiv(out.shape[1], config.dense_rows)
    return _launch(
        functools.partial(_multiply_dense, per_item=per_item, config=config),
        *(lhs, dense, items, out),
        out=out,
        input_output_aliases={3: 0},
        grid=(per_item * items.shape[0],),
        compiler_params=plgpu.CompilerParams(num_warps=config.dense_warps, num_stages=3),
        interpret=interpret,
        name="multiply_dense",
    )


def _launch(kernel, *inputs, out, **options):
    inputs = gpu.vary_together(inputs)
    varying = jax.typeof(inputs[0]).manual_axis_type
    out_shape = jax.ShapeDtypeStruct(out.shape, out.dtype, manual_axis_type=varying)
    return pl.pallas_call(kernel, out_shape=out_shape, **options)(*inputs)


def _arrays(rhs):
    return rhs.data["codewords"], rhs.data["row_offsets"], rhs.levels, jnp.asarray(gpu.table())


# --- Kernels ------------------------------------------------------------------------------------------


def _multiply_few(lhs, blocks, codewords, row_offsets, levels, table, items, product, *, per_item, config):
    """A block of rows of one expert, times the tokens of one item."""
    item, rows = pl.program_id(0) // per_item, _rows(per_item, config.rows)
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
    item, rows = pl.program_id(0) // per_item, _rows(per_item, config.rows)

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


def _multiply_dense(lhs, dense, items, _, product, *, per_item, config):
    """A tile of tokens of one expert x a tile of its rows."""
    item, rows = pl.program_id(0) // per_item, _rows(per_item, config.dense_rows)
    size = items[item, gpu.SIZE]

    @pl.when(size > 0)
    def some_tokens():
        width, out = lhs.shape[1], product.shape[1]
        token = jnp.arange(config.dense_tokens)
        tokens = items[item, gpu.START] + token
        row_start = (items[item, gpu.RANK] * out + rows) * width

        def add(i, accumulator):
            columns = i * config.dense_columns + jnp.arange(config.dense_columns)
            inside = columns < width
            x_mask = (token < size)[:, None] & inside
            x = plgpu.load(lhs.at[tokens[:, None], columns[None, :]], mask=x_mask, other=0)
            W_mask = inside[:, None] & (rows < out)
            W = plgpu.load(dense.at[columns[:, None] + row_start[None, :]], mask=W_mask, other=0)
            for part in _bfloat16_parts(x):
                accumulator += jnp.dot(part, W, preferred_element_type=jnp.float32)
            return accumulator

        accumulator = jnp.zeros((config.dense_tokens, config.dense_rows), jnp.float32)
        accumulator = jax.lax.fori_loop(0, pl.cdiv(width, config.dense_columns), add, accumulator)
        mask = (token < size)[:, None] & (rows < out)
        plgpu.store(product.at[tokens[:, None], rows[None, :]], accumulator.astype(product.dtype), mask=mask)


def _rows(per_item, block):
    return pl.program_id(0) % per_item * block + jnp.arange(block)


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
            columns = starts + (entry >> shift & gpu.PLACE).astype(jnp.int32)
            exists, is_high = ((entry & (bit << shift)) != 0 for bit in (gpu.EXISTS, gpu.MAXIMUM))
            state = visit(columns, exists, is_high, state)
        return position + jnp.sum(length, axis=0), next_entry, codeword, state

    steps = (jnp.max(end - begin) + block - 1) // block
    carried = (jnp.zeros_like(begin), look_up(load(0), 0), load(1), state)
    return jax.lax.fori_loop(0, steps, step, carried)[-1]


def _bfloat16_parts(x):
    """bfloat16 arrays whose sum is x: exact, as three times eight bits are float32's 24."""
    if x.dtype == jnp.bfloat16:
        return [x]
    parts = []
    for _ in range(3):
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
        part = jax.lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts
