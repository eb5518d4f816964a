"""Damage to sound inputs: known faults by name, and as many more as one likes, drawn by number; always the same."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import msgpack
from bad_bases import BASES, OTHER

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


# --- Known faults -----------------------------------------------------------------------------------------------------


def zarray(array: str, **changes: Any) -> Damage:
    """Of a stored array, the one whose name ends so."""

    def damage(path: pathlib.Path, rng: random.Random) -> None:
        (found, *_) = sorted(p for p in path.rglob(".zarray") if p.parent.name.endswith(array))
        edit_json(found, lambda m: m.update(changes))

    return damage


def manifest(*at: Any, value: Any) -> Damage:
    """Sets what lies there."""

    def edit(root: Any) -> None:
        for key in at[:-1]:
            root = root[key]
        if value is KeyError:
            del root[at[-1]]
        else:
            root[at[-1]] = value

    return lambda path, rng: edit_json(path / "manifest.json", edit)


def config(**changes: Any) -> Damage:
    return lambda path, rng: edit_json(path / "config.json", lambda c: c.update(changes))


def in_file(name: str, damage: Damage) -> Damage:
    return lambda path, rng: damage(sorted(path.glob(name))[0], rng)


def rename_tensor(old: str, new: str) -> Damage:
    """In the header of model.safetensors."""

    def damage(path: pathlib.Path, rng: random.Random) -> None:
        for file in path.glob("*.safetensors*"):
            content = file.read_bytes()
            at = 0 if file.suffix == ".json" else 8
            size = len(content) if at == 0 else struct.unpack("<Q", content[:8])[0]
            text = content[at : at + size].replace(old.encode(), new.encode())
            head = struct.pack("<Q", len(text)) if at else b""
            replace(file, head + text + content[at + size :])

    return damage


def overlapping_offsets(path: pathlib.Path, rng: random.Random) -> None:
    """Two tensors of one size in the same bytes."""
    file = path / "model.safetensors"
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    sizes: dict[int, str] = {}
    for name, tensor in header.items():
        if "data_offsets" in tensor:
            begin, end = tensor["data_offsets"]
            if end - begin in sizes:
                tensor["data_offsets"] = header[sizes[end - begin]]["data_offsets"]
                break
            sizes[end - begin] = name
    text = json.dumps(header).encode()
    replace(file, struct.pack("<Q", len(text)) + text + content[8 + size :])


def msgpack_value(change: Callable[[dict], Any]) -> Damage:
    def damage(path: pathlib.Path, rng: random.Random) -> None:
        root = msgpack.unpackb((path / "checkpoint").read_bytes(), strict_map_key=False)
        root = change(root) or root
        replace(path / "checkpoint", msgpack.packb(root))

    return damage


def every_vocabulary_row(path: pathlib.Path, rng: random.Random) -> None:
    """10^12 rows, everywhere alike."""
    rows = 10**12
    zarray("token_embedder.embedding", shape=[rows, 20], chunks=[rows, 20])(path, rng)
    root = msgpack.unpackb((path / "checkpoint").read_bytes(), strict_map_key=False)
    if "optimizer" in root:
        metadata = root["optimizer"]["target"]["token_embedder"]["embedding"]["metadata"]
        metadata |= {"shape": [rows, 20], "chunks": [rows, 20]}
        replace(path / "checkpoint", msgpack.packb(root))


def program(code: bytes) -> Damage:
    return lambda path, rng: [
        set_program(file, code) for file in sorted(path.glob("*.pt")) + sorted(path.glob("*.bin"))
    ]


def flag_bits(bits: int) -> Damage:
    """In every header of every archive, as a member that is encrypted has them."""

    def damage(path: pathlib.Path, rng: random.Random) -> None:
        for file in path.glob("*.pt"):
            data = bytearray(file.read_bytes())
            for magic, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
                at = -1
                while (at := data.find(magic, at + 1)) >= 0:
                    data[at + offset] |= bits
            replace(file, bytes(data))

    return damage


def corrupt_deflate(path: pathlib.Path, rng: random.Random) -> None:
    file = path / "noexp.pt"
    write_zip(file, members(file), zipfile.ZIP_DEFLATED)
    data = bytearray(file.read_bytes())
    data[200:260] = b"\xff" * 60
    replace(file, bytes(data))


def flipped_weight(name: str) -> Damage:
    """A byte of a tensor, far from the headers: what only a checksum tells."""

    def damage(path: pathlib.Path, rng: random.Random) -> None:
        data = bytearray((path / name).read_bytes())
        with zipfile.ZipFile(path / name) as archive:
            info = max(archive.infolist(), key=lambda i: i.file_size if "data/" in i.filename else 0)
        lengths = struct.unpack("<HH", data[info.header_offset + 26 : info.header_offset + 30])
        data[info.header_offset + 30 + sum(lengths) + info.file_size // 2] ^= 1
        replace(path / name, bytes(data))

    return damage


TUPLES = b"\x80\2})" + b"\x85" * 1_000_000 + b"K\1s."  # a dictionary's key
LISTS = b"\x80\2]q\0" + b"".join(b"](h%ch%ce" % (i, i) + b"q%c" % (i + 1) for i in range(40)) + b"."
BIG = 2**40

NAMED: dict[str, tuple[str, Damage]] = {
    **{
        f"absurd shape, {kind}": (kind, zarray("token_embedder.embedding", shape=[10**12, 20], chunks=[10**12, 20]))
        for kind in ("t5x", "orbax", "compressed")
    },
    **{f"10^12 rows everywhere, {kind}": (kind, every_vocabulary_row) for kind in ("t5x", "orbax")},
    "absurd chunk": ("t5x", zarray("decoder_norm.scale", chunks=[10**12])),
    "absurd chunk, compressed": ("compressed", zarray("wi.codewords", chunks=[10**12])),
    "absurd shape of codewords": ("compressed", zarray("wi.codewords", shape=[10**12], chunks=[10**12])),
    "shape 2^62": ("orbax", zarray("decoder_norm.scale", shape=[2**62], chunks=[2**62])),
    "shape 2^64": ("orbax", zarray("decoder_norm.scale", shape=[2**64], chunks=[20])),
    "negative shape": ("t5x", zarray("decoder_norm.scale", shape=[-1])),
    "no chunks": ("t5x", zarray("decoder_norm.scale", chunks=[0])),
    "layers 10^9": ("compressed", manifest("model", "num_encoder_layers", value=10**9)),
    "experts 10^9": ("compressed", manifest("model", "num_experts", value=10**9)),
    "vocabulary 10^12": ("compressed", manifest("model", "vocab_size", value=10**12)),
    "heads that contradict": ("compressed", manifest("model", "num_heads", value=1)),
    "head_dim that contradicts": ("compressed", manifest("model", "head_dim", value=4)),
    "vocabulary that contradicts": ("compressed", manifest("model", "vocab_size", value=255)),
    "d_model that is text": ("compressed", manifest("model", "d_model", value="20")),
    "d_model that is a float": ("compressed", manifest("model", "d_model", value=20.0)),
    "matrix of 2^31 columns": (
        "compressed",
        manifest("layers", "encoder/layers_0", "matrices", "wi", "shape", value=[8, 28, 2**31]),
    ),
    "matrix of 2^40 columns, gap": (
        "gap",
        manifest("layers", "encoder/layers_0", "matrices", "wi", "shape", value=[8, 28, BIG]),
    ),
    "matrix removed": ("compressed", manifest("layers", "encoder/layers_0", "matrices", "wi", value=KeyError)),
    "matrix that is a list": ("compressed", manifest("layers", "encoder/layers_0", "matrices", value=[1])),
    "layers are a list": ("compressed", manifest("layers", value=[])),
    "codec is text": ("compressed", manifest("codec", value="dictionary")),
    "quantization is a number": ("compressed", manifest("quantization", value=1.5)),
    "directory outside": ("compressed", manifest("dense", "directory", value="../../x")),
    "directory is a number": ("compressed", manifest("dense", "directory", value=7)),
    "shard begins with a float": (
        "compressed",
        manifest("layers", "encoder/layers_0", "shards", 0, "start", value=0.0),
    ),
    "deep manifest": ("compressed", manifest("provenance", value="$DEEP")),
    "_METADATA is deep, maxtext": ("maxtext", lambda p, r: replace(p / "_METADATA", b"[" * DEEP)),
    "_METADATA holds a list, maxtext": (
        "maxtext",
        lambda p, r: edit_json(p / "_METADATA", lambda m: m.update(tree_metadata=[1])),
    ),
    "_METADATA is a list": ("compressed", lambda p, r: replace(p / "dense" / "_METADATA", b"[]")),
    "_METADATA is empty": ("compressed", lambda p, r: replace(p / "dense" / "_METADATA", b"")),
    "_METADATA is deep": ("compressed", lambda p, r: replace(p / "dense" / "_METADATA", b"[" * DEEP)),
    "a layer of the dense part is lost": (
        "compressed",
        lambda p, r: [shutil.rmtree(d) for d in (p / "dense").glob("encoder.layers_0.pre*")],
    ),
    "an embedding of integers": ("compressed", zarray("token_embedder.embedding", dtype="<i2")),
    **{
        f"a pipe in place of {name}, {kind}": (kind, in_file(name, fifo))
        for kind, name in (
            ("t5x", "target.decoder.decoder_norm.scale/0"),
            ("orbax", "target.decoder.decoder_norm.scale/.zarray"),
            ("ocdbt", "d/*"),
            ("t5x", "checkpoint"),
            ("compressed", "dense/token_embedder.embedding/0.0"),
            ("huggingface", "model-00001*"),
            ("huggingface", "config.json"),
            ("ista", "exp00.pt"),
            ("vocabulary", "spm.model"),
            ("tokenizer", "tokenizer.json"),
            ("tokenizer", "tokenizer_config.json"),
            ("text", "text.jsonl"),
        )
    },
    "msgpack 100 000 deep": ("t5x", lambda p, r: replace(p / "checkpoint", b"\x81\xa9optimizer" * DEEP)),
    "lists 100 000 deep": ("t5x", lambda p, r: replace(p / "checkpoint", b"\x81\xa6target" + b"\x91" * DEEP)),
    "900 targets": ("t5x", msgpack_value(lambda root: {"version": 3, "optimizer": {"target": nested(900)}})),
    "an array of 2^32 - 1": ("t5x", lambda p, r: replace(p / "checkpoint", b"\x81\xa6target\xdd\xff\xff\xff\xff")),
    "kvstore is text": (
        "t5x",
        msgpack_value(lambda root: root["optimizer"]["target"]["token_embedder"]["embedding"].update(kvstore="x")),
    ),
    "layer 999999999": (
        "t5x",
        msgpack_value(
            lambda root: root["optimizer"]["target"]["encoder"].update(layers_999999999={"x": "PLACEHOLDER://x"})
        ),
    ),
    "block 999999999": ("huggingface", rename_tensor("encoder.block.1.", "encoder.block.999999999.")),
    "expert 999999999": ("huggingface", rename_tensor("experts.expert_1.", "experts.expert_999999999.")),
    "layer 999999999, decoder": ("olmoe", rename_tensor("model.layers.1.", "model.layers.999999999.")),
    "expert 999999999, decoder": ("olmoe", rename_tensor("experts.1.", "experts.999999999.")),
    **{
        f"{field} = {value}, {kind}": (kind, config(**{field: value}))
        for kind in ("olmoe", "qwen3_moe", "gpt_oss", "deepseek_v3")
        for field, value in (("num_hidden_layers", 10**9), ("vocab_size", "x"), ("num_attention_heads", 4.0))
    },
    "rope theta is a list": ("olmoe", config(rope_parameters=[1])),
    "layers are negative": ("olmoe", config(num_hidden_layers=-1)),
    "experts are true": ("mixtral", config(num_local_experts=True)),
    "d_ff is text, published": ("ista", config(d_ff="28")),
    "d_ff is a list, published": ("ista", config(d_ff=[28])),
    "eps is another": ("huggingface", config(layer_norm_epsilon=1e-3)),
    "activation is another": ("huggingface", config(dense_act_fn="gelu_new")),
    "model_type is a list": ("huggingface", config(model_type=["x"])),
    "index points outside": (
        "mixtral",
        lambda p, r: edit_json(
            p / "model.safetensors.index.json", lambda m: m["weight_map"].update({"lm_head.weight": "../x"})
        ),
    ),
    "overlapping offsets": ("olmoe", overlapping_offsets),
    "a header of 2^63 bytes": (
        "olmoe",
        in_file("model.safetensors", lambda f, r: replace(f, struct.pack("<Q", 2**63) + f.read_bytes()[8:])),
    ),
    "a key of a million tuples": ("ista", program(TUPLES)),
    "a key of a million tuples, bin": ("bin", program(TUPLES)),
    "billion laughs": ("ista", program(LISTS)),
    "billion laughs, bin": ("bin", program(LISTS)),
    "a million calls deep": ("ista", program(b"\x80\2" + b"ccollections\nOrderedDict\n(" * 300_000)),
    "encrypted": ("ista", flag_bits(1)),
    "corrupt deflate": ("ista", corrupt_deflate),
    "strides beyond 2^63": (
        "ista",
        program(
            b"\x80\2}X\1\0\0\0actorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000"
            b"X\3\0\0\0cpuK\x10tQK\0(K\1t(\x8a\x10" + b"\x7f" * 16 + b"tI00\nNtRs."
        ),
    ),
    "a flipped byte of noexp.pt": ("ista", flipped_weight("noexp.pt")),
    "a flipped byte of exp00.pt": ("ista", flipped_weight("exp00.pt")),
    "a flipped byte of pytorch_model.bin": ("bin", flipped_weight("pytorch_model.bin")),
    "sizes of another kind": ("ista", lambda p, r: set_program(p / "sizes.pt", pickle.dumps([1], 2))),
    "a sentinel that isn't": ("text", lambda p, r: replace(p / "text.jsonl", b'{"text": "a <extra_id_100> b"}\n')),
    "a sentinel of 5 000 digits": (
        "text",
        lambda p, r: replace(p / "text.jsonl", b'{"text": "a <extra_id_' + b"9" * 5_000 + b'> b"}\n'),
    ),
    "deep text": ("text", lambda p, r: replace(p / "text.jsonl", b'{"text": ' + b"[" * DEEP + b"\n")),
    "gzip of zeros": ("text", lambda p, r: replace(p / "text.jsonl", b"\0" * 100_000)),
    "tokens that aren't text": (
        "tokenizer",
        lambda p, r: edit_json(p / "tokenizer_config.json", lambda c: c.update(bos_token=7, eos_token=["x"])),
    ),
    "deep tokenizer_config.json": ("tokenizer", lambda p, r: replace(p / "tokenizer_config.json", b"[" * DEEP)),
}

KINDS = tuple(BASES)


def apply(number: int, path: Callable[[str], pathlib.Path]) -> tuple[str, str]:
    """Damages a copy, path(kind), as the case of that number wants; returns what it is called, and the kind."""
    rng = random.Random(number)
    if number < len(NAMED):
        name, (kind, damage) = list(NAMED.items())[number]
        damage(path(kind), rng)
        if kind in ("compressed", "gap"):
            sign(path(kind))
        return name, kind
    kind = rng.choice(KINDS)
    copy = path(kind)
    files = sorted(p for p in copy.rglob("*") if p.is_file())
    # Small files that tell of others come up more often.
    telling = [f for f in files if f.name in ("checkpoint", "manifest.json", "config.json") or f.suffix == ".json"]
    file = rng.choice(telling if telling and rng.random() < 0.5 else files)
    if kind in OTHER:
        file = rng.choice(files)
    damage_file(file, rng)
    if kind in ("compressed", "gap") and rng.random() < 0.7:
        sign(copy)
    return f"{kind}: {file.relative_to(copy)}", kind
