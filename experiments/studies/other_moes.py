"""The paper's Table 4 for the other kinds of mixtures: small models of each, trained by configs/train_other_moes.py.

    for kind in gated tokens_choose experts_choose; do
      python experiments/train.py --config=configs/train_other_moes.py:$kind --workdir=out/$kind
    done
    python experiments/studies/other_moes.py --model=gated=out/gated --model=tokens_choose=out/tokens_choose \
      --model=experts_choose=out/experts_choose --output=out/other_moes

OUT gets other_moes.json and other_moes.md: losses, rates, and how far the losses of the compressed checkpoint are from
those of the T5X checkpoint that it dequantizes to.
"""

import os
import pathlib
import runpy
import sys
import tempfile

from absl import app, flags

from qmoe_jax import files, reports, streaming
from qmoe_jax.checkpoints import TARGETS, conversion, open_checkpoint
from qmoe_jax.compression.compress import compress_examples
from qmoe_jax.models import families
from qmoe_jax.quantization.methods import TERNARY
from qmoe_jax.quantization.settings import QuantizationSettings

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # experiments/
import command_line
import common

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = common.define_config("config", str(ROOT / "configs/tiny.py"), "Data and settings.")
MODELS = flags.DEFINE_multi_string("model", [], "KIND=DIR of a trained model; may be repeated.")
OUTPUT = flags.DEFINE_string("output", "out/other_moes", "Directory for other_moes.json and other_moes.md.")

# The paper's rows; the last is saved, and compared with what it dequantizes to.
SAVED = "QMoE, ternary"
ROWS = {
    "round to nearest, 2-bit": ("rtn", 2, "gap"),
    "round to nearest, ternary": ("rtn", TERNARY, "dictionary"),
    "QMoE, 2-bit": ("gptq", 2, "gap"),
    SAVED: ("gptq", TERNARY, "dictionary"),
}


def measure(path: str, untold: dict, config) -> dict[str, dict]:
    """Reports by row, of the model at `path`; `untold` are the fields that its parameter tree doesn't tell."""
    config.model.update(untold)
    checkpoint, vocabulary = common.open_model(path, config)
    documents = {name: common.examples(config, name, checkpoint, vocabulary) for name in ("calibration", "validation")}
    calibration, validation = documents.values()
    memory = common.memory_settings(config)
    # Where experts choose, they do within a batch: this is measured in the batches that compression has.
    examples, rounded = [*calibration, *validation], memory._replace(round_weights=True)

    def losses(of, settings):
        return streaming.DocumentLosses(*(a[len(calibration) :] for a in streaming.run(of, examples, settings)))

    found = {"bfloat16": losses(checkpoint, rounded).summary()}
    with tempfile.TemporaryDirectory() as directory:
        for name, (method, bits, codec) in ROWS.items():
            output = os.path.join(directory, "compressed") if name == SAVED else None
            settings = (calibration, validation, QuantizationSettings(method, bits=bits), memory)
            found[name] = compress_examples(
                checkpoint,
                vocabulary,
                *settings,
                codec=codec,
                output=output,
                provenance=checkpoint.provenance,
                what=name,
            )
        compressed = open_checkpoint(os.path.join(directory, "compressed"))
        folder = pathlib.Path(directory, "dense")
        conversion.run(TARGETS["t5x"](compressed, folder, conversion.Options("bfloat16")), folder, "")
        dense = open_checkpoint(folder, **untold)
        totals = [losses(of, memory).total for of in (compressed, dense)]
    found[SAVED]["compressed_minus_dequantized"] = float(abs(totals[0] - totals[1]).max())
    return found


def main(_):
    kinds = runpy.run_path(str(ROOT / "configs/train_other_moes.py"))["KINDS"]
    output = common.prepare_output(OUTPUT.value, overwrite=True)
    given = dict(m.partition("=")[::2] for m in MODELS.value)
    if not given or not set(given) <= set(kinds) or not all(given.values()):
        raise ValueError(f"--model={','.join(MODELS.value)}: expected KIND=DIR, KIND one of {', '.join(kinds)}.")
    results, tables = {}, []
    for kind, path in given.items():
        untold = {field: kinds[kind][field] for field in families.untold() if field in kinds[kind]}
        found = measure(path, untold, CONFIG.value.copy_and_resolve_references())
        results[kind] = {
            name: {k: v for k, v in report.items() if k not in ("layers", "seconds", "peak_rss_bytes")}
            for name, report in found.items()
        }
        rows = [reports.compression_row(name, report) for name, report in found.items()]
        tables.append(f"{kind}\n\n{reports.table(reports.COMPRESSION_HEADER, rows)}")
        off = found[SAVED]["compressed_minus_dequantized"]
        tables[-1] += (
            f"\n\nA document's summed loss differs by at most {off:.1e} between compressed and dequantized experts."
        )
        reports.say("\n" + tables[-1])
        files.write_json(output / "other_moes.json", results)
        files.write_text(output / "other_moes.md", "\n\n".join(tables) + "\n")
    reports.say(f"\n{output}: other_moes.json, other_moes.md")


if __name__ == "__main__":
    app.run(command_line.without_traceback(main))
