"""The CUDA C++ kernel: its threads run on the host, it lowers, nvcc compiles it. None of it needs a GPU."""

import ctypes
import functools
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_cases import (
    BUDGET,
    CASES,
    CODECS,
    COMPILED,
    FEW,
    WEIGHTS,
    abstract_arguments,
    assert_equals_reference,
    example,
)
from ptx import lower, machine_code_loops

from qmoe_jax.kernels.compressed_ragged_dot import cuda, gpu

GAP = [codec for codec in CODECS if codec != "dictionary"]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """What `cuda.gap.multiply_few` calls, as one that runs blocks and threads of the kernel one by one."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("running the kernel's threads on the host needs g++ or clang++")
    path = tmp_path_factory.mktemp("cuda") / "host.so"
    command = [compiler, "-x", "c++", "-std=c++17", "-O1", "-fPIC", "-shared", "-w", cuda.gap.SOURCE, "-o", path]
    subprocess.run(command, check=True)
    run = ctypes.CDLL(path).QmoeGapHost

    def call(out, *inputs, threads, block):
        def run_on_host(lhs, words, starts, skips, levels, table, items):
            arrays = [np.array(a) for a in (lhs, words, starts, skips, levels, table, items)]
            assert arrays[-1][:, gpu.SIZE].max(initial=0) <= block <= cuda.gap.MAX_TOKENS
            parts = np.full(out.shape, np.nan, np.float32)  # whoever reads what was not written sees it
            sizes = *lhs.shape[:1], levels.shape[1], lhs.shape[1], words.size, items.shape[0], levels.shape[2], threads
            pointers = [ctypes.c_void_p(a.ctypes.data) for a in (*arrays, parts)]
            run(*pointers, (ctypes.c_int64 * 7)(*sizes), ctypes.c_bool(lhs.dtype == np.float32))
            return parts

        return jax.pure_callback(run_on_host, out, *inputs)

    return call


def multiply(host, lhs, rhs, group_sizes, config=None):
    config = config or cuda.gap.heuristic(lhs.shape[0], rhs.shape, lhs.dtype)
    kernels = {"multiply_few": functools.partial(cuda.gap.multiply_few, host), "decode": None, "multiply_dense": None}
    config = gpu.Config(**{**vars(config), "many_tokens": 1 << 30})  # these go the way of Pallas
    return gpu.multiply(jnp.asarray(lhs), rhs, jnp.array(group_sizes), config, codec=gpu.gap, **kernels)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("codec", GAP)
def test_on_the_host_equals_the_reference(host, codec, dtype, case):
    tokens, group_sizes, out, width, zeros = CASES[case]
    lhs, rhs, weights = example(tokens, 3, out, width, zeros, codec=codec)
    lhs = jnp.asarray(lhs, dtype)
    found = multiply(host, lhs, rhs, group_sizes, FEW)
    assert found.dtype == dtype
    assert_equals_reference(found, lhs, weights, group_sizes)


@pytest.mark.parametrize("codec", GAP)
@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.885, 0.98])
def test_on_the_host_at_any_density_with_default_block_sizes(host, codec, zeros):
    lhs, rhs, weights = example(23, 3, out=77, width=2080, zeros=zeros, codec=codec)
    found = multiply(host, lhs, rhs, [1, 19, 2])
    assert_equals_reference(found, lhs, weights, [1, 19, 2])


def test_arrays_of_any_content_end_and_stay_in_bounds(host):
    rng = np.random.default_rng(0)
    lhs, rhs, _ = example(14, 3, out=10, width=1100, codec="gap")
    data = {}
    for name, array in rhs.data.items():
        limits = np.iinfo(array.dtype)
        data[name] = jnp.asarray(rng.integers(limits.min, limits.max, array.shape, array.dtype, endpoint=True))
    rhs = type(rhs)(data, rhs.levels, rhs.codec, rhs.shape, rhs.bound)
    assert np.isfinite(np.asarray(multiply(host, lhs, rhs, [1, 3, 10], FEW))).all()


@pytest.mark.parametrize("tokens, shape", COMPILED.values(), ids=COMPILED.keys())
def test_lowers_without_a_gpu(tokens, shape):
    text = lower(cuda.multiply, *abstract_arguments(tokens, shape, jnp.bfloat16, "gap")).as_text()
    few = tokens < 4096
    assert (cuda.gap.TARGET in text) == few and ("multiply_dense" in text) != few


def test_compiles_for_an_h200_without_spills(tmp_path, capsys):
    try:
        nvcc = cuda.shared.find_nvcc()
    except RuntimeError as error:
        pytest.skip(str(error))
    binary = tmp_path / "gap_cuda.cubin"
    flags = "-O3", "-std=c++17", "-w", "-arch=sm_90", "-cubin", "-Xptxas=-v", "-o", binary
    log = cuda.shared.compile_with(nvcc, cuda.gap.SOURCE, *flags)
    found = re.findall(r"function '\w*MultiplyFewI([ft])Lb([01])ELi([23]).*?Used (\d+) registers", log, re.DOTALL)
    assert len(found) == 8
    loops = machine_code_loops(binary)
    for x, several, levels, registers in found:
        [own] = [loops[name] for name in loops if f"MultiplyFewI{x}Lb{several}ELi{levels}" in name]
        # The loops over the stream, for one token, and several: longer than those that fill shared memory.
        own = own[: 1 + int(several)]
        with capsys.disabled():
            kind = "float32" if x == "f" else "bfloat16", "8 tokens" if several == "1" else "1 token", levels, "levels"
            print("\n ", *kind, f"{registers} registers, loops of {own}, a weight", end="")
            print("", *(f"{loop / WEIGHTS['gap']:.1f}" for loop in own), end="")
        assert own[-1] / WEIGHTS["gap"] < 5
        assert own[0] / WEIGHTS["gap"] < 0.75 * BUDGET
    assert sum(map(int, re.findall(r"(\d+) bytes (?:spill stores|spill loads|stack frame)", log))) == 0, log


def test_the_library_is_compiled_once_and_has_its_handler(tmp_path, monkeypatch):
    try:
        cuda.shared.find_nvcc()
    except RuntimeError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    [path] = cuda.build()
    written = path.stat().st_mtime_ns
    assert cuda.build() == [path] and path.stat().st_mtime_ns == written
    assert list((tmp_path / "qmoe_jax").iterdir()) == [path]
    assert ctypes.CDLL(path).QmoeGapCuda


def test_without_nvcc_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    with pytest.raises(RuntimeError, match="there is no nvcc; put the one of CUDA 12 or later on the PATH"):
        cuda.build()


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_without_a_gpu_the_named_implementation_says_so():
    lhs, rhs, _ = example(6, 3, out=5, width=8, codec="gap")
    with pytest.raises(NotImplementedError, match="'cuda' cannot run here: it needs a GPU; JAX's devices are 'cpu'"):
        cuda.compressed_ragged_dot(lhs, rhs, jnp.array([6, 0, 0]))


def test_another_codec_is_refused():
    lhs, rhs, _ = example(6, 3, out=5, width=8)
    with pytest.raises(NotImplementedError, match="it decodes the codec 'gap', not 'dictionary'"):
        cuda.compressed_ragged_dot(lhs, rhs, jnp.array([6, 0, 0]))
