"""Compressed checkpoints: a directory that is whole when, and only when, its manifest is there.

    OUT/layers/LAYER/0-of-4/              one Orbax checkpoint per shard of a sparse layer: what the codec stores of
                                          the matrices of consecutive experts, shard i of n from i * experts // n on
    OUT/dense/                            one Orbax checkpoint for everything else, bfloat16
    OUT/manifest.json                     format version, family, model, quantization, codec, bytes and SHA-256 of each
                                          part; written last

A part is verified against its SHA-256 when it is read, so a model can be read layer by layer, and experts without the
other shards; the manifest, against its own, when it is opened. The same contents give the same files, byte for byte.
While a checkpoint is being made, OUT/progress/ may hold what is needed to go on (see `compression.progress`).
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

FORMAT = "qmoe_jax"
VERSION = 2  # Of version 1, whose layers have no shards, everything can be read as well.
MANIFEST = "manifest.json"
PROGRESS = "progress"
PARTS = (MANIFEST, "dense", "layers")  # All that a compressed checkpoint puts into its directory.
SHARD_WEIGHTS = 2**30  # A layer is in so many shards that each has at least these, unless told otherwise.


def is_compressed(path: str | os.PathLike) -> bool:
    """Whether `path` is, or was going to be, a compressed checkpoint."""
    path = pathlib.Path(path)
    if (path / MANIFEST).is_file() or (path / PROGRESS / f"{PROGRESS}.json").is_file():
        return True
    return (path / "layers").is_dir() and not (path / "checkpoint").exists()


def default_shards(num_experts: int, weights: int) -> int:
    """Shards of a layer with so many weights: a power of two."""
    return 1 << (max(1, min(num_experts, weights // SHARD_WEIGHTS)).bit_length() - 1)


def shard_bounds(num_experts: int, num_shards: int) -> list[tuple[int, int]]:
    """Experts start, stop of each shard. Raises ValueError for more shards than experts, or fewer than one."""
    if not 1 <= num_shards <= num_experts:
        raise ValueError(f"num_shards: found {num_shards}, expected 1 to {num_experts}, the number of experts.")
    at = [i * num_experts // num_shards for i in range(num_shards + 1)]
    return list(zip(at[:-1], at[1:], strict=True))


def manifest_sha256(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's values, its own 'sha256' left out."""
    rest = {k: v for k, v in manifest.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def layer_directory(layer: str) -> str:
    """Where a layer's shards are, below the checkpoint."""
    return f"layers/{layer.replace('/', '.')}"


def shards_of(layer: dict[str, Any], version: int) -> list[dict[str, Any]]:
    """What the manifest says of a layer's shards; in version 1 the layer itself was one."""
    if version > 1:
        return layer["shards"]
    experts = next(iter(layer["matrices"].values()))["shape"][0]
    return [{"start": 0, "stop": experts, **{key: layer[key] for key in ("directory", "sha256")}}]
