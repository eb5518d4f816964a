"""Operations on experts: one folder or file per operation, imported as `qmoe_jax.kernels`."""

from qmoe_jax.kernels.compressed_ragged_dot.api import compressed_ragged_dot
from qmoe_jax.kernels.grouped import grouped_dot, ragged_dot

__all__ = ["compressed_ragged_dot", "grouped_dot", "ragged_dot"]
