"""Compresses the experts of a mixture-of-experts model to ternary or 2 bits, and reports loss and size.

    python experiments/compress.py --config=configs/tiny.py --checkpoint=DIR --output=OUT

    python experiments/compress.py --config=configs/paper/c2048.py --plan

DIR is a checkpoint of any uncompressed layout; T5X's is a step directory or its parent, local or gs://. OUT gets the
compressed checkpoint, report.json, report.html, report.png and TensorBoard events. Every field of the config can be
set, e.g. --config.quantization.method=rtn.

A run that was interrupted (killed, out of space, the host lost) goes on after the last layer that it committed when the
same command is given again, and gives the same bytes. OUT/progress/ is there as long as it isn't through; then the same
command says that it is finished.
"""

import interrupts  # noqa: F401, before all that takes time

# isort: split

import json
import pathlib

from absl import app, flags

import command_line
import common
from qmoe_jax import files, reports, resources, streaming
from qmoe_jax.checkpoints.compressed import is_compressed
from qmoe_jax.checkpoints.samples import digest, samples
from qmoe_jax.compression import planning
from qmoe_jax.compression.compress import compress_examples, identity_of
from qmoe_jax.compression.progress import is_unfinished, remove_progress
from qmoe_jax.errors import CheckpointError
from qmoe_jax.lock import locked_by_first
from qmoe_jax.quantization.settings import QuantizationSettings, why_not_stored
from qmoe_jax.reports.events import write_compression
from qmoe_jax.reports.figures import plot_compression
from qmoe_jax.reports.html import html_report

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = common.define_config("config", str(ROOT / "configs/tiny.py"), "Data and settings.")
CHECKPOINT = common.define_checkpoint("Uncompressed checkpoint.")
command_line.define_process_flags()
OUTPUT = flags.DEFINE_string("output", "out/compressed", "Directory for the compressed checkpoint and the report.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the checkpoint in --output, finished or not.")

PLAN = flags.DEFINE_bool(
    "plan", False, "Only tell bytes, memory and (with a checkpoint) time. Without --checkpoint: of config.model.preset."
)
PLAN_JSON = flags.DEFINE_string("plan_json", None, "File for what --plan tells, as JSON.")


def plan_only(config, quantization, memory, codec: str | None) -> None:
    """Prints the plan of a compression, and how long it will take where there is a checkpoint to try it on."""
    if config.model.preset and not flags.FLAGS["checkpoint"].present:
        plan = common.plan_of_preset(config, quantization, memory, codec)
    else:
        checkpoint, vocabulary = common.open_model(common.checkpoint_path(CHECKPOINT, config), config)
        streamed, num_calibration = common.streamed_examples(config, quantization, checkpoint, vocabulary)
        plan = common.plan(checkpoint, streamed, num_calibration, quantization, memory, codec)
        plan["expected_seconds"] = common.expected_seconds(
            checkpoint, streamed, num_calibration, quantization, memory, codec
        )
    if PLAN_JSON.value:
        files.write_json(PLAN_JSON.value, plan)
    reports.say(reports.table(("plan", ""), planning.rows(plan)))


def main(_):
    processes = command_line.start_processes()
    config = CONFIG.value
    common.agree(processes, config, overwrite=OVERWRITE.value, plan=PLAN.value)
    quantization = common.quantization_settings(config)
    memory = common.memory_settings(config)
    problem = why_not_stored(quantization, config.codec.name)  # Refuses an unknown codec now, not after hours.
    save = problem is None if config.save is None else config.save
    if save and problem:
        raise ValueError(f"config.save: {problem}")

    if PLAN.value:
        common.check_file(PLAN_JSON.value, "plan_json")
        plan_only(config, quantization, memory, config.codec.name if save else None)
        return

    # --- Input -------------------------------------------------------------------------------------------------------
    path = common.checkpoint_path(CHECKPOINT, config)
    checkpoint, vocabulary = common.open_model(path, config)
    shards, experts = config.codec.num_shards, checkpoint.config.num_experts
    if shards is not None and not 1 <= shards <= experts:
        raise ValueError(f"config.codec.num_shards: found {shards}, expected 1 to {experts}, the number of experts.")
    unfinished = save and is_unfinished(OUTPUT.value)
    earlier = None if OVERWRITE.value or unfinished else finished_report(OUTPUT.value, save)
    replaces = OVERWRITE.value or unfinished or earlier is not None
    output = common.prepare_output(OUTPUT.value, replaces, path)
    memory = memory._replace(scratch=memory.scratch or str(output.parent))
    if not save and is_compressed(output):
        raise FileExistsError(f"--output={output} holds a compressed checkpoint, which a measurement doesn't replace.")
    which = ("calibration", "validation") if quantization.calibrated else ("validation",)
    number = {"calibration": config.data.candidates, "validation": None}
    documents = {name: common.examples(config, name, checkpoint, vocabulary, number[name]) for name in which}
    reports.say(
        f"{checkpoint.path}: {len(checkpoint.config.sparse_layers)} sparse layers of "
        f"{checkpoint.config.num_experts} experts"
    )
    for name, read in documents.items():
        reports.say(
            f"{name}: {len(read)} documents; {read.num_too_long} longer than "
            f"{config.data.max_length} tokens and {read.num_too_short} empty ones were skipped"
        )
    calibration, validation = documents.get("calibration"), documents["validation"]
    if calibration is not None and config.data.candidates:
        calibration = common.chosen(config, calibration, checkpoint, memory)
        reports.say(f"calibration: {len(calibration)} of them chosen by {config.data.choose_by}")

    what_is_given = (checkpoint, calibration, validation, quantization, memory)
    identity = identity_of(*what_is_given, codec=config.codec.name, num_shards=config.codec.num_shards)
    identity |= {"weights (a sample)": digest(samples(checkpoint)), "compare": config.compare}
    if earlier is not None:
        if earlier["identity"] != json.loads(json.dumps(identity)):
            common.prepare_output(OUTPUT.value, False)  # Refuses.
        if processes.first:
            remove_progress(output)  # A run that was killed may have left some.
        reports.say(f"{output}: finished already, by the same command; report.json has its results")
        return

    streamed = [*(calibration or ()), *validation]
    num_calibration = len(streamed) - len(validation)
    plan = common.plan(checkpoint, streamed, num_calibration, quantization, memory, config.codec.name if save else None)
    common.check_room(plan, memory, output)

    with locked_by_first(output, processes):
        model, documents = (checkpoint, vocabulary), (calibration, validation)
        run(config, quantization, memory, model, documents, plan, identity, output, save, processes)


def finished_report(path: str, save: bool) -> dict | None:
    """The report of a compression that is finished, and was saved or not; None if there is none."""
    output = pathlib.Path(path)
    if is_compressed(output) != save:
        return None
    try:
        report = files.read_json(output / "report.json")
    except CheckpointError:
        return None
    return report if "identity" in report else None


def run(config, quantization, memory, model, documents, plan, identity, output, save, processes) -> None:
    """Compresses, compares and reports, while nobody else writes to the output."""
    (checkpoint, vocabulary), (calibration, validation) = model, documents
    if OVERWRITE.value and processes.first:
        for name in ("report.json", "report.html", "report.png"):  # An earlier run's.
            (output / name).unlink(missing_ok=True)

    # --- Compress ----------------------------------------------------------------------------------------------------
    report = compress_examples(
        checkpoint,
        vocabulary,
        calibration,
        validation,
        quantization,
        memory,
        codec=config.codec.name,
        output=str(output) if save else None,
        provenance=checkpoint.provenance,
        num_shards=config.codec.num_shards,
        resume=not OVERWRITE.value,
        keep_progress=True,  # until the reports are written, too
    )

    report["plan"] = plan | {"measured_peak_host_bytes": report["peak_rss_bytes"]}
    report["identity"] = identity  # what the same command has again
    try:
        compare_and_report(report, config, quantization, memory, model, validation, output, save, processes)
    except BaseException as e:
        if save and processes.first:
            e.add_note(f"{output}: the checkpoint is written; run the same command again for its reports")
        raise


def compare_and_report(report, config, quantization, memory, model, validation, output, save, processes) -> None:
    """What comes after the checkpoint."""
    checkpoint, vocabulary = model
    # --- Compare and report ------------------------------------------------------------------------------------------
    if config.compare:
        stages = resources.Stages()
        rounded = memory._replace(round_weights=True)
        with stages("comparison"):
            bfloat16 = streaming.run(checkpoint, validation, rounded, what="bfloat16").summary()
            report["baselines"] = {"bfloat16": bfloat16}
            if quantization.method != "rtn":
                rtn = QuantizationSettings("rtn", bits=quantization.rounding.bits)
                rtn = compress_examples(checkpoint, vocabulary, None, validation, rtn, memory, codec=config.codec.name)
                report["baselines"]["rtn"] = {k: v for k, v in rtn.items() if k not in ("layers", "seconds")}
        report["seconds"] |= stages.seconds
        report["peak_rss_bytes"] = resources.peak_rss_bytes()
    if not processes.first:
        return
    report["checkpoint"] = checkpoint.provenance
    report["config"] = config.to_dict()
    report["environment"] = common.environment()
    files.write_json(output / "report.json", report)
    files.write_text(output / "report.html", html_report(report))
    plot_compression(report, output / "report.png")
    write_compression(report, output / "tensorboard")
    if save:
        remove_progress(output)
    reports.say("\n" + reports.table(reports.COMPRESSION_HEADER, reports.comparison_rows(report)) + "\n")
    reports.say(
        f"experts: {report['experts_quantized']} of {report['experts_total']} quantized, "
        f"{report['experts_fallback']} fell back (report.json says why)"
    )
    if report["experts_starved"]:
        reports.say(
            f"{report['experts_starved']} experts had fewer than {report['min_tokens']} tokens: tokens of their "
            "layers joined them (report.json names them)"
        )
    if report["super_experts"]:
        reports.say(f"largest outputs: {reports.super_experts(report['super_experts'])}")
    target, stored = report["target_bits"], report["bits_per_weight"] or report["entropy_per_weight"]
    if target is not None and abs(stored / target - 1) > 0.03:
        reports.say(
            f"warning: {stored:.3f} bits per weight, {stored / target - 1:+.0%} from target_bits {target:g}. Levels "
            "take bits too, many in narrow rows, and few layers leave little room to correct; see report.json."
        )
    seconds = ", ".join(f"{stage} {s:.1f}" for stage, s in report["seconds"].items())
    planned, measured = (resources.gigabytes(report["plan"][f"{k}peak_host_bytes"]) for k in ("", "measured_"))
    reports.say(f"seconds: {seconds}; peak memory {measured}, planned {planned}")
    reports.say(
        f"{output}: "
        + (
            "compressed checkpoint, report.json, report.html, report.png"
            if save
            else "report.json, report.html, report.png; the experts were measured, not saved"
        )
    )


if __name__ == "__main__":
    app.run(command_line.without_traceback(main))
