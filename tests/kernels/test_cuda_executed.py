"""The CUDA kernels' PTX, executed with checked memory, called by their own host code. None of it needs a GPU."""

import mmap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_cases import CASES, CODECS, SHORT, assert_equals_reference, example
from ptx_machine import build

from qmoe_jax.codecs.experts import CompressedExperts
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


@pytest.fixture(params=["forwards", "backwards", pytest.param("shuffled", marks=pytest.mark.long)])
def order(machine, request):
    machine.order(request.param)
    machine.clear()


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in SHORT else pytest.mark.long) for c in CASES])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("codec", GAP)
def test_equals_the_reference(machine, order, codec, dtype, case):
    tokens, group_sizes, out, width, zeros = CASES[case]
    lhs, rhs, weights = example(tokens, 3, out, width, zeros, codec=codec)
    lhs = jnp.asarray(lhs, dtype)
    found = cuda.multiply(lhs, rhs, jnp.array(group_sizes))
    assert found.dtype == dtype
    assert_equals_reference(found, lhs, weights, group_sizes)


@pytest.mark.parametrize("codec", GAP)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.885, 0.98, 1.0])
def test_any_density(machine, codec, dtype, zeros):
    lhs, rhs, weights = example(23, 3, out=77, width=2080, zeros=zeros, codec=codec)
    lhs = jnp.asarray(lhs, dtype)
    found = cuda.multiply(lhs, rhs, jnp.array([1, 19, 2]))
    assert_equals_reference(found, lhs, weights, [1, 19, 2])


@pytest.mark.long
def test_rows_of_the_largest_matrix(machine):
    lhs, rhs, weights = example(3, 4, out=2080, width=6144, zeros=0.885, codec="gap")
    lhs = jnp.asarray(lhs, jnp.bfloat16)
    assert_equals_reference(cuda.multiply(lhs, rhs, jnp.array([1, 0, 2, 0])), lhs, weights, [1, 0, 2, 0])


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(4, 40))])
def test_arrays_of_any_content_end_and_stay_in_bounds(machine, seed):
    rng = np.random.default_rng(seed)
    lhs, rhs, _ = example(14, 3, out=10, width=1100, codec=GAP[seed % len(GAP)])
    data = {}
    for name, array in rhs.data.items():
        limits = np.iinfo(array.dtype)
        data[name] = jnp.asarray(rng.integers(limits.min, limits.max, array.shape, array.dtype, endpoint=True))
    rhs = CompressedExperts(data, rhs.levels, rhs.codec, rhs.shape, rhs.bound)
    sizes = jnp.asarray(rng.integers(-3, 12, 3, np.int32))
    assert np.isfinite(np.asarray(cuda.multiply(lhs, rhs, sizes))).all()


def test_a_stream_beyond_the_first_eight_gigabytes(machine):
    """Offsets fit neither 32 bits of bytes nor 31 of them. The memory between is never touched, and so never there."""
    lhs, rhs, weights = example(3, 2, out=10, width=300, codec="gap")
    counts = np.asarray(rhs.data["word_counts"])
    own = np.asarray(rhs.data["words"])[counts[0] :]
    first = 2**31 - 2 - len(own)
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, 4 * (first + len(own)), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    words = np.frombuffer(memory, np.uint32)
    words[first:] = own
    there = jax.device_put(words)
    assert there.unsafe_buffer_pointer() == words.ctypes.data, "JAX copied eight gigabytes"
    counts = jnp.asarray([first, len(own)], jnp.int32)
    rhs = CompressedExperts(rhs.data | {"words": there, "word_counts": counts}, rhs.levels, "gap", rhs.shape, rhs.bound)
    assert_equals_reference(cuda.multiply(lhs, rhs, jnp.array([0, 3])), lhs, weights, [0, 3])


def test_a_call_is_one_launch_and_changes_nothing(machine):
    """So that XLA may capture it in a graph: nothing is set, allocated, loaded, copied or waited for."""
    lhs, rhs, _ = example(14, 3, out=10, width=37, codec="gap")
    cuda.multiply(lhs, rhs, jnp.array([1, 3, 10]))
    machine.calls()
    machine.clear()
    jax.block_until_ready(cuda.multiply(lhs, rhs, jnp.array([1, 3, 10])))
    assert machine.counts()["launches"] == 1
    print(machine.calls())
