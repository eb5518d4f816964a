"""The paper's tables 4 (loss) and 6 (size) in small: the carried model, compressed five ways, and text from the
last.

    python experiments/demo.py --output=out/demo

OUT gets the compressed checkpoint, demo.json, demo.md and demo.png.
"""

import interrupts  # noqa: F401, before all that takes time

# isort: split

import pathlib

from absl import app, flags

import command_line
import common
import qmoe_jax
from generate import PROMPT, pieces
from qmoe_jax import files, reports, resources, streaming
from qmoe_jax.compression.compress import compress_examples
from qmoe_jax.quantization.methods import TERNARY
from qmoe_jax.quantization.settings import QuantizationSettings
from qmoe_jax.reports.figures import plot_losses

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = common.define_config("demo_config", str(ROOT / "configs/tiny.py"), "Data and settings.")
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
    checkpoint, vocabulary = common.open_model(str(ROOT / "experiments/tiny_model"), config)
    output = common.prepare_output(OUTPUT.value, overwrite=True)
    calibration = common.examples(config, "calibration", checkpoint, vocabulary)
    validation = common.examples(config, "validation", checkpoint, vocabulary)
    memory = common.memory_settings(config)
    stages = resources.Stages()

    rounded = memory._replace(round_weights=True)
    with stages("bfloat16"):
        found = {"bfloat16": streaming.run(checkpoint, validation, rounded, what="bfloat16").summary()}
    for name, (method, bits, codec) in ROWS.items():
        with stages(name):
            found[name] = compress_examples(
                checkpoint,
                vocabulary,
                calibration,
                validation,
                QuantizationSettings(method, bits=bits),
                memory,
                codec=codec,
                output=output if name == SAVED else None,
                provenance=checkpoint.provenance,
                what=name,
            )
    found["bfloat16"]["bytes_model"] = found[SAVED]["bytes_bfloat16"]
    table = reports.table(reports.COMPRESSION_HEADER, [reports.compression_row(name, r) for name, r in found.items()])
    files.write_json(output / "demo.json", {"reports": found, "seconds": stages.report()})
    files.write_text(output / "demo.md", table + "\n")
    plot_losses(found, output / "demo.png")
    reports.say(f"\n{table}\n\nLosses are nats per predicted token; rates are against bfloat16; MB is the whole model.")

    model, params = qmoe_jax.load(output)
    (prompt,) = PROMPT.value or [config.generation.prompt]
    for temperature in (0.0, 0.7):
        config.generation.temperature = temperature
        text = "".join(pieces(model, params, vocabulary, prompt, config.generation))
        reports.say(f"\nFilled in by the compressed model (temperature {temperature}):\n  {text}")
    reports.say(f"\nprompt: {prompt}\n{output}: compressed checkpoint, demo.json, demo.md, demo.png")


if __name__ == "__main__":
    app.run(command_line.without_traceback(main))
