"""Seconds of a whole compression: the paper's recipe, and rate-distortion quantization, in turn.

    python experiments/benchmarks/compression_time.py --rounds=4 --output=OUT

Both compress --checkpoint with the same documents and write nothing. Of the rounds, the first compiles; of the others
the fastest counts, as other load on the machine only ever adds time. OUT gets compression_time.json and .md.
"""

import os
import pathlib
import sys

import jax
from absl import app, flags

from qmoe_jax import files, reports

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # experiments/
import command_line
import common
from studies.laboratory import Laboratory

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = common.define_config("config", str(ROOT / "configs/tiny.py"), "Data and settings.")
CHECKPOINT = common.define_checkpoint("Native T5X checkpoint.")
OUTPUT = flags.DEFINE_string("output", "out/benchmark_compression", "Directory for the report.")
ROUNDS = flags.DEFINE_integer("rounds", 4, "How often each is run.", lower_bound=2)
TARGET_BITS = flags.DEFINE_float("target_bits", 0.7, "Stored bits per weight, of rate-distortion quantization.")

PAPER, OURS = "the paper's recipe", "rate-distortion"


def main(_):
    path = common.checkpoint_path(CHECKPOINT, CONFIG.value)
    output = common.prepare_output(OUTPUT.value, True, path)
    lab = Laboratory(CONFIG.value, path)
    methods = {
        PAPER: dict(method="gptq", codec="dictionary"),
        OURS: dict(method="rd", codec="gap", target_bits=TARGET_BITS.value),
    }
    seconds = {name: [] for name in methods}
    for i in range(ROUNDS.value):
        for name, settings in methods.items():
            report = lab.compress(**settings, what=f"{name}, {i + 1} of {ROUNDS.value}")
            seconds[name].append(report["seconds"])
    best = {name: min(runs[1:], key=lambda run: run["total"]) for name, runs in seconds.items()}
    stages = list(best[OURS])
    table = reports.table(
        ("", *stages),
        [
            *((name, *(f"{run[stage]:.2f}" for stage in stages)) for name, run in best.items()),
            ("ratio", *(f"{best[OURS][s] / best[PAPER][s]:.2f}" if best[PAPER][s] > 0.05 else None for s in stages)),
        ],
    )
    result = dict(
        cores=len(os.sched_getaffinity(0)),
        jax=jax.__version__,
        calibration_documents=report["num_calibration_documents"],
        validation_documents=len(lab.validation),
        target_bits=TARGET_BITS.value,
        seconds=seconds,
        ratio=best[OURS]["total"] / best[PAPER]["total"],
        config=common.without_folders(lab.config),
    )
    files.write_json(output / "compression_time.json", result)
    files.write_text(output / "compression_time.md", table + "\n")
    reports.say(f"\n{table}")


if __name__ == "__main__":
    app.run(command_line.without_traceback(main))
