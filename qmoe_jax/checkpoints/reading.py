"""Experts are read along the chunk grid: every chunk file once, in bounded memory, ahead of the computation.

A chunk of a matrix [2048, 2080, 6144] may be [256, 208, 256], a part of each of 256 experts. The experts that whole
rows of chunks make up are a *block*:

    block = lcm(experts per chunk of each matrix, experts per group)

If two blocks fit into memory, one is read in the background while the groups of the other are computed. If not, the
block's chunks are read once and written, cut into groups, to scratch files, and it is groups that are read ahead.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import math
import os
import pathlib
import shutil
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from qmoe_jax import scratch
from qmoe_jax.checkpoints import retry
from qmoe_jax.checkpoints.checks import check_finite

MOST_IN_FLIGHT = 8  # chunks


class Reading(NamedTuple):
    """How experts get into memory.

    Attributes:
      dtype: to which weights are cast as they arrive; None: as stored.
      weights_bytes: most memory for experts that are read, all buffers included. None: half of the host's.
      scratch: folder for what doesn't fit; None: the system's for temporary files.
      patience: with reads that fail.
    """

    dtype: Any = None
    weights_bytes: int | None = None
    scratch: str | None = None
    patience: retry.Patience = retry.PATIENT

    @property
    def limit(self) -> int:
        """Bytes."""
        return host_memory_bytes() // 2 if self.weights_bytes is None else self.weights_bytes


DEFAULT = Reading()


def host_memory_bytes() -> int:
    """Memory of the host, or what a container may use of it."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(pathlib.Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


# --- Which chunks make which experts ---------------------------------------------------------------------------------

Region = tuple[slice, ...]


class Grid(NamedTuple):
    """A matrix of all experts of a layer, as it is stored.

    Attributes:
      shape: [experts, in, out].
      chunks: the same of one chunk file.
      itemsize: bytes of a stored value.
      layers: how many layers one chunk file holds a part of; more than 1 in some scanned models.
    """

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    itemsize: int
    layers: int = 1

    @property
    def chunk_bytes(self) -> int:
        """Of a decoded chunk."""
        return math.prod(self.chunks) * self.layers * self.itemsize

    def number_of_chunks(self) -> int:
        return math.prod(-(-n // c) for n, c in zip(self.shape, self.chunks, strict=True))


def regions(shape: tuple[int, ...], chunks: tuple[int, ...], start: int, stop: int) -> Iterator[Region]:
    """Where each chunk lies that holds a part of experts start:stop, cut to these."""
    spans = [(start, stop), *((0, n) for n in shape[1:])]
    numbers = (range(a // c, -(-b // c)) for (a, b), c in zip(spans, chunks, strict=True))
    for at in itertools.product(*numbers):
        yield tuple(slice(max(i * c, a), min((i + 1) * c, b)) for i, c, (a, b) in zip(at, chunks, spans, strict=True))


def blocks(experts: range, size: int, most: int) -> Iterator[range]:
    """`experts` in blocks of `size` that begin at its multiples; `most` is how many experts a layer has."""
    for start in range(experts.start // size * size, min(experts.stop, most), size):
        yield range(max(start, experts.start), min(start + size, experts.stop))


class LayerPlan(NamedTuple):
    """How a layer is read.

    Attributes:
      group: experts that are handed out together.
      block: experts that are read together.
      spilled: blocks go to scratch files first.
      in_flight: chunks that are read at once.
      memory_bytes: most that experts take, in all buffers.
      scratch_bytes: most that lies in scratch files.
    """

    group: int
    block: int
    spilled: bool
    in_flight: int
    memory_bytes: int
    scratch_bytes: int


def plan_layer(grids: Mapping[str, Grid], group: int, dtype: Any, limit: int) -> LayerPlan:
    """The way to read a layer within `limit` bytes.

    Args:
      grids: of its matrices.
      group: experts that are handed out together.
      dtype: to which they are cast; None: as stored.
      limit: bytes.

    Raises:
      ValueError: not even two groups fit; says what would.
    """
    num_experts = next(iter(grids.values())).shape[0]
    group = min(group, num_experts)
    block = min(math.lcm(group, *(g.chunks[0] for g in grids.values())), num_experts)
    sizes = {m: g.itemsize if dtype is None else np.dtype(dtype).itemsize for m, g in grids.items()}
    expert = sum(math.prod(g.shape[1:]) * sizes[m] for m, g in grids.items())  # bytes
    # A chunk is in memory as it is in the file, and decoded; on its way to scratch also cast, and as it is written,
    # while one that was written is read again.
    read = max(2 * g.chunk_bytes for g in grids.values())
    written = max(2 * math.prod(g.chunks) * sizes[m] for m, g in grids.items())
    again = max(2 * math.prod(_pieces(g.chunks, group)) * sizes[m] for m, g in grids.items())
    for spilled in (False, True):
        held = 2 * expert * (group if spilled else block)
        chunk = read + written + again if spilled else read
        if held + chunk <= limit:
            in_flight = min(MOST_IN_FLIGHT, (limit - held) // chunk)
            scratch_bytes = 2 * expert * block if spilled else 0
            return LayerPlan(group, block, spilled, in_flight, held + in_flight * chunk, scratch_bytes)
    raise ValueError(
        f"weights_bytes: found {limit:,}, but two groups of {group} experts and one chunk take {held + chunk:,} bytes: "
        "allow more, or take smaller groups (experts_per_group)."
    )


def _pieces(chunks: tuple[int, ...], group: int) -> tuple[int, ...]:
    """Shape of the files into which chunks are cut: every one is part of one chunk and of one group."""
    return (math.gcd(chunks[0], group), *chunks[1:])


# --- Reading ---------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A stored matrix of all experts of a layer.

    Attributes:
      name: its parameter.
      array: [experts, in, out].
      grid: of the same shape.
      where: the checkpoint, for messages.
      first: which expert the array begins with.
    """

    name: str
    array: ts.TensorStore
    grid: Grid
    where: str
    first: int = 0


Kernels = dict[str, np.ndarray]


def stream(
    layers: Iterable[tuple[str, Callable[[], dict[str, Source]]]], group: int, reading: Reading, experts: range
) -> Generator[tuple[str, int, int, Kernels]]:
    """Experts of many layers, group by group; the next block is read while the caller has the present one.

    Args:
      layers: names, and functions that open the layer's matrices.
      group: experts that are handed out together.
      reading: memory and patience.
      experts: those that are wanted of every layer.

    Yields:
      (layer, start, stop, kernels [experts, in, out] by name), checked to be finite.

    Raises:
      CheckpointError: something can't be read, or is NaN or Inf.
      ValueError: weights_bytes is too small.
    """
    stop = threading.Event()
    with contextlib.ExitStack() as stack:
        folder = functools.cache(lambda: stack.enter_context(scratch.folder(reading.scratch)))
        read = (
            block
            for name, open_sources in layers
            for block in _read_blocks(name, open_sources(), group, reading, experts, folder, stop)
        )
        with contextlib.closing(prefetched(read, stop)) as blocks_ahead:
            for layer, groups, in_memory in blocks_ahead:
                with contextlib.closing(groups if in_memory else prefetched(groups, stop)) as ahead:
                    for start, end, kernels in ahead:
                        yield layer, start, end, kernels
                        del kernels  # A block that is done with isn't kept while the next but one is read.
                del groups, ahead


def _read_blocks(layer, sources, group, reading, experts, folder, stop):
    """(layer, generator of its groups, whether these are in memory) of each block."""
    grids = {m: s.grid for m, s in sources.items()}
    plan = plan_layer(grids, group, reading.dtype, reading.limit)
    num_experts = next(iter(grids.values())).shape[0]
    read = functools.partial(_read, in_flight=plan.in_flight, patience=reading.patience, stop=stop)
    for block in blocks(experts, plan.block, num_experts):
        if plan.spilled:
            directory = folder() / f"{layer.replace('/', '.')}.{block.start}"
            copies, spilled = _spill(sources, block, plan.group, reading.dtype, directory)
            _run(copies, plan.in_flight, reading.patience, stop)
            yield layer, _spilled_groups(spilled, block, plan.group, read, directory), False
        else:
            kernels = read(sources, block, reading.dtype)
            yield layer, _groups(kernels, block, plan.group), True
            del kernels


def _read(sources: Mapping[str, Source], wanted: range, dtype, *, in_flight, patience, stop) -> Kernels:
    """Experts `wanted`, from chunks."""
    kernels, copies = {}, []
    for matrix, source in sources.items():
        dtype_ = source.array.dtype.numpy_dtype if dtype is None else dtype
        kernels[matrix] = np.empty((len(wanted), *source.grid.shape[1:]), dtype_)
        copies.append(_copies(source, ts.array(kernels[matrix], copy=False), wanted))
    _run(itertools.chain(*copies), in_flight, patience, stop)
    for matrix, kernel in kernels.items():
        check_finite(sources[matrix].name, kernel, wanted.start)
    return kernels


def _parts(block: range, group: int) -> Iterator[range]:
    for start in range(block.start, block.stop, group):
        yield range(start, min(start + group, block.stop))


def _groups(kernels: Kernels, block: range, group: int) -> Generator[tuple[int, int, Kernels]]:
    for part in _parts(block, group):
        at = slice(part.start - block.start, part.stop - block.start)
        yield part.start, part.stop, {m: k[at] for m, k in kernels.items()}


def _spill(sources, block: range, group: int, dtype, directory: pathlib.Path):
    """Copies of a block's chunks to files that are cut into groups, and these as sources."""
    spilled, copies = {}, []
    for matrix, source in sources.items():
        shape = (len(block), *source.grid.shape[1:])
        chunks = tuple(map(min, _pieces(source.grid.chunks, group), shape))
        dtype_ = source.array.dtype if dtype is None else ts.dtype(dtype)
        metadata = {
            "shape": shape,
            "chunks": chunks,
            "dtype": "bfloat16" if dtype_ == ts.bfloat16 else dtype_.numpy_dtype.str,
            "compressor": None,
        }
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{directory}/{matrix}/"},
            "metadata": metadata,
            "context": {"file_io_sync": False},  # Nobody wants it after a crash.
        }
        array = ts.open(spec, create=True).result()
        grid = Grid(shape, chunks, dtype_.numpy_dtype.itemsize)
        spilled[matrix] = Source(source.name, array, grid, str(directory), first=block.start)
        copies.append(_spills(source, spilled[matrix], block))
    return itertools.chain(*copies), spilled


def _spilled_groups(spilled, block: range, group: int, read, directory) -> Generator[tuple[int, int, Kernels]]:
    for part in _parts(block, group):
        yield part.start, part.stop, read(spilled, part, None)
    shutil.rmtree(directory, ignore_errors=True)


class _Copy(NamedTuple):
    """One chunk, and where it goes: an array in memory, and from there to scratch where that is wanted."""

    source: Source
    region: Region
    target: ts.TensorStore
    scratch: Source | None = None
    there: Region = ()

    def start(self) -> ts.Future:
        return start_copy(self.source.array[self.region], self.target)

    def spill(self) -> ts.Future:
        assert self.scratch is not None
        return start_copy(self.target, self.scratch.array[self.there])

    def what(self) -> str:
        at = ".".join(str(r.start // c) for r, c in zip(self.region, self.source.grid.chunks, strict=True))
        return f"{self.source.where}: cannot read parameter {self.source.name!r}, chunk {at}"


def start_copy(source: ts.TensorStore, target: ts.TensorStore) -> ts.Future:
    """Starts to read `source` into `target`, cast to its dtype."""
    future = target.write(source if source.dtype == target.dtype else ts.cast(source, target.dtype)).commit
    future.force()
    return future


def _copies(source: Source, target: ts.TensorStore, wanted: range) -> Iterator[_Copy]:
    """Of all chunks of experts `wanted` to `target` [wanted experts, in, out]."""
    first = wanted.start - source.first
    for region in regions(source.grid.shape, source.grid.chunks, first, first + len(wanted)):
        there = (slice(region[0].start - first, region[0].stop - first), *region[1:])
        yield _Copy(source, region, target[there])


def _spills(source: Source, scratch: Source, wanted: range) -> Iterator[_Copy]:
    """The same to scratch files. Straight from file to files TensorStore would read a chunk once for each of them."""
    for copy in _copies(source, scratch.array, wanted):
        chunk = ts.array(np.empty(copy.target.shape, scratch.array.dtype.numpy_dtype), copy=False)
        there = tuple(slice(a, b) for a, b in zip(copy.target.origin, copy.target.domain.exclusive_max, strict=True))
        yield copy._replace(target=chunk, scratch=scratch, there=there)


def _run(copies: Iterator[_Copy], in_flight: int, patience: retry.Patience, stop: threading.Event) -> None:
    """Runs copies, so many at a time."""
    pending: collections.deque[tuple[_Copy, ts.Future]] = collections.deque()

    def finish():
        copy, future = pending.popleft()
        retry.result(copy.start, copy.what(), first=future, patience=patience, stop=stop)
        if copy.scratch is not None:
            what = f"{copy.scratch.where}: cannot write parameter {copy.scratch.name!r}"
            retry.result(copy.spill, what, patience=patience, stop=stop)

    for copy in copies:
        if stop.is_set():
            raise retry.Stopped
        if len(pending) == in_flight:
            finish()
        pending.append((copy, copy.start()))
    while pending:
        finish()


def prefetched(items: Generator[Any], stop: threading.Event | None = None) -> Generator[Any]:
    """The same items; the next is made by a background thread while the caller has the present one.

    Args:
      items: a generator.
      stop: set when the caller stops early, so that `items` may, too.
    """
    stop, end = stop or threading.Event(), object()
    with ThreadPoolExecutor(1, "reading") as pool:
        future = pool.submit(next, items, end)
        try:
            while (item := future.result()) is not end:
                future = pool.submit(next, items, end)
                yield item
                del item
        except BaseException:  # Closed or interrupted: what is under way need not be finished.
            stop.set()
            raise
        finally:
            future.cancel() or future.exception()
            items.close()
