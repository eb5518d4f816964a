"""Plain XLA: each active expert is decoded to a dense float32 matrix, then multiplied."""

import jax

from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels.grouped import grouped_dot


@jax.jit
def compressed_ragged_dot(lhs: jax.Array, rhs: CompressedExperts, group_sizes: jax.Array) -> jax.Array:
    """See `api.compressed_ragged_dot`."""
    return grouped_dot(lhs, group_sizes, lambda expert: rhs.expert(expert).T, out_features=rhs.shape[1])


@jax.jit
def transposed(g: jax.Array, rhs: CompressedExperts, group_sizes: jax.Array) -> jax.Array:
    """See `gradient.transposed`."""
    return grouped_dot(g, group_sizes, rhs.expert, out_features=rhs.shape[2])
