"""Compressed checkpoints: a directory that is whole when, and only when, its manifest is there.

    OUT/layers/encoder.layers_1/0-of-4/   one Orbax checkpoint per shard of a sparse layer: what the codec stores of
                                          the matrices of consecutive experts, shard i of n from i * experts // n on
    OUT/dense/                            one Orbax checkpoint for everything else, bfloat16
    OUT/manifest.json                     format version, model, quantization, codec, bytes and SHA-256 of each part;
                                          written last

A part is verified against its SHA-256 when it is read, so a model can be read layer by layer, and experts without the
other shards; the manifest, against its own, when it is opened. The same contents give the same files, byte for byte.
While a checkpoint is being made, OUT/progress/ may hold what is needed to go on (see `quantization.progress`).
"""

from __future__ import annotations

import errno
import functools
import hashlib
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax import traverse_util

from qmoe_jax.checkpoints import reading
from qmoe_jax.checkpoints.base import Checkpoint, StoredMatrix
from qmoe_jax.checkpoints.reading import Reading
from qmoe_jax.checkpoints.t5x_files import reason
from qmoe_jax.codecs.experts import CompressedExperts, concatenate
from qmoe_jax.errors import CheckpointError
from qmoe_jax.files import sync, write_json
from qmoe_jax.models.switch.config import ModelConfig
from qmoe_jax.processes import Processes

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
    # Found out now: Orbax, when it fails, has threads that go on.
    needed = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(tree))
    directory.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory.parent).free
    if needed > free:
        raise CheckpointError(
            f"{directory}: cannot be written: {os.strerror(errno.ENOSPC)}: {needed:,} bytes are needed, {free:,} free."
        )
    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(directory.absolute(), args=ocp.args.PyTreeSave(tree))
        _settle(directory)
    except ValueError as e:  # TensorStore's error, for instance of a full disk.
        raise CheckpointError(f"{directory}: cannot be written: {reason(e)}.") from e


def _checkpointer() -> ocp.Checkpointer:
    """Without OCDBT every array is a plain zarr directory, which any reader of zarr can open.

    One of several processes reads and writes by itself: no part belongs to two.
    """
    if jax.process_count() == 1:
        return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False))
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process_{own}"
    )
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, _OwnArrays()))
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, type_handler_registry=registry, multiprocessing_options=alone
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


class _OwnArrays(ocp.type_handlers.NumpyHandler):
    """Writes what Orbax's own handler would, which leaves NumPy's arrays to the first process, whoever has them."""

    async def serialize(self, values, infos, args=None):
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            spec = {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": f"{info.parent_dir / info.name}/"},
                "metadata": {
                    "shape": value.shape,
                    "chunks": [max(1, n) for n in value.shape],
                    "compressor": {"id": "zstd", "level": 1},
                },
                "dtype": str(value.dtype),
                "store_data_equal_to_fill_value": True,
            }
            array = await ts.open(spec, create=True)
            await array.write(value)
        return []


def _settle(directory: pathlib.Path) -> None:
    """Takes out of Orbax's notes when and where they were written, and sees to it that all files are on disk."""
    notes = directory / "_CHECKPOINT_METADATA"
    if notes.is_file():
        found = json.loads(notes.read_text(encoding="utf-8"))
        found |= {name: 0 for name in found if name.endswith("_timestamp_nsecs")}
        notes.write_text(json.dumps(found), encoding="utf-8")
    done = directory / "commit_success.txt"
    if done.is_file():
        done.write_text("Checkpoint commit was successful.\n", encoding="utf-8")
    for path in (*directory.rglob("*"), directory):
        sync(path)


def _restore(directory: pathlib.Path) -> dict[str, Any]:
    with _checkpointer() as checkpointer:
        tree = checkpointer.metadata(directory.absolute()).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(directory.absolute(), args=ocp.args.PyTreeRestore(restore_args=as_numpy))


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
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        config: ModelConfig,
        quantization: Mapping[str, Any],
        codec: str,
        provenance: Mapping[str, Any],
        num_shards: int | None = None,
        layers: Mapping[str, Any] | None = None,
        processes: Processes | None = None,
    ):
        self.directory = pathlib.Path(directory)
        self._processes = processes or Processes()
        weights = config.num_experts * config.d_model * config.d_ff * len(config.expert_matrices)
        count = default_shards(config.num_experts, weights) if num_shards is None else num_shards
        self._bounds = shard_bounds(config.num_experts, count)
        if count < self._processes.count:
            raise ValueError(
                f"num_shards: found {count}, but there are {self._processes.count} processes, each of which writes "
                "whole shards: give as many or more (a run with another number of processes needs the same)."
            )
        shards = self._processes.share(count)
        self.own = range(self._bounds[shards[0]][0], self._bounds[shards[-1]][1])
        self._kept = dict(layers or {})
        self._manifest: dict[str, Any] = {
            "format": FORMAT,
            "format_version": VERSION,
            "model": config.to_dict(),
            "quantization": dict(quantization),
            "codec": {"name": codec},
            "provenance": dict(provenance),
            "layers": dict(self._kept),
        }
        if self._processes.first:
            for layer in self._kept.values():
                for shard in layer["shards"]:
                    _check_part(self.directory, shard)
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

    def _remove(self) -> None:
        (self.directory / MANIFEST).unlink(missing_ok=True)  # First: from here on it is no checkpoint.
        # Orbax leaves its temporary directory behind when saving fails.
        for directory in (self.directory / "dense", *self.directory.glob("dense.orbax-checkpoint-tmp*")):
            shutil.rmtree(directory, ignore_errors=True)
        kept = {self.directory / _layer_directory(layer) for layer in self._kept}
        for directory in (self.directory / "layers").glob("*") if kept else [self.directory / "layers"]:
            if directory not in kept:
                shutil.rmtree(directory, ignore_errors=True)

    def _part(self, name: str, tree: dict[str, Any]) -> dict[str, Any]:
        directory = self.directory / name
        _save(directory, tree)
        for parent in itertools.takewhile(lambda p: p != self.directory.parent, directory.parents):
            sync(parent)
        return {"directory": name, "bytes_on_disk": _directory_bytes(directory), "sha256": sha256(directory)}

    def write_layer(self, layer: str, experts: Mapping[str, CompressedExperts]) -> None:
        """Writes the matrices (wi, wo, ...), of this process's experts, of a layer such as 'encoder/layers_1'."""
        count, written = len(self._bounds), []
        for i in self._processes.share(count):
            start, stop = self._bounds[i]
            own = {m: e.take(start - self.own.start, stop - self.own.start) for m, e in experts.items()}
            part = self._part(f"{_layer_directory(layer)}/{i}-of-{count}", {m: e.stored() for m, e in own.items()})
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
        written, expected = list(self._manifest["layers"]), list(self._manifest_config().sparse_layers)
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

    def _manifest_config(self) -> ModelConfig:
        return ModelConfig.from_dict(self._manifest["model"])


def _layer_directory(layer: str) -> str:
    return f"layers/{layer.replace('/', '.')}"


def _check_part(path: pathlib.Path, part: Mapping[str, Any]) -> pathlib.Path:
    """Where a part of the manifest is; raises CheckpointError unless it is as it was written."""
    directory = path / part["directory"]
    if not directory.is_dir() or sha256(directory) != part["sha256"]:
        raise CheckpointError(
            f"{directory} is missing or has changed since it was written (its SHA-256 is not that of {MANIFEST}); "
            "copy the checkpoint again, or make it again with --overwrite."
        )
    return directory


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
            self.config = ModelConfig.from_dict({**manifest["model"], **overrides})
            self.codec = manifest["codec"]["name"]
            self.provenance = manifest["provenance"]
            self.quantization = manifest["quantization"]
            self.expert_sizes = {
                layer: {m: StoredMatrix(tuple(d["shape"]), d["bytes"]) for m, d in part["matrices"].items()}
                for layer, part in manifest["layers"].items()
            }
            self._shards = {layer: _shards_of(part, found[1]) for layer, part in manifest["layers"].items()}
            parts = [part["directory"] for part in (manifest["dense"], *itertools.chain(*self._shards.values()))]
            for layer, shards in self._shards.items():
                if [0, *(s["stop"] for s in shards)] != [*(s["start"] for s in shards), self.config.num_experts]:
                    raise ValueError(f"the shards of {layer} don't hold each expert once")
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
        return _restore(_check_part(pathlib.Path(self.path), part))

    def read(self, name: str, index: tuple = ()) -> np.ndarray:
        if name not in self._dense:
            raise CheckpointError(f"{self.path}: there is no parameter {name!r} outside the compressed experts.")
        return self._dense[name][index]

    def experts(self, layer: str, group_size: int | None = None) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """A group is a shard, which is verified as a whole, or (None) all experts."""
        everything = range(self.config.num_experts)
        if group_size is None:
            yield 0, len(everything), self.read_experts(layer, 0, len(everything))
        else:
            yield from self._groups(layer, everything)

    def stream(
        self, layers: Sequence[str], group_size: int, how: Reading = reading.DEFAULT, experts: range | None = None
    ) -> Iterator[tuple[str, int, int, dict[str, Any]]]:
        wanted = experts or range(self.config.num_experts)
        return reading.prefetched((layer, *group) for layer in layers for group in self._groups(layer, wanted))

    def read_experts(self, layer: str, start: int, stop: int) -> dict[str, CompressedExperts]:
        """The matrices of experts start:stop by name; no other shards are read than theirs."""
        parts = [
            {m: e.take(max(start, a) - a, min(stop, b) - a) for m, e in experts.items()}
            for a, b, experts in self._groups(layer, range(start, stop))
        ]
        return {m: concatenate([p[m] for p in parts]) if len(parts) > 1 else parts[0][m] for m in parts[0]}

    def _groups(self, layer: str, wanted: range) -> Iterator[tuple[int, int, dict[str, CompressedExperts]]]:
        for shard in self._shards[layer]:
            if shard["start"] < wanted.stop and shard["stop"] > wanted.start:
                yield shard["start"], shard["stop"], self._read_shard(layer, shard)

    def _read_shard(self, layer: str, shard: dict[str, Any]) -> dict[str, CompressedExperts]:
        tree = self._read_part(shard)
        experts = {}
        for matrix, described in self.manifest["layers"][layer]["matrices"].items():
            shape = (shard["stop"] - shard["start"], *described["shape"][1:])
            try:
                experts[matrix] = CompressedExperts.from_stored(tree[matrix], str(self.codec), shape)
            except KeyError as e:
                raise CheckpointError(f"{self.path}: {layer}/mlp/expert/{matrix} lacks {e}.") from e
            except ValueError as e:
                at = f" (experts from {shard['start']} on)" if shard["start"] else ""
                raise CheckpointError(f"{self.path}: {layer}/mlp/expert/{matrix}{at}: {e}") from e
        return experts


def _shards_of(layer: dict[str, Any], version: int) -> list[dict[str, Any]]:
    """What the manifest says of a layer's shards; in version 1 the layer itself was one."""
    if version > 1:
        return layer["shards"]
    experts = next(iter(layer["matrices"].values()))["shape"][0]
    return [{"start": 0, "stop": experts, **{key: layer[key] for key in ("directory", "sha256")}}]
