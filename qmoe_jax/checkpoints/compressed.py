"""Compressed checkpoints: a directory that is whole when, and only when, its manifest is there.

    OUT/layers/encoder.layers_1/   one Orbax checkpoint per sparse layer: what the codec stores of its matrices
    OUT/dense/                     one Orbax checkpoint for everything else, bfloat16
    OUT/manifest.json              format version, model, quantization, codec, bytes and SHA-256 of each part; last

A part is verified against its SHA-256 when it is read, so a model can be read layer by layer; the manifest, against
its own, when it is opened.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from qmoe_jax.checkpoints.base import Checkpoint, StoredMatrix
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.checkpoints.t5x_files import reason
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.config import ModelConfig
from qmoe_jax.reporting import write_json

FORMAT = "qmoe_jax"
VERSION = 1
MANIFEST = "manifest.json"
PARTS = (MANIFEST, "dense", "layers")  # All that a compressed checkpoint puts into its directory.


def is_compressed(path: str | os.PathLike) -> bool:
    """Whether `path` is, or was going to be, a compressed checkpoint."""
    path = pathlib.Path(path)
    return (path / MANIFEST).is_file() or ((path / "layers").is_dir() and not (path / "checkpoint").exists())


def sha256(directory: pathlib.Path) -> str:
    """SHA-256 over names and contents of all files below a directory, in sorted order."""
    digest = hashlib.sha256()
    for file in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = file.relative_to(directory).as_posix()
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as f:
            while block := f.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def manifest_sha256(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's values, its own 'sha256' left out."""
    rest = {k: v for k, v in manifest.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _directory_bytes(directory: pathlib.Path) -> int:
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())


def _save(directory: pathlib.Path, tree: dict[str, Any]) -> None:
    # Without OCDBT every array is a plain zarr directory, which any reader of zarr can open.
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
            checkpointer.save(directory.absolute(), args=ocp.args.PyTreeSave(tree))
    except ValueError as e:  # TensorStore's error, for instance of a full disk.
        raise CheckpointError(f"{directory}: cannot be written: {reason(e)}.") from e


def _restore(directory: pathlib.Path) -> dict[str, Any]:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        tree = checkpointer.metadata(directory.absolute()).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(directory.absolute(), args=ocp.args.PyTreeRestore(restore_args=as_numpy))


class CompressedWriter:
    """Writes a compressed checkpoint layer by layer; the manifest, and so the checkpoint, exists after `finish`.

    As a context manager it removes what it wrote when the block raises.

    Args:
      directory: where to write; parts of an earlier checkpoint there are removed, other files are left alone.
      config: architecture.
      quantization: settings of the quantizer, kept in the manifest.
      codec: name of the codec.
      provenance: JSON values that say where the model came from.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        config: ModelConfig,
        quantization: Mapping[str, Any],
        codec: str,
        provenance: Mapping[str, Any],
    ):
        self.directory = pathlib.Path(directory)
        self._manifest = {
            "format": FORMAT,
            "format_version": VERSION,
            "model": config.to_dict(),
            "quantization": dict(quantization),
            "codec": {"name": codec},
            "provenance": dict(provenance),
            "layers": {},
        }
        self._remove()
        self.directory.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> CompressedWriter:
        return self

    def __exit__(self, kind, value, trace) -> None:
        if kind is not None:
            self._remove()

    def _remove(self) -> None:
        (self.directory / MANIFEST).unlink(missing_ok=True)  # First: from here on it is no checkpoint.
        for part in PARTS[1:]:
            # Orbax leaves its temporary directory behind when saving fails.
            for directory in (self.directory / part, *self.directory.glob(f"{part}.orbax-checkpoint-tmp*")):
                shutil.rmtree(directory, ignore_errors=True)

    def _part(self, name: str, tree: dict[str, Any]) -> dict[str, Any]:
        directory = self.directory / name
        _save(directory, tree)
        return {"directory": name, "bytes_on_disk": _directory_bytes(directory), "sha256": sha256(directory)}

    def write_layer(self, layer: str, experts: Mapping[str, CompressedExperts]) -> None:
        """Writes the matrices (wi, wo, ...) of one sparse layer such as 'encoder/layers_1'."""
        tree = {m: e.stored() for m, e in experts.items()}
        self._manifest["layers"][layer] = {
            **self._part(f"layers/{layer.replace('/', '.')}", tree),
            "bytes": sum(e.nbytes for e in experts.values()),
            "matrices": {m: {"shape": list(e.shape), "bytes": e.nbytes} for m, e in experts.items()},
        }

    def finish(self, dense: Mapping[str, np.ndarray]) -> None:
        """Writes everything that isn't experts ('/'-joined names; stored as bfloat16), then the manifest."""
        written, expected = list(self._manifest["layers"]), list(self._manifest_config().sparse_layers)
        if sorted(written) != sorted(expected):
            raise CheckpointError(f"Sparse layers {sorted(set(expected) - set(written))} were never written.")
        flat = {name: np.asarray(value, ml_dtypes.bfloat16) for name, value in dense.items()}
        self._manifest["dense"] = {
            **self._part("dense", traverse_util.unflatten_dict(flat, sep="/")),
            "bytes": sum(v.nbytes for v in flat.values()),
        }
        write_json(self.directory / MANIFEST, self._manifest | {"sha256": manifest_sha256(self._manifest)})

    def _manifest_config(self) -> ModelConfig:
        return ModelConfig.from_dict(self._manifest["model"])


class CompressedCheckpoint(Checkpoint):
    """A compressed checkpoint; see `Checkpoint`. Experts' kernels are `CompressedExperts`.

    When it is opened, only the manifest and the presence of all parts are checked; contents are when they are read.

    Args:
      path: the directory.
      **overrides: fields of `ModelConfig` to change.

    Raises:
      CheckpointError: no or broken manifest, a foreign format or version, a missing part.
    """

    def __init__(self, path: str | os.PathLike, **overrides: Any):
        path = pathlib.Path(path)
        file = path / MANIFEST
        if not file.is_file():
            raise CheckpointError(
                f"{path} has no {MANIFEST}: writing it was interrupted, so it is not a checkpoint. Compress again."
            )
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
            found = (manifest.get("format"), manifest.get("format_version"))
        except (ValueError, AttributeError) as e:
            raise CheckpointError(f"{file} is not a manifest: {e}") from e
        if found != (FORMAT, VERSION):
            raise CheckpointError(
                f"{file}: format {found[0]!r}, version {found[1]!r}; this reads {FORMAT!r}, {VERSION}."
            )
        if manifest.get("sha256") != manifest_sha256(manifest):
            raise CheckpointError(
                f"{file} has changed since it was written (its SHA-256 is not that of its contents); copy it again."
            )
        try:
            self.config = ModelConfig.from_dict({**manifest["model"], **overrides})
            self.codec = manifest["codec"]["name"]
            self.provenance = manifest["provenance"]
            self.quantization = manifest["quantization"]
            self.expert_sizes = {
                layer: {m: StoredMatrix(tuple(d["shape"]), d["bytes"]) for m, d in part["matrices"].items()}
                for layer, part in manifest["layers"].items()
            }
            parts = [part["directory"] for part in (manifest["dense"], *manifest["layers"].values())]
            missing = [layer for layer in self.config.sparse_layers if layer not in manifest["layers"]]
        except (KeyError, TypeError, ValueError) as e:
            raise CheckpointError(f"{file} is not a manifest of version {VERSION}: {e!r}") from e
        missing += [part for part in parts if not (path / part).is_dir()]
        if missing:
            raise CheckpointError(f"{path}: missing {', '.join(missing)}; copy the checkpoint again.")
        self.path = str(path)
        self.manifest = manifest

    @property
    def specs(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        return {n: jax.ShapeDtypeStruct(v.shape, v.dtype) for n, v in self._dense.items()}

    @functools.cached_property
    def _dense(self) -> dict[str, np.ndarray]:
        return traverse_util.flatten_dict(self._read_part(self.manifest["dense"]), sep="/")

    def _read_part(self, part: dict[str, Any]) -> dict[str, Any]:
        directory = pathlib.Path(self.path) / part["directory"]
        if not directory.is_dir() or sha256(directory) != part["sha256"]:
            raise CheckpointError(
                f"{directory} is missing or has changed since it was written (its SHA-256 is not that of {MANIFEST}); "
                "copy the checkpoint again."
            )
        return _restore(directory)

    def read(self, name: str, index: tuple = ()) -> np.ndarray:
        if name not in self._dense:
            raise CheckpointError(f"{self.path}: there is no parameter {name!r} outside the compressed experts.")
        return self._dense[name][index]

    def experts(self, layer: str, group_size: int | None = None) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """All experts at once: a compressed layer is small, and verified as a whole."""
        part = self.manifest["layers"][layer]
        tree = self._read_part(part)
        experts = {}
        for matrix, described in part["matrices"].items():
            try:
                experts[matrix] = CompressedExperts.from_stored(tree[matrix], self.codec, described["shape"])
            except KeyError as e:
                raise CheckpointError(f"{self.path}: {layer}/mlp/expert/{matrix} lacks {e}.") from e
            except ValueError as e:
                raise CheckpointError(f"{self.path}: {layer}/mlp/expert/{matrix}: {e}") from e
        yield 0, self.config.num_experts, experts
