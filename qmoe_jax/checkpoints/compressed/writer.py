"""Writing a compressed checkpoint layer by layer."""

from __future__ import annotations

import itertools
import math
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from flax import traverse_util

from qmoe_jax.checkpoints.compressed.manifest import (
    FORMAT,
    MANIFEST,
    VERSION,
    default_shards,
    layer_directory,
    manifest_sha256,
    shard_bounds,
)
from qmoe_jax.checkpoints.compressed.parts import check_part, directory_bytes, is_layer, is_part, save, sha256
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.errors import CheckpointError
from qmoe_jax.files import sync, write_json
from qmoe_jax.models.families import family_of
from qmoe_jax.models.family import Config
from qmoe_jax.processes import Processes


class CompressedWriter:
    """Writes a compressed checkpoint layer by layer; the manifest, and so the checkpoint, exists after `finish`.

    As a context manager it removes what it wrote when the block raises, but for what was kept (`keep`). Of several
    processes each writes the shards of its own experts, and the first one everything else.

    Args:
      directory: where to write; parts of an earlier checkpoint there are removed, other files are left alone.
      config: architecture.
      quantization: settings of the quantizer, kept in the manifest.
      codec: name of the codec.
      provenance: JSON values that say where the model came from.
      num_shards: of each layer; None: see `default_shards`.
      layers: what `layers` was of a writer that was stopped, to go on from there; they stay in any case.
      processes: all of which make a writer and call its methods; None: `jax.distributed`'s.

    Attributes:
      own: the experts of every layer that this process writes.

    Raises:
      ValueError: a number of shards that there are no experts for, or fewer than processes.
      CheckpointError: what was kept isn't there any more, or has changed.
      FileExistsError: what would be removed was not written by a compression.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        config: Config,
        quantization: Mapping[str, Any],
        codec: str,
        provenance: Mapping[str, Any],
        num_shards: int | None = None,
        layers: Mapping[str, Any] | None = None,
        processes: Processes | None = None,
    ):
        self.directory = pathlib.Path(directory)
        self._processes = processes or Processes()
        weights = _weights_of_a_layer(config)
        count = default_shards(config.num_experts, weights) if num_shards is None else num_shards
        self._bounds = shard_bounds(config.num_experts, count)
        if count < self._processes.count:
            raise ValueError(
                f"num_shards: found {count}, but there are {self._processes.count} processes, each of which writes "
                "whole shards: give as many or more (a run with another number of processes needs the same)."
            )
        shards = self._processes.share(count)
        self.own = range(self._bounds[shards[0]][0], self._bounds[shards[-1]][1])
        self._sparse_layers = config.sparse_layers
        self._kept = dict(layers or {})
        self._manifest: dict[str, Any] = {
            "format": FORMAT,
            "format_version": VERSION,
            "family": family_of(config).name,
            "model": config.to_dict(),
            "quantization": dict(quantization),
            "codec": {"name": codec},
            "provenance": dict(provenance),
            "layers": dict(self._kept),
        }
        if self._processes.first:
            for layer in self._kept.values():
                for shard in layer["shards"]:
                    check_part(self.directory, shard)
            self._check_ours()
            self._remove()
            self.directory.mkdir(parents=True, exist_ok=True)
        self._processes.wait()

    def __enter__(self) -> CompressedWriter:
        return self

    def __exit__(self, kind, value, trace) -> None:
        if kind is not None and self._processes.first:
            self._remove()

    @property
    def layers(self) -> dict[str, Any]:
        """What the manifest will say of the layers so far, as JSON values."""
        return self._manifest["layers"]

    def keep(self, layers: Mapping[str, Any]) -> None:
        """These layers stay even if the block raises."""
        self._kept = dict(layers)

    def _check_ours(self) -> None:
        """Raises FileExistsError where `_remove` would take what no compressed checkpoint has written."""
        layers, dense = self.directory / "layers", self.directory / "dense"
        for folder in (*(layers.iterdir() if layers.is_dir() else [layers]), dense):
            if folder.exists() and not is_part(folder) and (folder == dense or not is_layer(folder)):
                raise FileExistsError(
                    f"{folder} is no part of a compressed checkpoint, and would be removed. Move it away, or write to "
                    "another directory."
                )

    def _remove(self) -> None:
        (self.directory / MANIFEST).unlink(missing_ok=True)  # First: from here on it is no checkpoint.
        # Orbax leaves its temporary directory behind when saving fails.
        for directory in (self.directory / "dense", *self.directory.glob("dense.orbax-checkpoint-tmp*")):
            shutil.rmtree(directory, ignore_errors=True)
        kept = {self.directory / layer_directory(layer) for layer in self._kept}
        for directory in (self.directory / "layers").glob("*") if kept else [self.directory / "layers"]:
            if directory not in kept:
                shutil.rmtree(directory, ignore_errors=True)

    def _part(self, name: str, tree: dict[str, Any]) -> dict[str, Any]:
        directory = self.directory / name
        save(directory, tree)
        for parent in itertools.takewhile(lambda p: p != self.directory.parent, directory.parents):
            sync(parent)
        return {"directory": name, "bytes_on_disk": directory_bytes(directory), "sha256": sha256(directory)}

    def write_layer(self, layer: str, experts: Mapping[str, CompressedExperts]) -> None:
        """Writes the matrices of this process's experts of a sparse layer, by name."""
        count, written = len(self._bounds), []
        for i in self._processes.share(count):
            start, stop = self._bounds[i]
            own = {m: e.take(start - self.own.start, stop - self.own.start) for m, e in experts.items()}
            part = self._part(f"{layer_directory(layer)}/{i}-of-{count}", {m: e.stored() for m, e in own.items()})
            written.append(({"start": start, "stop": stop, **part}, {m: e.nbytes for m, e in own.items()}))
        shards, nbytes = zip(*itertools.chain(*self._processes.gather(written)), strict=True)
        self._manifest["layers"][layer] = {
            "bytes": sum(sum(of.values()) for of in nbytes),
            "matrices": {
                m: {"shape": [self._bounds[-1][1], *e.shape[1:]], "bytes": sum(of[m] for of in nbytes)}
                for m, e in experts.items()
            },
            "shards": list(shards),
        }

    def finish(self, dense: Mapping[str, np.ndarray]) -> None:
        """Writes everything that isn't experts ('/'-joined names; stored as bfloat16), then the manifest.

        It is the first process's `dense` that is written.
        """
        written, expected = list(self._manifest["layers"]), list(self._sparse_layers)
        if sorted(written) != sorted(expected):
            raise CheckpointError(f"Sparse layers {sorted(set(expected) - set(written))} were never written.")
        if self._processes.first:
            shutil.rmtree(self.directory / "dense", ignore_errors=True)
            flat = {name: np.asarray(value, ml_dtypes.bfloat16) for name, value in dense.items()}
            self._manifest["dense"] = {
                **self._part("dense", traverse_util.unflatten_dict(flat, sep="/")),
                "bytes": sum(v.nbytes for v in flat.values()),
            }
            write_json(self.directory / MANIFEST, self._manifest | {"sha256": manifest_sha256(self._manifest)})
            sync(self.directory)  # Before what was committed is removed.
        self._processes.wait()


def _weights_of_a_layer(config: Config) -> int:
    """Of all of a sparse layer's experts."""
    family, shapes = family_of(config), family_of(config).param_shapes(config)
    return sum(
        math.prod(shapes[family.expert_parameter(layer, matrix)])
        for layer in config.sparse_layers[:1]
        for matrix in config.expert.matrices
    )
