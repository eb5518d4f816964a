"""Pallas kernels, on its Triton backend; those that decode are in `pallas_<codec>.py`.

`gpu.py` says how they work. Interpreted on the CPU they are the executable reference of the Triton kernels.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels.compressed_ragged_dot import gpu, gpu_dictionary, gpu_gap, pallas_dictionary, pallas_gap
from qmoe_jax.kernels.compressed_ragged_dot.gpu import Config

KERNELS = {"dictionary": (gpu_dictionary, pallas_dictionary), "gap": (gpu_gap, pallas_gap)}


def why_not(rhs: CompressedExperts) -> str | None:
    """Why this implementation cannot multiply by `rhs` here; None where it can."""
    return gpu.why_not(rhs)


def compressed_ragged_dot(lhs: jax.Array, rhs: CompressedExperts, group_sizes: jax.Array) -> jax.Array:
    """See `api.compressed_ragged_dot`. Invalid streams of the codec `dictionary` are read out of bounds.

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
    run = functools.partial(launch, interpret=interpret)
    codec, kernels = KERNELS[rhs.codec]
    return gpu.multiply(
        lhs,
        rhs,
        group_sizes,
        config,
        codec=codec,
        multiply_few=functools.partial(kernels.multiply_few, run),
        decode=functools.partial(kernels.decode, run),
        multiply_dense=functools.partial(multiply_dense, run),
    )


def launch(kernel, *inputs, out, **options):
    """A kernel's result, like `out` in shape and dtype; `options` as of `pl.pallas_call`."""
    together = gpu.vary_together(inputs)
    varying = jax.typeof(together[0]).manual_axis_type
    out_shape = jax.ShapeDtypeStruct(out.shape, out.dtype, manual_axis_type=varying)
    return pl.pallas_call(kernel, out_shape=out_shape, **options)(*together)


# --- The dense product, for all codecs -------------------------------------------------------------------


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
