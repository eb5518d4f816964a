"""The Triton kernels: interpreted, lowered for an H200, compiled to machine code. None of it needs a GPU."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_cases import (
    CASES,
    CODECS,
    COMPILED,
    RUNS,
    abstract_arguments,
    assert_equals_reference,
    check_compiled,
    example,
)
from ptx import CAPABILITY, kernels, lower

from qmoe_jax.kernels.compressed_ragged_dot import triton


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Results of all cases by '<codec>/<case>/<way>/<dtype>', from one process, as imports take longest."""
    pytest.importorskip("triton", reason="interpreting Triton's kernels needs the package triton")
    path = tmp_path_factory.mktemp("triton") / "results.npz"
    script = pathlib.Path(__file__).with_name("interpret_triton.py")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, script, path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.load(path)


@pytest.mark.parametrize("codec, case, way, dtype", RUNS)
def test_interpreted_equals_the_reference(interpreted, codec, case, way, dtype):
    tokens, group_sizes, out, width, zeros = CASES[case]
    lhs, _, weights = example(tokens, 3, out, width, zeros, codec=codec)
    found = jnp.asarray(interpreted[f"{codec}/{case}/{way}/{dtype}"], dtype)
    # The interpreter rounds to bfloat16 by cutting off.
    assert_equals_reference(found, jnp.asarray(lhs, dtype), weights, group_sizes, bfloat16_error=2**-7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("tokens, shape", COMPILED.values(), ids=COMPILED.keys())
@pytest.mark.parametrize("codec", CODECS)
def test_compiles_for_an_h200_without_spills(codec, tokens, shape, dtype, capsys):
    try:
        import jax_triton  # noqa: F401
    except Exception as error:
        pytest.skip(f"needs jax-triton and jax-cuda13-plugin: {error}")
    multiply = functools.partial(triton.multiply, compute_capability=CAPABILITY)
    lowered = lower(multiply, *abstract_arguments(tokens, shape, dtype, codec))
    check_compiled(kernels(lowered), codec, capsys)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_without_a_gpu_the_named_implementation_says_so():
    lhs, rhs, _ = example(6, 3, out=5, width=8)
    with pytest.raises(NotImplementedError, match="'triton' cannot run here: it needs a GPU; JAX's devices are 'cpu'"):
        triton.compressed_ragged_dot(lhs, rhs, jnp.array([6, 0, 0]))
