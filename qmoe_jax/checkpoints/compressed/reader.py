"""Reading a compressed checkpoint; experts shard by shard."""

from __future__ import annotations

import functools
import itertools
import operator
import os
import pathlib
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from qmoe_jax import codecs
from qmoe_jax.checkpoints.checkpoint import Checkpoint, Kernels, StoredMatrix
from qmoe_jax.checkpoints.checks import check_tree
from qmoe_jax.checkpoints.compressed import schema
from qmoe_jax.checkpoints.compressed.manifest import FORMAT, MANIFEST, PROGRESS, VERSION, manifest_sha256, shards_of
from qmoe_jax.checkpoints.compressed.parts import check_part, declared, restore
from qmoe_jax.checkpoints.store import Index
from qmoe_jax.codecs.experts import CompressedExperts, concatenate
from qmoe_jax.errors import CheckpointError, listed
from qmoe_jax.files import read_json
from qmoe_jax.models.families import FAMILIES
from qmoe_jax.models.family import Family


class CompressedCheckpoint(Checkpoint):
    """A compressed checkpoint; see `Checkpoint`. Experts' kernels are `CompressedExperts`.

    When it is opened, only the manifest and the presence of all parts are checked; contents are when they are read.

    Args:
      path: the directory.
      **overrides: fields of the config to change.

    Raises:
      CheckpointError: no or broken manifest, a foreign format or version, a missing part.
    """

    def __init__(self, path: str | os.PathLike, **overrides: Any):
        path = pathlib.Path(path)
        file = path / MANIFEST
        if not file.is_file() and (path / PROGRESS / f"{PROGRESS}.json").is_file():
            raise CheckpointError(
                f"{path} is unfinished: compressing was interrupted. Give the same command again, and it goes on from "
                "the last layer that was committed."
            )
        if not file.is_file():
            raise CheckpointError(
                f"{path} has no {MANIFEST}: writing it was interrupted, so it is not a checkpoint. Compress again."
            )
        manifest = read_json(file)
        version = manifest.get("format_version")
        if manifest.get("format") != FORMAT or type(version) is not int or not 1 <= version <= VERSION:
            raise CheckpointError(
                f"{file}: format {reprlib.repr(manifest.get('format'))}, version {reprlib.repr(version)}; this reads "
                f"{FORMAT!r}, 1 to {VERSION}."
            )
        if manifest.get("sha256") != manifest_sha256(manifest):
            raise CheckpointError(
                f"{file} has changed since it was written (its SHA-256 is not that of its contents); copy it again."
            )
        if problems := schema.problems(manifest):
            raise CheckpointError(listed(f"{file} is not a manifest of version {version}:", problems))
        try:
            Config: Any = _family(manifest).Config
            self.config = Config.from_dict({**manifest["model"], **overrides})
            codecs.get(manifest["codec"]["name"])
        except ValueError as e:
            raise CheckpointError(f"{file}: {e}") from e
        self.codec = manifest["codec"]["name"]
        self.provenance = manifest["provenance"]
        self.quantization = manifest["quantization"]
        self._expert_sizes = {
            layer: {m: StoredMatrix(tuple(d["shape"]), d["bytes"]) for m, d in part["matrices"].items()}
            for layer, part in manifest["layers"].items()
        }
        self._shards = {layer: shards_of(part, version) for layer, part in manifest["layers"].items()}
        for layer, shards in self._shards.items():
            starts, stops = [s["start"] for s in shards], [s["stop"] for s in shards]
            if [0, *stops] != [*starts, self.config.num_experts] or any(map(operator.ge, starts, stops)):
                raise CheckpointError(f"{file}: the shards of {layer} don't hold each expert once.")
        parts = [part["directory"] for part in (manifest["dense"], *itertools.chain(*self._shards.values()))]
        missing = [layer for layer in self.config.sparse_layers if layer not in manifest["layers"]]
        missing += [part for part in parts if not (path / part).is_dir()]
        if missing:
            raise CheckpointError(f"{path}: missing {', '.join(missing)}; copy the checkpoint again.")
        self.path = str(path)
        self.manifest = manifest
        try:
            check_tree(self, self._expert_sizes)
        except CheckpointError:
            check_part(path, manifest["dense"])  # Damaged since it was written: that says more.
            raise

    @property
    def specs(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        return self._specs

    @property
    def expert_sizes(self) -> Mapping[str, Mapping[str, StoredMatrix]]:
        return self._expert_sizes

    @functools.cached_property
    def _dense(self) -> dict[str, np.ndarray]:
        return {_parameter(name): v for name, v in self._read_part(self.manifest["dense"]).items()}

    @functools.cached_property
    def _specs(self) -> dict[str, jax.ShapeDtypeStruct]:
        found = declared(pathlib.Path(self.path) / self.manifest["dense"]["directory"])
        return {_parameter(name): jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in found.items()}

    def _read_part(self, part: dict[str, Any]) -> dict[str, np.ndarray]:
        return restore(check_part(pathlib.Path(self.path), part))

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        if name not in self._dense:
            raise CheckpointError(f"{self.path}: there is no parameter {name!r} outside the compressed experts.")
        return self._dense[name][index]

    def groups(self, layer: str, group_size: int) -> Iterator[range]:
        """Shards: one is verified as a whole."""
        for shard in self._shards[layer]:
            yield range(shard["start"], shard["stop"])

    def read_experts(self, layer: str, start: int, stop: int) -> Kernels:
        """The matrices of experts start:stop by name; no other shards are read than theirs."""
        parts = []
        for shard in self._shards[layer]:
            first, last = max(start, shard["start"]), min(stop, shard["stop"])
            if first < last:
                experts = self._read_shard(layer, shard)
                parts.append({m: e.take(first - shard["start"], last - shard["start"]) for m, e in experts.items()})
        return {m: concatenate([p[m] for p in parts]) if len(parts) > 1 else parts[0][m] for m in parts[0]}

    def _read_shard(self, layer: str, shard: dict[str, Any]) -> dict[str, CompressedExperts]:
        arrays: dict[str, dict[str, np.ndarray]] = {}
        for name, array in self._read_part(shard).items():
            matrix, _, own = name.partition(".")
            arrays.setdefault(matrix, {})[own] = array
        experts = {}
        for matrix, described in self.manifest["layers"][layer]["matrices"].items():
            shape = (shard["stop"] - shard["start"], *described["shape"][1:])
            try:
                experts[matrix] = CompressedExperts.from_stored(arrays[matrix], str(self.codec), shape)
            except KeyError as e:
                raise CheckpointError(f"{self.path}: {self.matrices(layer)[matrix]} lacks {e}.") from e
            except ValueError as e:
                at = f" (experts from {shard['start']} on)" if shard["start"] else ""
                raise CheckpointError(f"{self.path}: {self.matrices(layer)[matrix]}{at}: {e}") from e
        return experts


def _parameter(folder: str) -> str:
    """Name of the parameter that lies in a folder."""
    return folder.replace(".", "/")


def _family(manifest: Mapping[str, Any]) -> Family:
    """That of the model; one that isn't told is what there was before there were families."""
    name = manifest.get("family", "switch")
    if name not in FAMILIES:
        raise CheckpointError(f"family {reprlib.repr(name)}, expected {', '.join(map(repr, FAMILIES))}.")
    return FAMILIES[name]
