"""Damage to sound inputs: known faults by name, and as many more as one likes, drawn by number; always the same."""

from __future__ import annotations

import json
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
from bad_damage import (
    DEEP,
    Damage,
    damage_file,
    edit_json,
    fifo,
    members,
    nested,
    replace,
    set_program,
    sign,
    write_zip,
)

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
