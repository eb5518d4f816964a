"""Compresses a checkpoint through little memory, and has TensorStore's own counters witness what was read.

    python experiments/tools/make_checkpoint.py --output=MODEL --preset=switch_c_2048 --codec=zstd --chunks=256,96,128 \
      --set=vocab_size=2176 --set=d_model=288 --set=d_ff=512 --set=num_heads=4 --set=num_experts=1024 \
      --set=num_encoder_layers=2 --set=num_decoder_layers=1 --set=encoder_sparse_layers=0,1 \
      --set=decoder_sparse_layers=0
    python experiments/benchmarks/streaming.py --checkpoint=MODEL --output=OUT --config.data.num_calibration=300 \
      --config.data.num_validation=50 --config.memory.weights_bytes=1000000000

`--read_only` reads all experts and computes nothing: what the reader alone can do, and with a smaller bound what
scratch files cost. OUT gets streaming.json beside the compressed checkpoint. Files may come from the page cache.
"""

import contextlib
import pathlib
import sys
import time

import tensorstore as ts
from absl import app, flags

from qmoe_jax import files, reports, resources
from qmoe_jax.compression.compress import compress_examples

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # experiments/
import command_line
import common

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = common.define_config("config", str(ROOT / "configs/tiny.py"), "Data and settings.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Native T5X checkpoint.", required=True)
OUTPUT = flags.DEFINE_string("output", "out/streaming", "Directory for the compressed checkpoint and streaming.json.")

READ_ONLY = flags.DEFINE_bool("read_only", False, "Only read all experts.")

FILES = "/tensorstore/kvstore/file/"
COUNTERS = ("read", "bytes_read", "write", "bytes_written")


def counters() -> dict[str, int]:
    """What TensorStore's file driver has read and written so far."""
    metrics = {m["name"]: m for m in ts.experimental_collect_matching_metrics(FILES)}
    return {n: sum(v["value"] for v in metrics.get(FILES + n, {"values": []})["values"]) for n in COUNTERS}


def read_all(checkpoint, memory) -> dict:
    """Reads the experts of all layers, group by group."""
    weights = 0
    reading = memory._replace(round_weights=True).reading
    groups = checkpoint.stream(checkpoint.config.sparse_layers, memory.experts_per_group, reading)
    stages = resources.Stages()
    with contextlib.closing(groups), stages("reading"):
        for *_, kernels in groups:
            weights += sum(kernel.size for kernel in kernels.values())
            del kernels
    return {
        "peak_rss_bytes": resources.peak_rss_bytes(),
        "seconds": stages.report(),
        "expert_weights": weights,
        "bits_per_weight": None,
    }


def main(_):
    config = CONFIG.value
    quantization, memory = common.quantization_settings(config), common.memory_settings(config)
    checkpoint, vocabulary = common.open_model(CHECKPOINT.value, config)
    output = common.prepare_output(OUTPUT.value, False, CHECKPOINT.value)
    memory = memory._replace(scratch=memory.scratch or str(output.parent))
    calibration, validation = (
        common.examples(config, w, checkpoint, vocabulary) for w in ("calibration", "validation")
    )
    examples = [*calibration, *validation]
    plan = common.plan(checkpoint, examples, len(calibration), quantization, memory, config.codec.name)

    sources = [s for layer in checkpoint.config.sparse_layers for s in checkpoint.sources(layer).values()]
    step = pathlib.Path(checkpoint.path).parent
    folders = [step / f"target.{s.name.replace('/', '.')}" for s in sources]
    chunk_files = [p for folder in folders for p in folder.iterdir() if p.name[0] != "."]
    before, started = counters(), time.perf_counter()
    if READ_ONLY.value:
        report = read_all(checkpoint, memory)
    else:
        report = compress_examples(
            checkpoint,
            vocabulary,
            calibration,
            validation,
            quantization,
            memory,
            codec=config.codec.name,
            output=output,
        )
    seconds = time.perf_counter() - started
    done = {name: n - before[name] for name, n in counters().items()}
    size = sum(p.stat().st_size for p in chunk_files)
    result = {
        "model": checkpoint.config.to_dict(),
        "checkpoint_bytes": sum(p.stat().st_size for p in step.rglob("*") if p.is_file()),
        "experts_bytes_per_layer": plan["read_bytes"] // plan["layers"],
        "chunk_files_of_experts": len(chunk_files),
        "chunk_shapes": sorted({s.grid.chunks for s in sources}),
        "bytes_of_their_files": size,
        "tensorstore": done,
        "weights_limit_bytes": memory.weights_bytes,
        "spilled": plan["spilled"],
        "planned_peak_bytes": plan["peak_host_bytes"],
        "measured_peak_bytes": report["peak_rss_bytes"],
        "plan": plan,
        "seconds": report["seconds"],
        "wall_seconds": seconds,
        "waited_for_reading_seconds": report["seconds"]["reading"],
        "weights_per_second": report["expert_weights"] / seconds,
        "bits_per_weight": report["bits_per_weight"],
        "documents": len(examples),
        "environment": common.environment(),
    }
    files.write_json(output / "streaming.json", result)
    rows = [
        ("experts' chunk files", f"{len(chunk_files)}, {resources.gigabytes(size)}"),
        ("file reads by TensorStore, everything", f"{done['read']}, {resources.gigabytes(done['bytes_read'])}"),
        ("bound for experts", resources.gigabytes(plan["weights_limit_bytes"])),
        ("through scratch files", "yes" if plan["spilled"] else "no"),
        ("peak memory, planned", resources.gigabytes(plan["peak_host_bytes"])),
        ("peak memory, measured", resources.gigabytes(report["peak_rss_bytes"])),
        ("seconds", f"{seconds:.0f}, of them {report['seconds']['reading']:.1f} waiting for the reader"),
        ("million weights a second", f"{result['weights_per_second'] / 1e6:.1f}"),
    ]
    reports.say(reports.table(("streaming", ""), rows))


if __name__ == "__main__":
    app.run(command_line.without_traceback(main))
