"""Loss of a checkpoint, native T5X or compressed, on held-out documents; one layer in memory at a time.

python experiments/evaluate.py --config=configs/tiny.py --checkpoint=DIR --report=FILE
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # LAPACK's threads fight XLA's; set before jax is imported.

import pathlib

import jax
import numpy as np
from absl import app, flags

from qmoe_jax import experiment, files, reports, resources, streaming
from qmoe_jax.models.switch import Examples

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = experiment.define_config("config", str(ROOT / "configs/tiny.py"), "Data and settings.")
CHECKPOINT = flags.DEFINE_string("checkpoint", str(ROOT / "experiments/tiny_model"), "T5X or compressed checkpoint.")
experiment.define_process_flags()
REPORT = flags.DEFINE_string("report", None, "JSON file for the report; none is written by default.")


def unigram_entropy(examples: Examples) -> float:
    """Loss in nats of the best guess that sees no context: entropy of the predicted tokens' own frequencies."""
    counts = np.bincount(np.concatenate([decoder[1:] for _, decoder in examples.pairs]))
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def main(_):
    processes = experiment.start_processes()
    config = CONFIG.value
    memory = experiment.memory_settings(config)
    checkpoint, vocabulary = experiment.open_model(CHECKPOINT.value, config)
    memory = memory._replace(mesh=experiment.mesh(config, checkpoint, jax.local_devices()))
    validation = experiment.examples(config, "validation", vocabulary)
    stages = resources.Stages()
    losses = streaming.run(checkpoint, validation.pairs, memory, stages=stages)
    report = {
        **losses.summary(),
        "unigram_entropy": unigram_entropy(validation),
        "checkpoint": checkpoint.provenance,
        "seconds": stages.report(),
        "peak_rss_bytes": resources.peak_rss_bytes(),
        "config": config.to_dict(),
    }
    if REPORT.value and processes.first:
        files.write_json(REPORT.value, report)
    fields = ("loss", "loss_paper", "unigram_entropy", "num_documents", "num_tokens")
    reports.say("\n" + reports.table(["checkpoint", *fields], [[checkpoint.path, *(report[f] for f in fields)]]))


if __name__ == "__main__":
    app.run(experiment.without_traceback(main))
