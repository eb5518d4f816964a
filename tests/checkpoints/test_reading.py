"""Experts along the chunk grid: right values, each chunk once, bounded memory, and stores that fail."""

import collections
import contextlib
import itertools
import pathlib
import threading

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from t5x_by_hand import encoded, values, write_index, write_legacy
from test_t5x_damage import corrupt, truncate
from tiny_model import CONFIG, random_params

from qmoe_jax import scratch
from qmoe_jax.checkpoints import NativeCheckpoint, open_t5x, reading, retry, write_t5x
from qmoe_jax.checkpoints.reading import Grid, Reading, plan_layer
from qmoe_jax.errors import CheckpointError

BF16 = ml_dtypes.bfloat16
LAYERS = CONFIG.sparse_layers
EXPERTS, D, F = CONFIG.num_experts, CONFIG.d_model, CONFIG.d_ff
WI = f"{LAYERS[0]}/mlp/expert/wi/kernel"


def is_expert(name):
    return "/mlp/expert/" in name


def checkpoint_of(path, params, wi=(4, 10, 14), wo=(4, 14, 10), **options):
    chunks = {n: wi if "/wi/" in n else wo for n in params if is_expert(n)}
    return NativeCheckpoint(write_legacy(path / "checkpoint_1", params, chunks, **options))


@pytest.fixture(scope="module")
def params():
    return random_params()


def bytes_of_a_layer(itemsize=2):
    return 2 * EXPERTS * D * F * itemsize


def small(experts, itemsize=2):
    """A bound that holds two groups of so many experts and a chunk, but not two blocks."""
    return 2 * experts * 2 * D * F * itemsize + 4 * 10 * 14 * (2 * 4 + 4 * itemsize)


def metric(name):
    (found,) = (m for m in ts.experimental_collect_matching_metrics(name) if m["name"] == name)
    return sum(v["value"] for v in found["values"])


# --- Which chunks ----------------------------------------------------------------------------------------------------


@hypothesis.given(st.data())
def test_regions_cover_every_element_once_and_never_cross_a_chunk(data):
    shape = tuple(data.draw(st.integers(1, 7)) for _ in range(3))
    chunks = tuple(data.draw(st.integers(1, n)) for n in shape)
    start = data.draw(st.integers(0, shape[0] - 1))
    stop = data.draw(st.integers(start + 1, shape[0]))
    count = np.zeros(shape, int)
    for region in reading.regions(shape, chunks, start, stop):
        count[region] += 1
        assert all(r.start // c == (r.stop - 1) // c for r, c in zip(region, chunks, strict=True))
    assert (count[start:stop] == 1).all() and count.sum() == count[start:stop].size


@hypothesis.given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_blocks_cover_a_range_in_order_and_begin_at_multiples(most, size, data):
    start = data.draw(st.integers(0, most - 1))
    stop = data.draw(st.integers(start + 1, most))
    found = list(reading.blocks(range(start, stop), size, most))
    assert list(itertools.chain(*found)) == list(range(start, stop))
    assert all(b.start % size == 0 for b in found[1:])


C2048 = {"wi": Grid((2048, 2080, 6144), (256, 208, 256), 4), "wo": Grid((2048, 6144, 2080), (256, 256, 208), 4)}


def test_c2048_is_spilled_where_256_experts_dont_fit_twice():
    expert = 2 * 2080 * 6144 * 2
    plan = plan_layer(C2048, 16, BF16, 8 << 30)
    assert plan.spilled and plan.block == 256 and plan.scratch_bytes == 2 * 256 * expert
    assert 2 * 16 * expert < plan.memory_bytes <= 8 << 30
    plan = plan_layer(C2048, 16, BF16, 64 << 30)
    assert not plan.spilled and plan.scratch_bytes == 0 and 2 * 256 * expert < plan.memory_bytes <= 64 << 30


def test_a_bound_below_two_groups_is_refused_with_what_it_takes():
    with pytest.raises(ValueError, match=r"weights_bytes: found 1,000, but two groups of 16 experts .* [0-9,]+ bytes"):
        plan_layer(C2048, 16, BF16, 1000)


def test_matrices_cut_differently_make_blocks_of_whole_chunks_of_both_and_whole_groups():
    grids = {"wi": Grid((24, 4, 4), (3, 4, 4), 4), "wo": Grid((24, 4, 4), (4, 4, 4), 4)}
    assert plan_layer(grids, 2, None, 1 << 20).block == 12
    assert plan_layer(grids, 5, None, 1 << 20).block == 24  # at most all


# --- Values ----------------------------------------------------------------------------------------------------------

CHUNKS = {
    "chunks span all experts and cut both axes": ((8, 10, 14), (8, 14, 10)),
    "chunks span four experts": ((4, 20, 14), (4, 7, 20)),
    "matrices cut differently, odd edges": ((3, 8, 28), (2, 28, 9)),
    "an expert a chunk": ((1, 20, 28), (1, 28, 20)),
}


@pytest.mark.parametrize("spilled", [False, True], ids=["in memory", "spilled"])
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("group", [1, 2, 3, 8, 100])
def test_streamed_experts_are_the_stored_ones(tmp_path, params, monkeypatch, spilled, chunks, group):
    checkpoint = checkpoint_of(tmp_path / "model", params, *chunks)
    if spilled:  # Whatever the bound: the choice itself is tested elsewhere.
        plan = reading.plan_layer
        monkeypatch.setattr(reading, "plan_layer", lambda *a: plan(*a)._replace(spilled=True, in_flight=2))
    how = Reading(BF16, scratch=str(tmp_path / "scratch"))
    found = {}
    for layer, start, stop, kernels in checkpoint.stream(LAYERS, group, how):
        assert 0 < stop - start <= group
        for m, kernel in kernels.items():
            found.setdefault(f"{layer}/mlp/expert/{m}/kernel", []).append((start, stop, kernel))
    assert list(dict.fromkeys(n.split("/mlp")[0] for n in found)) == list(LAYERS)
    for name, parts in found.items():
        assert [e for a, b, _ in parts for e in range(a, b)] == list(range(EXPERTS))
        whole = np.concatenate([k for *_, k in parts])
        assert whole.dtype == BF16 and whole.tobytes() == params[name].astype(BF16).tobytes()
    assert not list((tmp_path / "scratch").glob("*"))


@pytest.mark.parametrize("spilled", [False, True], ids=["in memory", "spilled"])
def test_some_experts_as_stored(tmp_path, params, spilled):
    checkpoint = checkpoint_of(tmp_path, params)
    how = Reading(weights_bytes=small(2, itemsize=4) if spilled else None)
    groups = list(checkpoint.stream(LAYERS[1:2], 2, how, experts=range(3, 7)))
    assert [e for _, a, b, _ in groups for e in range(a, b)] == [3, 4, 5, 6]
    found = np.concatenate([k["wo"] for *_, k in groups])
    np.testing.assert_array_equal(found, params[f"{LAYERS[1]}/mlp/expert/wo/kernel"][3:7])


@pytest.mark.parametrize("fixture", ["switch_base_tiny_orbax", "switch_base_scan_tiny", "switch_xxl_tiny"])
def test_other_layouts(fixture, fixture_path):
    checkpoint = NativeCheckpoint(fixture_path(fixture))
    for layer, start, stop, kernels in checkpoint.stream(checkpoint.config.sparse_layers, 3):
        for m, kernel in kernels.items():
            np.testing.assert_array_equal(
                kernel, checkpoint.read(f"{layer}/mlp/expert/{m}/kernel", (slice(start, stop),))
            )


def test_scanned_chunks_of_several_layers_are_known(tmp_path):
    array = values(4, 2, 6, 10)
    name = "encoder/encoder/subblock_0/mlp/expert/wi/kernel"
    t5x = open_t5x(write_legacy(tmp_path / "checkpoint_1", {name: array}, {name: (2, 2, 3, 10)}))
    source = t5x.source("encoder/layers_1/mlp/expert/wi/kernel")
    assert source.grid == Grid((4, 6, 10), (2, 3, 10), 4, layers=2)
    (group,) = reading.stream([("layer", lambda: {"wi": source})], 4, Reading(), range(4))
    np.testing.assert_array_equal(group[3]["wi"], array[:, 1])


# --- Once, ahead, within bounds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [None, small(2)], ids=["in memory", "spilled"])
def test_each_chunk_file_is_read_once(tmp_path, params, bound):
    checkpoint = checkpoint_of(tmp_path / "model", params, codec=None)
    opened = [s for layer in LAYERS for s in checkpoint.sources(layer).values()]  # reads .zarray
    files, size = metric("/tensorstore/kvstore/file/read"), metric("/tensorstore/kvstore/file/bytes_read")
    how = Reading(BF16, bound, str(tmp_path / "scratch"))
    for _ in checkpoint.stream(LAYERS, 2, how):
        pass
    chunks = sum(s.grid.number_of_chunks() for s in opened)
    assert chunks == len(LAYERS) * 2 * 2 * 2 * 2  # 2 matrices, each cut in two along each axis
    files, size = (
        metric("/tensorstore/kvstore/file/read") - files,
        metric("/tensorstore/kvstore/file/bytes_read") - size,
    )
    stored = len(LAYERS) * bytes_of_a_layer(4)
    if bound is None:
        assert (files, size) == (chunks, stored)
    else:  # And what was spilled, once: bfloat16, in groups of two.
        assert size == stored + len(LAYERS) * bytes_of_a_layer(2)


def test_the_next_block_is_read_while_the_caller_has_the_present_one(tmp_path, params, monkeypatch):
    checkpoint = checkpoint_of(tmp_path, params)
    read, enough = [], threading.Event()
    start = reading.start_copy

    def watched(source, target):
        read.append(source)
        if len(read) == 16:
            enough.set()
        return start(source, target)

    monkeypatch.setattr(reading, "start_copy", watched)
    with contextlib.closing(checkpoint.stream(LAYERS, 4)) as stream:
        next(stream)
        assert enough.wait(30), "the second block of 8 chunks was never begun"
        assert len(read) <= 16


def test_no_more_chunks_at_once_than_fit(tmp_path, params, monkeypatch):
    checkpoint = checkpoint_of(tmp_path, params, codec=None)
    sources = checkpoint.sources(LAYERS[0])
    plan = plan_layer({m: s.grid for m, s in sources.items()}, 2, BF16, small(2))
    assert plan.spilled and plan.in_flight == 1
    running = collections.Counter()  # by thread: one spills, one reads what was spilled
    start, result = reading.start_copy, retry.result

    def counted(source, target):
        running[threading.get_ident()] += 1
        assert max(running.values()) == 1 and len(running) <= 2
        return start(source, target)

    def finished(*args, **options):
        done = result(*args, **options)
        running[threading.get_ident()] -= 1
        return done

    monkeypatch.setattr(reading, "start_copy", counted)
    monkeypatch.setattr(reading.retry, "result", finished)
    how = Reading(BF16, small(2), str(tmp_path / "scratch"))
    with contextlib.closing(checkpoint.stream(LAYERS[:1], 2, how)) as stream:
        next(stream)


def test_closing_early_stops_the_reader_and_removes_scratch_files(tmp_path, params):
    checkpoint = checkpoint_of(tmp_path, params)
    how = Reading(BF16, small(1), str(tmp_path / "scratch"))
    stream = checkpoint.stream(LAYERS, 1, how)
    next(stream)
    assert list((tmp_path / "scratch").glob(f"{scratch.PREFIX}*/*/*"))
    threads = threading.active_count()
    stream.close()
    assert threading.active_count() < threads
    assert not list((tmp_path / "scratch").iterdir())


# --- Scratch folders -------------------------------------------------------------------------------------------------


def test_folders_of_dead_runs_are_removed_and_those_of_living_ones_are_not(tmp_path):
    dead = tmp_path / f"{scratch.PREFIX}dead"
    dead.mkdir()
    (dead / "lock").touch()
    (dead / "data").write_bytes(b"x" * 100)
    other = tmp_path / "mine"
    other.mkdir()
    with scratch.folder(tmp_path) as first:
        assert not dead.exists()
        with scratch.folder(tmp_path) as second:
            assert first.is_dir() and second.is_dir() and first != second
        assert first.is_dir() and not second.exists()
    assert list(tmp_path.iterdir()) == [other]


# --- Stores that fail ------------------------------------------------------------------------------------------------

QUICK = retry.Patience(attempts=4, first_delay=0.001, stalled=0.05)


class Faults:
    """Stands in for `start_copy`: the first `times` copies of each chunk are what `fault` makes of them."""

    def __init__(self, fault, times):
        self.fault, self.times, self.tried = fault, times, {}
        self.start = reading.start_copy

    def __call__(self, source, target):
        chunk = str(source.domain), source.dtype.name
        self.tried[chunk] = self.tried.get(chunk, 0) + 1
        if self.tried[chunk] <= self.times:
            return self.fault(source, target)
        return self.start(source, target)


def failing(message):
    def fault(source, target):
        promise, future = ts.Promise.new()
        promise.set_exception(ValueError(message))
        return future

    return fault


def stalling(source, target):
    promise, future = ts.Promise.new()
    stalling.promises.append(promise)  # A promise that is dropped fails at once.
    return future


stalling.promises = []


@pytest.mark.parametrize(
    "fault",
    [failing('UNAVAILABLE: Error reading "x": connection reset'), failing("DEADLINE_EXCEEDED: HTTP 504")],
    ids=["unavailable", "timeout"],
)
def test_what_fails_for_a_while_is_read_in_the_end(tmp_path, params, monkeypatch, fault):
    checkpoint = checkpoint_of(tmp_path, params)
    faults = Faults(fault, 2)
    monkeypatch.setattr(reading, "start_copy", faults)
    patience = QUICK._replace(stalled=300.0)
    ((_, _, _, kernels),) = checkpoint.stream(LAYERS[:1], EXPERTS, Reading(patience=patience))
    np.testing.assert_array_equal(kernels["wi"], params[WI])
    assert set(faults.tried.values()) == {3}


def test_a_read_that_stalls_is_started_anew(tmp_path, params, monkeypatch):
    checkpoint = checkpoint_of(tmp_path, params)
    start, calls = reading.start_copy, []

    def first_stalls(source, target):
        calls.append(source)
        return stalling(source, target) if len(calls) == 1 else start(source, target)

    monkeypatch.setattr(reading, "start_copy", first_stalls)
    patience = QUICK._replace(stalled=2.0)  # Real reads take their time on a busy machine.
    ((_, _, _, kernels),) = checkpoint.stream(LAYERS[:1], EXPERTS, Reading(patience=patience))
    np.testing.assert_array_equal(kernels["wi"], params[WI])
    assert len(calls) >= 17  # 16 chunks


@pytest.mark.parametrize(
    ("fault", "why"), [(failing("UNAVAILABLE: HTTP 503"), "HTTP 503"), (stalling, "no answer within 0.05 s")]
)
def test_what_keeps_failing_is_named(tmp_path, params, monkeypatch, fault, why):
    checkpoint = checkpoint_of(tmp_path, params)
    faults = Faults(fault, 10**9)
    monkeypatch.setattr(reading, "start_copy", faults)
    message = rf"checkpoint_1/checkpoint: .*'{WI}', chunk 0\.0\.0: .*{why}; tried 4 times .* the same command again"
    with pytest.raises(CheckpointError, match=message):
        list(checkpoint.stream(LAYERS, 4, Reading(patience=QUICK)))
    assert max(faults.tried.values()) == 4


def chunk_file(tmp_path, at="1.0.1"):
    return tmp_path / "checkpoint_1" / f"target.{WI.replace('/', '.')}" / at


@pytest.mark.parametrize("damage", [truncate, corrupt], ids=["short", "corrupt"])
def test_short_data_are_read_again(tmp_path, params, monkeypatch, damage):
    """A store that returns damaged data once: the file is whole again by the second try."""
    checkpoint = checkpoint_of(tmp_path, params)
    file = chunk_file(tmp_path)
    content = file.read_bytes()
    damage(file)
    pauses = []

    class Stop(threading.Event):
        def wait(self, timeout=None):
            if timeout is None:  # A thread begins.
                return super().wait()
            pauses.append(timeout)
            return file.write_bytes(content) == 0

    monkeypatch.setattr(reading.threading, "Event", Stop)
    ((_, _, _, kernels),) = reading.stream(
        [(LAYERS[0], lambda: checkpoint.sources(LAYERS[0]))], EXPERTS, Reading(), range(EXPERTS)
    )
    np.testing.assert_array_equal(kernels["wi"], params[WI])
    assert pauses == [0.25]


@pytest.mark.parametrize(
    ("damage", "tries"), [(pathlib.Path.unlink, 1), (truncate, 3), (corrupt, 3)], ids=["missing", "short", "corrupt"]
)
@pytest.mark.parametrize("bound", [None, small(2)], ids=["in memory", "spilled"])
def test_a_chunk_that_stays_damaged_is_named_soon(tmp_path, params, monkeypatch, damage, tries, bound):
    checkpoint = checkpoint_of(tmp_path, params)
    damage(chunk_file(tmp_path))
    faults = Faults(None, 0)
    monkeypatch.setattr(reading, "start_copy", faults)
    how = Reading(BF16, bound, str(tmp_path / "scratch"), QUICK._replace(stalled=300.0))
    with pytest.raises(CheckpointError, match=rf"{WI}.*kernel/1\.0\.1.*copied again"):
        list(checkpoint.stream(LAYERS, 2, how))
    assert max(n for (_, dtype), n in faults.tried.items() if dtype == "float32") == tries  # Spilled, it is bfloat16.
    assert not list(pathlib.Path(how.scratch).glob("*"))


def test_pauses_grow_exponentially():
    pauses = []

    class Stop(threading.Event):
        def wait(self, timeout=None):
            pauses.append(timeout)

    with pytest.raises(CheckpointError, match="tried 8 times"):
        retry.result(lambda: failing("UNAVAILABLE: x")(None, None), "what", stop=Stop())
    assert pauses == [0.25 * 2**i for i in range(7)]


def test_dense_parameters_are_tried_again_too(tmp_path, params, monkeypatch):
    name = "encoder/encoder_norm/scale"
    checkpoint = checkpoint_of(tmp_path, params)
    file = tmp_path / "checkpoint_1" / f"target.{name.replace('/', '.')}" / "0"
    content = file.read_bytes()
    truncate(file)
    monkeypatch.setattr(threading.Event, "wait", lambda self, timeout: file.write_bytes(content) == 0)
    np.testing.assert_array_equal(checkpoint.read(name), params[name])


@pytest.mark.parametrize("bound", [None, small(2)], ids=["in memory", "spilled"])
def test_nan_is_named_with_its_expert(tmp_path, params, bound):
    bad = {**params, WI: params[WI].copy()}
    bad[WI][6, 3, 5] = np.nan
    checkpoint = checkpoint_of(tmp_path, bad)
    with pytest.raises(CheckpointError, match=rf"'{WI}', expert 6: NaN or Inf"):
        list(checkpoint.stream(LAYERS, 2, Reading(BF16, bound, str(tmp_path / "scratch"))))


def test_float32_that_overflows_bfloat16_is_refused(tmp_path, params):
    bad = {**params, WI: params[WI].copy()}
    bad[WI][1, 0, 0] = np.float32(3.4e38)
    with pytest.raises(CheckpointError, match=rf"'{WI}', expert 1: NaN or Inf"):
        list(checkpoint_of(tmp_path, bad).stream(LAYERS, 2, Reading(BF16)))


def test_inlined_arrays(tmp_path, params):
    write_index(tmp_path / "checkpoint_1" / "checkpoint", {n: encoded(v) for n, v in params.items()})
    groups = list(NativeCheckpoint(tmp_path).stream(LAYERS[:1], 3))
    assert [(a, b) for _, a, b, _ in groups] == [(0, 3), (3, 6), (6, 8)]
    np.testing.assert_array_equal(np.concatenate([k["wi"] for *_, k in groups]), params[WI])


def test_written_by_the_project(tmp_path, params):
    checkpoint = NativeCheckpoint(write_t5x(tmp_path, params))
    for start, stop, kernels in checkpoint.experts(LAYERS[0], 3):
        np.testing.assert_array_equal(kernels["wi"], params[WI][start:stop])
