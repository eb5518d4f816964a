"""Files of torch.save, read without PyTorch and without running what is in them; and written.

Such a file is a zip archive: STEM/data.pkl says which tensors there are, STEM/data/0, 1, ... hold their bytes,
uncompressed, and the archive has a CRC-32 of each. `data.pkl` is a program for Python's unpickler, which may call
anything. As PyTorch's weights_only loader, this one knows a handful of names, and refuses a file that asks for any
other: what comes out are tensors, dicts, lists, strings and numbers.
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import reprlib
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from qmoe_jax.checkpoints import pickles
from qmoe_jax.errors import CheckpointError
from qmoe_jax.files import check_regular

STORAGES = {
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "HalfStorage": np.dtype(np.float16),
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "ByteStorage": np.dtype(np.uint8),
    "CharStorage": np.dtype(np.int8),
    "ShortStorage": np.dtype(np.int16),
    "IntStorage": np.dtype(np.int32),
    "LongStorage": np.dtype(np.int64),
    "BoolStorage": np.dtype(np.bool_),
}
ALIGNMENT = 64


class Tensor(NamedTuple):
    """A tensor in a file, not read yet. Offset and strides count elements."""

    record: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]


# --- Reading ---------------------------------------------------------------------------------------------------------


class TorchFile:
    """A file of torch.save; nothing but its index is read before `read`.

    Attributes:
      content: what was saved: dicts, lists, strings, numbers, and `Tensor` in the place of tensors.

    Raises:
      CheckpointError: not such a file, damaged, or it asks for anything but tensors and plain values.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self._size = check_regular(self.path)
        self._checked: set[str] = set()
        try:
            with zipfile.ZipFile(self.path) as archive:
                self._records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        except (ValueError, OSError, RuntimeError, struct.error, OverflowError, zipfile.BadZipFile) as e:
            raise CheckpointError(
                f"{self.path}: not a file of torch.save as PyTorch writes it since 1.6, or truncated ({e}). Copy it "
                "again; an older one has to be saved anew by PyTorch."
            ) from e
        if "data.pkl" not in self._records:
            raise CheckpointError(f"{self.path}: a zip archive without data.pkl, not a file of torch.save.")
        order = self._record("byteorder").tobytes() if "byteorder" in self._records else b"little"
        if order != b"little":
            raise CheckpointError(f"{self.path}: byte order {order[:20]!r}, expected little endian.")
        program = self._record("data.pkl").tobytes()
        try:
            self.content = pickles.load(program, _find, _storage)
        except CheckpointError as e:
            raise CheckpointError(f"{self.path}: {e}") from e
        except (ValueError, TypeError) as e:
            raise CheckpointError(f"{self.path}: data.pkl is damaged ({type(e).__name__}: {e}).") from e

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a saved dict. Raises CheckpointError if something else was saved."""
        if not isinstance(self.content, dict) or not all(
            isinstance(k, str) and isinstance(v, Tensor) for k, v in self.content.items()
        ):
            raise CheckpointError(f"{self.path}: holds {reprlib.repr(self.content)}, expected tensors by name.")
        return dict(self.content)

    def read(self, tensor: Tensor) -> np.ndarray:
        """The values of a tensor, as a read-only view of the file. Raises CheckpointError if it lies outside."""
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
        count = 0 if 0 in tensor.shape else tensor.offset + last + 1
        size = tensor.dtype.itemsize
        content = self._record(f"data/{tensor.record}", count * size)
        if count == 0:
            return np.zeros(tensor.shape, tensor.dtype)
        values = content[: count * size].view(tensor.dtype)
        return np.lib.stride_tricks.as_strided(
            values[tensor.offset :], tensor.shape, [s * size for s in tensor.strides], writeable=False
        )

    def _record(self, name: str, least: int = 0) -> np.ndarray:
        """Bytes of a record, as they are in the file. Raises CheckpointError unless they are whole."""
        info = self._records.get(name)
        if info is None or info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size < least:
            raise CheckpointError(
                f"{self.path}: record {name} is missing, packed, encrypted or shorter than its {least} bytes: damaged, "
                "copy it again."
            )
        if info.file_size == 0:
            return np.zeros(0, np.uint8)
        with self.path.open("rb") as f:
            f.seek(min(info.header_offset, self._size))
            header = f.read(30)
        if len(header) < 30 or header[:4] != b"PK\3\4":
            raise CheckpointError(f"{self.path}: record {name} is damaged: copy it again.")
        begin = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))  # after name and extra field
        if begin + info.file_size > self._size:
            raise CheckpointError(f"{self.path}: truncated in record {name}: copy it again.")
        content = np.memmap(self.path, np.uint8, "r", begin, (info.file_size,))
        if name not in self._checked and zlib.crc32(content) != info.CRC:
            raise CheckpointError(
                f"{self.path}: record {name} isn't what was written (its CRC-32 is another): damaged, copy it again."
            )
        self._checked.add(name)
        return content


class _Storage(NamedTuple):
    kind: str
    record: str
    numel: int


class _RebuildTensor:
    """torch._utils._rebuild_tensor_v2, for strided views of a storage. No attributes: data.pkl could set them."""

    __slots__ = ()

    def __call__(self, storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None) -> Tensor:
        if not isinstance(storage, _Storage):
            raise CheckpointError(f"a tensor in {reprlib.repr(storage)}, expected a storage.")
        kind, record, numel = storage
        shape, strides = tuple(shape), tuple(strides)
        numbers = (offset, *shape, *strides)
        if not all(isinstance(n, int) and 0 <= n < 2**62 for n in numbers) or len(shape) != len(strides):
            raise CheckpointError(
                f"a tensor of shape {reprlib.repr(shape)}, strides {reprlib.repr(strides)}, offset "
                f"{reprlib.repr(offset)}: damaged."
            )
        last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if 0 not in shape and max(offset + last + 1, math.prod(shape)) > numel:
            raise CheckpointError(
                f"a tensor of shape {shape} reaches outside its storage of {numel} elements: damaged."
            )
        return Tensor(record, STORAGES[kind], shape, offset, strides)


class _RebuildParameter:
    """torch._utils._rebuild_parameter."""

    __slots__ = ()

    def __call__(self, tensor, requires_grad=False, hooks=None) -> Tensor:
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"a parameter made from {reprlib.repr(tensor)}, expected a tensor.")
        return tensor


def _ordered() -> OrderedDict:
    """collections.OrderedDict, which is filled afterwards."""
    return OrderedDict()


_KNOWN = {
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    ("collections", "OrderedDict"): _ordered,
    **{("torch", name): name for name in STORAGES},
}


def _find(module: Any, name: Any) -> Any:
    """See `pickles.load`."""
    if not isinstance(module, str) or not isinstance(name, str):
        raise CheckpointError(f"it asks for {reprlib.repr(module)}, {reprlib.repr(name)}: damaged.")
    if (module, name) not in _KNOWN:
        raise CheckpointError(
            f"it asks for {module[:80]}.{name[:80]}, but only tensors and plain values are read. A file from an "
            "unknown source that asks for anything else may be an attack."
        )
    return _KNOWN[module, name]


def _storage(key: Any) -> _Storage:
    """See `pickles.load`."""
    match key:
        case ("storage", str(kind), str(record), _, int(numel)) if kind in STORAGES and 0 <= numel < 2**62:
            return _Storage(kind, record, numel)
        case _:
            raise CheckpointError(
                f"a storage {reprlib.repr(key)}, expected ('storage', type, record, place, elements)."
            )


# --- Writing ---------------------------------------------------------------------------------------------------------


class TorchWriter:
    """Writes a dict of arrays (or of integers) as torch.save does; a context manager, whole after it or not there.

    Arrays are written as they come and not kept. Two names may share one array.

    Args:
      path: the file; it appears when the block ends without an error.
      ordered: the dict is an OrderedDict, as a state_dict is.
    """

    def __init__(self, path: str | os.PathLike, *, ordered: bool = False):
        self.path = pathlib.Path(path)
        self._temporary = self.path.with_name(f".{self.path.name}.tmp")
        self._ordered = ordered
        self._items: list[bytes] = []
        self._written: dict[str, bytes] = {}
        self._records = 0

    def __enter__(self) -> TorchWriter:
        self._file = self._temporary.open("wb")
        self._archive = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
        return self

    def __exit__(self, kind, value, trace) -> None:
        try:
            if kind is None:
                self._record("data.pkl", self._program())
                self._record("version", b"3\n")
                self._archive.close()
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._temporary, self.path)
        finally:
            with contextlib.suppress(OSError, ValueError):  # Of a failed write.
                self._archive.close()
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def add(self, name: str, array: np.ndarray) -> None:
        """Writes an array of one of the dtypes of `STORAGES`."""
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        (kind,) = [k for k, dtype in STORAGES.items() if dtype == array.dtype]
        record = str(self._records)
        self._records += 1
        self._record(f"data/{record}", array.reshape(-1).view(np.uint8))
        strides = [math.prod(array.shape[i + 1 :]) for i in range(array.ndim)]
        storage = _text("storage") + _name("torch", kind) + _text(record) + _text("cpu") + _integer(array.size)
        self._written[name] = (
            _name("torch._utils", "_rebuild_tensor_v2")
            + (b"((" + storage + b"tQ" + _integer(0) + _tuple(array.shape) + _tuple(strides))
            + (b"\x89" + _EMPTY_ORDERED + b"tR")  # no gradient; no hooks
        )
        self._items.append(_text(name) + self._written[name])

    def alias(self, name: str, other: str) -> None:
        """Names an array once more."""
        self._items.append(_text(name) + self._written[other])

    def add_integer(self, name: str, value: int) -> None:
        self._items.append(_text(name) + _integer(value))

    def _program(self) -> bytes:
        begin = _EMPTY_ORDERED if self._ordered else b"}"
        return b"\x80\2" + begin + b"(" + b"".join(self._items) + b"u."

    def _record(self, name: str, content: bytes | np.ndarray) -> None:
        info = zipfile.ZipInfo(f"{self.path.stem}/{name}")  # dated 1980: the same content is the same file
        # An extra field pads the header so that the bytes are aligned.
        begin = self._file.tell() + 30 + len(info.filename) + 4
        padding = -begin % ALIGNMENT
        info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        self._archive.writestr(info, memoryview(content))


# The unpickler's opcodes: GLOBAL, EMPTY_TUPLE, REDUCE; BINUNICODE; LONG1; MARK, TUPLE.
def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _integer(value: int) -> bytes:
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def _tuple(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"


_EMPTY_ORDERED = _name("collections", "OrderedDict") + b")R"


def save(path: str | os.PathLike, values: Mapping[str, np.ndarray | int], *, ordered: bool = False) -> None:
    """Writes a dict of arrays and integers; see `TorchWriter`."""
    with TorchWriter(path, ordered=ordered) as writer:
        for name, value in values.items():
            writer.add_integer(name, value) if isinstance(value, int) else writer.add(name, value)
