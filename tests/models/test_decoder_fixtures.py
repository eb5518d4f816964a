"""Checkpoints that transformers saved, with its logits and its greedy tokens, of every decoder-only family."""

import hugging_face
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qmoe_jax

FIXTURES = ["olmoe", "mixtral", "qwen3_moe", "deepseek_v3", "deepseek_v3_fp8", "gpt_oss", "gpt_oss_mxfp4"]
PROMPT = 9  # tokens of `greedy`


def also(few):
    """All fixtures; those that aren't among the few only where long tests are run."""
    marked = [f if f in few else pytest.param(f, marks=pytest.mark.long) for f in FIXTURES]
    return pytest.mark.parametrize("case", marked, indirect=True)


@pytest.fixture(scope="module", params=FIXTURES)
def case(request, fixture_path):
    path = fixture_path(f"{request.param}_tiny")
    family, config, params = hugging_face.load(path / "checkpoint")
    return family, config, params, np.load(path / "io.npz")


def real(io):
    return np.arange(io["input_ids"].shape[1]) < io["lengths"][:, None]


@pytest.mark.parametrize("lengths_given", [False, pytest.param(True, marks=pytest.mark.long)])  # test_decoders.py, too
def test_logits(case, lengths_given):
    family, config, params, io = case
    model = family.model(config, jnp.float32, None)
    lengths = io["lengths"] if lengths_given else None
    logits = np.asarray(qmoe_jax.forward(model, params, io["input_ids"], lengths=lengths))
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits[real(io)], io["logits"][real(io)], atol=2e-4, rtol=0)


# Packed weights are in nothing else than the logits.
@also(["olmoe", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_greedy_tokens(case):
    family, config, params, io = case
    model, greedy = family.model(config, jnp.float32, None), io["greedy"]
    new = greedy.shape[1] - PROMPT
    found = qmoe_jax.generate(model, params, greedy[:, :PROMPT], max_length=new, stop=())
    np.testing.assert_array_equal(found, greedy[:, PROMPT:])


@also(["deepseek_v3", "gpt_oss"])
def test_bfloat16_is_close(case):
    """As close as bfloat16 is elsewhere: the error is a few hundredths of the logits' spread."""
    family, config, params, io = case
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    logits = family.forward(family.model(config, jnp.bfloat16, None), params, io["input_ids"])
    difference, expected = (np.asarray(logits) - io["logits"])[real(io)], io["logits"][real(io)]
    # A token whose experts are nearly as good as others may go elsewhere: the median tells.
    assert np.median(np.abs(difference)) < 0.03 * expected.std()


@pytest.mark.parametrize("fixture, most", [("gpt_oss_mxfp4", 16 + 1), ("deepseek_v3_fp8", 128 * 128 + 4)])
def test_slices_are_those_of_the_whole(fixture_path, monkeypatch, fixture, most):
    """Where tensors are fused and packed, and where each expert has one in float8; of one weight, `most` bytes."""
    checkpoint = qmoe_jax.open_checkpoint(fixture_path(f"{fixture}_tiny") / "checkpoint")
    sizes, read = [], checkpoint.store.read
    for layer in checkpoint.config.sparse_layers:
        for matrix in checkpoint.config.expert.matrices:
            name = checkpoint.family.expert_parameter(layer, matrix)
            whole = checkpoint.read(name)
            assert whole.shape == checkpoint.specs[name].shape
            for index in ((slice(1, 3),), (2, slice(5, 20)), (slice(None), slice(7), slice(3, 130, 2))):
                np.testing.assert_array_equal(checkpoint.read(name, index), whole[index])
            with monkeypatch.context() as patch:
                patch.setattr(checkpoint.store, "read", lambda *args: sizes.append(part := read(*args)) or part)
                assert checkpoint.read(name, (1, -1, -1)) == whole[1, -1, -1]
            assert 0 < sum(part.nbytes for part in sizes) <= most
            sizes.clear()
