"""float32 stays float32 on GPUs, whose default for it is TF32: read off what is lowered for one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random_decoders, random_models

from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels import compressed_ragged_dot, ragged_dot
from qmoe_jax.models.families import family_of


def products(function, *arguments):
    """Precisions of all products of float32 in the program for a GPU."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    lines = [line for line in text.splitlines() if re.search(r"\bragged_dot\b|dot_general|stablehlo\.dot\b", line)]
    assert lines
    return [line for line in lines if "xf32>" in line.split("->")[0].rsplit(":", 1)[-1]]


def assert_highest(found):
    assert found
    for line in found:
        assert "HIGHEST, HIGHEST" in line or line.count("HIGHEST") == 2, line


@pytest.mark.parametrize("name", random_decoders.CONFIGS)
def test_decoders(name):
    model, params = random_decoders.model_and_params(name)
    tokens = jnp.ones((2, 5), jnp.int32)
    assert_highest(products(lambda params: model.apply({"params": params}, tokens), params))


@pytest.mark.parametrize("name", random_models.CONFIGS)
def test_switch(name):
    config = random_models.CONFIGS[name]
    model = family_of(config).model(config, jnp.float32, None)
    tokens = jnp.ones((2, 5), jnp.int32)
    params = random_models.random_params(config)
    assert_highest(products(lambda params: model.apply({"params": params}, tokens, tokens), params))


def test_routers_of_bfloat16_models():
    model, params = random_decoders.model_and_params("olmoe", jnp.bfloat16)
    assert_highest(products(lambda params: model.apply({"params": params}, jnp.ones((2, 5), jnp.int32)), params))


def test_ragged_products():
    lhs, sizes = jnp.ones((6, 8)), jnp.array([2, 4])
    assert_highest(products(ragged_dot, lhs, jnp.ones((2, 8, 5)), sizes))
    rhs = CompressedExperts.from_symbols(np.ones((2, 5, 8), np.uint8), np.ones((2, 5, 2)), "gap")
    assert_highest(products(lambda *a: compressed_ragged_dot(*a, implementation="xla"), lhs, rhs, sizes))
