"""Hugging Face's directories at a URL: file://, which TensorStore reads as it does gs://."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from qmoe_jax.checkpoints import open_checkpoint
from qmoe_jax.errors import CheckpointError


def url(path):
    return f"file://{pathlib.Path(path).resolve()}"


@pytest.mark.parametrize("fixture", ["olmoe_tiny", "deepseek_v3_fp8_tiny", "gpt_oss_mxfp4_tiny"])
def test_it_is_what_is_read_from_a_local_one(fixture, fixture_path):
    path = fixture_path(fixture) / "checkpoint"
    local, remote = open_checkpoint(path), open_checkpoint(url(path) + "/")
    assert remote.path == url(path) and remote.config == local.config and dict(remote.specs) == dict(local.specs)
    for name, spec in local.specs.items():
        indices = [()]
        if spec.shape and min(spec.shape) > 3:
            indices += [(1,), (slice(1, 3),), (-2,)]
        if len(spec.shape) > 1 and min(spec.shape) > 3:
            indices += [(slice(None), slice(1, None, 2)), (-1, ..., slice(0, 2))]
        for index in indices:
            np.testing.assert_array_equal(remote.read(name, index), local.read(name, index), err_msg=f"{name} {index}")


def test_of_a_slice_only_its_rows_are_fetched(fixture_path, monkeypatch):
    checkpoint = open_checkpoint(url(fixture_path("olmoe_tiny") / "checkpoint"))
    fetched = []

    for file in set(checkpoint.store._files.values()):
        file._piece = lambda start, stop, old=file._piece: (fetched.append(stop - start), old(start, stop))[1]
    embedding = next(n for n in checkpoint.specs if "embed" in n)
    rows, width = checkpoint.specs[embedding].shape
    assert checkpoint.read(embedding, (slice(2, 5),)).shape == (3, width)
    assert fetched == [3 * width * 4] or fetched == [3 * width * 2]


@pytest.fixture
def copy(fixture_path, tmp_path):
    return pathlib.Path(shutil.copytree(fixture_path("olmoe_tiny") / "checkpoint", tmp_path / "copy"))


def header_of(file):
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write(file, header, rest):
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + rest)


@pytest.mark.parametrize("damage", ["size", "json", "offsets", "shape", "dtype"])
def test_a_damaged_header_is_named(damage, copy):
    (file,) = copy.glob("*.safetensors")
    header, rest = header_of(file)
    name = next(n for n in header if n != "__metadata__")
    if damage == "size":
        file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    elif damage == "json":
        file.write_bytes(file.read_bytes().replace(b'"dtype"', b'"dtype:', 1))
    else:
        key, value = {"offsets": ("data_offsets", [4, 8]), "shape": ("shape", [10**12]), "dtype": ("dtype", "I3")}[
            damage
        ]
        header[name][key] = value
        write(file, header, rest)
    with pytest.raises(CheckpointError, match="model.safetensors"):
        open_checkpoint(url(copy))


def test_what_is_cut_off_missing_or_of_another_kind(copy):
    (file,) = copy.glob("*.safetensors")
    checkpoint = open_checkpoint(url(copy))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        for name in checkpoint.specs:
            checkpoint.read(name)
    (copy / "pytorch_model.bin").write_bytes(b"x")
    file.unlink()
    with pytest.raises(CheckpointError, match="pytorch_model.bin: of files at a URL only safetensors are read"):
        open_checkpoint(url(copy))
    (copy / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="copy"):
        open_checkpoint(url(copy))
