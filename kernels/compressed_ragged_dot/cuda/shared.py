"""CUDA C++ for all codecs: a source is compiled when it is first wanted, and called through XLA's FFI."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

import jax

from qmoe_jax.kernels.compressed_ragged_dot import gpu

# Compute capabilities, ten times: A100; A6000 and 3090; 4090; H100 and H200; B200; 5090.
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
FLAGS = ("-O3", "-std=c++17", "-w")
# Where wheels put CUDA, in a folder `nvidia` of site-packages: of CUDA 13 and of 12.
WHEELS = ("cu13", "cu12", "cuda_nvcc")


def build(source: pathlib.Path) -> pathlib.Path:
    """Compiles the library unless that has been done before: its path.

    Raises RuntimeError with the reason where there is no nvcc or it fails.
    """
    nvcc = find_nvcc()
    version = _run([nvcc, "--version"])
    flags = (*FLAGS, *_architecture_flags(nvcc))
    key = hashlib.sha256(_sources(source) + version.encode() + repr((flags, jax.lib.__version__)).encode())
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache", "qmoe_jax")
    library = cache / f"{source.stem}_cuda_{key.hexdigest()[:16]}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            part = pathlib.Path(folder, "library.so")
            compile_with(nvcc, source, *flags, "-Xcompiler=-fPIC", "-shared", "-o", part)
            part.replace(library)  # at once, so that another process sees all of it or nothing
    return library


def find_nvcc() -> str:
    """Of CUDA_HOME, of the wheels of the extra `cuda13`, or on the PATH. Raises RuntimeError where there is none."""
    folders = [os.path.join(home, "bin") for home in [os.environ.get("CUDA_HOME")] if home]
    nvidia = importlib.util.find_spec("nvidia")
    for site in (nvidia and nvidia.submodule_search_locations) or ():
        folders += [os.path.join(site, wheel, "bin") for wheel in WHEELS]
    for folder in (*folders, None):
        if nvcc := shutil.which("nvcc", path=folder):
            return nvcc
    raise RuntimeError(
        "there is no nvcc; put the one of CUDA 12 or later on the PATH, set CUDA_HOME, or install the extra cuda13 "
        "(pip install 'qmoe_jax[cuda13]')"
    )


def compile_with(nvcc: str, source: pathlib.Path, *arguments: str | os.PathLike) -> str:
    """Runs nvcc on the source: what it prints. Raises RuntimeError where it fails."""
    command = [nvcc, *map(str, arguments), f"-I{jax.ffi.include_dir()}", str(source)]
    # Wheels have the runtime's library in `lib`, where nvcc looks in `lib64`.
    library = pathlib.Path(nvcc).parents[1] / "lib"
    return _run([*command, f"-L{library}"] if library.is_dir() else command)


@functools.cache
def load(source: pathlib.Path, function: str, target: str, warm_up: str) -> str | None:
    """Registers the library's function with XLA: None, or the reason why not.

    `warm_up` is the library's function that loads all kernels, and returns the error's text or "".
    """
    try:
        library = ctypes.CDLL(str(build(source)))
        # With the backend there, a library that does not fit it raises here and not when JAX starts.
        jax.devices()
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, function)), platform="CUDA")
        warm = getattr(library, warm_up)
        warm.restype = ctypes.c_char_p
        text = warm().decode()
    except (OSError, AttributeError, RuntimeError) as error:
        return str(error)
    return f"its kernels cannot be loaded ({text})" if text else None


def call(target: str, out: jax.ShapeDtypeStruct, *inputs: jax.Array, **attributes: object) -> jax.Array:
    """The registered function's result, like `out` in shape and dtype."""
    return gpu.vary_together((jax.ffi.ffi_call(target, out)(*inputs, **attributes), *inputs))[0]


def _architecture_flags(nvcc: str) -> list[str]:
    """Machine code for the GPUs that are there, or for all that are known; for any other, code that drivers compile."""
    known = {int(number) for number in re.findall(r"sm_(\d+)", _run([nvcc, "--list-gpu-code"]))}
    wanted = {int(d.compute_capability.replace(".", "")) for d in jax.local_devices() if d.platform == "gpu"}
    machine = sorted(known & (wanted or set(ARCHITECTURES)))
    flags = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in machine]
    if not wanted or wanted - known:
        flags.append("-gencode=arch=compute_80,code=compute_80")
    return flags


def _sources(source: pathlib.Path) -> bytes:
    """Everything in the source's folder, as it may include it."""
    return b"".join(p.read_bytes() for p in sorted(source.parent.iterdir()) if p.is_file())


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise RuntimeError(f"nvcc failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr
