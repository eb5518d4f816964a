"""Reading a compressed checkpoint; experts shard by shard."""

from __future__ import annotations

import functools
import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from qmoe_jax.checkpoints.checkpoint import Checkpoint, Kernels, StoredMatrix
from qmoe_jax.checkpoints.compressed.manifest import FORMAT, MANIFEST, PROGRESS, VERSION, manifest_sha256, shards_of
from qmoe_jax.checkpoints.compressed.parts import check_part, restore
from qmoe_jax.checkpoints.store import Index
from qmoe_jax.codecs.experts import CompressedExperts, concatenate
from qmoe_jax.errors import CheckpointError
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
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
            found = (manifest.get("format"), manifest.get("format_version"))
        except (ValueError, AttributeError) as e:
            raise CheckpointError(f"{file} is not a manifest: {e}") from e
        if found not in [(FORMAT, 1), (FORMAT, VERSION)]:
            raise CheckpointError(
                f"{file}: format {found[0]!r}, version {found[1]!r}; this reads {FORMAT!r}, 1 to {VERSION}."
            )
        if manifest.get("sha256") != manifest_sha256(manifest):
            raise CheckpointError(
                f"{file} has changed since it was written (its SHA-256 is not that of its contents); copy it again."
            )
        try:
            Config: Any = _family(manifest).Config
            self.config = Config.from_dict({**manifest["model"], **overrides})
            self.codec = manifest["codec"]["name"]
            self.provenance = manifest["provenance"]
            self.quantization = manifest["quantization"]
            self._expert_sizes = {
                layer: {m: StoredMatrix(tuple(d["shape"]), d["bytes"]) for m, d in part["matrices"].items()}
                for layer, part in manifest["layers"].items()
            }
            self._shards = {layer: shards_of(part, found[1]) for layer, part in manifest["layers"].items()}
            parts = [part["directory"] for part in (manifest["dense"], *itertools.chain(*self._shards.values()))]
            for layer, shards in self._shards.items():
                if [0, *(s["stop"] for s in shards)] != [*(s["start"] for s in shards), self.config.num_experts]:
                    raise ValueError(f"the shards of {layer} don't hold each expert once")
            missing = [layer for layer in self.config.sparse_layers if layer not in manifest["layers"]]
        except CheckpointError as e:
            raise CheckpointError(f"{file}: {e}") from e
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

    @property
    def expert_sizes(self) -> Mapping[str, Mapping[str, StoredMatrix]]:
        return self._expert_sizes

    @functools.cached_property
    def _dense(self) -> dict[str, np.ndarray]:
        return traverse_util.flatten_dict(self._read_part(self.manifest["dense"]), sep="/")

    def _read_part(self, part: dict[str, Any]) -> dict[str, Any]:
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
        tree = self._read_part(shard)
        experts = {}
        for matrix, described in self.manifest["layers"][layer]["matrices"].items():
            shape = (shard["stop"] - shard["start"], *described["shape"][1:])
            try:
                experts[matrix] = CompressedExperts.from_stored(tree[matrix], str(self.codec), shape)
            except KeyError as e:
                raise CheckpointError(f"{self.path}: {self.matrices(layer)[matrix]} lacks {e}.") from e
            except ValueError as e:
                at = f" (experts from {shard['start']} on)" if shard["start"] else ""
                raise CheckpointError(f"{self.path}: {self.matrices(layer)[matrix]}{at}: {e}") from e
        return experts


def _family(manifest: Mapping[str, Any]) -> Family:
    """That of the model; one that isn't told is what there was before there were families."""
    name = manifest.get("family", "switch")
    if name not in FAMILIES:
        raise CheckpointError(f"family {name!r}, expected {', '.join(map(repr, FAMILIES))}.")
    return FAMILIES[name]
