"""A compressed checkpoint of any layout as this project's own, its experts in any codec that holds them; lossless."""

from __future__ import annotations

import pathlib
from typing import Any

from qmoe_jax import codecs
from qmoe_jax.checkpoints.checkpoint import Checkpoint
from qmoe_jax.checkpoints.compressed.manifest import MANIFEST
from qmoe_jax.checkpoints.compressed.writer import CompressedWriter
from qmoe_jax.checkpoints.conversion import Options, Part, Writer
from qmoe_jax.codecs.experts import CompressedExperts, convert
from qmoe_jax.errors import CheckpointError


def refuse_dense(checkpoint: Checkpoint, target: str) -> None:
    """Raises CheckpointError for a checkpoint whose experts aren't compressed."""
    if not checkpoint.is_compressed:
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


class Recoder(Writer):
    """A compressed `checkpoint` in another codec; see `conversion.Writer`. The manifest keeps what was known of it."""

    def __init__(self, checkpoint: Checkpoint, output: pathlib.Path, options: Options):
        super().__init__(checkpoint, output, options)
        refuse_dense(checkpoint, "compressed")
        codecs.get(options.codec)
        self.parts = [Part(layer, None) for layer in checkpoint.config.sparse_layers]
        self.lost = lost_by_rounding(checkpoint)
        # Levels that the codec can't hold are refused before anything in `output` is touched.
        self._first = {part.name: in_codec(checkpoint, part.name, options.codec) for part in self.parts[:1]}
        self._kept: dict[str, Any] = {}
        self._writer: CompressedWriter

    def __enter__(self) -> Recoder:
        told = (self.checkpoint.config, self.checkpoint.quantization, self.options.codec, self.checkpoint.provenance)
        self._writer = CompressedWriter(self.output, *told, num_shards=self.options.num_shards, layers=self._kept)
        self._writer.__enter__()
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        self._writer.__exit__(kind, value, trace)

    def keep(self, parts: list[str], layers: Any) -> None:
        self._kept = {layer: layers[layer] for layer in parts}

    def layers(self) -> Any:
        return self._writer.layers

    def write(self, part: str) -> list[pathlib.Path]:
        matrices = self._first.pop(part, None) or in_codec(self.checkpoint, part, self.options.codec)
        self._writer.write_layer(part, matrices)
        self._writer.keep(self._writer.layers)
        return self._files(*(shard["directory"] for shard in self._writer.layers[part]["shards"]))

    def finish(self) -> list[pathlib.Path]:
        self._writer.finish({name: self.checkpoint.read(name) for name in self.checkpoint.specs})
        return [*self._files("dense"), self.output / MANIFEST]

    def _files(self, *folders: str) -> list[pathlib.Path]:
        return sorted(f for folder in folders for f in (self.output / folder).rglob("*") if f.is_file())
