"""What a manifest of a compressed checkpoint has to hold; checked whole, before anything in it is believed."""

from __future__ import annotations

import pathlib
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any, str], list[str]]  # check(value, where) -> problems, in words


def problems(manifest: Mapping[str, Any]) -> list[str]:
    """All that is missing, or of another kind than it should be."""
    return (_MANIFEST_1 if manifest.get("format_version") == 1 else _MANIFEST)(manifest, "")


def _value(what: str, fits: Callable[[Any], bool]) -> Check:
    return lambda value, where: [] if fits(value) else [f"{where}: found {reprlib.repr(value)}, expected {what}"]


def _fields(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """An object with these fields; others are left alone."""

    def check(value: Any, where: str) -> list[str]:
        if not isinstance(value, dict):
            return [f"{where}: found {reprlib.repr(value)}, expected an object"]
        at = f"{where}." if where else ""
        found = [f"{at}{name}: missing" for name in required if name not in value]
        fields = {**required, **(optional or {})}
        return found + [p for name, c in fields.items() if name in value for p in c(value[name], f"{at}{name}")]

    return check


def _each(of: Check, least: int = 0) -> Check:
    """An object with so many fields, which are all alike."""

    def check(value: Any, where: str) -> list[str]:
        if not isinstance(value, dict) or len(value) < least:
            return [f"{where}: found {reprlib.repr(value)}, expected an object{' with something in it' * least}"]
        return [p for name, v in value.items() for p in of(v, f"{where}[{name!r}]")]

    return check


def _list(of: Check) -> Check:
    """A list of alike values, at least one."""

    def check(value: Any, where: str) -> list[str]:
        if not isinstance(value, list) or not value:
            return [f"{where}: found {reprlib.repr(value)}, expected a list with something in it"]
        return [p for i, v in enumerate(value) for p in of(v, f"{where}[{i}]")]

    return check


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _is_below(value: Any) -> bool:
    """A path that stays below the folder it is relative to."""
    if not isinstance(value, str) or not value or "\0" in value:
        return False
    path = pathlib.PurePosixPath(value)
    return not path.is_absolute() and ".." not in path.parts and path.parts != ()


_SIZE = _value("a whole number from 0 on", _is_size)
_TEXT = _value("text", lambda v: isinstance(v, str))
_OBJECT = _value("an object", lambda v: isinstance(v, dict))
_PART = {
    "directory": _value("a folder below the checkpoint", _is_below),
    "sha256": _value("a SHA-256", lambda v: isinstance(v, str) and re.fullmatch("[0-9a-f]{64}", v) is not None),
}
_BYTES = {"bytes": _SIZE, "bytes_on_disk": _SIZE}
_SHAPE = _value(
    "[experts, out, in]", lambda v: isinstance(v, list) and len(v) == 3 and all(_is_size(n) and n for n in v)
)
_MATRICES = {"matrices": _each(_fields({"shape": _SHAPE, "bytes": _SIZE}), least=1)}
_SHARD = _fields({"start": _SIZE, "stop": _SIZE, **_PART}, _BYTES)


def _manifest(layer: Check) -> Check:
    return _fields(
        {
            "model": _OBJECT,
            "quantization": _OBJECT,
            "codec": _fields({"name": _TEXT}),
            "provenance": _OBJECT,
            "layers": _each(layer),
            "dense": _fields(_PART, _BYTES),
        },
        {"family": _TEXT},
    )


_MANIFEST = _manifest(_fields({**_MATRICES, "shards": _list(_SHARD)}, _BYTES))
_MANIFEST_1 = _manifest(_fields({**_MATRICES, **_PART}, _BYTES))
