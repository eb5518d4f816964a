"""Fine-tunes what isn't quantized of a compressed checkpoint, towards what the original model predicts.

    python experiments/finetune.py --config=configs/tiny.py --checkpoint=COMPRESSED --original=DIR --output=OUT

COMPRESSED is a compressed checkpoint, DIR what it was made from. Norms, routers, attention and the experts' levels are
trained (--config.finetune.parts), symbols stay. OUT gets a compressed checkpoint of nearly the same size, report.json.
The documents are the calibration documents; some of them are held out, and say which state is the best. Losses before
and after are those of the validation documents, and of other text that is given by --dataset.

With --config.finetune.layerwise=original a layer at a time is trained, to give what it gives in the original model: for
models that don't fit in memory. =compressed aims at what the original's layer gives from the compressed model's stream.

A run that was interrupted goes on when the same command is given again. OUT/progress/ is there as long as it isn't
through, and holds the original model's predictions; then the same command says that it is finished.
"""

import interrupts  # noqa: F401, before all that takes time

# isort: split

import json
import pathlib

from absl import app, flags

import command_line
import common
from qmoe_jax import files, finetuning, reports, resources, streaming
from qmoe_jax.checkpoints import open_checkpoint
from qmoe_jax.checkpoints.compressed import is_compressed
from qmoe_jax.compression.progress import is_unfinished, remove_progress
from qmoe_jax.errors import CheckpointError, DataError
from qmoe_jax.lock import locked

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = common.define_config("config", str(ROOT / "configs/tiny.py"), "Data and settings.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Compressed checkpoint.")
ORIGINAL = flags.DEFINE_string("original", None, "What it was made from. Default: the config's model.checkpoint.")
OUTPUT = flags.DEFINE_string("output", "out/finetuned", "Directory for the new compressed checkpoint and the report.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the checkpoint in --output, finished or not.")
DATASETS = flags.DEFINE_multi_string("dataset", [], "NAME=FILES: other text, whose loss is measured before and after.")


def other_text(config, checkpoint, vocabulary) -> dict:
    """Examples by name, as many of each as there are, at most as many as validation documents."""
    found = {}
    for item in DATASETS.value:
        name, equals, paths = item.partition("=")
        if not equals or not name or not paths:
            raise ValueError(f"--dataset={item}: expected NAME=FILES.")
        data = config.copy_and_resolve_references()
        data.data.validation = paths
        found[name] = as_many_as_there_are(data, checkpoint, vocabulary)
    return found


def as_many_as_there_are(config, checkpoint, vocabulary):
    """The config's number of validation documents, or, of a smaller text, nearly all there are."""
    number = config.data.num_validation
    while True:
        try:
            return common.examples(config, "validation", checkpoint, vocabulary, number)
        except DataError:
            if number == 1:
                raise
            number = max(1, int(0.9 * number))


def main(_):
    config = CONFIG.value
    settings, memory = common.finetuning_settings(config), common.memory_settings(config)

    # --- Input -------------------------------------------------------------------------------------------------------
    if not CHECKPOINT.value:
        raise ValueError("No compressed checkpoint is given: give --checkpoint=DIR.")
    original_path = ORIGINAL.value or config.model.checkpoint
    if not original_path:
        raise ValueError("The original model isn't given: give --original=DIR.")
    checkpoint = open_checkpoint(CHECKPOINT.value)
    original, vocabulary = common.open_model(original_path, config)
    calibration = common.examples(config, "calibration", original, vocabulary)
    texts = {"validation": common.examples(config, "validation", original, vocabulary)}
    texts |= other_text(config, original, vocabulary)
    identity = finetuning.identity_of(checkpoint, original, list(calibration), settings)
    layerwise = config.finetune.layerwise
    identity |= {"layerwise": layerwise and [layerwise, memory.tokens_per_batch]}
    identity |= {"texts": {name: len(text) for name, text in texts.items()}}

    unfinished = is_unfinished(OUTPUT.value)
    earlier = None if OVERWRITE.value or unfinished else finished_report(OUTPUT.value)
    replaces = OVERWRITE.value or unfinished or earlier is not None
    output = common.prepare_output(OUTPUT.value, replaces, CHECKPOINT.value, original_path)
    if earlier is not None:
        if earlier["identity"] != json.loads(json.dumps(identity)):
            common.prepare_output(OUTPUT.value, False)  # Refuses.
        remove_progress(output)
        reports.say(f"{output}: finished already, by the same command; report.json has its results")
        return

    with locked(output):
        if OVERWRITE.value:
            (output / "report.json").unlink(missing_ok=True)
        what = (checkpoint, original, list(calibration), settings)
        how = dict(
            output=output,
            resume=not OVERWRITE.value,
            commit_share=config.memory.commit_share,
            keep_progress=True,
        )
        if layerwise:
            report = finetuning.finetune_layers(*what, memory, target=layerwise, **how)
        else:
            report = finetuning.finetune_examples(*what, **how)
        report["identity"] = identity
        report["texts"] = measure(texts, original, checkpoint, open_checkpoint(output), memory)
        report["checkpoint"], report["config"] = checkpoint.provenance, config.to_dict()
        report["environment"], report["peak_rss_bytes"] = common.environment(), resources.peak_rss_bytes()
        files.write_json(output / "report.json", report)
        remove_progress(output)
    say(report, output)


def finished_report(path: str) -> dict | None:
    """The report of a fine-tuning that is finished; None if there is none."""
    output = pathlib.Path(path)
    try:
        report = files.read_json(output / "report.json") if is_compressed(output) else {}
    except CheckpointError:
        return None
    return report if "identity" in report else None


def measure(texts: dict, original, before, after, memory: streaming.Settings) -> dict:
    """Losses by text: of the original in bfloat16, of the compressed checkpoint before and after; what is recovered."""
    found = {}
    for name, text in texts.items():
        losses = {
            "original": streaming.run(original, text, memory._replace(round_weights=True), what=f"{name}, original"),
            "before": streaming.run(before, text, memory, what=f"{name}, before"),
            "after": streaming.run(after, text, memory, what=f"{name}, after"),
        }
        found[name] = {which: of.summary()["loss"] for which, of in losses.items()}
        found[name] |= {"recovered": finetuning.recovered(**found[name]), "num_documents": len(text)}
    return found


def say(report: dict, output: pathlib.Path) -> None:
    """What came of it, as a table."""
    header = ("text", "documents", "original", "compressed", "fine-tuned", "above: before", "after", "recovered")
    rows = [
        [name, t["num_documents"], t["original"], t["before"], t["after"], t["before"] - t["original"],
         t["after"] - t["original"], "" if t["recovered"] is None else f"{t['recovered']:.0%}"]
        for name, t in report["texts"].items()
    ]  # fmt: skip
    reports.say("\n" + reports.table(header, rows) + "\n")
    parts = ", ".join(f"{part} {number:,}" for part, number in report["parameters"].items())
    if "layers" in report:
        errors = [[layer["layer"], layer.get("before", ""), layer.get("after", "")] for layer in report["layers"]]
        reports.say(reports.table(("layer", "error on documents held out: before", "after"), errors) + "\n")
        reports.say(f"trained: {parts}")
    else:
        change = f"{report['before']:.4f} -> {report['after']:.4f}"
        reports.say(f"trained: {parts}; divergence of documents held out {change}")
    before, after = report["bytes_experts"]["before"], report["bytes_experts"]["after"]
    reports.say(f"experts: {before:,} bytes before, {after:,} after (levels are packed, by how much they differ)")
    reports.say(f"{output}: compressed checkpoint and report.json")


if __name__ == "__main__":
    app.run(command_line.without_traceback(main))
