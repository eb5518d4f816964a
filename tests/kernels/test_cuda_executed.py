"""The CUDA kernels' PTX, executed with checked memory, called by their own host code. None of it needs a GPU."""

import ctypes
import mmap
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_cases import CASES, CODECS, SHORT, assert_equals_reference, example, with_classes
from ptx_machine import build

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "experiments"))
from benchmarks.on_gpu import events, products, timing
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels.compressed_ragged_dot import cuda

GAP = [name for name, (codec, _) in CODECS.items() if codec == "gap"]
Config = cuda.gap.Config
# Every kernel that there is, with more than one block of rows, segment, pass and part of the sum.
CONFIGS = (
    Config(tiles=False, tokens=1),
    Config(tiles=False, tokens=8, passes=2),
    Config(tiles=True, tokens=16),
    Config(tiles=True, tokens=32, splits=2),
    Config(tiles=True, tokens=64, splits=2),
)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    try:
        nvcc = cuda.shared.find_nvcc()
    except RuntimeError as error:
        pytest.skip(str(error))
    handlers = {cuda.gap.FUNCTION: cuda.gap.TARGET, "QmoeTimed": None}
    return build(tmp_path_factory.mktemp("machine"), nvcc, [cuda.gap.SOURCE, timing.SOURCE], handlers)


@pytest.fixture(params=["forwards", "backwards", pytest.param("shuffled", marks=pytest.mark.long)])
def order(machine, request):
    machine.order(request.param)
    machine.clear()


def test_every_kernel_equals_the_reference(machine, order):
    sizes = [0, 1, 9, 21]
    gradient = np.random.default_rng(1).standard_normal((32, 140))
    for codec in GAP:
        lhs, rhs, weights = example(32, 4, out=140, width=600, zeros=0.885, codec=codec)
        for dtype in (jnp.float32, jnp.bfloat16):
            x = jnp.asarray(lhs, dtype)
            for config in CONFIGS:
                if dtype == jnp.float32 and config.tokens > 16:
                    continue
                found = cuda.multiply(x, rhs, jnp.array(sizes), config=config)
                assert found.dtype == dtype
                assert_equals_reference(found, x, weights, sizes)
            g = jnp.asarray(gradient, dtype)
            found = cuda.multiply_transposed(g, rhs, jnp.array(sizes))
            assert found.dtype == dtype
            assert_equals_reference(found, g, weights.swapaxes(1, 2), sizes)
    clocks = ("Empty", "AddOne")  # timing.cu's, which have tests of their own
    assert machine.launched() == {name for name in machine.kernels if not any(clock in name for clock in clocks)}


def test_columns_in_classes(machine):
    """Classes of three segments, in parts of a sum that are no larger than a class."""
    sizes = [1, 9, 21]
    lhs, rhs, weights = with_classes(32, 3, out=140, width=2688, classes=2)
    x = jnp.asarray(lhs, jnp.bfloat16)
    for config in (*CONFIGS[1:4], Config(tiles=True, tokens=16, splits=6)):
        assert_equals_reference(cuda.multiply(x, rhs, jnp.array(sizes), config=config), x, weights, sizes)
    g = jnp.asarray(np.random.default_rng(1).standard_normal((32, 140)), jnp.bfloat16)
    assert_equals_reference(cuda.multiply_transposed(g, rhs, jnp.array(sizes)), g, weights.swapaxes(1, 2), sizes)


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in SHORT else pytest.mark.long) for c in CASES])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cases_as_they_are_called(machine, order, dtype, case):
    tokens, group_sizes, out, width, zeros = CASES[case]
    lhs, rhs, weights = example(tokens, 3, out, width, zeros, codec="gap")
    lhs = jnp.asarray(lhs, dtype)
    assert_equals_reference(cuda.multiply(lhs, rhs, jnp.array(group_sizes)), lhs, weights, group_sizes)
    few = Config(tiles=False, tokens=4)
    assert_equals_reference(cuda.multiply(lhs, rhs, jnp.array(group_sizes), config=few), lhs, weights, group_sizes)


@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.98, 1.0])
def test_any_density(machine, zeros):
    codec, dtype = (GAP[0], "float32") if zeros < 0.9 else (GAP[-1], "bfloat16")
    lhs, rhs, weights = example(23, 3, out=20, width=1040, zeros=zeros, codec=codec)
    lhs = jnp.asarray(lhs, dtype)
    for config in (CONFIGS[1], CONFIGS[2]):
        found = cuda.multiply(lhs, rhs, jnp.array([1, 19, 2]), config=config)
        assert_equals_reference(found, lhs, weights, [1, 19, 2])


@pytest.mark.long
@pytest.mark.parametrize("tokens", [3, 40])
def test_rows_of_the_largest_matrix(machine, tokens):
    sizes = [1, 0, tokens - 1, 0]
    lhs, rhs, weights = example(tokens, 4, out=2080, width=6144, zeros=0.885, codec="gap")
    lhs = jnp.asarray(lhs, jnp.bfloat16)
    assert_equals_reference(cuda.multiply(lhs, rhs, jnp.array(sizes)), lhs, weights, sizes)


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
    for config in CONFIGS[:3]:
        assert np.isfinite(np.asarray(cuda.multiply(lhs, rhs, sizes, config=config))).all()
    assert np.isfinite(np.asarray(cuda.multiply_transposed(jnp.ones((14, 10)), rhs, sizes))).all()


def test_group_sizes_of_any_content(machine):
    """What they promise beyond the tokens that there are is nobody's, up to the ends of int32; so it is in XLA's."""
    lhs, rhs, weights = example(14, 3, out=10, width=37, codec="gap")
    top = np.iinfo(np.int32).max
    for sizes, meant in (([top, top, top], [14, 0, 0]), ([-top - 1, 2, top], [0, 2, 12]), ([-1, -1, -1], [0, 0, 0])):
        for config in CONFIGS[:3]:
            found = cuda.multiply(jnp.asarray(lhs), rhs, jnp.array(sizes, jnp.int32), config=config)
            assert_equals_reference(found, lhs, weights, meant)
        g = lhs[:, :10]
        found = cuda.multiply_transposed(jnp.asarray(g), rhs, jnp.array(sizes, jnp.int32))
        assert_equals_reference(found, g, weights.swapaxes(1, 2), meant)


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[2]], ids=["gathered", "tiles"])
def test_a_stream_beyond_the_first_eight_gigabytes(machine, config):
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
    sizes = jnp.array([0, 3])
    assert_equals_reference(cuda.multiply(lhs, rhs, sizes, config=config), lhs, weights, [0, 3])
    g = lhs[:, :10]
    assert_equals_reference(cuda.multiply_transposed(jnp.asarray(g), rhs, sizes), g, weights.swapaxes(1, 2), [0, 3])


@pytest.mark.parametrize("config", [CONFIGS[1], CONFIGS[2]], ids=["gathered", "tiles"])
def test_a_call_is_one_launch_and_changes_nothing(machine, config):
    """So that XLA may capture it in a graph: nothing is set, allocated, loaded, copied or waited for."""
    warm_up = getattr(machine.library, cuda.gap.WARM_UP)
    warm_up.restype = ctypes.c_char_p
    assert warm_up() == b""
    lhs, rhs, _ = example(14, 3, out=10, width=37, codec="gap")
    machine.calls()
    machine.clear()
    sizes = jnp.array([1, 3, 10])
    jax.block_until_ready(cuda.multiply(lhs, rhs, sizes, config=config))
    assert machine.counts()["launches"] == 1
    jax.block_until_ready(cuda.multiply_transposed(jnp.ones((14, 10)), rhs, sizes))
    assert machine.counts()["launches"] == 2
    assert not any(machine.calls().values())


@pytest.mark.parametrize("kernel, config", [("FewTokensIfLb1ELi2E", CONFIGS[1]), ("TilesIfLi16ELi2E", CONFIGS[2])])
def test_without_any_one_of_its_barriers_a_kernel_is_wrong(machine, kernel, config):
    """So the machine sees it, and none is there for nothing."""
    machine.order("forwards")
    lhs, rhs, _ = example(14, 3, out=140, width=600, zeros=0.885, codec="gap")
    run = lambda: jax.block_until_ready(cuda.multiply(jnp.asarray(lhs), rhs, jnp.array([1, 3, 10]), config=config))
    [name] = [name for name in machine.kernels if kernel in name]
    start = machine.ptx[0].index(f".entry {name}(")
    end = machine.ptx[0].find(".entry", start + 1) if ".entry" in machine.ptx[0][start + 1 :] else None
    text = machine.ptx[0][start:end].removesuffix(".visible ")
    header = machine.ptx[0][: machine.ptx[0].index(".entry")].removesuffix(".visible ")
    barriers = [found.start() for found in re.finditer(r"bar\.sync", text)]
    try:
        run()
        for at in barriers:
            machine.load(header + text[:at] + "//" + text[at:])
            with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="barrier stands between|nobody wrote"):
                run()
    finally:
        machine.load(machine.ptx[0])


def spilled(nvcc_or_ptxas, *arguments):
    """Kernels that need a stack, by what ptxas says when it is asked to be verbose."""
    done = subprocess.run([nvcc_or_ptxas, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = done.stdout + done.stderr
    found = re.findall(r"Function properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill", text)
    assert len(found) == text.count("Compiling entry function") > 0
    return [name for name, *sizes in found if any(map(int, sizes))]


def test_no_register_is_spilled_by_what_drivers_compile(machine, tmp_path):
    """On GPUs that the library has no machine code for."""
    beside = pathlib.Path(cuda.shared.find_nvcc()).resolve().parent
    ptxas = shutil.which("ptxas", path=str(beside)) or shutil.which("ptxas")
    if ptxas is None:
        pytest.skip("there is no ptxas beside nvcc")
    (tmp_path / "kernels.ptx").write_text(machine.ptx[0])
    arguments = "-v", "-arch=sm_90", tmp_path / "kernels.ptx", "-o", tmp_path / "kernels.cubin"
    assert spilled(ptxas, *arguments) == []


@pytest.mark.long
@pytest.mark.parametrize("architecture", cuda.shared.ARCHITECTURES)
def test_no_register_is_spilled(machine, architecture, tmp_path):
    flags = *cuda.shared.FLAGS, f"-arch=sm_{architecture}", "-cubin", "-Xptxas=-v", f"-I{jax.ffi.include_dir()}"
    assert spilled(cuda.shared.find_nvcc(), *flags, cuda.gap.SOURCE, "-o", tmp_path / "kernels.cubin") == []


# --- experiments/benchmarks/on_gpu/timing.cu ----------------------------------------------------------------------


@pytest.fixture
def clock(machine):
    machine.order("forwards")
    machine.clear()
    return timing.Timing(machine.library, platform="cpu", function="OnCpu_QmoeTimed")


def test_a_graph_of_custom_calls_each_with_its_own_group_sizes(machine, clock, monkeypatch):
    monkeypatch.setattr(cuda.gap, "TARGET", "qmoe_gap_cuda_timed")  # another name than the tests above use
    rhs = products.encoded(24, 40, 6)
    handler, calls = machine.library[cuda.gap.FUNCTION], 3
    microseconds = events.timed_call(clock, handler, rhs, tokens=2, active=2, calls=calls)
    assert microseconds == pytest.approx(1000 / calls)  # a replay takes a millisecond there
    assert machine.counts()["launches"] == 1 + calls  # first one before capture

    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 40)), jnp.bfloat16)
    sizes, found = products.group_sizes(calls, 6, 2, 2), []
    run = lambda: found.append(np.asarray(cuda.multiply(x, rhs, jnp.asarray(sizes.ravel()))))
    clock.custom_call(cuda.gap.TARGET, handler, calls, run)
    expected = products.reference(np.asarray(x, np.float64), np.asarray(rhs.to_dense()), sizes[-1])
    np.testing.assert_allclose(found[0].astype(np.float64), expected, rtol=2**-8, atol=1e-6)

    with pytest.raises(RuntimeError, match="group sizes of another shape"):
        clock.custom_call(cuda.gap.TARGET, handler, 5, run)


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("tokens, active", [(1, 1), (6, 1), (6, 3)])
def test_dense_products_stay_within_their_matrices(machine, clock, monkeypatch, tokens, active, by_rows):
    monkeypatch.setattr(timing, "cublas_library", lambda: machine.path)
    matrices = 7
    found = clock.cublas(tokens, 24, 40, active, matrices, by_rows)
    assert found == pytest.approx(1000 / (matrices // active))


def test_an_empty_kernel_and_a_copy(clock):
    assert clock.empty_kernel(blocks=2) == pytest.approx(1000 / 500)
    assert clock.copy(1 << 12) == pytest.approx(2 * 4096 / 1e-3)
