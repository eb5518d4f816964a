"""The paper's tables 4 (loss) and 6 (size) in small: the carried model, compressed five ways, and text from the
last.

    python experiments/demo.py --output=out/demo

OUT gets the compressed checkpoint, demo.json, demo.md and demo.png.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # LAPACK's threads fight XLA's; set before jax is imported.

import pathlib

from absl import app, flags
from generate import PROMPT, write

import qmoe_jax
from qmoe_jax import experiment, files, resources, streaming
from qmoe_jax.quantization.pipeline import TERNARY, QuantizationSettings, compress
from qmoe_jax.reports.figures import plot_losses

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = experiment.define_config("demo_config", str(ROOT / "configs/tiny.py"), "Data and settings.")
OUTPUT = flags.DEFINE_string("output", "out/demo", "Where everything goes; an earlier demo there is replaced.")

# Ternary rows of the paper's methods are stored by the paper's codec.
SAVED = "rate-distortion, ternary"
ROWS = {
    "round to nearest, 2-bit": ("rtn", 2, "gap"),
    "GPTQ, 2-bit": ("gptq", 2, "gap"),
    "round to nearest, ternary": ("rtn", TERNARY, "dictionary"),
    "GPTQ, ternary": ("gptq", TERNARY, "dictionary"),
    SAVED: ("rd", TERNARY, "gap"),
}


def main(_):
    config = CONFIG.value
    checkpoint, vocabulary = experiment.open_model(str(ROOT / "experiments/tiny_model"), config)
    output = experiment.prepare_output(OUTPUT.value, overwrite=True)
    calibration = experiment.examples(config, "calibration", vocabulary)
    validation = experiment.examples(config, "validation", vocabulary)
    memory = experiment.memory_settings(config)
    stages = resources.Stages()

    with stages("bfloat16"):
        reports = {
            "bfloat16": streaming.run(
                checkpoint, validation.pairs, memory._replace(round_weights=True), what="bfloat16"
            ).summary()
        }
    for name, (method, bits, codec) in ROWS.items():
        with stages(name):
            reports[name] = compress(
                checkpoint,
                vocabulary,
                calibration,
                validation,
                QuantizationSettings(method, bits),
                memory,
                codec=codec,
                output=str(output) if name == SAVED else None,
                provenance=checkpoint.provenance,
                what=name,
            )
    reports["bfloat16"]["bytes_model"] = reports[SAVED]["bytes_bfloat16"]
    table = reports.table(reports.COMPRESSION_HEADER, [reports.compression_row(name, r) for name, r in reports.items()])
    files.write_json(output / "demo.json", {"reports": reports, "seconds": stages.report()})
    (output / "demo.md").write_text(table + "\n", encoding="utf-8")
    plot_losses(reports, output / "demo.png")
    reports.say(f"\n{table}\n\nLosses are nats per predicted token; rates are against bfloat16; MB is the whole model.")

    model, params = qmoe_jax.load(output)
    for temperature in (0.0, 0.7):
        config.generation.temperature = temperature
        text = write(model, params, vocabulary, PROMPT.value, config.generation)
        reports.say(f"\nFilled in by the compressed model (temperature {temperature}):\n  {text}")
    reports.say(f"\nprompt: {PROMPT.value}\n{output}: compressed checkpoint, demo.json, demo.md, demo.png")


if __name__ == "__main__":
    app.run(experiment.without_traceback(main))
