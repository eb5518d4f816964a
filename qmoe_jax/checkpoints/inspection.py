"""What a checkpoint is, from its index alone: no weights are read."""

from __future__ import annotations

import collections
import math
import os
import pathlib
from typing import Any

from qmoe_jax.checkpoints import LAYOUTS, Checkpoint, open_checkpoint
from qmoe_jax.checkpoints.samples import digest, samples
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.errors import CheckpointError
from qmoe_jax.files import read_json
from qmoe_jax.models.families import PRESETS, mismatches
from qmoe_jax.models.family import Config

# What this project's own commands, and others, write beside a checkpoint (globs).
_BESIDE = ("convert.json", "SHA256SUMS", "report.*", "README*", "LICENSE*", ".git*", "generation_config.json")
_TOKENIZER = ("tokenizer*", "spiece.model", "spm.model", "special_tokens_map.json", "added_tokens.json")


def inspect(
    path: str | os.PathLike, *, density: bool = False, sample: bool = False, preset: str | None = None
) -> dict[str, Any]:
    """What the checkpoint at `path` is, as JSON values.

    Args:
      path: of a checkpoint of any layout.
      density: read and decode compressed experts, to count non-zero weights.
      sample: hash a sample of the weights; see `samples`, which says how much is read.
      preset: see `open_checkpoint`.

    Returns:
      layout, problems (why it can't be opened: all that is missing or foreign), foreign (files that aren't the
      layout's); and if it can be opened: family, model, summary (of it, in words), preset, parameters, dtypes
      (parameters by dtype), bytes and files on disk, chunks (where experts are in chunks), experts (compressed ones),
      super_experts (that a report beside them names), quantization, provenance,
      left_out (stored tensors that aren't part of the model, by what they are),
      weights_sample (with `sample`; what a compression of these weights has in its provenance by that name).

    Raises:
      CheckpointError: there is no checkpoint of any layout.
    """
    layout = next((layout for layout in LAYOUTS if layout.fits(path)), None)
    report: dict[str, Any] = {"path": os.fspath(path), "layout": layout and layout.name, "problems": [], "foreign": []}
    if layout is not None:
        report["foreign"] = foreign_files(pathlib.Path(path), layout.files)
    try:
        checkpoint = open_checkpoint(path, preset=preset)
    except CheckpointError as e:
        if layout is None:
            raise
        return report | {"problems": str(e).split("\n  ")}

    dense = {n: math.prod(s.shape) for n, s in checkpoint.specs.items()}
    experts = sum(size for n, size in dense.items() if checkpoint.is_expert(n))
    compressed = sum(math.prod(m.shape) for layer in checkpoint.expert_sizes.values() for m in layer.values())
    dtypes: collections.Counter = collections.Counter()
    for name, spec in checkpoint.specs.items():
        dtypes[str(spec.dtype)] += dense[name]
    if compressed:
        dtypes[f"compressed, {checkpoint.codec}"] = compressed
    return report | {
        "family": checkpoint.family.name,
        "model": checkpoint.config.to_dict(),
        "summary": checkpoint.family.summary(checkpoint.config),
        "preset": preset_of(checkpoint.config),
        "parameters": {
            "all": sum(dense.values()) + compressed,
            "experts": experts + compressed,
            "other": sum(dense.values()) - experts,
        },
        "dtypes": dict(dtypes),
        "on_disk": on_disk(checkpoint),
        "chunks": chunks(checkpoint),
        "experts": compressed_experts(checkpoint, density),
        "super_experts": _reported(pathlib.Path(checkpoint.path)).get("super_experts", []) if compressed else [],
        "quantization": dict(checkpoint.quantization),
        "provenance": checkpoint.provenance,
        "weights_sample": digest(samples(checkpoint)) if sample else None,
        "left_out": checkpoint.provenance.get("left_out", {}),
    }


def preset_of(config: Config) -> str | None:
    """The published model of this architecture."""
    return next((name for name, published in PRESETS.items() if not mismatches(config, published)), None)


def foreign_files(path: pathlib.Path, files: tuple[str, ...]) -> list[str]:
    """Files and folders beside a checkpoint, whose own are `files` (globs), that are not known to belong there."""
    known = (*files, *_BESIDE, *_TOKENIZER)
    entries = path.iterdir() if path.is_dir() else ()
    return sorted(e.name for e in entries if not any(e.match(pattern) for pattern in known))


def on_disk(checkpoint: Checkpoint) -> dict[str, int]:
    """Files and bytes; none of what isn't local. Optimizer state counts."""
    path = pathlib.Path(checkpoint.path)
    folder = path.parent if path.name == "checkpoint" and path.is_file() else path  # T5X: of its index file
    files = [folder] if folder.is_file() else [f for f in folder.rglob("*") if f.is_file()]
    return {"files": len(files), "bytes": sum(f.stat().st_size for f in files)}


def chunks(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """How experts are cut into files, where they are, by parameter: shape, chunk [experts, in, out], number."""
    return {
        source.name: {
            "shape": list(source.grid.shape),
            "chunk": list(source.grid.chunks),
            "number": source.grid.number_of_chunks(),
            "bytes": source.grid.chunk_bytes,
        }
        for layer in checkpoint.config.sparse_layers
        for source in checkpoint.sources(layer).values()
    }


def compressed_experts(checkpoint: Checkpoint, density: bool) -> dict[str, dict[str, Any]]:
    """Codec, weights, bytes, bits per weight and share of non-zero weights of each layer's compressed experts.

    The share is what a report beside the checkpoint says, unless it is to be counted; None if neither tells.
    """
    zeros = _reported_zeros(pathlib.Path(checkpoint.path))
    layers = {}
    for layer, matrices in checkpoint.expert_sizes.items():
        weights, nbytes = sum(math.prod(m.shape) for m in matrices.values()), sum(m.nbytes for m in matrices.values())
        reported = None if zeros.get(layer) is None else 1 - zeros[layer]
        layers[layer] = {
            "codec": checkpoint.codec,
            "weights": weights,
            "bytes": nbytes,
            "bits_per_weight": 8 * nbytes / weights,
            "density": count_nonzeros(checkpoint, layer) / weights if density else reported,
        }
    return layers


def count_nonzeros(checkpoint: Checkpoint, layer: str) -> int:
    """Weights of a layer's compressed experts whose symbol isn't 0, one expert decoded at a time."""
    return sum(
        int((kernel.expert(e) != 0).sum())
        for _, _, kernels in checkpoint.experts(layer)
        for kernel in kernels.values()
        if isinstance(kernel, CompressedExperts)
        for e in range(kernel.shape[0])
    )


def _reported(path: pathlib.Path) -> dict[str, Any]:
    """The report beside a compressed checkpoint; empty if there is none."""
    try:
        return read_json(path / "report.json")
    except CheckpointError:
        return {}


def _reported_zeros(path: pathlib.Path) -> dict[str, float]:
    try:
        return {layer: float(account["zeros"]) for layer, account in _reported(path)["layers"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
