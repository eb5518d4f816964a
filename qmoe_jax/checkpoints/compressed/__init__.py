"""Compressed checkpoints, this project's own layout; `manifest` describes it."""

from qmoe_jax.checkpoints.compressed.manifest import (
    FORMAT,
    MANIFEST,
    PARTS,
    PROGRESS,
    VERSION,
    default_shards,
    is_compressed,
    manifest_sha256,
    shard_bounds,
)
from qmoe_jax.checkpoints.compressed.parts import sha256
from qmoe_jax.checkpoints.compressed.reader import CompressedCheckpoint
from qmoe_jax.checkpoints.compressed.target import Recoder
from qmoe_jax.checkpoints.compressed.writer import CompressedWriter
from qmoe_jax.checkpoints.layout import Layout

LAYOUT = Layout("compressed", is_compressed, CompressedCheckpoint, (*PARTS, PROGRESS), Recoder)

__all__ = [
    "FORMAT",
    "LAYOUT",
    "MANIFEST",
    "PARTS",
    "PROGRESS",
    "VERSION",
    "CompressedCheckpoint",
    "CompressedWriter",
    "default_shards",
    "is_compressed",
    "manifest_sha256",
    "sha256",
    "shard_bounds",
]
