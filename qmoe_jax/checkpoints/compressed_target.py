"""A compressed checkpoint of any layout as this project's own, its experts in any codec that holds them; lossless."""

from __future__ import annotations

import contextlib
import functools
import itertools
import pathlib
from typing import Any

from qmoe_jax import codecs
from qmoe_jax.checkpoints.base import Checkpoint
from qmoe_jax.checkpoints.compressed import MANIFEST, CompressedWriter
from qmoe_jax.checkpoints.conversion import Options, Part, Plan
from qmoe_jax.codecs.experts import CompressedExperts, convert
from qmoe_jax.errors import CheckpointError


def refuse_dense(checkpoint: Checkpoint, target: str) -> None:
    """Raises CheckpointError for a checkpoint whose experts aren't compressed."""
    if any(map(checkpoint.is_expert, checkpoint.specs)):
        raise CheckpointError(
            f"{checkpoint.path} is not compressed, but {target!r} holds compressed experts. Compress it: "
            "experiments/compress.py."
        )


def in_codec(checkpoint: Checkpoint, layer: str, codec: str) -> dict[str, CompressedExperts]:
    """The matrices of a layer. Raises CheckpointError, naming it, for levels that the codec can't hold."""
    ((_, _, matrices),) = checkpoint.experts(layer)
    try:
        return {m: e if e.codec == codec else convert(e, codec) for m, e in matrices.items()}
    except ValueError as e:
        raise CheckpointError(f"{checkpoint.path}: {layer}: {e}") from e


def lost_by_rounding(checkpoint: Checkpoint) -> list[str]:
    """What writing everything but experts as bfloat16 loses."""
    wider = sorted({str(spec.dtype) for spec in checkpoint.specs.values()} - {"bfloat16"})
    return [f"{', '.join(wider)} parameters beside the experts are rounded to bfloat16"] if wider else []


def plan(checkpoint: Checkpoint, output: pathlib.Path, options: Options) -> Plan:
    """How `checkpoint` is re-encoded into `output`; see `conversion`. The manifest keeps what was known of it."""
    refuse_dense(checkpoint, "compressed")
    codecs.get(options.codec)
    layers = checkpoint.config.sparse_layers
    # Levels that the codec can't hold are refused before anything in `output` is touched.
    first = {layer: in_codec(checkpoint, layer, options.codec) for layer in itertools.islice(layers, 1)}
    writers: list[CompressedWriter] = []
    kept: dict[str, Any] = {}

    @contextlib.contextmanager
    def writing():
        settings = (checkpoint.config, checkpoint.quantization, options.codec, checkpoint.provenance)
        with CompressedWriter(output, *settings, num_shards=options.num_shards, layers=kept) as writer:
            writers.append(writer)
            yield

    def files(*folders):
        return sorted(f for folder in folders for f in (output / folder).rglob("*") if f.is_file())

    def write_layer(layer):
        (writer,) = writers
        matrices = first.pop(layer) if layer in first else in_codec(checkpoint, layer, options.codec)
        writer.write_layer(layer, matrices)
        writer.keep(writer.layers)
        return files(*(shard["directory"] for shard in writer.layers[layer]["shards"]))

    def finish():
        writers[0].finish({name: checkpoint.read(name) for name in checkpoint.specs})
        return [*files("dense"), output / MANIFEST]

    def go_on(layers, names):
        kept.update({layer: layers[layer] for layer in names})

    parts = [Part(layer, None, functools.partial(write_layer, layer)) for layer in layers]
    return Plan(
        parts, finish, lost_by_rounding(checkpoint), context=writing(), state=lambda: writers[0].layers, go_on=go_on
    )
