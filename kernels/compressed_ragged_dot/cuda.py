"""CUDA C++ for the codec `gap`: threads gather few tokens' values from shared memory, which Triton cannot do.

`gpu_gap.py` says how it works, csrc/gap_cuda.cu holds the kernel. Many tokens an expert go the way of `pallas.py`.
The library is compiled by nvcc (on the PATH, or in the folder `bin` of CUDA_HOME) when it is first wanted, into the
user's cache (XDG_CACHE_HOME or ~/.cache); compile it beforehand, and see where it is, by

    python -c "from qmoe_jax.kernels.compressed_ragged_dot import cuda; print(cuda.build())"
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels.compressed_ragged_dot import gpu, gpu_gap, pallas, pallas_gap
from qmoe_jax.kernels.compressed_ragged_dot.gpu import Config

TARGET = "qmoe_gap_cuda"
SOURCE = pathlib.Path(__file__).with_name("csrc") / "gap_cuda.cu"

# Machine code for Hopper, and what drivers compile for any other GPU from compute capability 8.0 on.
FLAGS = (
    *("-O3", "-std=c++17", "-w"),
    *("-gencode=arch=compute_90,code=sm_90", "-gencode=arch=compute_80,code=compute_80"),
)
# What the kernel has room for.
MAX_TOKENS, MAX_ROWS = 8, 256


def why_not(rhs: CompressedExperts) -> str | None:
    """Why this implementation cannot multiply by `rhs` here; None where it can. Compiles the library if need be."""
    if rhs.codec != "gap":
        return f"it decodes the codec 'gap', not {rhs.codec!r}"
    return gpu.why_not(rhs) or _load()


def compressed_ragged_dot(lhs: jax.Array, rhs: CompressedExperts, group_sizes: jax.Array) -> jax.Array:
    """See `api.compressed_ragged_dot`.

    Raises:
      NotImplementedError: no GPU, no nvcc, another codec, or (when lowered) another platform than CUDA.
    """
    if reason := why_not(rhs):
        raise NotImplementedError(f"implementation 'cuda' cannot run here: {reason}.")
    # Without a default, lowering for another platform raises NotImplementedError.
    return jax.lax.platform_dependent(lhs, rhs, group_sizes, cuda=multiply)


@functools.partial(jax.jit, static_argnames="config")
def multiply(
    lhs: jax.Array, rhs: CompressedExperts, group_sizes: jax.Array, *, config: Config | None = None
) -> jax.Array:
    """`compressed_ragged_dot` where `why_not` says None. Lowers anywhere."""
    launch = functools.partial(pallas.launch, interpret=False)
    return gpu.multiply(
        lhs,
        rhs,
        group_sizes,
        config or heuristic(lhs.shape[0], rhs.shape, lhs.dtype),
        codec=gpu_gap,
        multiply_few=functools.partial(multiply_few, _call),
        decode=functools.partial(pallas_gap.decode, launch),
        multiply_dense=functools.partial(pallas.multiply_dense, launch),
    )


def heuristic(tokens: int, shape: tuple[int, int, int], dtype: DTypeLike) -> Config:
    """Block sizes as of `gpu_gap.heuristic`, for blocks of threads that share what they gather from: untuned."""
    experts, out, width = shape
    rows = max(1, min(tokens, experts)) * out * -(-width // gpu_gap.SEGMENT)  # of a segment each
    # Two blocks a multiprocessor, if that can be; beyond that, the larger a block, the less is copied for each row.
    block = next((r for r in (256, 128) if rows >= 2 * 132 * r), 64)
    own = gpu_gap.heuristic(tokens, shape, dtype)
    return Config(rows=block, warps=block // 32, tokens=min(tokens, MAX_TOKENS), dense_tokens=own.dense_tokens)


def multiply_few(
    call: Callable[..., jax.Array],
    lhs: jax.Array,
    blocks: jax.Array | None,
    rhs: CompressedExperts,
    items: jax.Array,
    config: Config,
) -> jax.Array:
    """As in `gpu.multiply`; `blocks` go unused, as a block of threads collects its tokens itself."""
    del blocks
    segments = -(-rhs.shape[2] // gpu_gap.SEGMENT)
    out = jax.ShapeDtypeStruct((segments, lhs.shape[0], rhs.shape[1]), jnp.float32)
    parts = call(out, lhs, *gpu_gap.arrays(rhs), items, threads=config.rows, block=config.tokens)
    return jnp.sum(parts, axis=0).astype(lhs.dtype)


def build() -> pathlib.Path:
    """Compiles the library unless that has been done before: its path.

    Raises RuntimeError with the reason where there is no nvcc or it fails.
    """
    nvcc = find_nvcc()
    version = subprocess.run([nvcc, "--version"], capture_output=True).stdout
    key = hashlib.sha256(SOURCE.read_bytes() + version + repr((FLAGS, jax.lib.__version__)).encode())
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache", "qmoe_jax")
    library = cache / f"gap_cuda_{key.hexdigest()[:16]}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            part = pathlib.Path(folder, "library.so")
            compile_with(nvcc, *FLAGS, "-Xcompiler=-fPIC", "-shared", "-o", part)
            part.replace(library)  # at once, so that another process sees all of it or nothing
    return library


def find_nvcc() -> str:
    """Raises RuntimeError where there is none."""
    home = os.environ.get("CUDA_HOME")
    nvcc = (home and shutil.which("nvcc", path=os.path.join(home, "bin"))) or shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("there is no nvcc; put the one of CUDA 12 or later on the PATH, or set CUDA_HOME")
    return nvcc


def compile_with(nvcc: str, *arguments: str | os.PathLike) -> str:
    """Runs nvcc on the source: what it prints. Raises RuntimeError where it fails."""
    command = [nvcc, *map(str, arguments), f"-I{jax.ffi.include_dir()}", str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


@functools.cache
def _load() -> str | None:
    """Registers the library with XLA: None, or the reason why not."""
    try:
        library = ctypes.CDLL(str(build()))
        # With the backend there, a library that does not fit it raises here and not when JAX starts.
        jax.devices()
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library.QmoeGapCuda), platform="CUDA")
    except (OSError, AttributeError, RuntimeError) as error:
        return str(error)
    return None


def _call(out, *inputs, **attributes):
    attributes = {name: np.int32(value) for name, value in attributes.items()}
    return gpu.vary_together((jax.ffi.ffi_call(TARGET, out)(*inputs, **attributes), *inputs))[0]
