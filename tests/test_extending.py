"""A codec, a quantization method and a family of models, added through the registries alone, from files to reports."""

import dataclasses
import functools
import json
import types
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import qmoe_jax
from qmoe_jax import codecs, reports, streaming
from qmoe_jax.compression import planning
from qmoe_jax.compression.compress import compress_examples
from qmoe_jax.models import families
from qmoe_jax.models.decoder.attention import GroupedAttention
from qmoe_jax.models.decoder.config import MATRICES, GroupedConfig
from qmoe_jax.models.decoder.family import DecoderFamily
from qmoe_jax.models.decoder.model import Decoder, DecoderLayer
from qmoe_jax.models.decoder.names import COMMON, EXPERTS, ROUTER
from qmoe_jax.models.decoder.routing import Router, softmax_then_choose
from qmoe_jax.models.family import Expert
from qmoe_jax.quantization import methods, settings
from qmoe_jax.quantization.gptq import Quantized
from qmoe_jax.quantization.methods import Needs
from qmoe_jax.quantization.settings import QuantizationSettings
from qmoe_jax.reports.figures import plot_compression
from qmoe_jax.reports.html import html_report

# --- A codec: a byte for each symbol, and any number of levels -------------------------------------------------------

BYTES = types.SimpleNamespace(
    LEVELS=range(1, 256),
    encode_experts=lambda symbols, num_levels: {"symbols": np.asarray(symbols)},
    pack=lambda data, levels, shape: {"symbols": np.asarray(data["symbols"]), "levels": np.asarray(levels)},
    stored_nbytes=lambda data, levels, shape: data["symbols"].size + 2 * levels.size,
    unpack=lambda stored, shape: ({"symbols": stored["symbols"]}, stored["levels"]),
    take=lambda data, start, stop: {"symbols": data["symbols"][start:stop]},
    static_bound=lambda data: 0,
    decode_expert=lambda data, shape, num_levels, bound, expert: data["symbols"][expert],
)


# --- A method: signs of weights that are far from zero ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Signs:
    title: ClassVar[str] = "signs of large weights"
    calibrated: ClassVar[bool] = True
    uses_importance: ClassVar[bool] = False
    defaults: ClassVar[dict] = {"token_cap": 8.0}
    target_bits: ClassVar[None] = None
    bits: ClassVar[float] = 1.5
    levels: ClassVar[int] = 2

    threshold: float = 0.5

    def needs(self):
        return Needs(0.0, 4.0, 8.0, 8.1)

    def __call__(self, W, H, importance=None):
        scale = jnp.sqrt(jnp.mean(W**2, -1, keepdims=True))
        seen = jnp.diagonal(H, axis1=1, axis2=2)[:, None] > 0
        symbols = jnp.where((jnp.abs(W) > self.threshold * scale) & seen, 1 + (W > 0), 0).astype(jnp.uint8)
        levels = jnp.concatenate([-scale, scale], -1)
        fallback = ~jnp.any(seen, (1, 2))
        Q = jnp.where(symbols == 2, scale, jnp.where(symbols == 1, -scale, 0.0))
        return Quantized(Q, symbols, levels, fallback, jnp.zeros(len(W)))


# --- A family: a decoder whose experts gate by tanh -------------------------------------------------------------------


def tanh_gate(hidden):
    gate, up = hidden
    return jnp.tanh(gate) * up


class ToyConfig(GroupedConfig):
    expert = Expert(MATRICES, tanh_gate)


class ToyLayer(DecoderLayer):
    def attention(self):
        c = self.config
        return GroupedAttention(c.d_model, (c.num_heads, c.num_kv_heads), c.head_dim, c.rope, self.dtype)

    def router(self):
        choose = functools.partial(softmax_then_choose, top_k=self.config.top_k, renormalise=True)
        return Router((self.config.d_model, self.config.num_experts), choose)


class Toy(Decoder):
    Layer = ToyLayer


FAMILY = DecoderFamily(
    name="toy",
    title="a toy",
    Config=ToyConfig,
    Model=Toy,
    PRESETS={},
    read=lambda described, **overrides: ToyConfig(**described["toy"] | overrides),
    write=lambda config, dtype: {"model_type": "toy", "toy": config.to_dict()},
    rows=(*COMMON, EXPERTS, ROUTER),
    model_types=("toy",),
)
CONFIG = ToyConfig(
    vocab_size=50, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=24, num_experts=4, top_k=2
)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(codecs.CODECS, "bytes", BYTES)
    monkeypatch.setitem(methods.METHODS, "signs", Signs)
    monkeypatch.setitem(families.FAMILIES, "toy", FAMILY)


@pytest.fixture
def directory(registered, tmp_path):
    """A model of the family as it is downloaded."""
    rng, tensors, names = np.random.default_rng(0), {}, FAMILY.names["huggingface"]
    for name, shape in FAMILY.param_shapes(CONFIG).items():
        value = (rng.standard_normal(shape) * (shape[-2] ** -0.5 if len(shape) > 1 else 1)).astype(np.float32)
        stored = names.tensors(name, CONFIG)
        for tensor, part in zip(stored.names, value if stored.stacked else [value], strict=True):
            tensors[tensor] = np.ascontiguousarray(part.T if stored.transposed else part)
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps(names.describe(CONFIG, dict.fromkeys(FAMILY.param_shapes(CONFIG), np.dtype("f4")), None))
    )
    return folder


def test_they_compress_and_report_end_to_end(directory, tmp_path):
    checkpoint = qmoe_jax.open_checkpoint(directory)
    assert checkpoint.config == CONFIG and checkpoint.family is FAMILY
    rng = np.random.default_rng(1)
    examples = [(rng.integers(0, CONFIG.vocab_size, n).astype(np.int32),) for n in rng.integers(3, 30, 24)]
    quantization, memory = QuantizationSettings("signs", threshold=0.4), streaming.Settings(experts_per_group=3)
    assert settings.fields()["threshold"] == (float, 0.5)
    assert (quantization.token_cap, quantization.threshold) == (8.0, 0.4)

    work = planning.workload(FAMILY.task, examples, 16)
    plan = planning.plan(
        CONFIG, work, memory, quantization, grids=checkpoint.grids("model/layers_0"), is_cpu=True, resident_bytes=0,
        codec="bytes",
    )  # fmt: skip
    assert plan["assumed_bits_per_weight"] == 8 and all(planning.rows(plan))

    output = tmp_path / "out"
    report = compress_examples(
        checkpoint, None, examples[:16], examples[16:], quantization, memory, codec="bytes", output=output
    )
    report |= {"plan": plan, "checkpoint": checkpoint.provenance}
    assert reports.method_title(report) == "signs of large weights, 1.5 bits"
    assert "signs of large weights" in html_report(report)
    plot_compression(report, tmp_path / "report.png")
    assert report["experts_total"] == 8 and 0.1 < report["zeros"] < 0.5
    assert report["bits_per_weight"] == pytest.approx(8 + 16 * 2 * (16 + 24 + 24) / (3 * 16 * 24), rel=1e-6)

    compressed = qmoe_jax.open_checkpoint(output)
    assert compressed.config == CONFIG and compressed.quantization["threshold"] == 0.4
    losses = streaming.run(compressed, examples[16:], memory).summary()
    assert losses["loss"] == pytest.approx(report["loss"], abs=1e-6)
    model, params = qmoe_jax.load(output)
    tokens = np.stack([np.resize(tokens, 12) for (tokens,) in examples[:3]])
    assert np.isfinite(qmoe_jax.forward(model, params, tokens)).all()
    experts = params["model"]["layers_0"]["mlp"]["experts"]["down_proj"]["kernel"]
    assert experts.codec == "bytes" and experts.shape == (4, 16, 24)
    # The last matrix is the one that maps back, whatever its name comes to in the alphabet.
    dense = qmoe_jax.open_checkpoint(directory).read("model/layers_0/mlp/experts/down_proj/kernel").swapaxes(1, 2)
    found, scale = np.asarray(experts.to_dense()), np.sqrt((dense**2).mean(-1, keepdims=True))
    agree = np.sign(found) == np.where(np.abs(dense) > 0.4 * scale, np.sign(dense), 0)
    assert agree.mean() > 0.98  # rounding to bfloat16 before
    jax.tree.map(lambda a: a.block_until_ready() if isinstance(a, jax.Array) else a, params)


def test_what_is_not_registered_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="'signs', expected one of gptq, rtn, rd"):
        QuantizationSettings("signs")
    with pytest.raises(ValueError, match="'bytes'. Known codecs: dictionary, gap"):
        codecs.get("bytes")
    (tmp_path / "config.json").write_text('{"model_type": "toy"}')
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(qmoe_jax.CheckpointError, match="model_type 'toy', expected 'switch_transformers', 'olmoe'"):
        qmoe_jax.open_checkpoint(tmp_path)
