"""The public function."""

from __future__ import annotations

import jax

from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels.compressed_ragged_dot import base, xla

# Best first.
IMPLEMENTATIONS = {
    "xla": xla.compressed_ragged_dot,
}


def compressed_ragged_dot(
    lhs: jax.Array,
    rhs: CompressedExperts,
    group_sizes: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies tokens, sorted by expert, by the transpose of their expert's compressed matrix.

    The contract of `jax.lax.ragged_dot` with a compressed right-hand side: the first group_sizes[0] rows of
    lhs meet expert 0, the next group_sizes[1] expert 1, and so on. Experts without tokens are not decoded.

    Args:
      lhs: float32 or bfloat16 [tokens, in].
      rhs: experts of shape (experts, out, in).
      group_sizes: int32 [experts], tokens of each expert.
      implementation: name of one of `IMPLEMENTATIONS`; None takes the best that works here.

    Returns:
      [tokens, out] in lhs's dtype, accumulated in float32. Rows beyond sum(group_sizes) are zero.

    Raises:
      ValueError or TypeError for arguments of the wrong kind, shape or dtype, and for an unknown
      implementation.
    """
    base.check_arguments(lhs, rhs, group_sizes)
    if implementation is None:
        implementation = next(iter(IMPLEMENTATIONS))
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"Unknown implementation {implementation!r}. Known: {', '.join(IMPLEMENTATIONS)}.")
    return IMPLEMENTATIONS[implementation](lhs, rhs, group_sizes)
