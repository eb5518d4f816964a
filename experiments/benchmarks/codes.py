"""Stored bits of the codec `gap` above the entropy of symbols, for rates from .3 to 3 bits, and how fast it encodes.

    python experiments/benchmarks/codes.py --output=results/codes.json

Rows of independent Gaussian or Laplace weights are rounded with a dead zone to as many levels as the rate wants. Stored
bits count everything: streams, levels, the places of blocks. The entropy is that of each expert's own symbols, order 0.
"""

import pathlib
import sys
import time

import numpy as np
from absl import app, flags

from qmoe_jax import files, reports
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels.compressed_ragged_dot import arg_specs

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # experiments/
import command_line

SHAPES = flags.DEFINE_list("shapes", ["2080x6144", "768x2048"], "Matrices, out x in.")
RATES = flags.DEFINE_list("rates", "0.3 0.5 0.7 1.0 1.5 2.0 2.5 3.0".split(), "Entropies of symbols, in bits.")
OUTPUT = flags.DEFINE_string("output", None, "JSON file for the report.")


def row(distribution: str, rate: float, out: int, width: int) -> dict:
    """One expert of one shape."""
    symbols, levels = arg_specs.rounded(distribution, rate, 1, out, width)
    share = np.bincount(symbols.reshape(-1)) / symbols.size
    entropy = -sum(p * np.log2(p) for p in share if p > 0)
    CompressedExperts.from_symbols(symbols[:, :32], levels[:, :32])  # The codes, once.
    started = time.process_time()
    experts = CompressedExperts.from_symbols(symbols, levels)
    seconds = time.process_time() - started
    bits = 8 * experts.nbytes / symbols.size
    return dict(
        distribution=distribution,
        out=out,
        width=width,
        levels=levels.shape[-1],
        zeros=share[0],
        entropy=entropy,
        stored_bits=bits,
        above_entropy=bits / entropy - 1,
        code=int(experts.data["parameters"][0]),
        weights_per_second=symbols.size / seconds,
    )


def main(_):
    shapes = [tuple(map(int, shape.split("x"))) for shape in SHAPES.value]
    rows = [
        row(distribution, float(rate), *shape)
        for shape in shapes
        for distribution in arg_specs.TAILS
        for rate in RATES.value
    ]
    header = ("out, in", "weights", "levels", "zeros", "entropy", "stored bits", "above entropy", "Mweights/s encoded")
    cells = [
        [
            f"{r['out']}, {r['width']}",
            r["distribution"],
            str(r["levels"]),
            f"{r['zeros']:.3f}",
            f"{r['entropy']:.3f}",
            f"{r['stored_bits']:.3f}",
            f"{r['above_entropy']:.2%}",
            f"{r['weights_per_second'] / 1e6:.0f}",
        ]
        for r in rows
    ]
    reports.say(reports.table(header, cells))
    if OUTPUT.value:
        files.write_json(OUTPUT.value, dict(rows=rows))


if __name__ == "__main__":
    app.run(command_line.without_traceback(main))
