"""Any checkpoint as a native T5X checkpoint (legacy layout); compressed experts are dequantized."""

from __future__ import annotations

import math
import os
import pathlib
import shutil

from qmoe_jax.checkpoints import t5x
from qmoe_jax.checkpoints.base import Checkpoint
from qmoe_jax.checkpoints.conversion import BFLOAT16, ExpertReader, Options, Part, Plan, expert_dtype, replacing
from qmoe_jax.models.switch.config import ModelConfig
from qmoe_jax.models.switch.parameters import param_shapes

CHUNK_BYTES = 64 * 2**20  # T5X's own
CODEC = "gzip"
# What a parameter tree doesn't tell, and what it is then taken for.
_UNTOLD = {"top_k": 1, "experts_choose": None, "batch_prioritized": None, "router_group_size": 8192}


def plan(checkpoint: Checkpoint, output: pathlib.Path, options: Options) -> Plan:
    """How `checkpoint` becomes `output`/checkpoint_STEP; see `conversion`.

    One dtype for all, as T5X writes: bfloat16 if all are, else float32, which holds the others. A chunk holds whole
    experts, so that they are written, and can be read, expert by expert.
    """
    config, shapes = checkpoint.config, param_shapes(checkpoint.config)
    step = checkpoint.provenance.get("step") or 0
    final = output / f"checkpoint_{step}"
    unfinished = output / f"checkpoint_{step}.tmp-converting"
    dtypes = {options.dtype_of(expert_dtype(checkpoint, name)) for name in shapes}
    dtype = "bfloat16" if dtypes == {BFLOAT16} else "float32"
    itemsize = 2 if dtype == "bfloat16" else 4
    experts_per_chunk = {n: _experts_per_chunk(s, itemsize) for n, s in shapes.items() if checkpoint.is_expert(n)}
    entries = {
        name: t5x.placeholder(
            name,
            shape,
            (experts_per_chunk[name], *shape[1:]) if checkpoint.is_expert(name) else t5x.t5x_chunks(shape),
            dtype,
            CODEC,
        )
        for name, shape in shapes.items()
    }
    reader = ExpertReader(checkpoint)

    def files(names):
        directories = [unfinished / entries[name]["kvstore"]["path"] for name in names]
        return sorted(f for directory in directories for f in directory.iterdir())

    def write_dense():
        names = [n for n in shapes if not checkpoint.is_expert(n)]
        for name in names:
            t5x.ArrayWriter(unfinished, name, entries[name]).write((), checkpoint.read(name))
        return files(names)

    def write_layer(layer):
        names = {m: f"{layer}/mlp/expert/{m}/kernel" for m in config.expert_matrices}
        per_expert = sum(math.prod(shapes[n][1:]) * 4 for n in names.values())
        whole_chunks = math.lcm(*(experts_per_chunk[n] for n in names.values()))
        size = max(1, options.shard_bytes // per_expert // whole_chunks) * whole_chunks
        stores = {m: t5x.ArrayWriter(unfinished, n, entries[n]) for m, n in names.items()}
        for start in range(0, config.num_experts, size):
            stop = min(start + size, config.num_experts)
            for matrix, values in reader.read(layer, start, stop).items():
                stores[matrix].write((slice(start, stop),), values)
        return files(names.values())

    def finish():
        index = unfinished / "checkpoint"
        with replacing(index) as temporary:
            temporary.write_bytes(t5x.index_file(entries, step))
        if final.exists():
            shutil.rmtree(final)
        os.rename(unfinished, final)
        return [final / "checkpoint"]

    def part(name, names, write):
        return Part(name, sum(math.prod(shapes[n]) * itemsize for n in names), write)

    parts = [part("dense", [n for n in shapes if not checkpoint.is_expert(n)], write_dense)]
    for layer in config.sparse_layers:
        names = [f"{layer}/mlp/expert/{m}/kernel" for m in config.expert_matrices]
        parts.append(part(layer, names, lambda layer=layer: write_layer(layer)))
    return Plan(parts, finish, _lost(config), renamed=(unfinished, final))


def _experts_per_chunk(shape: tuple[int, ...], itemsize: int) -> int:
    """The most experts that divide all of them and fit into a chunk; at least one."""
    fit = max(1, CHUNK_BYTES // (math.prod(shape[1:]) * itemsize))
    return max(n for n in range(1, min(fit, shape[0]) + 1) if shape[0] % n == 0)


def _lost(config: ModelConfig) -> list[str]:
    told = {field: getattr(config, field) for field, usual in _UNTOLD.items() if getattr(config, field) != usual}
    return [
        f"{field}={value}: a T5X parameter tree doesn't tell; give it when you open it" for field, value in told.items()
    ]
