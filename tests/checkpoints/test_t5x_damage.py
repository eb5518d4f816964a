"""Native T5X checkpoints: every kind of damage, and values that are none."""

import json
import pathlib
import shutil
import warnings

import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
import tensorstore as ts
from t5x_by_hand import (
    CHUNKS,
    LOST,
    SCALE,
    WI,
    assert_same,
    placeholders,
    spec,
    values,
    write_index,
    write_legacy,
    write_orbax,
)

from qmoe_jax.checkpoints import t5x
from qmoe_jax.checkpoints.checks import check_finite
from qmoe_jax.errors import CheckpointError

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


@pytest.mark.parametrize("shape", [[10**12, 6], [2**62, 2**62], [10**9, 6], [-1, 6]])
def test_an_ocdbt_store_that_declares_what_it_cannot_hold(shape, tmp_path):
    """TensorStore would end the process."""
    state = tmp_path / "checkpoint_5" / "state"
    state.mkdir(parents=True)
    array = {WI: values(4, 6)}
    kvstore = {"driver": "ocdbt", "base": f"file://{state}/", "path": f"target.{WI.replace('/', '.')}/"}
    metadata = {"shape": [4, 6], "chunks": [4, 6], "dtype": "<f4"}
    ts.open({"driver": "zarr", "kvstore": kvstore, "metadata": metadata, "create": True}).result()[:] = array[WI]
    store = ts.KvStore.open(kvstore).result()
    metadata = json.loads(store.read(".zarray").result().value)
    store.write(".zarray", json.dumps(metadata | {"shape": shape, "chunks": shape}).encode()).result()
    (state / "checkpoint").write_bytes(msgpack.packb({"target": placeholders(array)}))
    with pytest.raises(
        CheckpointError, match=r"cannot open parameter 'encoder/layers_1/mlp/expert/wi/kernel' .*\.zarray"
    ):
        t5x.open_t5x(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_that_no_model_has_are_named(dtype):
    array = np.zeros((3, 4, 5), jnp.dtype(dtype))
    array[1, 2, 3] = 9_000
    with warnings.catch_warnings(action="error"):
        check_finite("layers_0/mlp/expert/wi/kernel", array, 10)
    array[1, 2, 3] = -11_000
    with pytest.warns(UserWarning, match=r"'layers_0/mlp/expert/wi/kernel', expert 11: .*first -1.* at \[1, 2, 3\]"):
        check_finite("layers_0/mlp/expert/wi/kernel", array, 10)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (5,)])
def test_finite_at_any_rank(shape):
    check_finite("x", np.zeros(shape, np.float32))
    if not np.zeros(shape).size:
        return
    with pytest.raises(CheckpointError, match="'x'"):
        check_finite("x", np.full(shape, np.nan, np.float32))
