"""Files that are written whole or not at all, and small files that are read whole or refused."""

from __future__ import annotations

import json
import os
import pathlib
import reprlib
import stat
from typing import Any

from qmoe_jax.errors import CheckpointError

MOST_BYTES = 100_000_000  # of a file of JSON; safetensors allows its headers as many


def check_regular(path: str | os.PathLike, error: type[ValueError] = CheckpointError) -> int:
    """Bytes of a regular file. Raises `error` for anything else: a pipe, say, would be waited for without end."""
    try:
        found = os.stat(path)
    except FileNotFoundError as e:
        raise error(f"{os.fspath(path)} is missing; copy it again.") from e
    except (OSError, ValueError) as e:  # Of links in a circle, a name that can't be one.
        raise error(f"{os.fspath(path)}: cannot be read ({getattr(e, 'strerror', None) or e}).") from e
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{os.fspath(path)} is no regular file (but {_kind(found.st_mode)}): copy it again.")
    return found.st_size


def _kind(mode: int) -> str:
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    return next((name for test, name in kinds.items() if test(mode)), "a device")


def read_bytes(path: str | os.PathLike, most: int = MOST_BYTES, error: type[ValueError] = CheckpointError) -> bytes:
    """Content of a regular file. Raises `error` for anything else, and for more than `most` bytes."""
    size = check_regular(path, error)
    if size > most:
        raise error(f"{os.fspath(path)} has {size:,} bytes, expected at most {most:,}: this can't be the file.")
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as e:
        raise error(f"{os.fspath(path)}: cannot be read ({e.strerror}).") from e


def parse_json(content: bytes | str, where: str, error: type[ValueError] = CheckpointError) -> dict[str, Any]:
    """A JSON object, from `where`. Raises `error` for anything else, however it is nested."""
    try:
        value = json.loads(content.decode("utf-8") if isinstance(content, bytes) else content)
    except RecursionError as e:
        raise error(f"{where} is not JSON that can be read: nested too deep.") from e
    except ValueError as e:
        raise error(f"{where} is not JSON ({e}): damaged, copy it again.") from e
    if not isinstance(value, dict):
        raise error(f"{where} holds {reprlib.repr(value)}, expected a JSON object.")
    return value


def read_json(path: str | os.PathLike, error: type[ValueError] = CheckpointError) -> dict[str, Any]:
    """A file's JSON object. Raises `error`: see `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path, error=error), os.fspath(path), error)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON such that the file is there whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 such that the file is there whole or not at all; directories are made."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: str | os.PathLike) -> None:
    """Returns when a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
