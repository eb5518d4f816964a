"""Damage to files of any kind, drawn by a random generator."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import msgpack

from qmoe_jax.checkpoints import compressed

Damage = Callable[[pathlib.Path, random.Random], object]  # of the copy of an input

DEEP = 100_000
# In place of what belongs there. Text that json.dumps can't write is put in afterwards.
ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 7, 1.5, -0.5, 1e308, 10**9, 2**31, 2**40, 2**63, 10**30, "", "x", "../../x"),
    *([], {}, [1], [[]], {"a": 1}, [10**12, 20], "x" * 10_000, "\x00", "$DEEP", "$DIGITS", "$NAN", "$HUGE"),
)
SPELLED = {
    '"$DEEP"': "[" * DEEP + "]" * DEEP,
    '"$DIGITS"': "9" * 5_000,
    '"$NAN"': "NaN",
    '"$HUGE"': "1e999",
}


def spelled(value: Any) -> bytes:
    text = json.dumps(value)
    for what, how in SPELLED.items():
        text = text.replace(what, how)
    return text.encode()


# --- JSON ------------------------------------------------------------------------------------------------------------


def places(value: Any, depth: int = 0) -> list[tuple[Any, Any]]:
    """Every (container, key) of nested JSON values."""
    if depth > 50 or not isinstance(value, dict | list):
        return []
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    return [(value, k) for k, _ in items] + [p for _, v in items for p in places(v, depth + 1)]


def change_value(root: Any, rng: random.Random) -> Any:
    """Another value, name or no value somewhere."""
    found = places(root)
    if not found or rng.random() < 0.05:
        return rng.choice(ODD)
    container, key = rng.choice(found)
    how = rng.random()
    if how < 0.15:
        del container[key]
    elif how < 0.25 and isinstance(container, dict):
        container[rng.choice(("", "x", "../x", "0", f"{key}/x", "encoder/layers_999999999/x"))] = container.pop(key)
    elif how < 0.35:
        other, at = rng.choice(found)
        container[key] = json.loads(json.dumps(other[at])) if at in other or isinstance(other, list) else None
    elif how < 0.45 and isinstance(container[key], int):
        container[key] = container[key] + rng.choice((-1, 1, 8))
    else:
        container[key] = rng.choice(ODD)
    return root


def edit_json(file: pathlib.Path, edit: Callable[[Any], Any]) -> None:
    """edit(value) returns the new value, or None for the one that it has changed."""
    value = json.loads(file.read_bytes())
    new = edit(value)
    replace(file, spelled(value if new is None else new))


def replace(file: pathlib.Path, content: bytes) -> None:
    """The file is another one then: copies are links to the sound one."""
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def damage_json(file: pathlib.Path, rng: random.Random) -> None:
    value = json.loads(file.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 3))):
        value = change_value(value, rng)
    replace(file, spelled(value))


# --- msgpack ----------------------------------------------------------------------------------------------------------


def damage_msgpack(file: pathlib.Path, rng: random.Random) -> None:
    root = msgpack.unpackb(file.read_bytes(), strict_map_key=False)
    found = places(root)
    container, key = rng.choice(found)
    odd = (
        None,
        True,
        -1,
        1.5,
        2**63,
        "",
        "PLACEHOLDER://../x",
        "PLACEHOLDER://",
        b"\0" * 9,
        [],
        {},
        [[]],
        msgpack.ExtType(1, b"\x93"),
        nested(900),
    )
    if rng.random() < 0.2:
        del container[key]
    elif isinstance(container[key], msgpack.ExtType):
        shape = rng.choice(([], [-1], [2**40], [0], [2**62, 4], "x", [1.5], [True], None))
        dtype = rng.choice(("float32", "bfloat16", "object", "O", "x", "", "f4,f4", 3, None, "V4"))
        container[key] = msgpack.ExtType(rng.choice((1, 3, 9)), msgpack.packb([shape, dtype, b"\0" * 8]))
    else:
        container[key] = rng.choice(odd)
    replace(file, msgpack.packb(root))


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"target": value}
    return value


# --- Files of torch.save, and of safetensors --------------------------------------------------------------------------


def members(file: pathlib.Path) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_zip(file: pathlib.Path, content: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    file.unlink(missing_ok=True)
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)


def set_program(file: pathlib.Path, program: bytes) -> None:
    content = members(file)
    name = next(n for n in content if n.endswith("data.pkl"))
    write_zip(file, content | {name: program})


def damage_zip(file: pathlib.Path, rng: random.Random) -> None:
    content = members(file)
    name = next(n for n in content if n.endswith("data.pkl"))
    how = rng.randrange(6)
    if how == 0:  # any opcode
        program = bytearray(content[name])
        for _ in range(rng.choice((1, 2, 5))):
            program[rng.randrange(len(program))] = rng.randrange(256)
        write_zip(file, content | {name: bytes(program)})
    elif how == 1:
        write_zip(file, content | {name: content[name][: rng.randrange(len(content[name]))]})
    elif how == 2:
        write_zip(file, content, rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)))
    elif how == 3:
        gone = rng.choice(list(content))
        write_zip(file, {n: c for n, c in content.items() if n != gone})
    elif how == 4:  # a field of the central directory
        data = bytearray(file.read_bytes())
        at = data.rindex(b"PK\1\2", 0, len(data)) if rng.random() < 0.5 else data.index(b"PK\1\2")
        data[at + rng.randrange(4, 46)] ^= 1 << rng.randrange(8)
        replace(file, bytes(data))
    else:  # numbers
        program = content[name]
        spots = [i for i in range(len(program) - 2) if program[i : i + 2] == b"\x8a\x01"]
        at = rng.choice(spots) if spots else 0
        number = rng.choice(
            (
                b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
                b"\x8a\x01\xff",
                b"N",
                b"]",
                b"G" + bytes(8),
                b"\x8a\x10" + b"\x7f" * 16,
            )
        )
        write_zip(file, content | {name: program[:at] + number + program[at + 3 :]})


def damage_safetensors(file: pathlib.Path, rng: random.Random) -> None:
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    if rng.random() < 0.2:
        replace(file, struct.pack("<Q", rng.choice((0, 1, size - 1, size + 8, 2**31, 2**63, 2**64 - 1))) + content[8:])
        return
    header = change_value(json.loads(content[8 : 8 + size]), rng)
    text = spelled(header)
    replace(file, struct.pack("<Q", len(text)) + text + content[8 + size :])


# --- Any file --------------------------------------------------------------------------------------------------------


def flip(file: pathlib.Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    replace(file, bytes(content))


def truncate(file: pathlib.Path, rng: random.Random) -> None:
    content = file.read_bytes()
    replace(file, content[: rng.randrange(len(content) or 1)])


def insert(file: pathlib.Path, rng: random.Random) -> None:
    content = file.read_bytes()
    at = rng.randrange(len(content) + 1)
    replace(file, content[:at] + rng.randbytes(rng.choice((1, 4, 100))) + content[at:])


def noise(file: pathlib.Path, rng: random.Random) -> None:
    replace(file, rng.randbytes(rng.choice((1, 20, 1000))))


def empty(file: pathlib.Path, rng: random.Random) -> None:
    replace(file, b"")


def remove(file: pathlib.Path, rng: random.Random) -> None:
    file.unlink()


def fifo(file: pathlib.Path, rng: random.Random) -> None:
    file.unlink()
    os.mkfifo(file)


def folder(file: pathlib.Path, rng: random.Random) -> None:
    file.unlink()
    file.mkdir()


def loop(file: pathlib.Path, rng: random.Random) -> None:
    file.unlink()
    file.symlink_to(file.name)


def endless(file: pathlib.Path, rng: random.Random) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def deep(file: pathlib.Path, rng: random.Random) -> None:
    replace(file, rng.choice((b"[" * DEEP, b'{"a":' * DEEP, b"\x91" * DEEP, b"\x81\xa6target" * DEEP)))


ANY: tuple[Damage, ...] = (
    flip,
    flip,
    truncate,
    truncate,
    insert,
    noise,
    empty,
    remove,
    fifo,
    folder,
    loop,
    endless,
    deep,
)


def damage_file(file: pathlib.Path, rng: random.Random) -> None:
    """As the file's kind suggests, or like any file."""
    special: Damage | None = None
    if file.suffix == ".json" or file.name in (".zarray", "_METADATA", "_CHECKPOINT_METADATA"):
        special = damage_json
    elif file.name == "checkpoint":
        special = damage_msgpack
    elif file.suffix in (".pt", ".bin"):
        special = damage_zip
    elif file.suffix == ".safetensors":
        special = damage_safetensors
    (special if special and rng.random() < 0.7 else rng.choice(ANY))(file, rng)


def sign(path: pathlib.Path) -> None:
    """Makes the sums of a compressed checkpoint fit what is there: damage that sums don't find."""
    file = path / "manifest.json"
    if not file.is_file():  # A pipe, say.
        return
    try:
        manifest = json.loads(file.read_bytes())
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            shards = [shard for layer in manifest["layers"].values() for shard in layer["shards"]]
            for part in (manifest["dense"], *shards):
                part["sha256"] = compressed.sha256(path / part["directory"])
        manifest["sha256"] = compressed.manifest_sha256(manifest)
        text = json.dumps(manifest)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return
    replace(file, text.encode())
