"""What is measured: shapes, loads, compressed experts that no cache holds, and products with them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels.compressed_ragged_dot import arg_specs

NAMES = ("base wo", "base wi", "large wo", "large wi", "c2048 wo", "c2048 wi")
LOADS = ((1, 1), (2, 2), (4, 4), (8, 8), (8, 1), (64, 64))  # tokens, experts
ENCODED = 2  # experts that are encoded; the others are copies of them


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured; `TINY` is for a machine without a GPU."""

    shapes: dict[str, tuple[int, int]]  # (out, in)
    loads: tuple[tuple[int, int], ...]
    cold_bytes: int  # of the experts that calls go through, at least
    calls: int  # of a program, at most
    layer_experts: tuple[int, ...]
    checked_tokens: tuple[int, ...] = (1, 6, 64)
    checked_dtypes: tuple[str, ...] = ("float32", "bfloat16")


FULL = Sizes(dict(zip(NAMES, arg_specs.SHAPES, strict=True)), LOADS, 1 << 30, 64, (128, 2048))
TINY = Sizes({"tiny": (24, 40)}, ((1, 1), (4, 2)), 0, 2, (8,), (6,), ("bfloat16",))


def encoded(out: int, width: int, experts: int, codec: str = "gap", seed: int = 0) -> CompressedExperts:
    """Experts of the paper's distribution on the device: a few encoded ones, over and over."""
    few = min(ENCODED, experts)
    scale = (0.115 * width) ** -0.5
    levels = np.broadcast_to(np.float32([-scale, scale]), (few, out, 2))
    own = CompressedExperts.from_symbols(arg_specs.random_trits(few, out, width, seed), levels, codec)
    times = -(-experts // few)
    tile = lambda a: jnp.tile(a, (times, *[1] * (a.ndim - 1)))
    data = {name: tile(array) for name, array in own.data.items()}
    return dataclasses.replace(own, data=data, levels=tile(own.levels), shape=(times * few, out, width))


def group_sizes(calls: int, experts: int, tokens: int, active: int) -> np.ndarray:
    """int32 [calls, experts]: every call meets `active` other experts, with equally many tokens."""
    sizes = np.zeros((calls, experts), np.int32)
    chosen = np.arange(calls * active).reshape(calls, active) % experts
    np.put_along_axis(sizes, chosen, tokens // active, axis=1)
    return sizes


def reference(x: np.ndarray, weights: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """float64 [tokens, out]: expert by expert, of weights [experts, out, in]."""
    product = np.zeros((x.shape[0], weights.shape[1]))
    expert_of_token = np.repeat(np.arange(len(sizes)), sizes)
    for token, expert in enumerate(expert_of_token):
        product[token] = weights[expert].astype(np.float64) @ x[token].astype(np.float64)
    return product


def median_seconds(run: Callable[[], object], repeats: int = 11) -> float:
    """Of a call by the host's clock; a first one compiles."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return float(np.median(times))
