"""Names and shapes of a decoder's parameters, from its modules, and whether those that are there fit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from qmoe_jax.errors import CheckpointError, listed
from qmoe_jax.models.decoder.config import DecoderConfig, layer_name
from qmoe_jax.models.family import Shape

EXPERTS = "/mlp/experts/"


def param_shapes(make_layer: Callable[..., Any], config: DecoderConfig) -> dict[str, Shape]:
    """Shapes of all parameters, by '/'-joined name. Kernels are [in, out], experts' [experts, in, out]."""
    shapes: dict[str, Shape] = {"model/embed_tokens/embedding": (config.vocab_size, config.d_model)}
    for i in range(config.num_layers):
        layer = _layer_shapes(make_layer, config, config.is_sparse(i))
        shapes |= {f"{layer_name(i)}/{name}": shape for name, shape in layer.items()}
    shapes["model/norm/scale"] = (config.d_model,)
    if not config.tied:
        shapes["lm_head/kernel"] = (config.d_model, config.vocab_size)
    return shapes


@functools.lru_cache(maxsize=64)
def _layer_shapes(make_layer: Callable[..., Any], config: DecoderConfig, sparse: bool) -> dict[str, Shape]:
    x, positions = jax.ShapeDtypeStruct((1, 1, config.d_model), jnp.float32), jnp.zeros((1, 1), jnp.int32)
    variables = jax.eval_shape(make_layer(config, sparse, None).init, jax.random.key(0), x, positions)
    return {n: tuple(p.shape) for n, p in traverse_util.flatten_dict(variables["params"], sep="/").items()}


def expert_parameter(layer: str, matrix: str) -> str:
    """Name of the parameter that holds a matrix [experts, in, out], or a bias [experts, out], of a layer's experts."""
    module, is_bias = matrix.removesuffix("_bias"), matrix.endswith("_bias")
    return f"{layer}{EXPERTS}{module}/{'bias' if is_bias else 'kernel'}"


def expert_of(name: str) -> tuple[str, str] | None:
    """Layer and matrix of a parameter that holds experts' matrices; None: it is another parameter, such as a bias."""
    layer, inside, rest = name.partition(EXPERTS)
    return (layer, rest.removesuffix("/kernel")) if inside and rest.endswith("/kernel") else None


def is_small(name: str) -> bool:
    """Whether a parameter is a norm or a router."""
    return name.endswith("/scale") or "/router/" in name


def check(expected: Mapping[str, Shape], found: Mapping[str, Shape], title: str) -> None:
    """Raises CheckpointError that lists all parameters that are missing, foreign or of wrong shape."""
    problems = [f"missing: {n}, expected {list(s)}" for n, s in expected.items() if n not in found]
    problems += [
        f"wrong shape: {n}, found {list(found[n])}, expected {list(s)}"
        for n, s in expected.items()
        if n in found and tuple(found[n]) != s
    ]
    problems += [f"unknown: {n} {list(s)}" for n, s in found.items() if n not in expected]
    if problems:
        raise CheckpointError(
            listed(f"The parameters aren't those of {title} as config.json tells it; {len(problems)} differ:", problems)
        )
