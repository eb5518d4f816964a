"""Files of torch.save without PyTorch: nothing in them is run, nothing malformed is read."""

import pathlib
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from qmoe_jax.checkpoints import CheckpointError
from qmoe_jax.checkpoints.torch_files import STORAGES, Tensor, TorchFile, TorchWriter, save


def write(path, program: bytes, records=(("data/0", bytes(64)),), **how):
    with zipfile.ZipFile(path, "w", **how) as archive:
        for name, content in (("data.pkl", program), *records):
            archive.writestr(f"{path.stem}/{name}", content)
    return path


def read(path):
    file = TorchFile(path)
    return {name: file.read(v) if isinstance(v, Tensor) else v for name, v in file.content.items()}


def test_every_dtype_there_and_back(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {k: (100 * rng.normal(size=(3, 5))).astype(dtype) for k, dtype in STORAGES.items()}
    arrays |= {
        "empty": np.zeros((0, 4), np.int16),
        "scalar": np.float32(3).reshape(()),
        "transposed": arrays["IntStorage"].T,
    }
    save(tmp_path / "x.pt", arrays | {"count": 70_000, "none": 0, "negative": -129}, ordered=True)
    found = read(tmp_path / "x.pt")
    assert (found.pop("count"), found.pop("none"), found.pop("negative")) == (70_000, 0, -129)
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == np.ascontiguousarray(array).tobytes()


def test_records_are_aligned_and_names_share_them(tmp_path):
    with TorchWriter(tmp_path / "x.pt") as writer:
        for i in range(5):
            writer.add(f"a{i}", np.arange(i + 1, dtype=np.int16))
        writer.alias("b", "a4")
    file = TorchFile(tmp_path / "x.pt")
    assert file.content["b"] == file.content["a4"]
    content = (tmp_path / "x.pt").read_bytes()
    assert content.index(np.arange(5, dtype=np.int16).tobytes()) % 64 == 0
    assert (tmp_path / "x.pt").read_bytes() == content


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), TorchWriter(tmp_path / "x.pt") as writer:
        writer.add("a", np.zeros(3, np.float32))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_what_pytorch_writes_and_reads(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra 'torch')")
    torch.save({"a": torch.arange(12.0).reshape(3, 4).bfloat16().T, "n": 5}, tmp_path / "theirs.pt")
    found = read(tmp_path / "theirs.pt")
    np.testing.assert_array_equal(found["a"], np.arange(12.0).reshape(3, 4).T.astype(ml_dtypes.bfloat16))
    arrays = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "e": np.zeros(0, np.int16)}
    save(tmp_path / "ours.pt", arrays | {"n": 7})
    loaded = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert loaded.pop("n") == 7
    for name, tensor in loaded.items():
        np.testing.assert_array_equal(tensor.numpy(), arrays[name])


def test_published_files(fixture_path):
    directory = fixture_path("ista_base_tiny") / "checkpoint"
    noexp = TorchFile(directory / "noexp.pt")
    embeddings = [noexp.content[n] for n in ("shared.weight", "encoder.embed_tokens.weight")]
    assert embeddings[0] == embeddings[1] and embeddings[0].shape == (512, 64) and embeddings[0].dtype == np.float32
    sizes = TorchFile(directory / "sizes.pt").content
    experts = read(directory / "exp00.pt")
    for prefix, count in sizes.items():
        if "encoder.block.1." in prefix:
            assert experts[f"{prefix}.w_comp"].shape == (count,) and experts[f"{prefix}.row_off"][-1] == count


# --- Malice ----------------------------------------------------------------------------------------------------------

MARKER = "attack_was_run"
CALLS = {
    "os.system": b"cos\nsystem\n(X%s\0\0\0touch %stR." % (bytes([6 + len(MARKER)]), MARKER.encode()),
    "builtins.exec": b"cbuiltins\nexec\n(X\4\0\0\0passtR.",
    "a method, by a dotted name": b"\x80\4\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
    "getattr": b"cbuiltins\ngetattr\n(ccollections\nOrderedDict\nX\5\0\0\0clearttR.",
    "an instance": b"(ios\nsystem\n.",
    "torch.load": b"ctorch.serialization\nload\n)R.",
    "what only looks like a storage": b"ctorch\nnn\n.",
}


@pytest.mark.parametrize("program", CALLS.values(), ids=CALLS)
def test_code_is_refused_and_not_run(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"x\.pt: (it asks for|data\.pkl is damaged)"):
        TorchFile(write(tmp_path / "x.pt", program))
    assert not pathlib.Path(MARKER).exists()


def test_the_functions_that_are_called_cannot_be_changed(tmp_path):
    """The opcode BUILD sets attributes of what is on the stack."""
    for state in (b"}X\1\0\0\0aK\1s", b"N}X\x08\0\0\0__call__K\1s\x86"):
        with pytest.raises(CheckpointError, match="damaged"):
            TorchFile(write(tmp_path / "x.pt", b"\x80\2ctorch._utils\n_rebuild_tensor_v2\n" + state + b"b."))


def tensor(
    storage=b"X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\x10",
    offset=b"K\0",
    shape=b"K\4",
    strides=b"K\1",
):
    """A dict with one float32 tensor; the storage has 16 elements."""
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return (
        b"\x80\2}X\1\0\0\0a"
        + rebuild
        + b"("
        + storage
        + b"tQ"
        + offset
        + b"("
        + shape
        + b"t("
        + strides
        + b"tI00\nNtRs."
    )


def test_a_strided_view(tmp_path):
    values = np.arange(16, dtype=np.float32)
    program = tensor(offset=b"K\3", shape=b"K\2K\3", strides=b"K\1K\4")
    found = read(write(tmp_path / "x.pt", program, [("data/0", values.tobytes())]))["a"]
    np.testing.assert_array_equal(found, [[3, 7, 11], [4, 8, 12]])


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (tensor(shape=b"K\x11"), "outside its storage"),
        (tensor(offset=b"J\xff\xff\xff\xff"), "offset -1"),
        (tensor(strides=b"J\xff\xff\xff\xff"), "strides"),
        (tensor(strides=b"K\1K\1"), "strides"),
        (tensor(shape=b"N"), "shape"),
        (tensor(storage=b"X\7\0\0\0storageX\1\0\0\0aX\1\0\0\x000X\3\0\0\0cpuK\x10"), "a storage"),
        (tensor(storage=b"K\1"), "a storage"),
        (tensor()[:-9], "damaged"),
        (b"", "damaged"),
        (b"garbage", "damaged"),
    ],
)
def test_malformed_programs_are_refused(program, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        TorchFile(write(tmp_path / "x.pt", program))


def test_malformed_archives_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    for content in (b"", b"not a zip archive", b"\x80\2}."):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"not a file of torch\.save"):
            TorchFile(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/other", b"")
    with pytest.raises(CheckpointError, match=r"without data\.pkl"):
        TorchFile(path)
    with pytest.raises(CheckpointError, match="expected little endian"):
        TorchFile(write(path, tensor(), [("byteorder", b"big")]))
    for records in ([], [("data/0", bytes(12))]):
        with pytest.raises(CheckpointError, match="record data/0 is missing"):
            read(write(path, tensor(), records))
    with pytest.raises(CheckpointError, match=r"record data\.pkl is missing, packed"):
        read(write(path, tensor(), compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(CheckpointError, match="expected tensors by name"):
        TorchFile(write(path, b"\x80\2K\1.")).tensors()


def test_a_flipped_bit_is_found(tmp_path):
    save(tmp_path / "x.pt", {"a": np.arange(100, dtype=np.float32)})
    content = bytearray((tmp_path / "x.pt").read_bytes())
    content[content.index(np.arange(100, dtype=np.float32).tobytes()) + 201] ^= 1
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pt: record data/0 isn't what was written"):
        read(tmp_path / "x.pt")


def test_depth_costs_nothing(tmp_path):
    nested = b"\x80\2})" + b"\x85" * 1_000_000 + b"K\1s."
    with pytest.raises(CheckpointError, match=r"data\.pkl is damaged .*a key"):
        TorchFile(write(tmp_path / "x.pt", nested))
    with pytest.raises(CheckpointError, match="expected tensors by name"):
        TorchFile(write(tmp_path / "x.pt", b"\x80\2)" + b"\x85" * 1_000_000 + b".")).tensors()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_values_of_every_protocol(protocol, tmp_path):
    values = {
        "a": [1, -(2**40), 1.5, None, True],
        "b": ("text \u00e9", {"c": []}),
        "d": "x" * 300,
        "e": (),
    }
    assert TorchFile(write(tmp_path / "x.pt", pickle.dumps(values, protocol))).content == values
