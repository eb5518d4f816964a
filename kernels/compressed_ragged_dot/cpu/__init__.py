"""C++ on CPU: one custom call multiplies tokens straight from the compressed bytes of all active experts.

The library is built by `pip install` from csrc/ where there is a C++ compiler; csrc/shared/ serves all codecs. It has
code for AVX-512 (with VBMI: Ice Lake, Zen 4 and later), for AVX2 and for any other processor, and takes the best at run
time; the environment variable QMOE_JAX_ISA (avx512, avx2 or portable) forces one for whatever is traced afterwards.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from types import ModuleType

import jax
import jax.numpy as jnp

from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels.compressed_ragged_dot.cpu import dictionary, gap, nibbles
from qmoe_jax.kernels.grouped import varying_as

ISAS = ("avx512", "avx2", "portable")
TARGET = "qmoe_compressed_ragged_dot"  # and _ and the codec's name

# A codec is csrc/CODEC.cc, CODEC.py with FUNCTION, TRANSPOSED, ARRAYS, number_of_parts(data), equal ones of an expert's
# columns that are multiplied each by itself, and prepare(library, num_levels), and a line here.
CODECS: dict[str, ModuleType] = {
    "dictionary": dictionary,
    "gap": gap,
    "nibbles": nibbles,
}

# Sizes that csrc/shared/compressed_ragged_dot.h has: the largest block of a token, and a record of work.
BLOCK, ACTIVE_BYTES, ALIGNMENT = 128, 40, 64


def why_not(rhs: CompressedExperts) -> str | None:
    """Why this implementation cannot multiply by `rhs` here; None where it can."""
    if rhs.codec not in CODECS:
        return f"it decodes the codecs {', '.join(CODECS)}, not {rhs.codec!r}"
    isa = _isa()
    library, reason = _load()
    if library is not None and isa != "auto" and not library.QmoeHasInstructionSet(isa.encode()):
        return f"QMOE_JAX_ISA={isa}, but this machine lacks that instruction set"
    return reason


def compressed_ragged_dot(lhs: jax.Array, rhs: CompressedExperts, group_sizes: jax.Array) -> jax.Array:
    """See `api.compressed_ragged_dot`. The streams of `rhs` have to be valid, or results are arbitrary.

    Raises:
      NotImplementedError: no library, another codec, or (when lowered) another platform than CPU.
    """
    if reason := why_not(rhs):
        raise NotImplementedError(f"implementation 'cpu' cannot run here: {reason}.")
    # Without a default, lowering for another platform raises NotImplementedError.
    return jax.lax.platform_dependent(lhs, rhs, group_sizes, cpu=multiply)


def multiply(lhs: jax.Array, rhs: CompressedExperts, group_sizes: jax.Array) -> jax.Array:
    """`compressed_ragged_dot` where `why_not` says None and lowering is for CPU."""
    return _multiply(lhs, rhs, group_sizes, isa=_isa())


@functools.partial(jax.jit, static_argnames="isa")
def _multiply(lhs, rhs, group_sizes, *, isa):
    tokens, width = lhs.shape
    experts, out = rhs.levels.shape[:2]
    if tokens == 0 or out == 0 or experts == 0:
        return jnp.zeros((tokens, out), lhs.dtype)
    _prepare(rhs.codec, rhs.levels.shape[2])
    parts = CODECS[rhs.codec].number_of_parts(rhs.data)
    padded = -(-width // (BLOCK * parts)) * BLOCK
    scratch = 4 * tokens * parts * padded + ACTIVE_BYTES * min(experts, tokens) + ALIGNMENT
    results = jax.ShapeDtypeStruct((tokens, out), lhs.dtype), jax.ShapeDtypeStruct((scratch,), jnp.uint8)
    call = jax.ffi.ffi_call(f"{TARGET}_{rhs.codec}", results, vmap_method="sequential")
    arrays = [rhs.data[name] for name in CODECS[rhs.codec].ARRAYS]
    result, _ = call(lhs, *arrays, rhs.levels, group_sizes, isa=isa)
    return varying_as(result, lhs, group_sizes)


def multiply_transposed(g: jax.Array, rhs: CompressedExperts, group_sizes: jax.Array) -> jax.Array:
    """See `gradient.transposed`, where `why_not` says None and lowering is for CPU."""
    return _multiply_transposed(g, rhs, group_sizes, isa=_isa())


@functools.partial(jax.jit, static_argnames="isa")
def _multiply_transposed(g, rhs, group_sizes, *, isa):
    result = jax.ShapeDtypeStruct((g.shape[0], rhs.shape[2]), g.dtype)
    if 0 in (g.shape[0], *rhs.levels.shape[:2], rhs.shape[2]):
        return jnp.zeros(result.shape, result.dtype)
    _prepare(rhs.codec, rhs.levels.shape[2])
    call = jax.ffi.ffi_call(f"{TARGET}_{rhs.codec}_transposed", result, vmap_method="sequential")
    arrays = [rhs.data[name] for name in CODECS[rhs.codec].ARRAYS]
    return varying_as(call(g, *arrays, rhs.levels, group_sizes, isa=isa), g, group_sizes)


def _isa() -> str:
    isa = os.environ.get("QMOE_JAX_ISA") or "auto"
    if isa not in (*ISAS, "auto"):
        raise ValueError(f"QMOE_JAX_ISA: found {isa!r}, expected one of {', '.join(ISAS)}, or nothing.")
    return isa


@functools.cache
def _prepare(codec: str, num_levels: int) -> None:
    """Hands the library the tables that the codec needs, once; whatever is traced may count on them."""
    library, _ = _load()
    CODECS[codec].prepare(library, num_levels)


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, registered with XLA; or None and the reason."""
    found = importlib.util.find_spec(f"{__package__}._cpu")
    if found is None:
        return None, "its library was not built; install qmoe_jax where there is a C++17 compiler (g++ or clang++)"
    try:
        library = ctypes.CDLL(found.origin)
        # With the backend there, a library that does not fit it raises here and not when JAX starts.
        jax.devices()
        for name, codec in CODECS.items():
            for target, function in ((name, codec.FUNCTION), (f"{name}_transposed", codec.TRANSPOSED)):
                capsule = jax.ffi.pycapsule(getattr(library, function))
                jax.ffi.register_ffi_target(f"{TARGET}_{target}", capsule, platform="cpu")
    except (OSError, AttributeError, RuntimeError) as e:
        return None, f"its library {found.origin} cannot be loaded ({e}); install qmoe_jax again"
    library.QmoeHasInstructionSet.argtypes = [ctypes.c_char_p]
    library.QmoeHasInstructionSet.restype = ctypes.c_bool
    return library, None
