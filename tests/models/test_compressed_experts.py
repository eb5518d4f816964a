"""A model with compressed experts: as exact as plain XLA, and nothing dense stays in memory."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import SWITCH, random_params

import qmoe_jax
from qmoe_jax import codecs, streaming
from qmoe_jax.checkpoints import CompressedWriter, open_checkpoint
from qmoe_jax.models import experts as moe
from qmoe_jax.models.switch import Vocabulary, decoding, load_examples
from qmoe_jax.quantization.gptq import round_to_nearest

CARRIED = pathlib.Path(__file__).resolve().parents[2] / "experiments/tiny_model"

# Experts are nearly all of it.
MANY_EXPERTS = dataclasses.replace(SWITCH, num_experts=64, d_model=32, d_ff=96)
PROMPTS = np.random.default_rng(0).integers(2, SWITCH.vocab_size, (2, 5)).astype(np.int32)


def compress(kernel, codec):
    """CompressedExperts of a kernel [experts, in, out], rounded to nearest."""
    rounded = round_to_nearest(jnp.asarray(kernel, jnp.float32).swapaxes(1, 2), bits=1.5)
    return qmoe_jax.CompressedExperts.from_symbols(np.asarray(rounded.symbols), rounded.levels, codec)


@pytest.fixture
def as_xla(monkeypatch):
    """as_xla(function) -> its result with compressed_ragged_dot as plain XLA."""

    def run(function):
        calls = []

        def xla(*operands):
            calls.append(operands)
            return qmoe_jax.kernels.compressed_ragged_dot(*operands, implementation="xla")

        jax.clear_caches()  # Programs compiled so far hold the default.
        with monkeypatch.context() as patch:
            patch.setattr(moe, "compressed_ragged_dot", xla)
            result = function()
        jax.clear_caches()
        assert calls
        return result

    return run


@pytest.fixture(scope="module", params=["gap", pytest.param("dictionary", marks=pytest.mark.long)])
def carried(request, tmp_path_factory):
    """The carried model's compressed checkpoint."""
    path = tmp_path_factory.mktemp("carried")
    native = open_checkpoint(CARRIED)
    with CompressedWriter(path, native.config, {}, request.param, {}) as writer:
        for layer in native.config.sparse_layers:
            ((_, _, kernels),) = native.experts(layer)
            writer.write_layer(layer, {matrix: compress(k, request.param) for matrix, k in kernels.items()})
        writer.finish({name: native.read(name) for name in native.specs if not native.is_expert(name)})
    return path


@pytest.fixture(scope="module")
def documents():
    return load_examples(CARRIED / "validation.jsonl.gz", Vocabulary.load(CARRIED / "spm.model"), 24).pairs


# That it is the loss of the dequantized weights: test_streaming.py.
@pytest.mark.long
def test_loss_is_that_of_plain_xla(carried, documents, as_xla):
    loss = lambda: streaming.run(open_checkpoint(carried), documents, streaming.Settings()).summary()["loss"]
    assert loss() == pytest.approx(as_xla(loss), abs=1e-4)


def test_logits_are_those_of_plain_xla(carried, documents, as_xla):
    model, params = qmoe_jax.load(carried)
    encoder = np.stack([e[:16] for e, _ in documents if len(e) >= 16][:4])
    decoder = np.stack([d[:8] for _, d in documents if len(d) >= 8][:4])
    logits = lambda: np.asarray(qmoe_jax.forward(model, params, encoder, decoder))
    np.testing.assert_allclose(logits(), as_xla(logits), rtol=0, atol=1e-4)


@functools.cache
def many_experts(codec):
    """Model and parameters with compressed experts, and the bytes of its experts as dense float32."""
    params, dense = random_params(MANY_EXPERTS), 0
    for layer in MANY_EXPERTS.sparse_layers:
        stack, name = layer.split("/")
        for module in params[stack][name]["mlp"]["expert"].values():
            dense += module["kernel"].nbytes
            module["kernel"] = compress(module["kernel"], codec)
    return qmoe_jax.SwitchTransformer(MANY_EXPERTS), jax.device_put(params), dense


@pytest.mark.parametrize("codec", codecs.CODECS)
def test_generation_leaves_nothing_behind_but_its_tokens(codec):
    model, params, dense = many_experts(codec)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) < dense / 3

    def live():
        return sum(array.nbytes for array in jax.live_arrays())

    # The first call may set up constants, such as the dictionary, that serve every model.
    qmoe_jax.generate(model, params, PROMPTS, max_length=6, stop=())
    before = live()
    written = qmoe_jax.generate(model, params, PROMPTS, max_length=6, stop=())
    assert live() - before <= 2 * written.nbytes


@pytest.mark.parametrize("codec", codecs.CODECS)
def test_generation_never_has_all_experts_of_a_matrix_dense(codec):
    model, params, dense = many_experts(codec)
    settings = (6, (), (), (0,), 1.0)
    program = decoding._generate.lower(model, settings, params, jnp.asarray(PROMPTS), 0.0, jax.random.key(0)).compile()
    matrices = len(MANY_EXPERTS.sparse_layers) * len(MANY_EXPERTS.expert_matrices)
    assert program.memory_analysis().temp_size_in_bytes < dense / matrices / 2
