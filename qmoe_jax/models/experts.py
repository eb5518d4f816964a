"""Experts on their tokens: one interface for dense and compressed ones.

The experts' matrices are either arrays [experts, in, out] or `CompressedExperts` ([out, in] per expert). What differs
is which ragged dot multiplies them; everything else is shared. `kernels` is all of them by name, biases [experts, out]
too (see `family.Expert`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels import compressed_ragged_dot, ragged_dot
from qmoe_jax.models.expert_parallel import exchange
from qmoe_jax.models.family import Expert, Routing

Kernels = Mapping[str, Any]


# --- Products: a `dot(rows, kernel, bias)` for `Expert`, for each way in which rows are laid out --------------------


def grouped(group_sizes: jax.Array) -> Callable:
    """Rows [n, in] are sorted by expert; `group_sizes` int32 [experts] says how many each has."""

    def dot(rows, kernel, bias=None):
        if isinstance(kernel, CompressedExperts):
            y = compressed_ragged_dot(rows, kernel, group_sizes)
        else:
            if kernel.dtype.itemsize > rows.dtype.itemsize:
                kernel = kernel.astype(rows.dtype)  # A narrower one is converted in the product, where it has tokens.
            y = ragged_dot(rows, kernel, group_sizes)
        if bias is None:
            return y
        whose = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(len(rows)), side="right")
        return y + jnp.asarray(bias, y.dtype).at[whose].get(mode="fill", fill_value=0)

    return dot


def batched(rows: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Rows [experts, slots, in]."""
    y = jnp.einsum("eci,eio->eco", rows, kernel.astype(rows.dtype), precision="highest")
    return y if bias is None else y + bias.astype(y.dtype)[:, None]


def single(rows: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Rows [n, in] of one expert, kernel [in, out]; added up in float32."""
    y = jnp.matmul(rows, kernel.astype(rows.dtype), precision="highest", preferred_element_type=jnp.float32).astype(
        rows.dtype
    )
    return y if bias is None else y + bias.astype(y.dtype)


# --- Where each token goes --------------------------------------------------------------------------------------------


def run_experts(expert: Expert, rows: jax.Array, index: jax.Array, kernels: Kernels) -> jax.Array:
    """Expert index[i] of rows[i]: [n, d_model]. Rows of an expert that there isn't come out as zeros.

    The rows are sorted by expert once; each matrix is then one ragged dot.
    """
    order = jnp.argsort(index, stable=True)
    group_sizes = jnp.bincount(index, length=kernels[expert.last].shape[0]).astype(jnp.int32)
    y = expert(rows[order], kernels, grouped(group_sizes))  # [n, d_model], sorted by expert
    return jnp.zeros_like(y).at[order].set(y, unique_indices=True)


def _run(expert: Expert, rows: jax.Array, index: jax.Array, kernels: Kernels, mesh: Mesh | None) -> jax.Array:
    """`run_experts`; with a mesh the experts are over its devices, and each row goes there and back."""
    if mesh is None:
        return run_experts(expert, rows, index, kernels)
    return exchange(functools.partial(run_experts, expert), rows, index, kernels, mesh)


def apply_experts(
    expert: Expert, x: jax.Array, routing: Routing, kernels: Kernels, mesh: Mesh | None = None
) -> jax.Array:
    """Sum over a token's choices of gate * expert(token): [tokens, d_model]. A dropped choice has gate 0.

    Args:
      expert: the MLP.
      x: [tokens, d_model].
      routing: [tokens, choices].
      kernels: by name; arrays, `CompressedExperts` or `ShardedExperts`.
      mesh: over whose devices the experts are; None: one device.
    """
    rows, index = jnp.repeat(x, routing.expert.shape[1], axis=0), routing.expert.reshape(-1)  # [tokens * choices, ...]
    y = _run(expert, rows, index, kernels, mesh)
    y = y.reshape(*routing.expert.shape, -1)
    return jnp.sum(y * routing.gate[..., None].astype(y.dtype), axis=1)


def apply_experts_in_slots(expert: Expert, x: jax.Array, routing: Routing, kernels: Kernels, slots: int) -> jax.Array:
    """`apply_experts` for at most `slots` kept choices per expert, as batched dense products.

    Choices with gate 0 take no slot. Finite capacity bounds the work, and these products have fast gradients: this is
    what training uses.
    """
    experts, choices = kernels[expert.last].shape[0], routing.expert.shape[1]
    index, gate = routing.expert.reshape(-1), routing.gate.reshape(-1)
    one_hot = jax.nn.one_hot(index, experts, dtype=jnp.int32) * (gate > 0)[:, None]
    position = jnp.sum((jnp.cumsum(one_hot, axis=0) - 1) * one_hot, axis=-1)
    slot = jnp.where(gate > 0, index * slots + position, experts * slots)  # One past the last: nowhere.
    rows = jnp.zeros((experts * slots, x.shape[-1]), x.dtype).at[slot].set(jnp.repeat(x, choices, axis=0), mode="drop")
    y = expert(rows.reshape(experts, slots, -1), kernels, batched).reshape(experts * slots, -1)
    y = y.at[slot].get(mode="fill", fill_value=0) * gate[:, None].astype(y.dtype)
    return y.reshape(-1, choices, y.shape[-1]).sum(axis=1)


def apply_experts_to_chosen(
    expert: Expert, x: jax.Array, token: jax.Array, gate: jax.Array, kernels: Kernels, mesh: Mesh | None = None
) -> jax.Array:
    """Sum of gate * expert(token) over the experts that chose a token: [tokens, d_model].

    Args:
      expert: the MLP.
      x: [tokens, d_model].
      token: int32 [experts, slots], rows of x.
      gate: float32 [experts, slots].
      kernels: by name; arrays or `CompressedExperts`.
      mesh: over whose devices the experts are.
    """
    experts, slots = token.shape
    rows = x[token.reshape(-1)]
    if mesh is None and not any(isinstance(k, CompressedExperts) for k in kernels.values()):
        y = expert(rows.reshape(experts, slots, -1), kernels, batched).reshape(experts * slots, -1)
    else:
        y = _run(expert, rows, jnp.repeat(jnp.arange(experts, dtype=jnp.int32), slots), kernels, mesh)
    return jnp.zeros_like(x).at[token.reshape(-1)].add(y * gate.reshape(-1, 1).astype(y.dtype))
