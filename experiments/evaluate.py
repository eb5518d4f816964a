"""Loss of a checkpoint of any layout on held-out documents; one layer in memory at a time.

python experiments/evaluate.py --config=configs/tiny.py --checkpoint=DIR --report=FILE
"""

import interrupts  # noqa: F401, before all that takes time

# isort: split

import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from absl import app, flags

import command_line
import common
from qmoe_jax import files, reports, resources, streaming
from qmoe_jax.kernels.compressed_ragged_dot import api
from qmoe_jax.models.family import Example, Task

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = common.define_config("config", str(ROOT / "configs/tiny.py"), "Data and settings.")
CHECKPOINT = common.define_checkpoint("Checkpoint of any layout.")
command_line.define_process_flags()
REPORT = flags.DEFINE_string("report", None, "JSON file for the report; none is written by default.")


def unigram_entropy(task: Task, examples: Sequence[Example]) -> float:
    """Loss in nats of the best guess that sees no context: entropy of the predicted tokens' own frequencies."""
    counts = np.bincount(np.concatenate([task.targets(example) for example in examples]))
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def main(_):
    processes = command_line.start_processes()
    common.agree(processes, CONFIG.value)
    if processes.first:
        common.check_file(REPORT.value, "report")
    config = CONFIG.value
    memory = common.memory_settings(config)
    checkpoint, vocabulary = common.open_model(common.checkpoint_path(CHECKPOINT, config), config)
    memory = memory._replace(mesh=common.mesh(config, checkpoint, jax.local_devices()))
    validation = common.examples(config, "validation", checkpoint, vocabulary)
    common.agree_on_model(processes, checkpoint, validation)
    stages = resources.Stages()
    losses = streaming.run(checkpoint, validation, memory, stages=stages)
    report = {
        **losses.summary(),
        "unigram_entropy": unigram_entropy(checkpoint.family.task, validation),
        "checkpoint": checkpoint.provenance,
        "seconds": stages.report(),
        "peak_rss_bytes": resources.peak_rss_bytes(),
        "products": api.used(),
        "config": config.to_dict(),
    }
    if REPORT.value and processes.first:
        files.write_json(REPORT.value, report)
    fields = ("loss", "loss_paper", "unigram_entropy", "num_documents", "num_tokens")
    reports.say("\n" + reports.table(["checkpoint", *fields], [[checkpoint.path, *(report[f] for f in fields)]]))


if __name__ == "__main__":
    app.run(command_line.without_traceback(main))
