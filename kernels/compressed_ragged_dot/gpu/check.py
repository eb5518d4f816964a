"""Whether a kernel computes on the GPU that is there: asked once, before it is the default."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from qmoe_jax.codecs.experts import CompressedExperts

# Tokens of two experts: one, a few, and more than a block has.
GROUPS = ([0, 1], [1, 2], [3, 37])


def failure(multiply: Callable[..., jax.Array], codec: str, transposed: bool = False) -> str | None:
    """Multiplies small matrices of two experts and compares with float64: what went wrong, or None.

    `transposed`: it is `gradient.transposed`. Works while something else is traced.
    """
    rng = np.random.default_rng(0)
    symbols = rng.choice(3, (2, 40, 700), p=[0.8, 0.1, 0.1]).astype(np.uint8)
    levels = np.sort(rng.integers(-127, 128, (2, 40, 2)), axis=-1) / 64  # exact in bfloat16
    W = np.take_along_axis(np.insert(levels, 0, 0, axis=-1), symbols.astype(int), axis=-1)
    W = W.swapaxes(1, 2) if transposed else W
    x = [rng.integers(-127, 128, (sum(sizes) + 1, W.shape[2])) / 64 for sizes in GROUPS]  # The last has no expert.
    try:
        with jax.ensure_compile_time_eval():
            rhs = CompressedExperts.from_symbols(symbols, levels, codec)
            for dtype in (jnp.float32, jnp.bfloat16):
                for lhs, sizes in zip(x, GROUPS, strict=True):
                    found = multiply(jnp.asarray(lhs, dtype), rhs, jnp.asarray(sizes, jnp.int32))
                    expected = [W[expert] @ token for expert, token in zip(np.repeat((0, 1), sizes), lhs, strict=False)]
                    expected = np.array([*expected, np.zeros(len(W[0]))])
                    error = np.abs(np.asarray(found, np.float64) - expected)
                    if not (error <= 2.0**-8 * np.abs(expected) + 1e-3).all():
                        return f"a product in {np.dtype(dtype).name} is off by {error.max():.3g}"
    except Exception as error:  # whatever compilers, drivers and kernels come up with
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no text'])[0]}"
    return None
