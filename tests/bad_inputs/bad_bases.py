"""Sound inputs of every kind, in kilobytes: what `bad_cases` damages."""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
import shutil
import tarfile
import types
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import msgpack
import numpy as np
import safetensors.numpy
import tensorstore as ts
import tiny_model
import tokenizers
from flax import serialization, traverse_util
from models import random_decoders
from tiny_vocabulary import SENTENCES, train_pieces

from qmoe_jax.checkpoints import TARGETS, CompressedWriter, conversion, open_checkpoint
from qmoe_jax.checkpoints.checkpoint import Checkpoint
from qmoe_jax.checkpoints.torch_files import save
from qmoe_jax.codecs.experts import CompressedExperts

CONFIG = tiny_model.CONFIG
ISTA = dataclasses.replace(CONFIG, encoder_sparse_layers=(1,))


class InMemory(Checkpoint):
    """Parameters that are there already, to be written in any layout."""

    def __init__(self, config: Any, params: dict[str, Any]):
        self.path, self.config, self.provenance = "memory", config, {}
        self._params = {n: np.asarray(v) for n, v in traverse_util.flatten_dict(params, sep="/").items()}

    @property
    def specs(self):
        return {n: jax.ShapeDtypeStruct(v.shape, v.dtype) for n, v in self._params.items()}

    def read(self, name, index=()):
        return self._params[name][index]


def convert(checkpoint: Checkpoint, path: pathlib.Path, target: str, **options: Any) -> None:
    path.mkdir(parents=True)
    conversion.run(TARGETS[target](checkpoint, path, conversion.Options(**options)), path, "")


def write_t5x(path: pathlib.Path) -> None:
    tiny_model.write_checkpoint(path.parent)
    (path.parent / "checkpoint_3").rename(path)


def write_msgpack(path: pathlib.Path) -> None:
    """Arrays within the index file."""
    tree = traverse_util.unflatten_dict(tiny_model.random_params(), sep="/")
    path.mkdir()
    state = {"version": 3, "optimizer": {"target": tree, "state": {"step": np.int32(3)}}}
    (path / "checkpoint").write_bytes(serialization.msgpack_serialize(state))


def placeholders() -> bytes:
    names = tiny_model.random_params()
    target = traverse_util.unflatten_dict({n: f"PLACEHOLDER://target.{n.replace('/', '.')}" for n in names}, sep="/")
    return msgpack.packb({"state": {"step": "PLACEHOLDER://state.step"}, "target": target})


def write_orbax(path: pathlib.Path) -> None:
    write_t5x(path)
    (path / "checkpoint").write_bytes(placeholders())


def write_ocdbt(path: pathlib.Path) -> None:
    path.mkdir()
    for name, array in tiny_model.random_params().items():
        kvstore = {"driver": "ocdbt", "base": f"file://{path}/", "path": f"target.{name.replace('/', '.')}/"}
        metadata = {"shape": array.shape, "chunks": array.shape, "dtype": "<f4"}
        ts.open({"driver": "zarr", "kvstore": kvstore, "metadata": metadata, "create": True}).result()[...] = array
    (path / "checkpoint").write_bytes(placeholders())


def write_bin(path: pathlib.Path) -> None:
    convert(InMemory(CONFIG, tiny_model.random_params()), path, "huggingface")
    file = path / "model.safetensors"
    save(path / "pytorch_model.bin", safetensors.numpy.load_file(file), ordered=True)
    file.unlink()


def write_compressed(path: pathlib.Path, codec: str = "dictionary", config: Any = CONFIG) -> None:
    rng = np.random.default_rng(0)
    with CompressedWriter(path, config, {"bits": 1.5}, codec, {"checkpoint": "somewhere"}, 2) as writer:
        for layer in config.sparse_layers:
            experts = {}
            for matrix in config.expert_matrices:
                out, width = (config.d_model, config.d_ff) if matrix == "wo" else (config.d_ff, config.d_model)
                symbols = rng.choice(3, (config.num_experts, out, width), p=(0.8, 0.1, 0.1)).astype(np.uint8)
                levels = np.sort(rng.normal(size=(config.num_experts, out, 2)), axis=-1).astype(ml_dtypes.bfloat16)
                experts[matrix] = CompressedExperts.from_symbols(symbols, levels, codec)
            writer.write_layer(layer, experts)
        writer.finish({n: v for n, v in tiny_model.random_params(config).items() if "/mlp/expert/" not in n})


def write_ista(path: pathlib.Path) -> None:
    compressed = path.with_name("ista.compressed")
    write_compressed(compressed, config=ISTA)
    convert(open_checkpoint(compressed), path, "ista")
    shutil.rmtree(compressed)


def write_decoder(name: str, path: pathlib.Path) -> None:
    config = random_decoders.CONFIGS[name]
    shard_bytes = 40_000 if name == "mixtral" else 1 << 30
    convert(InMemory(config, random_decoders.random_params(config)), path, "huggingface", shard_bytes=shard_bytes)


def write_maxtext(path: pathlib.Path) -> None:
    """What MaxText wrote; see tests/checkpoints/test_maxtext.py."""
    archive = pathlib.Path(__file__).resolve().parents[1] / "checkpoints" / "maxtext.tar.gz"
    unpacked = path.with_name("maxtext.unpacked")
    with tarfile.open(archive) as tar:
        tar.extractall(unpacked, filter="data")
    model = unpacked / "maxtext" / "mixtral"
    shutil.move(model / "scanned" / "0" / "items", path)
    shutil.copy(model / "huggingface" / "config.json", path)
    shutil.rmtree(unpacked)


def write_text(path: pathlib.Path) -> None:
    path.mkdir()
    lines = "".join(json.dumps({"text": text, "url": "-"}) + "\n" for text in SENTENCES * 3)
    (path / "text.jsonl").write_text(lines)
    (path / "text.txt").write_text("\n\n".join(SENTENCES * 3))
    (path / "text.json.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))


def write_vocabulary(path: pathlib.Path) -> None:
    path.mkdir()
    (path / "spm.model").write_bytes(train_pieces())


def write_tokenizer(path: pathlib.Path) -> None:
    path.mkdir()
    words = sorted({w for s in SENTENCES for w in s.replace(",", " ,").split()} | {"a"})
    ids = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.normalizer = tokenizers.normalizers.NFKC()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"add_bos_token": True, "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


BASES: dict[str, Callable[[pathlib.Path], None]] = {
    "t5x": write_t5x,
    "msgpack": write_msgpack,
    "orbax": write_orbax,
    "ocdbt": write_ocdbt,
    "huggingface": lambda p: convert(
        InMemory(CONFIG, tiny_model.random_params()), p, "huggingface", shard_bytes=100_000
    ),
    "bin": write_bin,
    "compressed": write_compressed,
    "gap": lambda p: write_compressed(p, "gap"),
    "ista": write_ista,
    **{name: (lambda p, name=name: write_decoder(name, p)) for name in random_decoders.CONFIGS},
    "maxtext": write_maxtext,
    "text": write_text,
    "vocabulary": write_vocabulary,
    "tokenizer": write_tokenizer,
}
OTHER = types.MappingProxyType({"text": "text.jsonl", "vocabulary": "spm.model", "tokenizer": "tokenizer.json"})


def make(folder: pathlib.Path) -> None:
    """Writes all of them to folder/KIND."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, write in BASES.items():
        write(folder / kind)
