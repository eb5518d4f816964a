"""The CPU kernels beside ggml's ternary types, which llama.cpp runs ternary models with.

    git clone https://github.com/ggml-org/ggml && cmake -S ggml -B ggml/build && cmake --build ggml/build
    taskset -c 0 python experiments/benchmarks/ggml.py --libraries=ggml/build/src --output=results/ggml_one_core.json
    taskset -c 0,1 python experiments/benchmarks/ggml.py --libraries=ggml/build/src --output=results/ggml_two_cores.json

ggml is loaded as it was built, and is no part of this project. Its products are nodes of one graph, ours steps of one
scan: every call meets a matrix that no cache holds. Both sides take as many threads as there are cores; they take turns
within each round, and the fastest round counts. ggml rounds activations to 8 bits; what that costs is measured on the
same products. TQ1_0 (1.69 bits) and TQ2_0 (2.06) hold every trit, however many are zero; rows are padded to whole
blocks of 256 for them.
"""

import ctypes
import os
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from qmoe_jax import files, reports
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels.compressed_ragged_dot import arg_specs
from qmoe_jax.kernels.compressed_ragged_dot.api import compressed_ragged_dot

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # experiments/
import command_line
import common

LIBRARIES = flags.DEFINE_string("libraries", None, "Folder with libggml-base.so and libggml-cpu.so.", required=True)
SHAPES = flags.DEFINE_list("shapes", [f"{out}x{width}" for out, width in arg_specs.SHAPES], "Shapes as out x in.")
ZEROS = flags.DEFINE_list("zeros", ["0.885", "0.96"], "P(0).")
TOKENS = flags.DEFINE_list("tokens", ["1", "8"], "Of one expert.")
MEGABYTES = flags.DEFINE_integer("megabytes", 192, "Least size of the float32 matrices that calls go through.")
ROUNDS = flags.DEFINE_integer("rounds", 21, "The fastest counts.", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "JSON file.")

BLOCK = 256
TYPES = {"TQ1_0": 34, "TQ2_0": 35, "Q4_0": 2}  # ggml.h's numbers
F32 = 0
BUILT = ("base", "cpu")


class Ggml:
    """What is needed of ggml's C functions."""

    class _Params(ctypes.Structure):
        _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]

    def __init__(self, folder: str):
        p, i64, n = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
        try:
            base, cpu = (ctypes.CDLL(str(pathlib.Path(folder) / f"libggml-{x}.so"), ctypes.RTLD_GLOBAL) for x in BUILT)
        except OSError as e:
            raise ValueError(f"--libraries={folder}: {e}. Give the folder that ggml was built in.") from e

        def function(library, name, result, *arguments):
            found = getattr(library, name)
            found.restype, found.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), found)

        function(base, "ggml_init", p, self._Params)
        function(base, "ggml_free", None, p)
        function(base, "ggml_new_tensor_2d", p, p, ctypes.c_int, i64, i64)
        function(base, "ggml_get_data", p, p)
        function(base, "ggml_nbytes", n, p)
        function(base, "ggml_mul_mat", p, p, p, p)
        function(base, "ggml_new_graph_custom", p, p, n, ctypes.c_bool)
        function(base, "ggml_build_forward_expand", None, p, p)
        function(base, "ggml_quantize_chunk", n, ctypes.c_int, p, p, i64, i64, i64, p)
        function(cpu, "ggml_graph_compute_with_ctx", ctypes.c_int, p, p, ctypes.c_int)

    def __getattr__(self, name: str) -> Any:  # for type checkers
        raise AttributeError(name)

    def context(self, megabytes: int) -> int:
        return self.init(self._Params(megabytes << 20, None, False))


class Products:
    """x times each of several matrices, by ggml.

    Args:
      ggml: its functions.
      kind: a key of `TYPES`.
      W: float32 [matrices, out, in].
      x: float32 [tokens, in].
    """

    def __init__(self, ggml: Ggml, kind: str, W: np.ndarray, x: np.ndarray, threads: int):
        matrices, out, width = W.shape
        self.ggml, self.calls, self.threads = ggml, matrices, threads
        padded = -(-width // BLOCK) * BLOCK
        room = (matrices * out * (padded + 64 * len(x)) >> 20) + 64
        self.context = ggml.context(room)
        inputs = ggml.new_tensor_2d(self.context, F32, padded, len(x))
        x = np.ascontiguousarray(np.pad(x, ((0, 0), (0, padded - width))), np.float32)
        ctypes.memmove(ggml.get_data(inputs), x.ctypes.data, x.nbytes)
        self.graph = ggml.new_graph_custom(self.context, 2 * matrices + 16, False)
        self.bytes, self.first = 0, None
        for w in W:
            w = np.ascontiguousarray(np.pad(w, ((0, 0), (0, padded - width))), np.float32)
            tensor = ggml.new_tensor_2d(self.context, TYPES[kind], padded, out)
            ggml.quantize_chunk(TYPES[kind], w.ctypes.data, ggml.get_data(tensor), 0, out, padded, None)
            self.bytes = ggml.nbytes(tensor)
            y = ggml.mul_mat(self.context, tensor, inputs)
            self.first = self.first or y
            ggml.build_forward_expand(self.graph, y)
        self.shape = (len(x), out)

    def __call__(self) -> np.ndarray:
        """What the first matrix gives: float32 [tokens, out]."""
        if status := self.ggml.graph_compute_with_ctx(self.context, self.graph, self.threads):
            raise RuntimeError(f"ggml_graph_compute_with_ctx: status {status}.")
        values = ctypes.cast(self.ggml.get_data(self.first), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(values, self.shape).copy()

    def close(self) -> None:
        self.ggml.free(self.context)


def ours(rhs: CompressedExperts, x: np.ndarray):
    """x times each expert, one after the other; what the first gives."""

    @jax.jit
    def run(rhs, x):
        def step(x, e):
            sizes = jnp.where(jnp.arange(rhs.shape[0]) == e, len(x), 0).astype(jnp.int32)
            y = compressed_ragged_dot(x, rhs, sizes, implementation="cpu")
            return x + 0 * jnp.sum(y[:, 0]), jnp.where(e == 0, y, 0)

        return jnp.sum(jax.lax.scan(step, x, jnp.arange(rhs.shape[0]))[1], axis=0)

    x = jnp.asarray(x)
    return lambda: np.asarray(run(rhs, x))


def measure(ggml: Ggml, out: int, width: int, zeros: float, tokens: int, threads: int) -> list[dict]:
    """A row for each product."""
    matrices = max(4, -(-(MEGABYTES.value << 20) // (4 * out * width)))
    random = np.random.default_rng(0)
    trits = random.choice(3, (matrices, out, width), p=(zeros, (1 - zeros) / 2, (1 - zeros) / 2)).astype(np.uint8)
    W = np.array([0, -1, 1], np.float32)[trits]
    x = random.standard_normal((tokens, width)).astype(np.float32)
    true = x.astype(np.float64) @ W[0].T.astype(np.float64)
    levels = np.tile(np.array([-1.0, 1.0]), (matrices, out, 1))
    products, sizes = {}, {}
    for codec in ("gap", "dictionary"):
        rhs = CompressedExperts.from_symbols(trits, levels, codec)
        products[codec], sizes[codec] = ours(rhs, x), rhs.nbytes // matrices
    for kind in TYPES:
        products[f"ggml {kind}"] = Products(ggml, kind, W, x, threads)
        sizes[f"ggml {kind}"] = products[f"ggml {kind}"].bytes
    errors = {name: float(np.linalg.norm(p() - true) / np.linalg.norm(true)) for name, p in products.items()}
    best = dict.fromkeys(products, float("inf"))
    for _ in range(ROUNDS.value):
        for name, product in products.items():
            started = time.perf_counter()
            product()
            best[name] = min(best[name], (time.perf_counter() - started) / matrices)
    for product in products.values():
        if isinstance(product, Products):
            product.close()
    return [
        dict(
            out=out,
            width=width,
            zeros=zeros,
            tokens=tokens,
            product=name,
            microseconds=1e6 * seconds,
            weights_per_second=out * width / seconds,
            bits_per_weight=8 * sizes[name] / (out * width),
            error=errors[name],
        )
        for name, seconds in best.items()
    ]


def main(_):
    ggml, threads = Ggml(LIBRARIES.value), len(os.sched_getaffinity(0))
    rows = []
    for shape in SHAPES.value:
        out, width = map(int, shape.split("x"))
        for zeros in map(float, ZEROS.value):
            for tokens in map(int, TOKENS.value):
                found = measure(ggml, out, width, zeros, tokens, threads)
                rows += found
                header = ("out, in", "P(0)", "tokens", "product", "us", "Gweights/s", "bits a weight", "error")
                cells = [
                    (
                        f"{out}, {width}",
                        f"{zeros:g}",
                        tokens,
                        r["product"],
                        f"{r['microseconds']:.1f}",
                        f"{r['weights_per_second'] / 1e9:.2f}",
                        f"{r['bits_per_weight']:.3f}",
                        f"{r['error']:.1e}",
                    )
                    for r in found
                ]
                reports.say(reports.table(header, cells) + "\n")
    if OUTPUT.value:
        files.write_json(OUTPUT.value, dict(cores=threads, rows=rows, environment=common.environment()))


if __name__ == "__main__":
    app.run(command_line.without_traceback(main))
