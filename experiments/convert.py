"""Re-encodes a compressed checkpoint with another codec, losslessly; one layer in memory at a time.

    python experiments/convert.py --checkpoint=IN --output=OUT --codec=gap

OUT gets the compressed checkpoint and convert.json. Symbols, levels and all other parameters are those of IN, bit by
bit, and so is what its manifest says about where the model came from.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # LAPACK's threads fight XLA's; set before jax is imported.

import itertools
import math
from collections.abc import Iterator

from absl import app, flags

from qmoe_jax import codecs, experiment, reporting
from qmoe_jax.checkpoints import CompressedCheckpoint, CompressedWriter, open_checkpoint
from qmoe_jax.codecs import experts as compressed

CHECKPOINT = flags.DEFINE_string("checkpoint", "out/compressed", "Compressed checkpoint.")
OUTPUT = flags.DEFINE_string("output", "out/converted", "Directory for the new checkpoint and convert.json.")
CODEC = flags.DEFINE_string("codec", "gap", f"One of {', '.join(codecs.CODECS)}.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the checkpoint in --output.")


def converted(checkpoint: CompressedCheckpoint, codec: str) -> Iterator[tuple[str, dict]]:
    """The matrices of each sparse layer in another codec."""
    for layer in checkpoint.config.sparse_layers:
        ((_, _, matrices),) = checkpoint.experts(layer)
        try:
            yield layer, {name: compressed.convert(matrix, codec) for name, matrix in matrices.items()}
        except ValueError as e:
            raise ValueError(f"{checkpoint.path}: {layer}: {e}") from e


def sizes(checkpoint: CompressedCheckpoint) -> dict:
    """Sizes against bfloat16."""
    layers, dense_bytes = checkpoint.manifest["layers"].values(), checkpoint.manifest["dense"]["bytes"]
    weights = sum(math.prod(m["shape"]) for layer in layers for m in layer["matrices"].values())
    expert_bytes = sum(layer["bytes"] for layer in layers)
    return {
        "codec": checkpoint.codec,
        "bits_per_weight": 8 * expert_bytes / weights,
        "compression_experts": 2 * weights / expert_bytes,
        "compression_model": (2 * weights + dense_bytes) / (expert_bytes + dense_bytes),
        "bytes_experts": expert_bytes,
        "bytes_model": expert_bytes + dense_bytes,
        "expert_weights": weights,
    }


def main(_):
    codecs.get(CODEC.value)
    checkpoint = open_checkpoint(CHECKPOINT.value)
    if not isinstance(checkpoint, CompressedCheckpoint):
        raise ValueError(f"--checkpoint={CHECKPOINT.value} is not compressed. Compress it: experiments/compress.py.")
    output = experiment.prepare_output(OUTPUT.value, OVERWRITE.value, CHECKPOINT.value)
    stages = reporting.Stages()
    layers = converted(checkpoint, CODEC.value)
    # Levels that the codec can't hold are refused before anything in --output is touched.
    layers = itertools.chain([next(layers)], layers)
    (output / "convert.json").unlink(missing_ok=True)  # An earlier run's, with --overwrite.
    quantization = checkpoint.manifest["quantization"]
    with (
        CompressedWriter(output, checkpoint.config, quantization, CODEC.value, checkpoint.provenance) as writer,
        reporting.progress(len(checkpoint.config.sparse_layers), "converting", unit="layer") as bar,
    ):
        for layer, matrices in layers:
            writer.write_layer(layer, matrices)
            bar.update()
        writer.finish({name: checkpoint.read(name) for name in checkpoint.specs})

    before, after = sizes(checkpoint), sizes(open_checkpoint(output))
    report = {
        "checkpoint": checkpoint.path,
        "before": before,
        "after": after,
        "provenance": checkpoint.provenance,
        "seconds": stages.report()["total"],
        "peak_rss_bytes": reporting.peak_rss_bytes(),
    }
    reporting.write_json(output / "convert.json", report)
    rows = [[s["codec"], s["bits_per_weight"], f"{s['bytes_model'] / 1e6:.2f}"] for s in (before, after)]
    reporting.say("\n" + reporting.table(("codec", "bits/weight", "MB"), rows) + "\n")
    reporting.say(f"{output}: compressed checkpoint, convert.json")


if __name__ == "__main__":
    app.run(experiment.without_traceback(main))
