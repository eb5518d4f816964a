"""The CUDA kernels' PTX, executed with checked memory, called by their own host code. None of it needs a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_cases import CASES, CODECS, FEW, assert_equals_reference, example
from ptx_machine import ORDERS, build

from qmoe_jax.kernels.compressed_ragged_dot import cuda

GAP = [codec for codec in CODECS if codec != "dictionary"]


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    try:
        nvcc = cuda.shared.find_nvcc()
    except RuntimeError as error:
        pytest.skip(str(error))
    codecs = cuda.CODECS.values()
    handlers = {codec.FUNCTION: codec.TARGET for codec in codecs}
    return build(tmp_path_factory.mktemp("machine"), nvcc, [codec.SOURCE for codec in codecs], handlers)


@pytest.fixture(params=["forwards", "backwards"])
def order(machine, request):
    machine.order(request.param)
    machine.clear()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("codec", GAP)
def test_equals_the_reference(machine, order, codec, dtype, case):
    tokens, group_sizes, out, width, zeros = CASES[case]
    lhs, rhs, weights = example(tokens, 3, out, width, zeros, codec=codec)
    lhs = jnp.asarray(lhs, dtype)
    found = cuda.multiply(lhs, rhs, jnp.array(group_sizes))
    assert found.dtype == dtype
    assert_equals_reference(found, lhs, weights, group_sizes)
