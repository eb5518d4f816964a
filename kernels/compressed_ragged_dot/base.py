"""What the arguments of `compressed_ragged_dot` have to be, for every implementation."""

import jax
import jax.numpy as jnp
import numpy as np

from qmoe_jax.codecs.experts import CompressedExperts

LHS_DTYPES = (jnp.float32, jnp.bfloat16)


def check_arguments(lhs: jax.Array, rhs: CompressedExperts, group_sizes: jax.Array) -> None:
    """Raises TypeError or ValueError unless kinds, shapes and dtypes fit. Looks at no values."""
    if not isinstance(rhs, CompressedExperts):
        raise TypeError(f"rhs: found {type(rhs).__name__}, expected CompressedExperts (ragged_dot takes arrays).")
    for name, array in (("lhs", lhs), ("group_sizes", group_sizes)):
        if not isinstance(array, jax.Array | np.ndarray):
            raise TypeError(f"{name}: found {type(array).__name__}, expected an array.")
    experts, _, width = rhs.shape
    if lhs.ndim != 2 or lhs.shape[1] != width:
        raise ValueError(f"lhs: shape {list(lhs.shape)}, expected [tokens, {width}] for experts of shape {rhs.shape}.")
    if lhs.dtype not in LHS_DTYPES:
        raise ValueError(f"lhs: dtype {lhs.dtype}, expected float32 or bfloat16.")
    if group_sizes.shape != (experts,) or group_sizes.dtype != jnp.int32:
        raise ValueError(f"group_sizes: {group_sizes.dtype} {list(group_sizes.shape)}, expected int32 [{experts}].")
