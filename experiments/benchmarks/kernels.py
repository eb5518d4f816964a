"""Time of compressed_ragged_dot against dense products, on weights that no cache holds.

    taskset -c 0 python experiments/benchmarks/kernels.py --output=results/kernels_cpu.json

Every call meets other experts than the one before, and all products of a shape take turns within each round. Dense
experts are a set much larger than the caches, so that a product's turn finds nothing there that it left in the round
before. The fastest round counts, as other load on the machine only ever adds time. Of dense products, which run with
the matrix and with its transpose, the faster counts.
"""

import concurrent.futures
import dataclasses
import math
import os
import pathlib
import platform
import sys
import time

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from absl import app, flags

from qmoe_jax import codecs, files, reports
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels.compressed_ragged_dot import arg_specs
from qmoe_jax.kernels.compressed_ragged_dot.api import IMPLEMENTATIONS, compressed_ragged_dot

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # experiments/
import command_line
import common

# The experts' matrices in the published Switch Transformers.
MATRICES = dict(
    zip(("base wo", "base wi", "large wo", "large wi", "c2048 wo", "c2048 wi"), arg_specs.SHAPES, strict=True)
)

SHAPES = flags.DEFINE_list("shapes", list(MATRICES), "Names of shapes, comma-separated.")
LOADS = flags.DEFINE_list("loads", [f"{t}x{e}" for t, e in arg_specs.LOADS], "Loads as tokens x experts, such as 8x1.")
CODEC_NAMES = flags.DEFINE_list("codecs", list(codecs.CODECS), "Codecs that implementations are measured with.")
NAMES = flags.DEFINE_list("implementations", list(IMPLEMENTATIONS), "Those that cannot run here are left out.")
BITS = flags.DEFINE_float("bits", None, "Entropy of Gaussian weights rounded to many levels; None: the paper's trits.")
ROUNDS = flags.DEFINE_integer("rounds", 31, "Rounds; the fastest counts.", lower_bound=1)
DENSE_MB = flags.DEFINE_integer("dense_megabytes", 256, "Least size of the float32 experts that calls go through.")
DTYPE = flags.DEFINE_enum("dtype", "float32", list(common.DTYPES), "Of the tokens for compressed experts.")
CLOCK = flags.DEFINE_enum(
    "clock", "wall", ["wall", "processor"], "Processor time is for one core of a CPU that others use too."
)
OUTPUT = flags.DEFINE_string("output", None, "JSON file for the report, and a bar chart beside it with suffix .png.")

# Programs that would run longer than this make fewer calls.
SECONDS_PER_PROGRAM = 1.0


@dataclasses.dataclass
class Product:
    """A program of many products: `run(*operands)` makes `calls` of them, one after the other."""

    name: str
    run: callable
    operands: tuple
    calls: int
    bytes_per_call: int
    seconds: list[float] = dataclasses.field(default_factory=list)  # of a call, by round

    def time(self) -> None:
        self.seconds.append(_seconds(lambda: jax.block_until_ready(self.run(*self.operands))) / self.calls)


def bandwidth(megabytes: int = 512) -> float:
    """Bytes per second, read and written, of a copy by all cores."""
    if jax.default_backend() != "cpu":
        x = jnp.ones((megabytes << 18,), jnp.float32)
        copy = jax.jit(lambda x: x + 1)
        jax.block_until_ready(copy(x))
        return 2 * x.nbytes / min(_seconds(lambda: jax.block_until_ready(copy(x))) for _ in range(10))
    cores = len(os.sched_getaffinity(0))
    source = np.ones((cores, (megabytes << 18) // cores), np.float32)
    target = np.zeros_like(source)
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        copy = lambda: list(pool.map(np.copyto, target, source))
        return 2 * source.nbytes / min(_seconds(copy) for _ in range(5))


def _seconds(function) -> float:
    clock = time.perf_counter if CLOCK.value == "wall" else time.process_time
    started = clock()
    function()
    return clock() - started


def _after(x, y):
    """x, once y is there: the next call has to wait for this one."""
    return x + 0 * jnp.sum(y[:, 0])


def dense_product(name: str, W: list[jax.Array], contracting: int, tokens: int, active: int) -> Product:
    """Products with dense experts, each an array of its own, [in, out] or [out, in]."""

    @jax.jit
    def run(x, W):
        for i in range(0, len(W) - active + 1, active):
            parts = jnp.split(x, active)
            y = [jax.lax.dot_general(x, W[i + k], (((1,), (contracting,)), ((), ()))) for k, x in enumerate(parts)]
            x = _after(x, jnp.concatenate(y))
        return x

    x = jnp.ones((tokens, W[0].shape[contracting]), W[0].dtype)
    out = W[0].shape[1 - contracting]
    size = active * W[0].nbytes + x.nbytes + tokens * out * x.dtype.itemsize
    return Product(name, run, (x, W), len(W) // active, size)


def compressed_product(name: str, rhs: CompressedExperts, tokens: int, active: int) -> Product:
    """Products with compressed experts."""
    experts, out, width = rhs.shape
    calls = experts // active
    chosen = np.arange(calls)[:, None] * active + np.arange(active)  # [calls, active]
    sizes = np.zeros((calls, experts), np.int32)
    np.put_along_axis(sizes, chosen, tokens // active, axis=1)

    @jax.jit
    def run(x, rhs, sizes):
        def call(x, group_sizes):
            return _after(x, compressed_ragged_dot(x, rhs, group_sizes, implementation=name)), None

        return jax.lax.scan(call, x, sizes)[0]

    x = jnp.ones((tokens, width), common.DTYPES[DTYPE.value])
    size = active * rhs.resident_nbytes // experts + x.nbytes + tokens * out * x.dtype.itemsize
    trial = Product(name, run, (x, rhs, jnp.asarray(sizes[:1])), 1, size)
    trial.time()
    trial.time()
    calls = max(1, min(calls, int(SECONDS_PER_PROGRAM / trial.seconds[-1])))
    return Product(f"{name} {rhs.codec}", run, (x, rhs, jnp.asarray(sizes[:calls])), calls, size)


def benchmark_shape(name: str, loads: list[tuple[int, int]], names: list[tuple[str, str]], peak: float) -> list[dict]:
    """A row of the report for each load and product; `names` are of implementation and codec."""
    out, width = MATRICES[name]
    experts = max(math.ceil(DENSE_MB.value * 2**20 / (4 * out * width)), *(active for _, active in loads))
    if BITS.value is None:
        symbols = arg_specs.random_trits(experts, out, width)
        levels = np.stack([-np.ones((experts, out)), np.ones((experts, out))], axis=-1)
    else:
        symbols, levels = arg_specs.rounded("gaussian", BITS.value, experts, out, width)
    rhs = {codec: CompressedExperts.from_symbols(symbols, levels, codec) for codec in {codec for _, codec in names}}
    W = np.array(next(iter(rhs.values())).to_dense())  # [experts, out, in]
    dense = {
        (dtype, contracting): [jnp.asarray(w if contracting else w.T, dtype) for w in W]
        for dtype in ("bfloat16", "float32")  # On CPU bfloat16 allocates much; what follows at once would suffer.
        for contracting in (0, 1)
    }
    del W, symbols
    rows = []
    for tokens, active in loads:
        products = [
            dense_product(f"dense {dtype}", weights, contracting, tokens, active)
            for (dtype, contracting), weights in dense.items()
        ] + [compressed_product(implementation, rhs[codec], tokens, active) for implementation, codec in names]
        for product in products:  # compile
            product.time()
            product.seconds.clear()
        for _ in range(ROUNDS.value):
            for product in products:
                product.time()
        best = {}
        for product in products:
            if product.name not in best or min(product.seconds) < min(best[product.name].seconds):
                best[product.name] = product
        reference = min(best["dense float32"].seconds)
        for product in best.values():
            seconds = min(product.seconds)
            row = dict(
                shape=name,
                out=out,
                width=width,
                tokens=tokens,
                experts=active,
                product=product.name,
                microseconds=seconds * 1e6,
                microseconds_median=float(np.median(product.seconds)) * 1e6,
                weights_per_second=active * out * width / seconds,
                bytes=product.bytes_per_call,
                roofline=product.bytes_per_call / peak / seconds,
                times_dense_float32=reference / seconds,
                calls=product.calls,
            )
            rows.append(row)
    return rows


def runs_here(name: str, codec: str) -> bool:
    """Whether an implementation can run; says why where it cannot."""
    rhs = CompressedExperts.from_symbols(np.zeros((1, 2, 2), np.uint8), np.zeros((1, 2, 2)), codec)
    try:
        compressed_ragged_dot(jnp.ones((1, 2)), rhs, jnp.ones(1, jnp.int32), implementation=name)
    except NotImplementedError as e:
        reports.say(str(e))
        return False
    return True


def plot(rows: list[dict], path: pathlib.Path) -> None:
    """Bars as in the paper's Figure 5 (left): speed relative to the dense product, by shape; a panel for each load."""
    loads = list(dict.fromkeys((row["tokens"], row["experts"]) for row in rows))
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    names = [n for n in dict.fromkeys(row["product"] for row in rows) if n != "dense float32"]
    fig, axes = plt.subplots(1, len(loads), figsize=(1.5 + 4 * len(loads), 3.6), squeeze=False)
    for ax, load in zip(axes[0], loads, strict=True):
        for i, name in enumerate(names):
            found = {
                r["shape"]: r["times_dense_float32"]
                for r in rows
                if (r["tokens"], r["experts"]) == load and r["product"] == name
            }
            x = np.arange(len(shapes)) + (i - (len(names) - 1) / 2) * 0.8 / len(names)
            ax.bar(x, [found.get(s, 0) for s in shapes], 0.8 / len(names), label=name)
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set_xticks(range(len(shapes)), shapes, rotation=45, ha="right")
        ax.set_title(f"{load[0]} tokens on {load[1]} experts")
    axes[0][0].set_ylabel("speed, dense float32 = 1")
    axes[0][-1].legend()
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def processor() -> str:
    if jax.default_backend() != "cpu":
        return jax.devices()[0].device_kind
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{found}, {len(os.sched_getaffinity(0))} cores"


def main(_):
    loads = [tuple(map(int, load.split("x"))) for load in LOADS.value]
    for name in SHAPES.value:
        if name not in MATRICES:
            raise ValueError(f"--shapes: found {name!r}, expected among {', '.join(MATRICES)}.")
    names = [(name, codec) for name in NAMES.value for codec in CODEC_NAMES.value if runs_here(name, codec)]
    peak = bandwidth()
    reports.say(f"{processor()}; a copy moves {peak / 1e9:.1f} GB/s\n")
    rows = []
    header = ("shape", "out, in", "tokens x experts", "product", "us", "x float32", "Gweights/s", "MB", "roofline")
    for name in SHAPES.value:
        found = benchmark_shape(name, loads, names, peak)
        rows += found
        cells = [
            [
                row["shape"],
                f"{row['out']}, {row['width']}",
                f"{row['tokens']} x {row['experts']}",
                row["product"],
                f"{row['microseconds']:.1f}",
                f"{row['times_dense_float32']:.2f}",
                f"{row['weights_per_second'] / 1e9:.2f}",
                f"{row['bytes'] / 1e6:.2f}",
                f"{row['roofline']:.1%}",
            ]
            for row in found
        ]
        reports.say(reports.table(header, cells) + "\n")
    if OUTPUT.value:
        report = dict(
            processor=processor(),
            jax=jax.__version__,
            clock=CLOCK.value,
            isa=os.environ.get("QMOE_JAX_ISA", "auto"),
            copy_bytes_per_second=peak,
            rounds=ROUNDS.value,
            bits=BITS.value,
            rows=rows,
        )
        files.write_json(OUTPUT.value, report)
        plot(rows, pathlib.Path(OUTPUT.value).with_suffix(".png"))


if __name__ == "__main__":
    app.run(command_line.without_traceback(main))
