"""Where a T5X checkpoint is: finding its index file and reading small files, locally or at a URL."""

from __future__ import annotations

import os
import re
from typing import Any

import tensorstore as ts

from qmoe_jax.checkpoints.retry import reason
from qmoe_jax.errors import CheckpointError
from qmoe_jax.files import check_regular

# JSON spec of a TensorStore key-value store: a file, or a directory to look below.
Location = dict[str, Any]

_STEP_DIRECTORY = re.compile(r"(?:checkpoint_)?(\d+)")


def find(path: str | os.PathLike) -> tuple[Location, bytes] | None:
    """The index file of the checkpoint at a path, and its content."""
    root = located(path)
    if (found := _find_step(root)) is not None:
        return found
    steps = [match for name in names_in(root) if (match := _STEP_DIRECTORY.fullmatch(name))]
    for match in sorted(steps, key=lambda m: int(m[1]), reverse=True):
        if (found := _find_step(child(root, "/" + match[0]))) is not None:
            return found
    if (data := read_file(root)) is not None:
        return root, data
    return None


def _find_step(directory: Location) -> tuple[Location, bytes] | None:
    for name in ("/checkpoint", "/state/checkpoint"):
        file = child(directory, name)
        if (data := read_file(file)) is not None:
            return file, data
    return None


def nothing_at(path: str | os.PathLike) -> str:
    """The message for a path where `find` found nothing."""
    children = names_in(located(path))
    unfinished = [name for name in children if ".tmp-" in name]
    found = f"a directory of {sorted(children)[:5]}" if children else "nothing, or an empty directory"
    hint = f" Saving {unfinished[0]!r} was never finished." if unfinished else ""
    return (
        f"No checkpoint at {os.fspath(path)!r}: found {found}; expected a T5X step directory (with a file 'checkpoint' "
        "or 'state/checkpoint'), a directory of checkpoint_<step>, a msgpack file, one of MaxText's with items/, or a "
        f"directory with manifest.json (compressed) or config.json (Hugging Face, published QMoE models).{hint}"
    )


def step_of(file: Location) -> int | None:
    """The training step in the path of an index file."""
    for part in reversed(file["path"].split("/")):
        if match := re.search(r"(?:^|checkpoint_)(\d+)$", part):
            return int(match[1])
        if part not in ("checkpoint", "state"):
            return None
    return None


def located(path: str | os.PathLike) -> Location:
    path = os.fspath(path)
    if "://" not in path:
        return {"driver": "file", "path": os.path.abspath(path)}
    try:
        location = ts.KvStore.Spec(path).to_json()
    except ValueError as e:
        raise CheckpointError(f"{path}: not a path that TensorStore understands: {reason(e)}.") from e
    return {**location, "path": location.get("path", "").rstrip("/")}


def child(location: Location, name: str) -> Location:
    """What has that path below a location; `name` starts with '/' unless the location's path ends in one."""
    return {**location, "path": location["path"] + name}


def show(location: Location) -> str:
    """The location for people: a path or a URL."""
    return location["path"] if location["driver"] == "file" else ts.KvStore.Spec(location).url


def read_file(location: Location) -> bytes | None:
    """Content of a file; None if there is none."""
    if location["driver"] == "file":  # TensorStore would wait for a pipe.
        path = location["path"]
        if not os.path.lexists(path) or os.path.isdir(path):
            return None
        check_regular(path)
    return content(start_reading(location), location)


def start_reading(location: Location) -> ts.Future:
    return ts.KvStore.open(location).result().read("")


def content(future: ts.Future, location: Location) -> bytes | None:
    """What `start_reading` comes to; None if there is no such file."""
    try:
        result = future.result()
    except ValueError as e:
        raise CheckpointError(f"{show(location)}: cannot be read: {reason(e)}.") from e
    return None if result.state == "missing" else result.value


def names_in(location: Location) -> list[str]:
    """Names in a directory; [] if it isn't one."""
    if location["driver"] == "file":  # TensorStore lists whole trees only
        return os.listdir(location["path"]) if os.path.isdir(location["path"]) else []
    try:
        keys = ts.KvStore.open(child(location, "/")).result().list().result()
    except ValueError as e:
        raise CheckpointError(f"{show(location)}: cannot be listed: {reason(e)}.") from e
    return sorted({key.decode().partition("/")[0] for key in keys})
