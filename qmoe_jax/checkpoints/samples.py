"""Whether a checkpoint's weights are still those that a run began with, without reading them all.

A sample of a parameter is a hash of the first kilobytes, as they are stored, of up to three of its experts (of three of
the rows, where it has none): the first, the middle and the last one. A run takes samples when it begins, and commits
those of all that its committed layers came from. It refuses to go on, or to commit more, where one has changed, so that
an output never holds layers of two models. What isn't committed yet may be repaired, and the run goes on.

Training changes all weights, which samples tell for certain; a change that leaves them as they are, such as one damaged
chunk among many, they do not tell.

What a sample reads: of arrays in chunks, 4 KB of up to three chunk files; of safetensors, 4 KB of up to three tensors;
of torch.save's files up to three whole tensors, and of compressed experts the files that the first one lies in, as
these can't be read in part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorstore as ts

from qmoe_jax.checkpoints.checkpoint import Checkpoint, StoredCheckpoint
from qmoe_jax.checkpoints.store import Store
from qmoe_jax.errors import CheckpointError

SAMPLE = 4_096  # bytes
AT_ONCE = 16  # reads, for the sake of stores that are far away

Samples = dict[str, str | None]  # by parameter; None: it couldn't be read, which reading it will tell


def samples(checkpoint: Checkpoint, of: Iterable[str] | None = None) -> Samples:
    """Of every parameter: those of `specs`, and compressed experts' matrices; 16 hexadecimal digits each.

    Or of these alone, names in `specs`.
    """
    names = list(checkpoint.specs if of is None else of)
    with ThreadPoolExecutor(AT_ONCE, "samples") as pool:
        found: Samples = dict(zip(names, pool.map(lambda n: _hash(lambda: _stored(checkpoint, n)), names), strict=True))
    if of is None and checkpoint.is_compressed:
        for layer in checkpoint.config.sparse_layers:
            sample = _hash(lambda: _compressed(checkpoint, layer))  # noqa: B023, called at once
            found |= dict.fromkeys(checkpoint.matrices(layer).values(), sample)
    return found


def of_layers(found: Samples, checkpoint: Checkpoint, layers: Iterable[str]) -> Samples:
    """Those that the compression of some sparse layers, the first ones, came from: all but other layers' experts."""
    others = set(checkpoint.config.sparse_layers) - set(layers)
    left_out = {n for layer in others for n in checkpoint.matrices(layer).values()}
    return {name: sample for name, sample in found.items() if name not in left_out}


def changed(before: Samples, now: Samples) -> list[str]:
    """Parameters of `before` whose sample is another one now."""
    return [name for name, sample in before.items() if now.get(name) != sample]


def digest(found: Samples) -> str:
    """One hash of all samples, to compare checkpoints by."""
    return hashlib.sha256("".join(f"{n} {s}\n" for n, s in sorted(found.items())).encode()).hexdigest()[:16]


def _hash(read: Callable[[], Iterable[bytes]]) -> str | None:
    sha256 = hashlib.sha256()
    try:
        for data in read():
            sha256.update(data)
    except (CheckpointError, OSError):
        return None
    return sha256.hexdigest()[:16]


def _stored(checkpoint: Checkpoint, name: str) -> Iterator[bytes]:
    """Some of a parameter's bytes."""
    if isinstance(checkpoint, StoredCheckpoint):
        for array in _three(checkpoint.stored_names(name)):
            yield from _of_array(checkpoint.store, array)
    else:
        yield checkpoint.read(name, _corner(checkpoint.specs[name])).tobytes()


def _compressed(checkpoint: Checkpoint, layer: str) -> Iterator[bytes]:
    """Of a layer's first expert, all matrices together: reading one reads all."""
    for matrix, kernel in checkpoint.read_experts(layer, 0, 1).items():
        for part, array in sorted(kernel.stored().items()):
            yield f"{matrix} {part}".encode() + np.asarray(array).tobytes()[:SAMPLE]


def _of_array(store: Store, name: str) -> Iterator[bytes]:
    """First bytes of what holds the first, the middle and the last row of a stored array."""
    source = store.source(name)
    kvstore = None if source is None else source.array.kvstore
    if source is None or kvstore is None or source.array.spec().to_json()["driver"] != "zarr":  # zarr3 has other names.
        yield store.read(name, _corner(store.specs[name])).tobytes()
        return
    spec = source.array.spec()
    metadata, in_stored = spec.to_json()["metadata"], spec.transform
    assert in_stored is not None
    for row in _three(range(source.array.shape[0])) if source.array.rank else [None]:
        index = [] if row is None else [row, *(0 for _ in source.array.shape[1:])]
        at = in_stored(index)  # in the array that is stored, of which this may be a layer
        chunk = (str(i // c) for i, c in zip(at, metadata["chunks"], strict=True))
        key = metadata.get("dimension_separator", ".").join(chunk) or "0"
        try:
            found = _begin(kvstore, key)
        except ValueError as e:  # TensorStore's, whatever the cause
            raise CheckpointError(f"{store.path}: cannot read chunk {key} of {name!r}: {e}") from e
        if found.state != "value":
            raise CheckpointError(f"{store.path}: chunk {key} of {name!r} is missing.")
        yield found.value


def _begin(kvstore: ts.KvStore, key: str) -> ts.KvStore.ReadResult:
    try:
        return kvstore.read(key, byte_range=slice(0, SAMPLE)).result()
    except ValueError:  # It may be smaller.
        return kvstore.read(key).result()


def _corner(spec) -> tuple[int | slice, ...]:
    """Of three rows, the first bytes."""
    count = max(1, SAMPLE // spec.dtype.itemsize)
    shape = spec.shape
    if len(shape) < 2:
        return tuple(slice(0, count) for _ in shape)
    return (slice(0, shape[0], max(1, (shape[0] - 1) // 2)), *(0 for _ in shape[1:-1]), slice(0, count))


def _three(items):
    """The first, the middle and the last."""
    return [items[i] for i in sorted({0, len(items) // 2, len(items) - 1})] if len(items) else []
