"""Native T5X checkpoints: every layout. Chunk files are made without TensorStore."""

import json
import shutil

import hypothesis
import hypothesis.extra.numpy
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
import tensorstore as ts
from flax import serialization, traverse_util
from t5x_by_hand import (
    CHUNKS,
    LOST,
    OPTIMIZER_STATE,
    SCALE,
    WI,
    assert_holds,
    assert_same,
    encoded,
    placeholders,
    spec,
    values,
    write_index,
    write_legacy,
    write_orbax,
)

from qmoe_jax.checkpoints import t5x
from qmoe_jax.errors import CheckpointError

FIXTURES = (
    "switch_base_tiny",
    "switch_c_tiny",
    "switch_xxl_tiny",
    "tokens_choose_tiny",
    "switch_base_scan_tiny",
    "switch_mini",
)


# Fixtures, written by T5X.


def listed_parameters(path):
    """params.txt of a fixture: {stored name: (shape, dtype)}."""
    lines = [line.split("\t") for line in (path / "params.txt").read_text().splitlines()]
    return {n.removeprefix("target."): (tuple(map(int, s.strip("(),").split(","))), d) for n, s, d in lines}


@pytest.mark.parametrize("fixture", FIXTURES)
def test_fixture_has_every_listed_parameter(fixture, fixture_path):
    path = fixture_path(fixture)
    listed = listed_parameters(path)
    if "scan" in fixture:  # two blocks of two sub-layers: layer = 2 * block + sub-layer, blocks on axis 1
        unscanned = {}
        for name, (shape, dtype) in listed.items():
            if "subblock_" not in name:
                unscanned[name] = (shape, dtype)
                continue
            stack, _, subblock, rest = name.split(".", 3)
            for block in range(2):
                layer = 2 * block + int(subblock[-1])
                unscanned[f"{stack}.layers_{layer}.{rest}"] = (shape[:1] + shape[2:], dtype)
        listed = unscanned
    checkpoint = t5x.open_t5x(path)
    found = {name.replace("/", "."): (s.shape, s.dtype.name) for name, s in checkpoint.specs.items()}
    assert found == listed
    for name, expected in checkpoint.specs.items():
        array = checkpoint.read(name)
        assert (array.shape, array.dtype) == (expected.shape, expected.dtype)
        assert np.isfinite(array).all() and array.any()


def test_step_is_read_off_the_directory(fixture_path):
    assert t5x.open_t5x(fixture_path("switch_mini")).step == 7100
    assert t5x.open_t5x(fixture_path("switch_base_tiny_orbax")).step == 1000


def test_orbax_fixture_equals_legacy_fixture(fixture_path):
    legacy = t5x.open_t5x(fixture_path("switch_base_tiny"))
    orbax = t5x.open_t5x(fixture_path("switch_base_tiny_orbax"))
    assert orbax.specs == legacy.specs
    for name in legacy.specs:
        assert_same(orbax.read(name), legacy.read(name))


def test_scanned_fixture_slices_are_those_of_the_stored_array(fixture_path):
    path = fixture_path("switch_base_scan_tiny")
    directory = path / "checkpoint_1000" / "target.decoder.decoder.subblock_1.mlp.expert.wi.kernel"
    stored = ts.open({"driver": "zarr", "kvstore": f"file://{directory}/"}).result().read().result()
    checkpoint = t5x.open_t5x(path)
    for block, layer in ((0, 1), (1, 3)):
        name = f"decoder/layers_{layer}/mlp/expert/wi/kernel"
        assert_same(checkpoint.read(name), np.ascontiguousarray(stored[:, block]))
        assert_same(checkpoint.read(name, np.s_[3:5, 7]), np.ascontiguousarray(stored[3:5, block, 7]))


# Layouts.


@pytest.mark.parametrize("codec", ["gzip", None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reads_zarr_written_by_hand(tmp_path, dtype, codec):
    arrays = {
        WI: values(4, 6, 10, dtype=dtype),
        SCALE: values(6, dtype=dtype),
        "rank/zero": values(dtype=dtype),
    }
    assert_holds(t5x.open_t5x(write_legacy(tmp_path / "checkpoint_5", arrays, CHUNKS, codec=codec)), arrays)


def test_zstd_chunks(tmp_path, arrays):
    path = write_legacy(tmp_path / "checkpoint_5", arrays)
    directory = path / f"target.{WI.replace('/', '.')}"
    metadata = {"shape": [4, 6, 10], "chunks": [2, 6, 5], "dtype": "<f4", "compressor": {"id": "zstd"}}
    zarr = {"driver": "zarr", "kvstore": f"file://{directory}/", "metadata": metadata}
    ts.open(zarr, create=True, delete_existing=True).result().write(arrays[WI]).result()
    assert (directory / "0.0.1").read_bytes()[:4] == b"\x28\xb5\x2f\xfd"  # zstd's magic number
    assert_holds(t5x.open_t5x(path), arrays)


@pytest.mark.parametrize(
    "changes",
    [
        {"kvstore": {"driver": "gcs", "bucket": "t5x-dummy-bucket", "path": "ARRAY"}},
        {"kvstore": {"driver": "gfile", "path": "ARRAY"}},
        {"kvstore": {"driver": "gfile", "path": "/cns/home/runs/checkpoint_5/ARRAY"}},
        {"kvstore": {"driver": "file"}, "path": "ARRAY"},
    ],
    ids=["gcs", "gfile", "absolute path", "path at the top level"],
)
def test_placeholder_is_looked_up_where_the_checkpoint_is(tmp_path, changes):
    array = values(6)
    path = write_legacy(tmp_path / "checkpoint_5", {SCALE: array})
    changes = json.loads(json.dumps(changes).replace("ARRAY", f"target.{SCALE.replace('/', '.')}/"))
    write_index(path / "checkpoint", {SCALE: spec(SCALE, array, **changes)})
    assert_holds(t5x.open_t5x(path), {SCALE: array})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inlined_arrays_and_scalars(tmp_path, dtype):
    arrays = {
        SCALE: values(6, dtype=dtype),
        "a/scalar": values(1, dtype=dtype)[0],
        "a/number": np.asarray(0.5),
    }
    leaves = {name: encoded(array) for name, array in arrays.items()} | {"a/number": 0.5}
    assert [leaves[n].code for n in (SCALE, "a/scalar")] == [1, 3]
    write_index(tmp_path / "checkpoint_5" / "checkpoint", leaves)
    checkpoint = t5x.open_t5x(tmp_path / "checkpoint_5")
    assert_holds(checkpoint, arrays)
    assert_same(checkpoint.read(SCALE, np.s_[-2:]), arrays[SCALE][-2:])


def test_chunked_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 100)
    array = values(4, 6, 10)
    leaf = encoded(array)
    assert len(leaf["chunks"]) == 10
    write_index(tmp_path / "checkpoint", {WI: leaf})
    assert_holds(t5x.open_t5x(tmp_path), {WI: array})


def test_single_msgpack_file(tmp_path, arrays):
    write_index(tmp_path / "model.checkpoint_12", {n: encoded(a) for n, a in arrays.items()})
    checkpoint = t5x.open_t5x(tmp_path / "model.checkpoint_12")
    assert checkpoint.step == 12
    assert_holds(checkpoint, arrays)


def test_step_inside_the_file_when_the_name_has_none(tmp_path, arrays):
    write_index(tmp_path / "model", {n: encoded(a) for n, a in arrays.items()})
    assert t5x.open_t5x(tmp_path / "model").step == OPTIMIZER_STATE["step"]


def test_empty_subtrees_vanish(tmp_path, arrays):
    path = write_legacy(tmp_path / "checkpoint_5", arrays)
    leaves = {name: spec(name, array) for name, array in arrays.items()}
    write_index(path / "checkpoint", leaves | {"decoder/mutables": {}, "nothing": None})
    assert_holds(t5x.open_t5x(path), arrays)


def test_orbax_placeholders(tmp_path, arrays):
    state = tmp_path / "checkpoint_5" / "state"
    write_orbax(state, arrays, {"state": LOST, "target": placeholders(arrays)})
    assert_holds(t5x.open_t5x(tmp_path / "checkpoint_5"), arrays)
    assert t5x.open_t5x(state).step == 5


def test_orbax_with_full_specs(tmp_path, arrays):
    """T5X of early 2023."""
    specs = traverse_util.unflatten_dict({n: spec(n, a) for n, a in arrays.items()}, sep="/")
    write_orbax(tmp_path / "checkpoint_5" / "state", arrays, {"state": LOST, "target": specs})
    assert_holds(t5x.open_t5x(tmp_path), arrays)


def test_oldest_orbax_form(tmp_path, arrays):
    """No `state` directory, and an `_optimizer` level."""
    prefix = "_optimizer.target"
    optimizer = {"state": LOST, "target": placeholders(arrays, prefix)}
    write_orbax(tmp_path / "1", arrays, {"_optimizer": optimizer, "flax_mutables": None}, prefix)
    assert_holds(t5x.open_t5x(tmp_path), arrays)
    assert t5x.is_t5x(tmp_path)


@pytest.mark.parametrize("dtype", ["<f4", "bfloat16"])
def test_ocdbt(tmp_path, dtype):
    state = tmp_path / "checkpoint_5" / "state"
    state.mkdir(parents=True)
    arrays = {name: values(4, 6, seed=i).astype(jnp.dtype(dtype)) for i, name in enumerate([WI, SCALE])}
    for name, array in arrays.items():
        kvstore = {"driver": "ocdbt", "base": f"file://{state}/", "path": f"target.{name.replace('/', '.')}/"}
        metadata = {"shape": [4, 6], "chunks": [2, 3], "dtype": dtype}
        ts.open({"driver": "zarr", "kvstore": kvstore, "metadata": metadata, "create": True}).result()[:] = array
    (state / "checkpoint").write_bytes(msgpack.packb({"state": LOST, "target": placeholders(arrays)}))
    checkpoint = t5x.open_t5x(tmp_path)
    assert_holds(checkpoint, arrays)
    assert_same(checkpoint.read(WI, np.s_[1:3, 4]), arrays[WI][1:3, 4])


def test_scanned_layers_appear_one_by_one(tmp_path):
    """Two blocks of three sub-layers; the last one is sparse."""
    stored = {f"encoder/encoder/subblock_{j}/pre_mlp_layer_norm/scale": values(6, 2, seed=j) for j in range(3)}
    stored["encoder/encoder/subblock_2/mlp/expert/wi/kernel"] = values(4, 2, 6, 10)
    checkpoint = t5x.open_t5x(write_legacy(tmp_path / "checkpoint_5", stored))
    expected = {
        f"encoder/layers_{3 * block + j}/pre_mlp_layer_norm/scale": values(6, 2, seed=j)[:, block]
        for block in range(2)
        for j in range(3)
    }
    for layer in (2, 5):
        expected[f"encoder/layers_{layer}/mlp/expert/wi/kernel"] = values(4, 2, 6, 10)[:, layer // 3]
    assert_holds(checkpoint, expected)


def test_scanned_arrays_that_disagree_about_blocks(tmp_path):
    stored = {f"encoder/encoder/subblock_{j}/pre_mlp_layer_norm/scale": values(6, 2 + j) for j in range(2)}
    with pytest.raises(CheckpointError, match=r"subblock_1/pre_mlp_layer_norm/scale.*\(6, 3\).*2 blocks"):
        t5x.open_t5x(write_legacy(tmp_path / "checkpoint_5", stored))


# Slices.


@pytest.fixture(scope="module")
def sliced(tmp_path_factory):
    """A zarr array, the same inlined, and the same as one layer of a scanned model."""
    array = values(5, 6, 7)
    scanned = "encoder/encoder/subblock_0/x"
    both = np.stack([values(5, 6, 7, seed=1), array], axis=1)
    arrays = {"zarr": array, scanned: both}
    path = tmp_path_factory.mktemp("sliced")
    write_legacy(path, arrays, {"zarr": (2, 6, 4), scanned: (2, 1, 6, 4)})
    leaves = {name: spec(name, a) for name, a in arrays.items()} | {"inlined": encoded(array)}
    write_index(path / "checkpoint", leaves)
    return t5x.open_t5x(path), array


@hypothesis.given(index=hypothesis.extra.numpy.basic_indices((5, 6, 7)))
@hypothesis.settings(deadline=None, max_examples=60)
@pytest.mark.parametrize("name", ["zarr", "inlined", "encoder/layers_1/x"])
def test_any_basic_index_reads_what_numpy_takes(sliced, name, index):
    checkpoint, array = sliced
    assert_same(checkpoint.read(name, index), np.ascontiguousarray(array[index]).reshape(array[index].shape))


@pytest.mark.parametrize("index", [(5,), (0, 0, -8), (0, 0, 0, 0)])
def test_index_out_of_bounds(sliced, index):
    with pytest.raises(IndexError):
        sliced[0].read("zarr", index)


def test_slice_touches_only_its_chunks(tmp_path, arrays):
    path = write_legacy(tmp_path / "checkpoint_5", arrays, {WI: (2, 3, 5)})
    directory = path / f"target.{WI.replace('/', '.')}"
    for file in directory.iterdir():
        if file.name not in (".zarray", "1.0.1"):
            file.unlink()
    shutil.rmtree(path / f"target.{SCALE.replace('/', '.')}")
    assert_same(t5x.open_t5x(path).read(WI, np.s_[2:, :3, 6:]), arrays[WI][2:, :3, 6:].copy())


def test_scanned_layer_touches_only_its_block(tmp_path):
    name = "encoder/encoder/subblock_0/mlp/expert/wi/kernel"
    array = values(4, 2, 6, 10)
    path = write_legacy(tmp_path / "checkpoint_5", {name: array}, {name: (4, 1, 6, 10)})
    (path / f"target.{name.replace('/', '.')}" / "0.0.0.0").unlink()
    assert_same(t5x.open_t5x(path).read("encoder/layers_1/mlp/expert/wi/kernel"), array[:, 1].copy())


# Which checkpoint.


def test_newest_complete_step_is_taken(tmp_path, arrays):
    for step in (5, 30, 200):
        write_legacy(tmp_path / f"checkpoint_{step}", arrays)
    (tmp_path / "checkpoint_1000").mkdir()  # nothing in it
    write_legacy(tmp_path / "checkpoint_2000.tmp-1234", arrays)
    (tmp_path / "train_ds-000-of-001").touch()
    assert t5x.open_t5x(tmp_path).step == 200
    assert t5x.open_t5x(str(tmp_path / "checkpoint_30")).step == 30
    assert t5x.open_t5x(f"file://{tmp_path}/checkpoint_5").step == 5


def test_nothing_at_the_path(tmp_path):
    with pytest.raises(CheckpointError, match="No checkpoint at .*absent.*expected a T5X step directory"):
        t5x.open_t5x(tmp_path / "absent")
    (tmp_path / "checkpoint_7.tmp-99").mkdir()
    with pytest.raises(CheckpointError, match=r"checkpoint_7\.tmp-99.*never finished"):
        t5x.open_t5x(tmp_path)
    assert not t5x.is_t5x(tmp_path)


def test_is_t5x_tells_other_files_apart(tmp_path, arrays):
    assert t5x.is_t5x(write_legacy(tmp_path / "run" / "checkpoint_5", arrays))
    assert t5x.is_t5x(tmp_path / "run")
    assert t5x.is_t5x(tmp_path / "run" / "checkpoint_5" / "checkpoint")
    (tmp_path / "text").write_text('{"version": 3}')
    assert not t5x.is_t5x(tmp_path / "text")
    assert not t5x.is_t5x(tmp_path / "absent")
