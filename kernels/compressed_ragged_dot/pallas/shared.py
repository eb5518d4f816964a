"""Pallas kernels for all codecs: launches, and the dense product. `gpu.multiply` says what they take."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from qmoe_jax.kernels.compressed_ragged_dot import gpu


def launch(kernel, *inputs, out, **options):
    """A kernel's result, like `out` in shape and dtype; `options` as of `pl.pallas_call`."""
    together = gpu.vary_together(inputs)
    varying = jax.typeof(together[0]).manual_axis_type
    out_shape = jax.ShapeDtypeStruct(out.shape, out.dtype, manual_axis_type=varying)
    return pl.pallas_call(kernel, out_shape=out_shape, **options)(*together)


def rows_of_program(per_item, block):
    """Rows of the matrix of a program, of `per_item` programs for an item."""
    return pl.program_id(0) % per_item * block + jnp.arange(block)


def multiply_dense(launch, lhs, dense, items, out, config):
    per_item = pl.cdiv(out.shape[1], config.dense_rows)
    return launch(
        functools.partial(_multiply_dense, per_item=per_item, config=config),
        *(lhs, dense, items, out),
        out=out,
        input_output_aliases={3: 0},
        grid=(per_item * items.shape[0],),
        compiler_params=plgpu.CompilerParams(num_warps=config.dense_warps, num_stages=3),
        name="multiply_dense",
    )


def _multiply_dense(lhs, dense, items, _, product, *, per_item, config):
    """A tile of tokens of one expert x a tile of its rows."""
    item, rows = pl.program_id(0) // per_item, rows_of_program(per_item, config.dense_rows)
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
