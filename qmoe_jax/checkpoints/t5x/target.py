"""Any checkpoint as a native T5X checkpoint (legacy layout); compressed experts are dequantized."""

from __future__ import annotations

import math
import os
import pathlib
import shutil
from collections.abc import Iterable

from qmoe_jax.checkpoints.checkpoint import BFLOAT16, Checkpoint
from qmoe_jax.checkpoints.conversion import ExpertReader, Options, Part, Writer, expert_dtype, names_of, replacing
from qmoe_jax.checkpoints.t5x.writing import ArrayWriter, index_file, placeholder, t5x_chunks
from qmoe_jax.models.names import Shape

CHUNK_BYTES = 64 * 2**20  # T5X's own
CODEC = "gzip"
DENSE = "dense"


class T5XWriter(Writer):
    """`checkpoint` as `output`/checkpoint_STEP; see `conversion.Writer`.

    One dtype for all, as T5X writes: bfloat16 if all are, else float32, which holds the others. A chunk holds whole
    experts, so that they are written, and can be read, expert by expert.
    """

    def __init__(self, checkpoint: Checkpoint, output: pathlib.Path, options: Options):
        super().__init__(checkpoint, output, options)
        config, self.lost = checkpoint.config, names_of(checkpoint, "t5x").lost(checkpoint.config)
        self.shapes = checkpoint.family.param_shapes(config)
        self.step = checkpoint.provenance.get("step") or 0
        self.final_directory = output / f"checkpoint_{self.step}"
        self.unfinished = output / f"checkpoint_{self.step}.tmp-converting"
        dtypes = {options.dtype_of(expert_dtype(checkpoint, name)) for name in self.shapes}
        dtype = "bfloat16" if dtypes == {BFLOAT16} else "float32"
        itemsize = 2 if dtype == "bfloat16" else 4
        self.experts_per_chunk = {
            n: _experts_per_chunk(s, itemsize) for n, s in self.shapes.items() if checkpoint.is_expert(n)
        }
        chunks = {
            n: (self.experts_per_chunk[n], *s[1:]) if checkpoint.is_expert(n) else t5x_chunks(s)
            for n, s in self.shapes.items()
        }
        self.entries = {n: placeholder(n, s, chunks[n], dtype, CODEC) for n, s in self.shapes.items()}
        self.dense = [n for n in self.shapes if not checkpoint.is_expert(n)]
        names = {DENSE: self.dense, **{layer: checkpoint.matrices(layer).values() for layer in config.sparse_layers}}
        self.parts = [
            Part(part, sum(math.prod(self.shapes[n]) * itemsize for n in names)) for part, names in names.items()
        ]
        self._reader = ExpertReader(checkpoint)

    def write(self, part: str) -> list[pathlib.Path]:
        if part != DENSE:
            return self._write_layer(part)
        for name in self.dense:
            self._array(name).write((), self.checkpoint.read(name))
        return self._files(self.dense)

    def _write_layer(self, layer: str) -> list[pathlib.Path]:
        names, num_experts = self.checkpoint.matrices(layer), self.checkpoint.config.num_experts
        per_expert = sum(math.prod(self.shapes[n][1:]) * 4 for n in names.values())
        whole_chunks = math.lcm(*(self.experts_per_chunk[n] for n in names.values()))
        size = max(1, self.options.shard_bytes // per_expert // whole_chunks) * whole_chunks
        arrays = {m: self._array(n) for m, n in names.items()}
        for start in range(0, num_experts, size):
            stop = min(start + size, num_experts)
            for matrix, values in self._reader.read(layer, start, stop).items():
                arrays[matrix].write((slice(start, stop),), values)
        return self._files(names.values())

    def finish(self) -> list[pathlib.Path]:
        index = self.unfinished / "checkpoint"
        with replacing(index) as temporary:
            temporary.write_bytes(index_file(self.entries, self.step))
        if self.final_directory.exists():
            shutil.rmtree(self.final_directory)
        os.rename(self.unfinished, self.final_directory)
        return [self.final_directory / "checkpoint"]

    def final(self, file: str) -> str:
        return file.replace(f"{self.unfinished.name}/", f"{self.final_directory.name}/", 1)

    def _array(self, name: str) -> ArrayWriter:
        return ArrayWriter(self.unfinished, name, self.entries[name])

    def _files(self, names: Iterable[str]) -> list[pathlib.Path]:
        directories = [self.unfinished / self.entries[name]["kvstore"]["path"] for name in names]
        return sorted(f for directory in directories for f in directory.iterdir())


def _experts_per_chunk(shape: Shape, itemsize: int) -> int:
    """The most experts that divide all of them and fit into a chunk; at least one."""
    fit = max(1, CHUNK_BYTES // (math.prod(shape[1:]) * itemsize))
    return max(n for n in range(1, min(fit, shape[0]) + 1) if shape[0] % n == 0)
