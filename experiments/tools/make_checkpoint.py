"""Writes a T5X checkpoint with random weights: any published size, or your own, chunked as T5X cuts it.

    python experiments/tools/make_checkpoint.py --output=DIR --preset=switch_base_8
    python experiments/tools/make_checkpoint.py --output=DIR --preset=switch_c_2048 --set=num_experts=64 \
      --set=d_ff=1024 --set=encoder_sparse_layers=0,1 --set=num_encoder_layers=2 --chunks=64,208,256

For rehearsals: how a size is read, how much memory and time its compression takes. Chunk after chunk is made and
written, so that a checkpoint may be far larger than the memory. Norm scales are ones, everything else is normal.
"""

import dataclasses
import math
import pathlib
import sys

import numpy as np
from absl import app, flags

from qmoe_jax import reports
from qmoe_jax.checkpoints import CheckpointError
from qmoe_jax.checkpoints.reading import regions
from qmoe_jax.checkpoints.t5x import ArrayWriter, index_file, placeholder, t5x_chunks
from qmoe_jax.models.families import preset
from qmoe_jax.models.switch import ModelConfig
from qmoe_jax.models.switch.parameters import param_shapes

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # experiments/
import command_line

OUTPUT = flags.DEFINE_string("output", None, "Parent of checkpoint_0/.", required=True)
PRESET = flags.DEFINE_string("preset", "switch_base_8", "Published size to start from.")
SET = flags.DEFINE_multi_string("set", [], "FIELD=VALUE of qmoe_jax.ModelConfig; lists are comma-separated.")
CHUNKS = flags.DEFINE_list("chunks", None, "Largest experts, d_model, d_ff of a chunk of experts; T5X's unless given.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the stored values.")
CODEC = flags.DEFINE_enum("codec", "gzip", ["gzip", "zstd"], "Of the chunks.")
SEED = flags.DEFINE_integer("seed", 0, "Of the weights.")


def overridden(config: ModelConfig, settings: list[str]) -> ModelConfig:
    """The model with fields set by 'field=value'."""
    types = {f.name: type(getattr(config, f.name)) for f in dataclasses.fields(ModelConfig)}
    fields = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in types or not value:
            raise ValueError(f"--set={setting}: expected FIELD=VALUE with one of {', '.join(types)}.")
        if types[name] is tuple:
            fields[name] = tuple(int(v) for v in value.split(",") if v != "none")
        elif types[name] is bool:
            fields[name] = {"true": True, "false": False}[value.lower()]
        else:
            fields[name] = int(value)
    return dataclasses.replace(config, **fields)


def standard_deviation(name: str, shape: tuple[int, ...]) -> float:
    """Of a parameter as T5X starts it: embeddings 1, kernels [.., in, out] 1 / sqrt(in)."""
    if "embedding" in name:
        return 1.0
    return 1 / math.sqrt(shape[-2])


def chunk_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of its files."""
    if CHUNKS.value is None or "/mlp/expert/" not in name:
        return t5x_chunks(shape)
    experts, d_model, d_ff = map(int, CHUNKS.value)
    wanted = (experts, d_ff, d_model) if "/wo/" in name else (experts, d_model, d_ff)
    return tuple(map(min, wanted, shape))


def write(directory: pathlib.Path, name: str, shape: tuple[int, ...], seed: int, bar) -> dict:
    """Writes one parameter, chunk by chunk; returns its entry in the index file."""
    chunks = chunk_shape(name, shape)
    entry = placeholder(name, shape, chunks, DTYPE.value, CODEC.value)
    array = ArrayWriter(directory, name, entry)
    rng = np.random.Generator(np.random.SFC64(seed))
    for region in regions(shape, chunks, 0, shape[0]):
        size = tuple(r.stop - r.start for r in region)
        if name.endswith("/scale"):
            values = np.ones(size, np.float32)
        else:
            values = rng.standard_normal(size, np.float32)
            values *= standard_deviation(name, shape)
        array.write(region, values)
        bar.update(math.prod(size))
    return entry


def main(_):
    config = overridden(preset(PRESET.value), SET.value)
    shapes = param_shapes(config)
    final = pathlib.Path(OUTPUT.value).absolute() / "checkpoint_0"
    if final.exists():
        raise CheckpointError(f"{final} exists: choose another directory.")
    unfinished = final.with_name("checkpoint_0.tmp-0")
    unfinished.mkdir(parents=True, exist_ok=True)
    total = sum(map(math.prod, shapes.values()))
    reports.say(f"{final}: {total / 1e9:.3f} billion parameters, {DTYPE.value}")
    with reports.progress(total, "writing", "weight") as bar:
        entries = {
            name: write(unfinished, name, shape, SEED.value + i, bar) for i, (name, shape) in enumerate(shapes.items())
        }
    (unfinished / "checkpoint").write_bytes(index_file(entries, 0))
    unfinished.rename(final)
    size = sum(p.stat().st_size for p in final.rglob("*") if p.is_file())
    reports.say(f"{final}: {size / 1e9:.3f} GB in files")


if __name__ == "__main__":
    app.run(command_line.without_traceback(main))
