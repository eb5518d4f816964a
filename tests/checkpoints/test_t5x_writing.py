"""Native T5X checkpoints, written."""

import gzip
import json
import pathlib

import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from flax import traverse_util
from t5x_by_hand import (
    SCALE,
    WI,
    assert_holds,
    assert_same,
    values,
)

from qmoe_jax.checkpoints import t5x
from qmoe_jax.errors import CheckpointError

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
