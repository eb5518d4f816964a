"""The CUDA C++ kernels: built, lowered, counted and chosen. test_cuda_executed.py runs them. None of it needs a GPU."""

import ctypes
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import pytest
from gpu_cases import CODECS, COMPILED, abstract_arguments, example
from ptx import lower

from qmoe_jax.codecs import gap
from qmoe_jax.kernels.compressed_ragged_dot import api, cuda, gpu, pallas

GAP = [codec for codec in CODECS if codec != "dictionary"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("tokens, shape", COMPILED.values(), ids=COMPILED.keys())
def test_any_load_is_one_call_of_a_kernel_that_there_is(tokens, shape, dtype):
    config = cuda.gap.heuristic(tokens, shape, dtype)
    most = (64 if dtype == jnp.bfloat16 else 16) if config.tiles else 8
    assert config.tokens in ((16, 32, 64) if config.tiles else (1, 2, 4, 8)) and config.tokens <= most
    assert 1 <= config.splits <= -(-shape[2] // gap.SEGMENT)
    text = lower(cuda.multiply, *abstract_arguments(tokens, shape, dtype, "gap")).as_text()
    assert text.count(cuda.gap.TARGET) == 1


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="needs jax-cuda13-pjrt, XLA's GPU compiler")
def test_a_product_with_2048_experts_is_two_kernels():
    script = pathlib.Path(__file__).with_name("compile_for_h100.py")
    done = subprocess.run([sys.executable, script, "cuda", "1", "8", "16384"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for tokens, operations in json.loads(done.stdout.splitlines()[-1]).items():
        assert operations["custom-call"] == 1 and sum(operations.values()) <= 2, (tokens, operations)


@pytest.fixture
def nvcc(monkeypatch):
    try:
        found = cuda.shared.find_nvcc()
    except RuntimeError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(cuda.shared, "ARCHITECTURES", (90,))  # The others take as long each.
    return found


@pytest.mark.long
def test_the_library_is_compiled_once_and_has_its_functions(nvcc, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    [path] = cuda.build()
    written = path.stat().st_mtime_ns
    assert cuda.build() == [path] and path.stat().st_mtime_ns == written
    assert list((tmp_path / "qmoe_jax").iterdir()) == [path]
    library = ctypes.CDLL(path)
    assert library.QmoeGapCuda and library.QmoeGapWarmUp


def fake_nvcc(folder, answer="sm_80 sm_90"):
    """An nvcc that knows few GPUs."""
    path = folder / "nvcc"
    folder.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho {answer}")
    path.chmod(0o755)
    return str(path)


def test_nvcc_is_that_of_cuda_home_or_of_the_wheels_or_on_the_path(monkeypatch, tmp_path):
    on_path, of_wheels, at_home = (fake_nvcc(tmp_path / p) for p in ("path", "nvidia/cu13/bin", "home/bin"))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    importlib.invalidate_caches()
    assert cuda.shared.find_nvcc() == at_home
    monkeypatch.delenv("CUDA_HOME")
    assert cuda.shared.find_nvcc() == of_wheels
    os.remove(of_wheels)
    assert cuda.shared.find_nvcc() == on_path
    os.remove(on_path)
    with pytest.raises(
        RuntimeError, match="there is no nvcc; put the one of CUDA 12 or later on the PATH, set CUDA_HOME"
    ):
        cuda.build()


def test_machine_code_is_for_the_gpus_that_are_there(monkeypatch, tmp_path):
    class Device:
        platform = "gpu"

        def __init__(self, compute_capability):
            self.compute_capability = compute_capability

    def flags(*devices):
        monkeypatch.setattr(jax, "local_devices", lambda: [Device(d) for d in devices])
        return [flag.split(",code=")[1] for flag in cuda.shared._architecture_flags(nvcc)]

    nvcc = fake_nvcc(tmp_path / "bin")
    assert flags("9.0", "9.0") == ["sm_90"]
    assert flags("12.0") == ["compute_80"]  # This nvcc does not know it: the driver compiles.
    assert flags() == ["sm_80", "sm_90", "compute_80"]


def test_an_nvcc_that_fails_is_quoted(monkeypatch, tmp_path):
    nvcc = pathlib.Path(fake_nvcc(tmp_path / "home" / "bin"))
    nvcc.write_text("#!/bin/sh\necho unsupported compiler >&2\nexit 3")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match="nvcc failed:\nunsupported compiler"):
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


# --- The choice on a GPU ---------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    api._say_once.cache_clear()


@pytest.mark.parametrize(
    ("reasons", "expected"), [((None, None), "cuda"), (("no nvcc", None), "pallas"), (("no nvcc", "too old"), "xla")]
)
def test_the_default_is_the_fastest_that_works_and_says_once_why_not(on_gpu, monkeypatch, reasons, expected):
    for backend, reason in zip((cuda, pallas), reasons, strict=True):
        monkeypatch.setattr(backend, "why_not", lambda rhs, reason=reason: reason)
    arguments = abstract_arguments(3, (4, 40, 700), jnp.float32, "gap")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        assert api.chosen(arguments[1]) == api.chosen(arguments[1]) == expected
        text = lower(lambda *a: api.compressed_ragged_dot(*a), *arguments).as_text()
    assert (cuda.gap.TARGET in text, "triton" in text) == (expected == "cuda", expected == "pallas")
    said = [str(w.message) for w in caught if "this GPU" in str(w.message)]
    assert len(said) == (expected != "cuda")
    assert all(f"'{expected}'" in text and all(r in text for r in reasons if r) for text in said)


def test_the_environment_names_an_implementation(monkeypatch):
    _, rhs, _ = example(6, 3, out=5, width=8, codec="gap")
    monkeypatch.setenv(api.ENVIRONMENT, "xla")
    assert api.chosen(rhs) == "xla" and api.chosen(rhs, "cuda") == "cuda"
    monkeypatch.setenv(api.ENVIRONMENT, "fast")
    with pytest.raises(ValueError, match="QMOE_JAX_IMPLEMENTATION: unknown implementation 'fast'. Known: cpu, cuda"):
        api.chosen(rhs)


def test_a_kernel_that_computes_wrongly_or_fails_does_not_pass_the_check():
    def right(lhs, rhs, group_sizes):
        return api.compressed_ragged_dot(lhs, rhs, group_sizes)

    def wrong(lhs, rhs, group_sizes):
        return right(lhs, rhs, group_sizes).at[0, 3].add(0.2)

    def fails(lhs, rhs, group_sizes):
        raise RuntimeError("no kernel image is available\nand more")

    assert jax.jit(lambda: (None, gpu.check.failure(right, "gap"))[0])() is None  # within a trace
    assert gpu.check.failure(right, "gap") is None
    assert gpu.check.failure(wrong, "gap").startswith("a product in float32 is off by 0.2")
    assert gpu.check.failure(fails, "gap") == "RuntimeError: no kernel image is available"


def test_the_old_name_is_another_for_pallas():
    lhs, rhs, _ = example(6, 3, out=5, width=8, codec="gap")
    with pytest.warns(DeprecationWarning, match="'triton' is now 'pallas'"), pytest.raises(NotImplementedError):
        api.compressed_ragged_dot(lhs, rhs, jnp.array([6, 0, 0]), implementation="triton")


def test_what_was_traced_is_told():
    lhs, rhs, _ = example(6, 3, out=5, width=8, codec="gap")
    api.compressed_ragged_dot(lhs, rhs, jnp.array([6, 0, 0]), implementation="xla")
    assert "xla" in api.used()
