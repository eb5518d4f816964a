"""CUDA C++ for all codecs: a source is compiled when it is first wanted, and called through XLA's FFI."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
import tempfile

import jax

from qmoe_jax.kernels.compressed_ragged_dot import gpu

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# Machine code for Hopper, and what drivers compile for any other GPU from compute capability 8.0 on.
FLAGS = (
    *("-O3", "-std=c++17", "-w"),
    *("-gencode=arch=compute_90,code=sm_90", "-gencode=arch=compute_80,code=compute_80"),
)


def build(source: pathlib.Path) -> pathlib.Path:
    """Compiles the library unless that has been done before: its path.

    Raises RuntimeError with the reason where there is no nvcc or it fails.
    """
    nvcc = find_nvcc()
    version = subprocess.run([nvcc, "--version"], capture_output=True).stdout
    key = hashlib.sha256(_sources(source) + version + repr((FLAGS, jax.lib.__version__)).encode())
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache", "qmoe_jax")
    library = cache / f"{source.stem}_cuda_{key.hexdigest()[:16]}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            part = pathlib.Path(folder, "library.so")
            compile_with(nvcc, source, *FLAGS, "-Xcompiler=-fPIC", "-shared", "-o", part)
            part.replace(library)  # at once, so that another process sees all of it or nothing
    return library


def _sources(source: pathlib.Path) -> bytes:
    """Everything beside it that it may include, too."""
    return b"".join(p.read_bytes() for p in sorted(source.parent.iterdir()))


def find_nvcc() -> str:
    """Raises RuntimeError where there is none."""
    home = os.environ.get("CUDA_HOME")
    nvcc = (home and shutil.which("nvcc", path=os.path.join(home, "bin"))) or shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("there is no nvcc; put the one of CUDA 12 or later on the PATH, or set CUDA_HOME")
    return nvcc


def compile_with(nvcc: str, source: pathlib.Path, *arguments: str | os.PathLike) -> str:
    """Runs nvcc on the source: what it prints. Raises RuntimeError where it fails."""
    command = [nvcc, *map(str, arguments), f"-I{jax.ffi.include_dir()}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


@functools.cache
def load(source: pathlib.Path, function: str, target: str) -> str | None:
    """Registers the library's function with XLA: None, or the reason why not."""
    try:
        library = ctypes.CDLL(str(build(source)))
        # With the backend there, a library that does not fit it raises here and not when JAX starts.
        jax.devices()
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, function)), platform="CUDA")
    except (OSError, AttributeError, RuntimeError) as error:
        return str(error)
    return None


def call(target: str, out: jax.ShapeDtypeStruct, *inputs: jax.Array, **attributes: object) -> jax.Array:
    """The registered function's result, like `out` in shape and dtype."""
    return gpu.vary_together((jax.ffi.ffi_call(target, out)(*inputs, **attributes), *inputs))[0]
