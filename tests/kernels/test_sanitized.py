"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: sound streams, and noise in their place."""

import importlib.util
import pathlib
import shutil
import struct
import subprocess

import ml_dtypes
import numpy as np
import pytest
from test_classes import example as of_classes
from test_compressed_ragged_dot import KINDS, example, reference

from qmoe_jax.codecs import gap
from qmoe_jax.codecs.gap_codes import numbers
from qmoe_jax.kernels.compressed_ragged_dot import cpu

SOURCES = pathlib.Path(cpu.__file__).resolve().parent / "csrc"
DRIVER = pathlib.Path(__file__).with_name("sanitized.cc")
# XLA's numbers of dtypes (xla_data.proto).
DTYPES = {
    np.dtype(np.float32): 11,
    np.dtype(ml_dtypes.bfloat16): 16,
    np.dtype(np.int32): 4,
    np.dtype(np.uint8): 6,
    np.dtype(np.uint16): 7,
    np.dtype(np.uint32): 8,
}
# Tokens of each expert, out, in, share of zeros: single rows and columns; edges of blocks, segments and vectors.
SHAPES = (
    ([1], 1, 1, 0.5),
    ([3, 0, 9], 33, 130, 0.9),
    ([0, 12], 65, 1025, 0.99),
    ([2, 1], 100, 2049, 0.6),
    ([1, 20, 1, 0], 31, 63, 0.0),
)
MANY_LEVELS = (("gap", 5), ("gap", 14), ("nibbles", 15))
REPETITIONS = 20  # of every call, with noise


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """The kernels and the driver, compiled with sanitizers."""
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("neither g++ nor clang++ is here")
    include = pathlib.Path(importlib.util.find_spec("jaxlib").submodule_search_locations[0]) / "include"
    program = tmp_path_factory.mktemp("sanitized") / "sanitized"
    flags = ["-std=c++17", "-O0", "-g1", "-w", "-pthread", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [DRIVER, *sorted(SOURCES.rglob("*.cc"))]
    command = [compiler, *flags, f"-I{include}", f"-I{SOURCES}", *sources, "-o", program]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode and "cannot find -l" in built.stderr or "libclang_rt" in built.stderr:
        pytest.skip(f"{compiler} comes without sanitizers")
    assert built.returncode == 0, built.stderr[-3000:]
    return program


def calls():
    """(lhs, compressed experts, sizes of groups, expected [tokens, out])."""
    for kind in (*KINDS.values(), *MANY_LEVELS):
        for seed, (sizes, out, width, zeros) in enumerate(SHAPES):
            tokens = sum(sizes) + seed % 2  # One that is nobody's.
            lhs, rhs, weights = example(kind, tokens, len(sizes), out, width, zeros, seed)
            for dtype in (np.float32, ml_dtypes.bfloat16):
                rounded = lhs.astype(dtype)
                yield rounded, rhs, np.array(sizes, np.int32), reference(rounded.astype(np.float32), weights, sizes)
    for classes, out, width in ((4, 70, 192), (2, 9, 1600)):
        lhs, rhs, weights = of_classes(classes, 2, out, width)
        yield lhs, rhs, np.array([1, 0, 5], np.int32), reference(lhs, weights, [1, 0, 5])


def described(array: np.ndarray, content: bool = True) -> bytes:
    numbers = (DTYPES[array.dtype], array.ndim, *array.shape, array.nbytes)
    return struct.pack(f"<{len(numbers)}q", *numbers) + (np.ascontiguousarray(array).tobytes() if content else b"")


def encoded(lhs, rhs, sizes) -> bytes:
    """A call as the driver reads it: arguments, and the results that XLA would allocate."""
    arrays = [np.asarray(rhs.data[name]) for name in cpu.CODECS[rhs.codec].ARRAYS]
    arguments = [lhs, *arrays, np.asarray(rhs.levels), sizes]
    parts = cpu.CODECS[rhs.codec].number_of_parts(rhs.data)
    padded = -(-lhs.shape[1] // (cpu.BLOCK * parts)) * cpu.BLOCK
    scratch = 4 * len(lhs) * parts * padded + cpu.ACTIVE_BYTES * min(len(sizes), len(lhs)) + cpu.ALIGNMENT
    results = [np.zeros((len(lhs), rhs.shape[1]), lhs.dtype), np.zeros(scratch, np.uint8)]
    head = struct.pack("<2q", ("dictionary", "gap", "nibbles").index(rhs.codec), len(arguments))
    return head + b"".join(map(described, arguments)) + b"".join(described(r, content=False) for r in results)


def gap_codes() -> bytes:
    """The codes of every number of levels that calls have, as `cpu.gap.prepare` hands them over."""
    every = sorted({L for codec, L in (*KINDS.values(), *MANY_LEVELS) if codec == "gap"})
    content = struct.pack("<q", len(every))
    for L in every:
        own, windows = numbers(L).astype(np.uint8), gap.window_table(L)
        content += struct.pack("<2q", L, own.size) + own.tobytes() + windows.tobytes()
    return content


@pytest.mark.parametrize("isa", cpu.ISAS)
def test_kernels_touch_nothing_but_their_arrays(driver, isa, tmp_path):
    every = list(calls())
    content = struct.pack("<q", len(every)) + b"".join(encoded(*call[:3]) for call in every)
    (tmp_path / "cases").write_bytes(cpu.dictionary._entries().tobytes() + gap_codes() + content)
    command = [driver, tmp_path / "cases", tmp_path / "results", isa, str(REPETITIONS)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if run.returncode == 4:
        pytest.skip(f"this machine lacks {isa}")
    assert run.returncode == 0, run.stderr[-4000:]
    results = (tmp_path / "results").read_bytes()
    for lhs, _, _, expected in every:
        size = expected.size * lhs.dtype.itemsize
        found, results = np.frombuffer(results[:size], lhs.dtype).reshape(expected.shape), results[size:]
        tolerance = 1e-5 if lhs.dtype == np.float32 else 1e-2
        np.testing.assert_allclose(found.astype(np.float64), expected, rtol=tolerance, atol=20 * tolerance)
    assert results == b""
