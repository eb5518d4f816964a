"""Small compressed checkpoints, to be read, damaged and interrupted."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import tiny_model

from qmoe_jax.checkpoints import CheckpointError, CompressedWriter, compressed, open_checkpoint
from qmoe_jax.codecs.experts import CompressedExperts

CONFIG = tiny_model.CONFIG
LAYERS = CONFIG.sparse_layers
DENSE = {n: v for n, v in tiny_model.random_params(CONFIG).items() if "/mlp/expert/" not in n}


def random_experts(out, in_, seed, codec="dictionary", num_levels=2):
    """Symbols, levels (bfloat16), and both compressed."""
    rng = np.random.default_rng(seed)
    p = [0.8] + [0.2 / num_levels] * num_levels
    symbols = rng.choice(num_levels + 1, (CONFIG.num_experts, out, in_), p=p).astype(np.uint8)
    levels = rng.standard_normal((CONFIG.num_experts, out, num_levels)).astype(ml_dtypes.bfloat16)
    levels = np.sort(levels, axis=-1)
    return symbols, levels, CompressedExperts.from_symbols(symbols, levels, codec)


def random_layers(*codec_and_levels):
    """{layer: {matrix: (symbols, levels, CompressedExperts)}}"""
    shapes = {"wi": (CONFIG.d_ff, CONFIG.d_model), "wo": (CONFIG.d_model, CONFIG.d_ff)}
    return {
        layer: {m: random_experts(*shape, 10 * i + j, *codec_and_levels) for j, (m, shape) in enumerate(shapes.items())}
        for i, layer in enumerate(LAYERS)
    }


@pytest.fixture(scope="module")
def experts():
    return random_layers()


def writer(directory, codec="dictionary", num_shards=None):
    return CompressedWriter(directory, CONFIG, {"bits": 1.5}, codec, {"checkpoint": "somewhere"}, num_shards)


def write(directory, experts, num_shards=None):
    (codec,) = {e.codec for matrices in experts.values() for _, _, e in matrices.values()}
    with writer(directory, codec, num_shards) as w:
        for layer, matrices in experts.items():
            w.write_layer(layer, {m: e for m, (_, _, e) in matrices.items()})
        w.finish(DENSE)
    return directory


@pytest.fixture(scope="module")
def original(experts, tmp_path_factory):
    return write(tmp_path_factory.mktemp("original") / "out", experts)


@pytest.fixture(scope="module")
def gap_original(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gap") / "out", random_layers("gap"))


@pytest.fixture
def copy(original, tmp_path):
    """A copy to damage; elsewhere than where it was written."""
    return shutil.copytree(original, tmp_path / "elsewhere" / "copy")


def read_everything(path):
    checkpoint = open_checkpoint(path)
    for name in checkpoint.specs:
        checkpoint.read(name)
    for layer in checkpoint.config.sparse_layers:
        for _ in checkpoint.experts(layer):
            pass


def assert_refused(path, *names):
    """Reading the checkpoint fails with one error that says where."""
    with pytest.raises(CheckpointError) as e:
        read_everything(path)
    for name in names:
        assert name in str(e.value), str(e.value)


def edit_manifest(path, edit, sign=True):
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    edit(manifest)
    if sign:
        manifest["sha256"] = compressed.manifest_sha256(manifest)
    file.write_text(json.dumps(manifest))
