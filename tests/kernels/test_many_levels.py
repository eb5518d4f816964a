"""compressed_ragged_dot of rows with more than three levels, and its derivative for tokens, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_compressed_ragged_dot import example, reference

from qmoe_jax.kernels import compressed_ragged_dot
from qmoe_jax.kernels.compressed_ragged_dot import cpu


@pytest.fixture(params=["xla", *(f"cpu with {isa}" for isa in cpu.ISAS)])
def implementation(request, monkeypatch):
    name, _, isa = request.param.partition(" with ")
    if isa:
        monkeypatch.setenv("QMOE_JAX_ISA", isa)
        if reason := cpu.why_not(example(("gap", 4), 1, 1, out=1, width=1)[1]):
            pytest.skip(reason)
    return name


# Codes whose steps write bytes, nibbles, and one symbol among zeros.
@pytest.mark.parametrize(
    ("codec", "num_levels", "zeros"),
    [("gap", 4, 0.75), ("gap", 7, 0.3), ("gap", 8, 0.55), ("gap", 13, 0.0), ("gap", 14, 0.98), ("nibbles", 15, 0.3)],
)
def test_equals_the_reference(implementation, codec, num_levels, zeros):
    sizes = [1, 0, 5]
    lhs, rhs, weights = example((codec, num_levels), 7, 3, out=70, width=1100, zeros=zeros)
    found, pull = jax.vjp(lambda x: compressed_ragged_dot(x, rhs, jnp.array(sizes), implementation=implementation), lhs)
    np.testing.assert_allclose(found, reference(lhs, weights, sizes), rtol=1e-5, atol=1e-3)
    g = np.random.default_rng(1).standard_normal(found.shape).astype(np.float32)
    expected = reference(g, weights.transpose(0, 2, 1), sizes)
    np.testing.assert_allclose(pull(jnp.asarray(g))[0], expected, rtol=1e-5, atol=1e-3)
