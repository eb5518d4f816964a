"""Native T5X checkpoints: every layout, every kind of damage. Chunk files are made without TensorStore."""

import gzip
import itertools
import json
import pathlib
import shutil

import hypothesis
import hypothesis.extra.numpy
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import pytest
import tensorstore as ts
from flax import serialization, traverse_util

from qmoe_jax.checkpoints import t5x
from qmoe_jax.checkpoints.checks import check_finite
from qmoe_jax.errors import CheckpointError

FIXTURES = (
    "switch_base_tiny",
    "switch_c_tiny",
    "switch_xxl_tiny",
    "tokens_choose_tiny",
    "switch_base_scan_tiny",
    "switch_mini",
)
WI = "encoder/layers_1/mlp/expert/wi/kernel"
SCALE = "encoder/encoder_norm/scale"


# Checkpoints made by hand.


def values(*shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(jnp.dtype(dtype))


def write_zarr(path, array, chunks, codec="gzip", **metadata):
    """A zarr array in plain Python: one file per chunk, C order, chunks at the edge padded."""
    path.mkdir(parents=True)
    for at in itertools.product(*(range(-(-n // c)) for n, c in zip(array.shape, chunks, strict=True))):
        part = array[tuple(slice(i * c, (i + 1) * c) for i, c in zip(at, chunks, strict=True))]
        chunk = np.zeros(chunks, array.dtype)
        chunk[tuple(slice(n) for n in part.shape)] = part
        content = chunk.tobytes()
        name = ".".join(map(str, at)) or "0"
        (path / name).write_bytes(gzip.compress(content) if codec == "gzip" else content)
    zarray = {
        "zarr_format": 2,
        "shape": array.shape,
        "chunks": chunks,
        "dtype": "bfloat16" if array.dtype == ml_dtypes.bfloat16 else array.dtype.str,
        "compressor": {"id": "gzip", "level": 1} if codec == "gzip" else None,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "dimension_separator": ".",
        **metadata,
    }
    (path / ".zarray").write_text(json.dumps(zarray))


def spec(name, array, **changes):
    """The placeholder of an array as T5X's Checkpointer writes it, but with wrong chunks and compressor."""
    return {
        "driver": "zarr",
        "dtype": array.dtype.name,
        "kvstore": {"driver": "file", "path": f"target.{name.replace('/', '.')}/"},
        "metadata": {"chunks": [1] * array.ndim, "compressor": {"id": "lz4"}, "shape": list(array.shape)},
        **changes,
    }


# Inlined, and an array that was never written: both must be left alone.
OPTIMIZER_STATE = {
    "param_states": {
        "lost": spec("nowhere", np.zeros((2, 2))),
        "pickled": msgpack.ExtType(42, b"not an array"),
    },
    "step": 7,
}


def write_index(path, leaves, **changes):
    """The msgpack file of a legacy checkpoint; `leaves` by '/'-joined name."""
    target = traverse_util.unflatten_dict(leaves, sep="/")
    index = {"version": 3, "optimizer": {"state": OPTIMIZER_STATE, "target": target}} | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgpack.packb(index))


def write_legacy(step_directory, arrays, chunks=None, **zarray):
    for name, array in arrays.items():
        directory = step_directory / f"target.{name.replace('/', '.')}"
        write_zarr(directory, array, (chunks or {}).get(name, array.shape), **zarray)
    write_index(step_directory / "checkpoint", {name: spec(name, array) for name, array in arrays.items()})
    return step_directory


def encoded(array):
    """Flax's own encoding of an array."""
    return msgpack.unpackb(serialization.msgpack_serialize({"x": array}))["x"]


def assert_same(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


def assert_holds(checkpoint, arrays):
    assert set(checkpoint.specs) == set(arrays)
    for name, array in arrays.items():
        assert checkpoint.specs[name].shape == array.shape
        assert checkpoint.specs[name].dtype == array.dtype
        assert_same(checkpoint.read(name), array)


@pytest.fixture
def arrays():
    return {WI: values(4, 6, 10), SCALE: values(6, seed=1)}


CHUNKS = {WI: (2, 6, 4)}  # the last chunk of the last axis is cut


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


def write_orbax(directory, arrays, index, prefix="target"):
    for name, array in arrays.items():
        write_zarr(directory / f"{prefix}.{name.replace('/', '.')}", array, CHUNKS.get(name, array.shape))
    (directory / "checkpoint").write_bytes(msgpack.packb(index))


def placeholders(arrays, prefix="target"):
    leaves = {name: f"PLACEHOLDER://{prefix}.{name.replace('/', '.')}" for name in arrays}
    return traverse_util.unflatten_dict(leaves, sep="/")


LOST = {"param_states": {"lost": "PLACEHOLDER://state.param_states.lost"}, "step": "PLACEHOLDER://state.step"}


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


# Damage.


@pytest.mark.parametrize("keep", [0, 1, 40, -1])
def test_truncated_msgpack(tmp_path, arrays, keep):
    file = write_legacy(tmp_path / "checkpoint_5", arrays) / "checkpoint"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="checkpoint_5/checkpoint: truncated"):
        t5x.open_t5x(tmp_path)


@pytest.mark.parametrize("content", [b"model_checkpoint_path: x", b"\x93\x01\x02\x03", b"\xc1", b"\x81\xa1a\x01"])
def test_not_the_msgpack_of_a_checkpoint(tmp_path, content):
    (tmp_path / "checkpoint").write_bytes(content)
    with pytest.raises(CheckpointError, match="not .*T5X checkpoint"):
        t5x.open_t5x(tmp_path)


def test_msgpack_followed_by_more(tmp_path, arrays):
    file = write_legacy(tmp_path, arrays) / "checkpoint"
    file.write_bytes(file.read_bytes() + b"\0\0")
    with pytest.raises(CheckpointError, match="2 bytes follow"):
        t5x.open_t5x(tmp_path)


@pytest.mark.parametrize("version", [2, None])
def test_other_versions_are_refused(tmp_path, arrays, version):
    path = write_legacy(tmp_path, arrays)
    write_index(path / "checkpoint", {n: spec(n, a) for n, a in arrays.items()}, version=version)
    with pytest.raises(CheckpointError, match=f"version {version}, expected version 3"):
        t5x.open_t5x(path)


def test_bfloat16_stored_as_integers_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=f"floating-point.*\n.*{SCALE}: uint16"):
        t5x.open_t5x(write_legacy(tmp_path, {SCALE: np.zeros(6, np.uint16)}))


@pytest.mark.parametrize(
    "leaf",
    [
        "text",
        b"bytes",
        [1, 2],
        msgpack.ExtType(1, msgpack.packb([[4], "float32", b"\0" * 15])),
        msgpack.ExtType(1, msgpack.packb([[1], "object", b"\0" * 8])),
        msgpack.ExtType(1, b"\xc1"),
        spec(SCALE, np.zeros(6), driver="n5"),
        spec(SCALE, np.zeros(6), kvstore={"driver": "file"}),
        spec(SCALE, np.zeros(6), dtype="no_such_dtype"),
    ],
)
def test_leaf_that_is_no_array(tmp_path, leaf):
    write_index(tmp_path / "checkpoint", {SCALE: leaf})
    with pytest.raises(CheckpointError, match=f"parameter '{SCALE}' cannot be understood"):
        t5x.open_t5x(tmp_path)


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def corrupt(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [pathlib.Path.unlink, truncate, corrupt], ids=["missing", "truncated", "corrupt"])
@pytest.mark.parametrize("orbax", [False, True], ids=["legacy", "orbax"])
def test_damaged_chunk_is_named(tmp_path, arrays, orbax, damage):
    directory = tmp_path / "checkpoint_5" / ("state" if orbax else "")
    if orbax:
        write_orbax(directory, arrays, {"state": LOST, "target": placeholders(arrays)})
    else:
        write_legacy(directory, arrays, CHUNKS)
    damage(directory / f"target.{WI.replace('/', '.')}" / "1.0.2")
    checkpoint = t5x.open_t5x(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{WI}.*target\.{WI.replace('/', '.')}/1\.0\.2"):
        checkpoint.read(WI)
    assert_same(checkpoint.read(WI, np.s_[:2]), arrays[WI][:2])
    assert_same(checkpoint.read(SCALE), arrays[SCALE])


@pytest.mark.parametrize("lost", range(1, 30))
def test_truncated_gzip_is_never_read_wrongly(tmp_path, arrays, lost):
    """The last bytes are a checksum: without them the values are either refused or still right."""
    path = write_legacy(tmp_path, arrays)
    file = path / f"target.{SCALE.replace('/', '.')}" / "0"
    file.write_bytes(file.read_bytes()[:-lost])
    try:
        found = t5x.open_t5x(path).read(SCALE)
    except CheckpointError:
        return
    assert_same(found, arrays[SCALE])


def test_truncated_chunk_without_codec(tmp_path, arrays):
    path = write_legacy(tmp_path, arrays, codec=None)
    truncate(path / f"target.{SCALE.replace('/', '.')}" / "0")
    with pytest.raises(CheckpointError, match=rf"{SCALE}.*encoder_norm\.scale/0"):
        t5x.open_t5x(path).read(SCALE)


@pytest.mark.parametrize("orbax", [False, True], ids=["legacy", "orbax"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / ".zarray").unlink(), "missing"),
        (shutil.rmtree, "missing"),
        (lambda d: truncate(d / ".zarray"), "not zarr metadata"),
        (lambda d: edit(d / ".zarray", compressor={"id": "lz77", "level": 1}), "unknown codec 'lz77'"),
        (lambda d: edit(d / ".zarray", filters=[{"id": "delta"}]), "filters"),
    ],
    ids=["no .zarray", "no directory", "truncated .zarray", "unknown codec", "filters"],
)
def test_array_that_cannot_be_opened(tmp_path, arrays, orbax, damage, message):
    if orbax:
        directory = tmp_path / "checkpoint_5" / "state"
        write_orbax(directory, arrays, {"state": LOST, "target": placeholders(arrays)})
    else:
        directory = write_legacy(tmp_path / "checkpoint_5", arrays)
    name = f"target.{WI.replace('/', '.')}"
    damage(directory / name)
    with pytest.raises(CheckpointError, match=rf"{WI}.*{name}/\.zarray.*{message}"):
        t5x.open_t5x(tmp_path).read(WI)


def edit(zarray, **changes):
    zarray.write_text(json.dumps(json.loads(zarray.read_text()) | changes))


def test_every_orbax_array_that_cannot_be_opened_is_listed(tmp_path, arrays):
    state = tmp_path / "checkpoint_5" / "state"
    write_orbax(state, arrays, {"state": LOST, "target": placeholders(arrays)})
    for directory in state.glob("target.*"):
        shutil.rmtree(directory)
    with pytest.raises(CheckpointError, match=rf"(?s)2 parameters cannot be opened.*{WI}.*{SCALE}"):
        t5x.open_t5x(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [4, 6, 11]}, r"shape \(4, 6, 11\).*\(4, 6, 10\)"),
        ({"dtype": "<f8"}, "dtype float64.*float32"),
    ],
)
def test_array_that_contradicts_the_index(tmp_path, arrays, changes, message):
    path = write_legacy(tmp_path, arrays)
    edit(path / f"target.{WI.replace('/', '.')}" / ".zarray", **changes)
    with pytest.raises(CheckpointError, match=f"{WI}.*{message}"):
        t5x.open_t5x(path).read(WI)


def test_unknown_parameter(tmp_path, arrays):
    with pytest.raises(CheckpointError, match="no parameter 'encoder/no_such'"):
        t5x.open_t5x(write_legacy(tmp_path, arrays)).read("encoder/no_such")


# Writing.


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_bitwise(tmp_path, dtype, codec):
    arrays = {
        WI: values(4, 6, 10, dtype=dtype),
        SCALE: values(6, dtype=dtype),
        "zeros": np.zeros((3, 2), dtype),
    }
    arrays["zeros"] = arrays["zeros"].astype(arrays[WI].dtype)
    path = t5x.write_t5x(tmp_path / "new", arrays, step=12, dtype=dtype, codec=codec)
    assert path == tmp_path / "new" / "checkpoint_12"
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint_12"]
    checkpoint = t5x.open_t5x(tmp_path / "new")
    assert checkpoint.step == 12
    assert_holds(checkpoint, arrays)


def test_written_files_are_those_of_t5x(tmp_path, arrays):
    path = t5x.write_t5x(tmp_path, arrays, step=12)
    index = msgpack.unpackb((path / "checkpoint").read_bytes())
    leaf = index["optimizer"]["target"]["encoder"]["layers_1"]["mlp"]["expert"]["wi"]["kernel"]
    assert leaf == {
        "driver": "zarr",
        "dtype": "float32",
        "kvstore": {"driver": "file", "path": "target.encoder.layers_1.mlp.expert.wi.kernel/"},
        "metadata": {"chunks": [4, 6, 10], "compressor": {"id": "gzip", "level": 1}, "shape": [4, 6, 10]},
    }
    assert index["version"] == 3
    assert index["optimizer"]["state"] == {"step": 12, "param_states": {}}
    directory = path / leaf["kvstore"]["path"]
    assert json.loads((directory / ".zarray").read_text()) == {
        "zarr_format": 2,
        "shape": [4, 6, 10],
        "chunks": [4, 6, 10],
        "dtype": "<f4",
        "compressor": {"id": "gzip", "level": 1},
        "fill_value": None,
        "filters": None,
        "order": "C",
        "dimension_separator": ".",
    }
    assert gzip.decompress((directory / "0.0.0").read_bytes()) == arrays[WI].tobytes()


def test_bfloat16_chunk_holds_the_upper_halves(tmp_path):
    array = values(4, 6, dtype="bfloat16").astype(np.float32)  # exactly representable
    path = t5x.write_t5x(tmp_path, {"encoder": {"x": array}}, dtype="bfloat16")
    content = gzip.decompress((path / "target.encoder.x" / "0.0").read_bytes())
    assert np.array_equal(np.frombuffer(content, "<u2").reshape(4, 6), array.view("<u4") >> 16)


def test_rewriting_a_fixture_gives_the_same_index(tmp_path, fixture_path):
    """Apart from chunk shapes and compressor, which are the writer's choice."""
    source = t5x.open_t5x(fixture_path("switch_c_tiny"))
    lazy = {name: lambda name=name: source.read(name) for name in source.specs}
    path = t5x.write_t5x(tmp_path, lazy, step=source.step, dtype="bfloat16")

    def leaves(file):
        target = msgpack.unpackb(pathlib.Path(file).read_bytes())["optimizer"]["target"]
        flat = traverse_util.flatten_dict(target, sep="/")
        return {k: v for k, v in flat.items() if "chunks" not in k and "compressor" not in k}

    assert leaves(path / "checkpoint") == leaves(source.path)
    copy = t5x.open_t5x(path)
    for name in source.specs:
        assert_same(copy.read(name), source.read(name))


def test_jax_arrays_and_nested_dicts(tmp_path):
    t5x.write_t5x(tmp_path, {"encoder": {"encoder_norm": {"scale": jnp.arange(6, dtype=jnp.bfloat16)}}})
    assert_holds(t5x.open_t5x(tmp_path), {SCALE: np.arange(6, dtype=np.float32)})


def test_only_one_lazy_parameter_is_in_memory(tmp_path):
    written = []

    def parameter(i):
        def read():
            unfinished = next(tmp_path.glob("*.tmp-*"))
            written.append(sorted(p.name for p in unfinished.iterdir()))
            return values(6, seed=i)

        return read

    t5x.write_t5x(tmp_path, {f"p{i}": parameter(i) for i in range(3)})
    assert written == [[], ["target.p0"], ["target.p0", "target.p1"]]


def test_existing_step_is_kept_unless_overwritten(tmp_path, arrays):
    t5x.write_t5x(tmp_path, {SCALE: np.zeros(6, np.float32)}, step=3)
    with pytest.raises(CheckpointError, match="checkpoint_3 exists"):
        t5x.write_t5x(tmp_path, arrays, step=3)
    assert not t5x.open_t5x(tmp_path).read(SCALE).any()
    t5x.write_t5x(tmp_path, arrays, step=3, overwrite=True)
    assert_holds(t5x.open_t5x(tmp_path), arrays)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_3"]


@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_nothing_is_left_of_a_failed_write(tmp_path, arrays, dtype):
    with pytest.raises(CheckpointError, match=f"'b' is {dtype}"):
        t5x.write_t5x(tmp_path, {"a": arrays[WI], "b": np.zeros(3, dtype)})
    assert list(tmp_path.iterdir()) == []


def test_failed_overwrite_keeps_what_was_there(tmp_path, arrays):
    def interrupted():
        raise KeyboardInterrupt

    t5x.write_t5x(tmp_path, arrays)
    with pytest.raises(KeyboardInterrupt):
        t5x.write_t5x(tmp_path, {"a": interrupted}, overwrite=True)
    assert_holds(t5x.open_t5x(tmp_path), arrays)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_0"]


@pytest.mark.parametrize(
    ("directory", "params", "options", "message"),
    [
        ("gs://bucket/run", {"a": np.zeros(2)}, {}, "local directories only"),
        ("run", {}, {}, "no parameters"),
        ("run", {"a": np.zeros(2)}, {"dtype": "float16"}, "dtype 'float16'"),
        ("run", {"a": np.zeros(2)}, {"codec": "lz77"}, "cannot write parameter 'a'.*lz77"),
    ],
)
def test_write_that_makes_no_sense(tmp_path, monkeypatch, directory, params, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        t5x.write_t5x(directory, params, **options)
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "run"])


@pytest.mark.parametrize(
    ("shape", "chunks"),
    [
        ((128, 768, 3072), (128, 256, 384)),
        ((2048, 2080, 6144), (256, 208, 256)),
        ((128, 4096, 10240), (128, 256, 512)),
        ((1, 4096, 10240), (1, 4096, 2560)),
        ((32128, 4096), (4016, 4096)),
        ((768,), (768,)),
        ((), ()),
    ],
)
def test_chunks_are_those_that_t5x_chose(shape, chunks):
    assert t5x.t5x_chunks(shape) == chunks


# NaN and Inf.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_expert_with_nan_or_inf_is_named(value, dtype):
    array = values(4, 6, 10, dtype=dtype)
    check_finite(WI, array, 0)
    array[2, 3, 9] = value
    array[3, 0, 0] = value
    with pytest.raises(CheckpointError, match=rf"'{WI}', expert 2: .*{value} at \[2, 3, 9\]"):
        check_finite(WI, array, 0)
    with pytest.raises(CheckpointError, match=rf"'{WI}', expert 7: .*{value} at \[2, 3, 9\]"):
        check_finite(WI, array, 5)


def test_parameter_with_nan_is_named():
    array = np.zeros((5000, 1000), np.float32)  # more than are looked at together
    check_finite("token_embedder/embedding", array)
    array[4999, 7] = np.nan
    with pytest.raises(CheckpointError, match=r"'token_embedder/embedding': .*\[4999, 7\]"):
        check_finite("token_embedder/embedding", array)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (5,)])
def test_finite_at_any_rank(shape):
    check_finite("x", np.zeros(shape, np.float32))
    if not np.zeros(shape).size:
        return
    with pytest.raises(CheckpointError, match="'x'"):
        check_finite("x", np.full(shape, np.nan, np.float32))
