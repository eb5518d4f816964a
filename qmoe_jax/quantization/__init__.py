"""Quantization of expert weights: grids, round to nearest and GPTQ, as pure functions on arrays."""

from qmoe_jax.quantization.gptq import Quantized, gptq, round_to_nearest
from qmoe_jax.quantization.hessian import accumulate, hessian

__all__ = ["Quantized", "accumulate", "gptq", "hessian", "round_to_nearest"]
