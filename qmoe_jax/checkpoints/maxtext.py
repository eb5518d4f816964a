"""MaxText's checkpoints, as Orbax writes them: STEP/items/ with an index `_METADATA`, and arrays in zarr or OCDBT.

    params/params/...            parameters; optimizer state and step lie beside them and aren't read
    .../layers/NAME              of all layers, where MaxText scans them (its default): their axis is the second
    .../layers_N/NAME            of one, where it doesn't

Nothing in them tells the architecture: config.json, as Hugging Face has it, lies beside them, or a published one is
named.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from qmoe_jax.checkpoints import reading, retry, zarr
from qmoe_jax.checkpoints.checkpoint import StoredCheckpoint
from qmoe_jax.checkpoints.layout import Layout
from qmoe_jax.checkpoints.store import Index, explicit
from qmoe_jax.checkpoints.t5x import files
from qmoe_jax.checkpoints.tensor_files import FLOATS
from qmoe_jax.errors import CheckpointError, listed
from qmoe_jax.files import parse_json
from qmoe_jax.models.families import PRESETS, family_of, family_of_type
from qmoe_jax.models.fields import MOST_LAYERS
from qmoe_jax.models.names import Shape

logger = logging.getLogger(__name__)
METADATA, ITEMS, CONFIG = "_METADATA", "items", "config.json"
_SCANNED = re.compile(r"(.*/)?layers/(.+)")
# What wraps parameters: trees of Linen, and of NNX, some of whose leaves are named 'value'.
_WRAPPERS = (("params", "params"), ("params",), ("base",), ())


class MaxTextStore:
    """See `Store`; scanned layers appear one by one, under the names that they have when they aren't scanned.

    Args:
      directory: with `_METADATA` in it.
      described: config.json's settings.
    """

    def __init__(self, directory: files.Location, described: Mapping[str, Any]):
        self.path, self.described = files.show(directory), described
        metadata = _json(files.child(directory, f"/{METADATA}"))
        try:
            keys = dict(_parameters(metadata["tree_metadata"].values()))
        except (KeyError, TypeError, AttributeError) as e:
            raise CheckpointError(f"{self.path}/{METADATA}: no tree of arrays in it ({e!r}): copy it again.") from e
        if not keys:
            raise CheckpointError(f"{self.path}/{METADATA}: there are no parameters in it, expected 'params'.")
        self._arrays = _opened(directory, keys, metadata)
        shapes = {name: tuple(array.shape) for name, array in self._arrays.items()}
        try:
            self._names = unscanned(shapes)
        except CheckpointError as e:
            raise CheckpointError(f"{self.path}: {e}") from e
        self.specs = {}
        for name, (source, axis, _) in self._names.items():
            shape = shapes[source] if axis is None else (*shapes[source][:axis], *shapes[source][axis + 1 :])
            self.specs[name] = jax.ShapeDtypeStruct(shape, self._arrays[source].dtype.numpy_dtype)

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        array = self._array(name)
        part = array[explicit(index, array.shape)]
        return np.asarray(retry.result(part.read, f"{self.path}: cannot read parameter {name!r}"))

    def source(self, name: str) -> reading.Source:
        stored, (source, axis, _) = self._array(name), self._names[name]
        layout: Any = self._arrays[source].chunk_layout.read_chunk
        chunks, layers = tuple(layout.shape), 1
        if axis is not None:
            layers, chunks = chunks[axis], (*chunks[:axis], *chunks[axis + 1 :])
        grid = reading.Grid(tuple(stored.shape), chunks, stored.dtype.numpy_dtype.itemsize, layers)
        return reading.Source(name, stored, grid, self.path)

    def _array(self, name: str) -> ts.TensorStore:
        source, axis, layer = self._names[name]
        array = self._arrays[source]
        return array if axis is None else array[ts.d[axis][layer]]


def unscanned(shapes: Mapping[str, Shape]) -> dict[str, tuple[str, int | None, int]]:
    """Names layer by layer, where arrays hold all layers.

    Args:
      shapes: of arrays, by name.

    Returns:
      By unscanned name: the array's, the axis of its layers (None: it has none), and the layer.

    Raises:
      CheckpointError: arrays of layers that have no common number of them on axis 1 or 0.
    """
    scanned = {name: match for name in shapes if (match := _SCANNED.fullmatch(name))}
    names: dict[str, tuple[str, int | None, int]] = {name: (name, None, 0) for name in shapes if name not in scanned}
    if not scanned:
        return names
    for axis in (1, 0):  # MaxText's param_scan_axis, 1 unless it was changed.
        counts = {shapes[name][axis] if len(shapes[name]) > axis else None for name in scanned}
        if len(counts) == 1 and None not in counts:
            break
    else:
        lines = [f"{name} {list(shapes[name])}" for name in scanned]
        raise CheckpointError(listed("Arrays of all layers differ in their number, expected on axis 1 or 0:", lines))
    if (layers := max(shapes[name][axis] for name in scanned)) > MOST_LAYERS:
        raise CheckpointError(f"Arrays hold {layers} layers, expected at most {MOST_LAYERS}.")
    for name, match in scanned.items():
        for layer in range(shapes[name][axis]):
            names[f"{match[1] or ''}layers_{layer}/{match[2]}"] = (name, axis, layer)
    return names


def _parameters(leaves) -> Iterator[tuple[str, str]]:
    """'/'-joined name of each parameter in a tree's metadata, and what its array is stored under."""
    paths = [
        tuple(str(part["key"]) for part in leaf["key_metadata"])
        for leaf in leaves
        if leaf["value_metadata"]["value_type"] in ("jax.Array", "np.ndarray")
    ]
    wrapper = next(w for w in _WRAPPERS if not w or any(path[: len(w)] == w for path in paths))
    for path in paths:
        if path[: len(wrapper)] != wrapper:
            continue
        inner = path[len(wrapper) :]
        inner = inner[:-1] if inner[-1] == "value" else inner
        name = re.sub(r"/(\d+)(?=/)", r"_\1", "/".join(inner))  # Lists: layers/0 is layers_0.
        yield name, ".".join(path)


def _opened(
    directory: files.Location, keys: Mapping[str, str], metadata: Mapping[str, Any]
) -> dict[str, ts.TensorStore]:
    """All arrays, opened at once. Raises CheckpointError that lists those that can't be, or are quantized."""
    base = files.child(directory, "/")
    stored = zarr.bytes_below(base["path"]) if base["driver"] == "file" else None
    if files.read_file(files.child(directory, "/manifest.ocdbt")) is not None:
        base = {"driver": "ocdbt", "base": base, "path": ""}
    spec = {
        "driver": "zarr3" if metadata.get("use_zarr3") else "zarr",
        # Where all chunks are written, one that isn't there is a loss, not zeros.
        "fill_missing_data_reads": not metadata.get("store_array_data_equal_to_fill_value", False),
    }
    futures = {n: ts.open({**spec, "kvstore": files.child(base, f"{key}/")}, read=True) for n, key in keys.items()}
    arrays, problems = {}, []
    for name, future in futures.items():
        try:
            arrays[name] = future.result()
            zarr.check_opened(arrays[name], stored)
        except ValueError as e:
            problems.append(f"{name}: {retry.reason(e)}")
    where = files.show(directory)
    if problems:
        raise CheckpointError(listed(f"{where}: {len(problems)} arrays cannot be opened; copy it again:", problems))
    if odd := [f"{n}: {a.dtype.name}" for n, a in arrays.items() if a.dtype.numpy_dtype not in FLOATS]:
        raise CheckpointError(
            listed(f"{where}: parameters must be {', '.join(map(str, FLOATS))}. Take one that isn't quantized:", odd)
        )
    return arrays


# --- Where it is ------------------------------------------------------------------------------------------------------


def find(path: str | os.PathLike) -> files.Location | None:
    """The directory with `_METADATA`: the path, its 'items', or those of the newest step below it."""
    root = files.located(path)

    def places() -> Iterator[str]:
        yield from ("", f"/{ITEMS}")
        steps = [name for name in files.names_in(root) if name.isdigit()]
        yield from (f"/{step}/{ITEMS}" for step in sorted(steps, key=int, reverse=True))

    there = (files.child(root, place) for place in places())
    return next((d for d in there if files.read_file(files.child(d, f"/{METADATA}")) is not None), None)


def is_maxtext(path: str | os.PathLike) -> bool:
    """Whether a checkpoint of MaxText's is at the path: an Orbax tree whose parameters have its embedding."""
    directory = find(path)
    metadata = files.read_file(files.child(directory, f"/{METADATA}")) if directory else None
    return metadata is not None and re.search(rb"\"\(('params', |'base', )*'token_embedder'", metadata) is not None


def _described(directory: files.Location) -> tuple[str, dict[str, Any]] | None:
    """config.json beside the arrays, in the step's directory, or beside the steps; and where."""
    path = directory["path"]
    for _ in range(3):
        file = {**directory, "path": f"{path}/{CONFIG}"}
        if files.read_file(file) is not None:
            return files.show(file), _json(file)
        path = path.rpartition("/")[0]
    return None


def _json(file: files.Location) -> dict[str, Any]:
    return parse_json(files.read_file(file) or b"", files.show(file))


class MaxTextCheckpoint(StoredCheckpoint):
    """See `StoredCheckpoint`.

    Args:
      path: the step's directory, its parent (the newest step), or 'items'; local or gs://.
      preset: name of the published architecture, where there is no config.json.
      **overrides: fields of the config to change.

    Raises:
      CheckpointError: nothing tells the architecture; an array is missing, foreign, of wrong shape, or damaged.
    """

    def __init__(self, path: str | os.PathLike, preset: str | None = None, **overrides: Any):
        directory = find(path)
        if directory is None:
            raise CheckpointError(f"{os.fspath(path)}: no {METADATA} of Orbax there, nor in {ITEMS}/ or STEP/{ITEMS}/.")
        known = [name for name, config in PRESETS.items() if "maxtext" in family_of(config).names]
        if (found := _described(directory)) is not None:
            where, described = found
            try:
                family = family_of_type(described.get("model_type"), "maxtext")
            except CheckpointError as e:
                raise CheckpointError(f"{where}: {e}") from e
        elif preset in known:
            config = PRESETS[preset]
            family = family_of(config)
            dtypes = dict.fromkeys(family.param_shapes(config), np.dtype(np.float32))
            described = family.names["huggingface"].describe(config, dtypes, None)
            where = files.show(directory)
            logger.warning(
                "%s: taken for %s as first published; its files don't tell, no %s is there", where, preset, CONFIG
            )
        else:
            raise CheckpointError(
                f"{files.show(directory)}: MaxText's checkpoints don't tell the architecture"
                f"{'' if preset is None else f', and it keeps no {preset!r} that is read'}. Put the model's {CONFIG}, "
                f"as Hugging Face has it, into {files.show(directory)}, or name a published one "
                f"(--config.model.preset=NAME, preset=NAME): {', '.join(known)}."
            )
        super().__init__(MaxTextStore(directory, described), "maxtext", family, overrides)
        step = re.search(r"/(\d+)/[^/]*$", directory["path"])
        self.provenance["step"] = step and int(step[1])


LAYOUT = Layout(
    "maxtext",
    is_maxtext,
    MaxTextCheckpoint,
    (METADATA, ITEMS, "_CHECKPOINT_METADATA", "commit_success.txt", "[0-9]*", CONFIG),
    takes_preset=True,
)
