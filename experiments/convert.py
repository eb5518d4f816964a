"""Converts a checkpoint of any layout to another: native T5X, Hugging Face's, compressed, the published QMoE models'.

    python experiments/convert.py --checkpoint=IN --output=OUT --format=huggingface

What the new layout can't hold is refused, or named as lost. Compressed experts become dense ones for t5x and
huggingface. Dense experts don't become compressed ones here: that is experiments/compress.py. With --codec (and format
compressed, the default) a compressed checkpoint is re-encoded, losslessly.

OUT gets the checkpoint, convert.json and, where the checkpoint has none of its own, checksums (`sha256sum --check
SHA256SUMS`). A conversion that was stopped goes on where it was when the same command is given again.
"""

import interrupts  # noqa: F401, before all that takes time

# isort: split

import math
import pathlib

from absl import app, flags

import command_line
import common
from qmoe_jax import codecs, reports, resources
from qmoe_jax.checkpoints import LAYOUTS, TARGETS, Checkpoint, conversion, open_checkpoint
from qmoe_jax.checkpoints.samples import digest, samples
from qmoe_jax.lock import locked
from qmoe_jax.models import families

CHECKPOINT = flags.DEFINE_string("checkpoint", "out/compressed", "Checkpoint of any layout.")
OUTPUT = flags.DEFINE_string("output", "out/converted", "Directory for the new checkpoint and convert.json.")
FORMAT = flags.DEFINE_enum("format", "compressed", list(TARGETS), "Layout of the new checkpoint.")
CODEC = flags.DEFINE_string("codec", "gap", f"Of compressed experts, one of {', '.join(codecs.CODECS)}.")
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Cast all uncompressed parameters (t5x, huggingface); default: as they are."
)
SHARD_MB = flags.DEFINE_float("shard_mb", 2048, "About how large files of several tensors are (10^6 bytes).")
NUM_SHARDS = flags.DEFINE_integer(
    "num_shards", None, "Of each layer's experts (compressed): devices or hosts that read one each. Default: by size."
)
UNTOLD = {
    field: (flags.DEFINE_integer if kind is int else flags.DEFINE_float)(field, None, f"Of the model: {what}.")
    for field, (kind, what) in families.untold().items()
}
PRESET = flags.DEFINE_string("preset", None, "Published architecture of a checkpoint of MaxText's without config.json.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only list what would be read and written.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the checkpoint in --output.")


def sizes(checkpoint: Checkpoint) -> dict:
    """Parameters, and of compressed experts the sizes against bfloat16."""
    dense = sum(math.prod(spec.shape) for spec in checkpoint.specs.values())
    matrices = [m for layer in checkpoint.expert_sizes.values() for m in layer.values()]
    weights, expert_bytes = sum(math.prod(m.shape) for m in matrices), sum(m.nbytes for m in matrices)
    if not matrices:
        return {"parameters": dense}
    return {
        "parameters": dense + weights,
        "codec": checkpoint.codec,
        "bits_per_weight": 8 * expert_bytes / weights,
        "compression_experts": 2 * weights / expert_bytes,
        "compression_model": 2 * (weights + dense) / (expert_bytes + 2 * dense),
        "bytes_experts": expert_bytes,
        "bytes_model": expert_bytes + 2 * dense,
        "expert_weights": weights,
    }


def sources(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Files and bytes that would be read, by the file's or folder's name; empty if they aren't local."""
    path = pathlib.Path(checkpoint.path)
    if path.is_file() and path.name != "checkpoint":
        return {path.name: (1, path.stat().st_size)}
    found = {}
    for entry in sorted((path.parent if path.is_file() else path).glob("*")):
        if not entry.name.startswith(("state.", "train_ds")):  # Optimizer and input pipeline are never read.
            files = [f for f in (entry.rglob("*") if entry.is_dir() else [entry]) if f.is_file()]
            found[entry.name] = (len(files), sum(f.stat().st_size for f in files))
    return found


def describe(checkpoint: Checkpoint, writer: conversion.Writer) -> None:
    """Prints what would be read and written."""
    read = [[name, count, size] for name, (count, size) in sources(checkpoint).items()]
    read.append(["all", sum(row[1] for row in read), sum(row[2] for row in read)])
    reports.say(f"{checkpoint.path} would be read:\n\n{reports.table(('read', 'files', 'bytes'), read)}\n")
    written = [[part.name, part.nbytes] for part in writer.parts]
    known = None if any(size is None for _, size in written) else sum(size for _, size in written)
    written.append(["all", known])
    reports.say(f"Written (bytes of arrays, before they are packed):\n\n{reports.table(('write', 'bytes'), written)}")


def clear(output: pathlib.Path) -> None:
    """Makes room in --output, as --overwrite asks: removes what an earlier conversion says that it wrote.

    Raises FileExistsError for a checkpoint of another layout, or one that says nothing.
    """
    layouts = [layout.name for layout in LAYOUTS if layout.fits(output)]
    ours = [output / name for name in conversion.written_before(output)]
    if layouts and layouts[0] != FORMAT.value or (layouts and layouts[0] != "compressed" and not ours):
        raise FileExistsError(
            f"--output={output} holds a {layouts[0]} checkpoint that --overwrite doesn't replace by {FORMAT.value}: "
            "remove it, or choose another directory."
        )
    for file in ours:
        file.unlink(missing_ok=True)


def main(_):
    codecs.get(CODEC.value)
    untold = {field: flag.value for field, flag in UNTOLD.items() if flag.value is not None}
    checkpoint = open_checkpoint(CHECKPOINT.value, preset=PRESET.value, **untold)
    output = pathlib.Path(OUTPUT.value)
    options = conversion.Options(DTYPE.value, CODEC.value, int(SHARD_MB.value * 1e6), NUM_SHARDS.value)
    identity = conversion.fingerprint(checkpoint, FORMAT.value, options)
    progress = conversion.read_progress(output)
    continued = progress is not None and progress["identity"] == identity
    weights = samples(checkpoint)
    if continued and OVERWRITE.value and conversion.replaced(progress, weights):
        continued = False
    if progress is None and not OVERWRITE.value and not DRY_RUN.value:
        finished = conversion.read_report(output)
        if finished is not None and finished.get("identity") == [identity, digest(weights)]:
            open_checkpoint(output)  # Raises if it isn't whole.
            reports.say(f"{output}: finished already: {FORMAT.value} checkpoint of {checkpoint.path}")
            return
    if progress is not None and not continued and not OVERWRITE.value:
        raise FileExistsError(
            f"--output={output} holds an unfinished conversion of something else, or with other settings. Give those "
            "again, choose another directory, or give --overwrite."
        )
    if not DRY_RUN.value:
        common.prepare_output(output, OVERWRITE.value or continued, CHECKPOINT.value)
    writer = TARGETS[FORMAT.value](checkpoint, output, options)
    common.say_left_out(checkpoint)
    for what in writer.lost:
        reports.say(f"lost: {what}")
    if DRY_RUN.value:
        describe(checkpoint, writer)
        return

    with locked(output):
        write(checkpoint, writer, output, [identity, digest(weights)], progress if continued else None)


def write(
    checkpoint: Checkpoint, writer: conversion.Writer, output: pathlib.Path, identity: list[str], progress: dict | None
) -> None:
    """Converts, going on after `progress`, and reports, while nobody else writes to the output."""
    stages = resources.Stages()
    if progress is not None:
        reports.say(f"{output}: going on after {len(progress['parts'])} of {len(writer.parts)} parts")
    elif OVERWRITE.value:
        clear(output)
    try:
        with reports.progress(len(writer.parts), "converting", unit="part") as bar:
            files = conversion.run(writer, output, identity[0], bar.update, keep_progress=True)
    except BaseException as e:
        done = len((conversion.read_progress(output) or {"parts": ()})["parts"])
        e.add_note(
            f"{output}: {done} of {len(writer.parts)} parts are written; run the same command to go on after them"
        )
        raise

    before, after = sizes(checkpoint), sizes(open_checkpoint(output))
    report = {
        "checkpoint": checkpoint.path,
        "format": FORMAT.value,
        "identity": identity,  # what the same command has again
        "before": before,
        "after": after,
        "lost": writer.lost,
        "provenance": checkpoint.provenance,
        "seconds": stages.report()["total"],
        "peak_rss_bytes": resources.peak_rss_bytes(),
    }
    names = conversion.write_report(writer, output, report, files)
    rows = [
        [
            f"{s['parameters'] / 1e6:.2f}",
            s.get("codec", "-"),
            s.get("bits_per_weight"),
            s.get("bytes_model", 0) / 1e6 or None,
        ]
        for s in (before, after)
    ]
    reports.say("\n" + reports.table(("M parameters", "codec", "bits/weight", "MB"), rows) + "\n")
    reports.say(f"{output}: {FORMAT.value} checkpoint, {', '.join(names)}")


if __name__ == "__main__":
    app.run(command_line.without_traceback(main))
