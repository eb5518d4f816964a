"""Rotary positions, with YaRN: each pair of a head's dimensions turns by an angle that grows with the position.

As Hugging Face's `modeling_rope_utils` computes them (Su et al. 2021; Peng et al. 2023).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from qmoe_jax.models.decoder.config import Rope


def frequencies(rope: Rope, dim: int) -> tuple[np.ndarray, float]:
    """Angle per position of each pair of dimensions, float32 [dim / 2], and what cos and sin are multiplied by."""
    plain = rope.theta ** -(np.arange(0, dim, 2, dtype=np.float32) / dim)
    if rope.kind == "default":
        return plain.astype(np.float32), 1.0
    stretched = plain / rope.factor
    if rope.kind == "linear":
        return stretched.astype(np.float32), 1.0

    def dimension(turns: float) -> float:
        """The pair that turns so often within the length in pretraining."""
        return dim * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    stretch = np.clip((np.arange(dim // 2) - low) / (high - low or 0.001), 0, 1)
    return (stretched * stretch + plain * (1 - stretch)).astype(np.float32), attention_factor(rope)


def mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's correction of the attention's temperature, .1 ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def attention_factor(rope: Rope) -> float:
    """By which YaRN multiplies cos and sin."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.factor, rope.mscale) / mscale(rope.factor, rope.mscale_all_dim)
    return mscale(rope.factor)


def rotate(x: jax.Array, positions: jax.Array, rope: Rope, *, neighbours: bool = False) -> jax.Array:
    """x turned by its positions.

    Args:
      x: [batch, length, heads, dim].
      positions: int32 [batch or 1, length].
      rope: the angles.
      neighbours: pairs are neighbours, and come out as halves; else dimension i and i + dim / 2 are a pair. Queries and
        keys have to be alike: only their products matter.

    Returns:
      [batch, length, heads, dim], of x's dtype.
    """
    dim = x.shape[-1]
    per_position, factor = frequencies(rope, dim)
    angle = positions[..., None, None].astype(jnp.float32) * per_position  # [batch, length, 1, dim / 2]
    cos, sin = ((f(angle) * factor).astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = (x[..., ::2], x[..., 1::2]) if neighbours else (x[..., : dim // 2], x[..., dim // 2 :])
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
