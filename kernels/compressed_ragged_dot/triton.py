"""Triton kernels, called through jax-triton. `gpu.py` says how they work.

`triton_kernels.py` holds those for the codec `dictionary` and for dense matrices, `triton_gap_kernels.py` those for
the codec `gap`.
"""

from __future__ import annotations

import functools
import importlib

import jax
import jax.numpy as jnp

from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels.compressed_ragged_dot import gpu, gpu_dictionary, gpu_gap
from qmoe_jax.kernels.compressed_ragged_dot.gpu import Config


def why_not(rhs: CompressedExperts) -> str | None:
    """Why this implementation cannot multiply by `rhs` here; None where it can."""
    return gpu.why_not(rhs) or _import_error()


def compressed_ragged_dot(lhs: jax.Array, rhs: CompressedExperts, group_sizes: jax.Array) -> jax.Array:
    """See `api.compressed_ragged_dot`. Invalid streams of the codec `dictionary` are read out of bounds.

    Raises:
      NotImplementedError: no GPU, no jax-triton, another codec, or (when lowered) another platform than CUDA.
    """
    if reason := why_not(rhs):
        raise NotImplementedError(f"implementation 'triton' cannot run here: {reason}.")
    # Without a default, lowering for another platform raises NotImplementedError.
    return jax.lax.platform_dependent(lhs, rhs, group_sizes, cuda=multiply)


@functools.partial(jax.jit, static_argnames=("config", "compute_capability"))
def multiply(
    lhs: jax.Array,
    rhs: CompressedExperts,
    group_sizes: jax.Array,
    *,
    config: Config | None = None,
    compute_capability: int | None = None,
) -> jax.Array:
    """`compressed_ragged_dot` where `why_not` says None; for a given compute capability it lowers without a GPU."""
    launch = functools.partial(_launch, compute_capability=compute_capability)
    codec, multiply_few, decode = KERNELS[rhs.codec]
    return gpu.multiply(
        lhs,
        rhs,
        group_sizes,
        config,
        codec=codec,
        multiply_few=functools.partial(multiply_few, launch),
        decode=functools.partial(decode, launch),
        multiply_dense=functools.partial(multiply_dense, launch),
    )


@functools.cache
def _import_error() -> str | None:
    try:
        import jax_triton  # noqa: F401
    except Exception as error:  # where jax lacks its CUDA plugin, it is not an ImportError
        return f"it needs jax-triton, from the extra 'cuda13' ({error})"
    return None


def _launch(module, kernel, *inputs, compute_capability, **options):
    import jax_triton

    kernel = getattr(importlib.import_module(f"{__package__}.{module}"), kernel)
    out = jax_triton.triton_call(*inputs, kernel=kernel, compute_capability=compute_capability, **options)
    return gpu.vary_together((out, *inputs))[0]  # jax-triton knows nothing of shard_map's axes


# --- Launches: their arguments are described in `gpu.multiply` -----------------------------------------


def multiply_few_dictionary(launch, lhs, blocks, rhs, items, config):
    return launch(
        *("triton_kernels", "multiply_few"),
        *(lhs, lhs if blocks is None else blocks, *gpu_dictionary.arrays(rhs), items),
        out_shape=jax.ShapeDtypeStruct((lhs.shape[0], rhs.shape[1]), lhs.dtype),
        **_dictionary_options(rhs, items, config),
        **{"TOKENS": config.tokens},
    )


def decode_dictionary(launch, rhs, items, config):
    zeros = _zeros(rhs, items)
    return launch(
        *("triton_kernels", "decode"),
        *(zeros, *gpu_dictionary.arrays(rhs), items),
        out_shape=jax.ShapeDtypeStruct(zeros.shape, zeros.dtype),
        input_output_aliases={0: 0},
        **_dictionary_options(rhs, items, config),
    )


def multiply_few_gap(launch, lhs, blocks, rhs, items, config):
    options = _gap_options(rhs, items, config)
    parts = launch(
        *("triton_gap_kernels", "multiply_few"),
        *(lhs, lhs if blocks is None else blocks, *gpu_gap.arrays(rhs), items),
        out_shape=jax.ShapeDtypeStruct((options["SEGMENTS"], lhs.shape[0], rhs.shape[1]), jnp.float32),
        **options,
        **{"ALL_TOKENS": lhs.shape[0], "TOKENS": config.tokens},
    )
    return jnp.sum(parts, axis=0).astype(lhs.dtype)


def decode_gap(launch, rhs, items, config):
    zeros = _zeros(rhs, items)
    return launch(
        *("triton_gap_kernels", "decode"),
        *(zeros, *gpu_gap.arrays(rhs), items),
        out_shape=jax.ShapeDtypeStruct(zeros.shape, zeros.dtype),
        input_output_aliases={0: 0},
        **_gap_options(rhs, items, config),
    )


def multiply_dense(launch, lhs, dense, items, out, config):
    per_item = -(-out.shape[1] // config.dense_rows)
    return launch(
        *("triton_kernels", "multiply_dense"),
        *(lhs, dense, items, out),
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        input_output_aliases={3: 0},
        grid=(per_item * items.shape[0],),
        num_warps=config.dense_warps,
        num_stages=3,
        **{"OUT": out.shape[1], "WIDTH": lhs.shape[1], "PER_ITEM": per_item},
        **{"TOKENS": config.dense_tokens, "ROWS": config.dense_rows, "COLUMNS": config.dense_columns},
    )


def _dictionary_options(rhs, items, config):
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


def _gap_options(rhs, items, config):
    _, out, width = rhs.shape
    segments, row_blocks, programs = gpu_gap.launches(config, rhs.shape, items.shape[0])
    launch = {"grid": (programs,), "num_warps": config.warps, "num_stages": 1}
    sizes = {"WORDS": rhs.data["words"].size, "OUT": out, "WIDTH": width, "LEVELS": rhs.levels.shape[2]}
    return launch | sizes | {"SEGMENTS": segments, "ROW_BLOCKS": row_blocks, "ROWS": config.rows}


def _zeros(rhs, items):
    return jnp.zeros((items.shape[0] * rhs.shape[1] * rhs.shape[2] + 1,), jnp.bfloat16)


# Each codec's `gpu_<codec>.py` and launches.
KERNELS = {
    "dictionary": (gpu_dictionary, multiply_few_dictionary, decode_dictionary),
    "gap": (gpu_gap, multiply_few_gap, decode_gap),
}
