"""Time of batched GPTQ, compilation apart, and optionally of another implementation on the same weights and Hessians.

    python experiments/benchmarks/gptq.py --output=results/gptq_cpu.json --reference=PATH

The fastest of some runs counts, as other load on the machine only ever adds time. PATH is a Python file, not part of
this project, with `gptq(W, H)` on PyTorch tensors: the quantized W. It may overwrite H, must damp by 0.1 of H's mean
diagonal, and runs with as many threads as there are cores.
"""

import functools
import importlib.util
import os
import pathlib
import sys
import time

import jax
import numpy as np
from absl import app, flags

from qmoe_jax import files, reports
from qmoe_jax.quantization import gptq

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # experiments/
import command_line

SHAPES = flags.DEFINE_list("shapes", ["16x768x3072", "16x3072x768"], "Experts x rows (outputs) x columns (inputs).")
BITS = flags.DEFINE_enum("bits", "1.5", ["1.5", "2"], "1.5 is ternary.")
BLOCK_SIZE = flags.DEFINE_integer("block_size", 128, "As in gptq.", lower_bound=1)
RUNS = flags.DEFINE_integer("runs", 5, "Runs; the fastest counts.", lower_bound=1)
REFERENCE = flags.DEFINE_string("reference", None, "Python file with gptq(W, H) in PyTorch.")
REFERENCE_RUNS = flags.DEFINE_integer("reference_runs", 2, "Runs of the reference after a first.", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "JSON file for the report.")


def problem(experts: int, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """W [experts, rows, columns], and H [experts, columns, columns] of correlated inputs of uneven size."""
    rng = np.random.default_rng(0)
    W = rng.standard_normal((experts, rows, columns), np.float32)
    X = rng.standard_normal((columns, columns), np.float32)
    X += X[:, rng.permutation(columns)] / 2
    scale = rng.lognormal(size=(experts, columns)).astype(np.float32)
    H = X.T @ X * scale[:, :, None] * scale[:, None, :]
    return W, H


def _seconds(function):
    """Seconds, and what the function returned."""
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def time_ours(W: np.ndarray, H: np.ndarray) -> tuple[dict, np.ndarray]:
    """Seconds to compile and to run, and Q."""
    W, H = jax.device_put((W, H))
    run = jax.jit(functools.partial(gptq, bits=float(BITS.value), block_size=BLOCK_SIZE.value))
    compile_seconds, run = _seconds(lambda: run.lower(W, H).compile())
    jax.block_until_ready(run(W, H))
    runs = [_seconds(lambda: jax.block_until_ready(run(W, H))) for _ in range(RUNS.value)]
    return dict(compile_seconds=compile_seconds, seconds=[s for s, _ in runs]), np.asarray(runs[-1][1].Q)


def time_reference(reference, W: np.ndarray, H: np.ndarray) -> tuple[list[float], np.ndarray]:
    """Seconds of each run after the first, and Q."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    W = torch.from_numpy(W)
    runs = []
    for _ in range(1 + REFERENCE_RUNS.value):
        H_copy = torch.from_numpy(H.copy())
        runs.append(_seconds(functools.partial(reference, W, H_copy)))
    return [s for s, _ in runs[1:]], runs[-1][1].numpy()


def load_reference(path: str):
    """The function `gptq` of a Python file."""
    spec = importlib.util.spec_from_file_location("reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.gptq


def parse_shape(text: str) -> tuple[int, int, int]:
    sizes = text.split("x")
    if len(sizes) != 3 or not all(s.isdecimal() and int(s) > 0 for s in sizes):
        raise ValueError(f"--shapes: found {text!r}, expected experts x rows x columns, such as 16x768x3072.")
    return tuple(map(int, sizes))


def main(_):
    shapes = [parse_shape(text) for text in SHAPES.value]
    reference = load_reference(REFERENCE.value) if REFERENCE.value else None
    rows, cells = [], []
    for shape in shapes:
        W, H = problem(*shape)
        ours, Q = time_ours(W, H)
        best = min(ours["seconds"])
        row = dict(shape=shape, **ours, weights_per_second=W.size / best)
        cell = ["x".join(map(str, shape)), f"{ours['compile_seconds']:.2f}"]
        cell += [f"{best:.2f}", f"{W.size / best / 1e6:.1f}"]
        if reference:
            seconds, Q_reference = time_reference(reference, W, H)
            row |= dict(
                reference_seconds=seconds,
                times_reference=min(seconds) / best,
                share_of_different_weights=float(np.mean(~np.isclose(Q, Q_reference, rtol=1e-4, atol=1e-5))),
            )
            cell += [f"{min(seconds):.2f}", f"{row['times_reference']:.1f}"]
            cell += [f"{row['share_of_different_weights']:.1e}"]
        rows.append(row)
        cells.append(cell)
    header = ["experts x rows x columns", "compile s", "run s", "Mweights/s"]
    header += ["reference s", "x reference", "different"] if reference else []
    reports.say(reports.table(header, cells))
    if OUTPUT.value:
        report = dict(
            device=jax.devices()[0].device_kind,
            cores=len(os.sched_getaffinity(0)),
            jax=jax.__version__,
            bits=float(BITS.value),
            block_size=BLOCK_SIZE.value,
            rows=rows,
        )
        files.write_json(OUTPUT.value, report)


if __name__ == "__main__":
    app.run(command_line.without_traceback(main))
