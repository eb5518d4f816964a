"""The paper's Table 4 for the other kinds of mixtures: small models of each, trained by configs/train_other_moes.py.

    for kind in gated tokens_choose experts_choose; do
      python experiments/train.py --config=configs/train_other_moes.py:$kind --workdir=out/$kind
    done
    python experiments/other_moes.py --model=gated=out/gated --model=tokens_choose=out/tokens_choose \
      --model=experts_choose=out/experts_choose --output=out/other_moes

OUT gets other_moes.json and other_moes.md: losses, rates, and how far the losses of the compressed checkpoint are from
those of the T5X checkpoint that it dequantizes to.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # LAPACK's threads fight XLA's; set before jax is imported.

import pathlib
import runpy
import tempfile

from absl import app, flags

from qmoe_jax import experiment, files, streaming
from qmoe_jax.checkpoints import TARGETS, conversion, open_checkpoint
from qmoe_jax.quantization.pipeline import TERNARY, QuantizationSettings, compress

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = experiment.define_config("config", str(ROOT / "configs/tiny.py"), "Data and settings.")
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
    checkpoint, vocabulary = experiment.open_model(path, config)
    documents = {name: experiment.examples(config, name, vocabulary) for name in ("calibration", "validation")}
    calibration, validation = documents.values()
    memory = experiment.memory_settings(config)
    # Where experts choose, they do within a batch: this is measured in the batches that compression has.
    pairs, rounded = [*calibration.pairs, *validation.pairs], memory._replace(round_weights=True)

    def losses(of, settings):
        return streaming.DocumentLosses(*(a[len(calibration) :] for a in streaming.run(of, pairs, settings)))

    reports = {"bfloat16": losses(checkpoint, rounded).summary()}
    with tempfile.TemporaryDirectory() as directory:
        for name, (method, bits, codec) in ROWS.items():
            output = os.path.join(directory, "compressed") if name == SAVED else None
            settings = (calibration, validation, QuantizationSettings(method, bits), memory)
            reports[name] = compress(
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
    reports[SAVED]["compressed_minus_dequantized"] = float(abs(totals[0] - totals[1]).max())
    return reports


def main(_):
    kinds = runpy.run_path(str(ROOT / "configs/train_other_moes.py"))["KINDS"]
    output = experiment.prepare_output(OUTPUT.value, overwrite=True)
    given = dict(m.partition("=")[::2] for m in MODELS.value)
    if not given or not set(given) <= set(kinds) or not all(given.values()):
        raise ValueError(f"--model={','.join(MODELS.value)}: expected KIND=DIR, KIND one of {', '.join(kinds)}.")
    results, tables = {}, []
    for kind, path in given.items():
        untold = {field: kinds[kind][field] for field in ("top_k", "experts_choose") if field in kinds[kind]}
        reports = measure(path, untold, CONFIG.value.copy_and_resolve_references())
        results[kind] = {
            name: {k: v for k, v in report.items() if k not in ("layers", "seconds", "peak_rss_bytes")}
            for name, report in reports.items()
        }
        rows = [reports.compression_row(name, report) for name, report in reports.items()]
        tables.append(f"{kind}\n\n{reports.table(reports.COMPRESSION_HEADER, rows)}")
        off = reports[SAVED]["compressed_minus_dequantized"]
        tables[-1] += (
            f"\n\nA document's summed loss differs by at most {off:.1e} between compressed and dequantized experts."
        )
        reports.say("\n" + tables[-1])
        files.write_json(output / "other_moes.json", results)
        (output / "other_moes.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    reports.say(f"\n{output}: other_moes.json, other_moes.md")


if __name__ == "__main__":
    app.run(experiment.without_traceback(main))
