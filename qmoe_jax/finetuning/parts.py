"""What of a compressed model is trained: everything has its part by what it is, symbols have none.

Trained are float32 master copies, by '/'-joined parameter name. In the forward pass they are rounded to bfloat16, as
they will be stored; the derivative takes that rounding for the identity (straight through).

Rows with up to three levels have each of them trained. More levels are stored as one field a row: where they are at
equal steps, the row's step is trained; where an expert's rows share another ladder, that matrix keeps its levels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.codecs.packed_levels import find_ladder, numbers
from qmoe_jax.models.families import family_of
from qmoe_jax.models.family import Config

NORMS, ROUTERS, ATTENTION, EMBEDDINGS, LEVELS = PARTS = ("norms", "routers", "attention", "embeddings", "levels")

FREE_LEVELS = 3  # of a row, at most, that are trained each for itself whatever they share

Flat = dict[str, Any]  # parameters by '/'-joined name


def part_of(name: str, shape: tuple[int, ...], config: Config) -> str:
    """The part that a parameter beside the experts' matrices belongs to.

    Embeddings have an axis of the vocabulary's size (untied logits too); 'attention' is every other matrix, those of
    dense MLPs and of shared experts among them.
    """
    if family_of(config).is_small(name):
        return NORMS if len(shape) == 1 else ROUTERS
    return EMBEDDINGS if config.vocab_size in shape else ATTENTION


def check_parts(parts: Collection[str]) -> None:
    """Raises ValueError for none, and for one that there isn't."""
    if not parts or isinstance(parts, str) or set(parts) - set(PARTS):
        raise ValueError(f"parts: found {parts!r}, expected some of {', '.join(PARTS)}.")


def trainable(params: Flat, config: Config, parts: Collection[str]) -> dict[str, jax.Array]:
    """Float32 copies of what is trained: parameters of these parts; of levels see `trainable_levels`."""
    found = {}
    for name, value in params.items():
        if isinstance(value, CompressedExperts):
            if LEVELS in parts and (levels := trainable_levels(value)) is not None:
                found[name] = levels
        elif part_of(name, value.shape, config) in parts:
            found[name] = jnp.asarray(value, jnp.float32)
    return found


def trainable_levels(experts: CompressedExperts) -> jax.Array | None:
    """What of levels is trained, float32: each [experts, out, L], a row's step [experts, out, 1], or nothing."""
    levels = np.asarray(experts.levels)
    number = levels.shape[2]
    if number > FREE_LEVELS:
        step = levels[:, :, number // 2, None].astype(np.float32)
        if number % 2 == 0 and np.array_equal((step * numbers(number)).astype(levels.dtype), levels):
            return jnp.asarray(step)
        if any(find_ladder(of_expert) is not None for of_expert in levels):
            return None
    return jnp.asarray(levels, jnp.float32)


def with_trained_levels(experts: CompressedExperts, trained: jax.Array) -> CompressedExperts:
    """The experts with levels that are, or have as their steps, what `trainable_levels` gave, trained."""
    number = experts.levels.shape[2]
    if number > FREE_LEVELS and trained.shape[2] == 1:
        step = _as_coarse_as(experts.levels[:, :, number // 2, None], trained)
        return experts.with_levels(jnp.abs(step) * numbers(number))  # Training may lead a small step below 0.
    return experts.with_levels(_as_coarse_as(experts.levels, trained))


def _as_coarse_as(old: jax.Array, value: jax.Array) -> jax.Array:
    """float32 [experts, ...] rounded to the mantissa bits that the expert's old ones, bfloat16, need; straight through.

    So they take as many bits when they are packed.
    """
    old_bits = jax.lax.bitcast_convert_type(old, jnp.uint16).astype(jnp.uint32) & 127
    used = jnp.bitwise_or.reduce(old_bits.reshape(len(old), -1), axis=1).reshape(-1, *[1] * (old.ndim - 1)) | 128
    unit = (used & -used) << 16  # the lowest bit that is used, as one of float32
    bits = jax.lax.bitcast_convert_type(value, jnp.uint32)
    rounded = jax.lax.bitcast_convert_type(bits + unit // 2 & ~(unit - 1), jnp.float32)
    return value + jax.lax.stop_gradient(rounded - value)


def placed(params: Flat, trained: Mapping[str, jax.Array]) -> Flat:
    """Parameters by name with these in place, rounded to bfloat16; differentiable, straight through."""
    found = dict(params)
    for name, value in trained.items():
        old = params[name]
        found[name] = with_trained_levels(old, value) if isinstance(old, CompressedExperts) else _rounded(value)
    return found


def with_trained(params: Flat, trained: Mapping[str, jax.Array]) -> Any:
    """The model's whole parameter tree with these in place, as `placed`."""
    return traverse_util.unflatten_dict(placed(params, trained), sep="/")


def _rounded(value: jax.Array) -> jax.Array:
    """Nearest bfloat16 values, as float32: gradients of a sum over many tokens are then added up in float32."""
    return value + jax.lax.stop_gradient(value.astype(jnp.bfloat16).astype(jnp.float32) - value)


def rising(levels: jax.Array) -> jax.Array:
    """Levels [experts, out, L] that rise again where training has let two of a row cross: each takes their mean.

    Of steps, [experts, out, 1], all stay. A row's symbols keep their meaning, so levels can't be exchanged.
    """
    low, high = jax.lax.cummax(levels, axis=2), jax.lax.cummin(levels, axis=2, reverse=True)
    return (low + high) / 2
