"""The paper's tables 4 (loss) and 6 (size) in small: the carried model, compressed five ways, and text from the result.

    python experiments/demo.py --output=out/demo

OUT gets the compressed checkpoint, demo.json, demo.md and demo.png.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # LAPACK's threads fight XLA's; set before jax is imported.

import dataclasses
import pathlib

from absl import app, flags
from generate import PROMPT, write
from ml_collections import config_flags

import qmoe_jax
from qmoe_jax import experiment, reporting
from qmoe_jax.figures import plot_losses
from qmoe_jax.models import streaming
from qmoe_jax.quantization.pipeline import TERNARY, compress

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = config_flags.DEFINE_config_file("demo_config", str(ROOT / "configs/tiny.py"), "Data and settings.")
OUTPUT = flags.DEFINE_string("output", "out/demo", "Where everything goes; an earlier demo there is replaced.")


def main(_):
    config = CONFIG.value
    checkpoint, vocabulary = experiment.open_model(str(ROOT / "experiments/tiny_model"), config)
    output = experiment.prepare_output(OUTPUT.value, overwrite=True)
    calibration = experiment.examples(config, "calibration", vocabulary)
    validation = experiment.examples(config, "validation", vocabulary)
    memory = experiment.memory_settings(config)
    stages = reporting.Stages()

    with stages("bfloat16"):
        reports = {
            "bfloat16": streaming.run(
                checkpoint, validation.pairs, memory._replace(round_weights=True), what="bfloat16"
            ).summary()
        }
    for bits, name in ((2, "2-bit"), (TERNARY, "ternary")):
        for method, title in (("rtn", "round to nearest"), ("gptq", "GPTQ")):
            quantization = dataclasses.replace(experiment.quantization_settings(config), method=method, bits=bits)
            save = method == "gptq" and bits == TERNARY
            with stages(f"{title}, {name}"):
                reports[f"{title}, {name}"] = compress(
                    checkpoint,
                    vocabulary,
                    calibration,
                    validation,
                    quantization,
                    memory,
                    output=str(output) if save else None,
                    provenance=checkpoint.provenance,
                    what=f"{title}, {name}",
                )
    reports["bfloat16"]["bytes_model"] = reports["GPTQ, ternary"]["bytes_bfloat16"]
    table = reporting.table(
        reporting.COMPRESSION_HEADER, [reporting.compression_row(name, r) for name, r in reports.items()]
    )
    reporting.write_json(output / "demo.json", {"reports": reports, "seconds": stages.report()})
    (output / "demo.md").write_text(table + "\n", encoding="utf-8")
    plot_losses(reports, output / "demo.png")
    reporting.say(
        f"\n{table}\n\nLosses are nats per predicted token; rates are against bfloat16; MB is the whole model."
    )

    model, params = qmoe_jax.load(output)
    for temperature in (0.0, 0.7):
        config.generation.temperature = temperature
        text = write(model, params, vocabulary, PROMPT.value, config.generation)
        reporting.say(f"\nFilled in by the compressed model (temperature {temperature}):\n  {text}")
    reporting.say(f"\nprompt: {PROMPT.value}\n{output}: compressed checkpoint, demo.json, demo.md, demo.png")


if __name__ == "__main__":
    app.run(experiment.without_traceback(main))
