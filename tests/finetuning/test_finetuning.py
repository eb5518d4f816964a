"""Fine-tuning: what is trained, towards what, and what comes of it, on the tiny model and a decoder."""

import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_model
from models import random_decoders

import qmoe_jax
from qmoe_jax import finetuning, streaming
from qmoe_jax.checkpoints.in_memory import write_huggingface
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.compression.compress import compress_examples
from qmoe_jax.compression.progress import OtherRunError
from qmoe_jax.finetuning import finetune, parts, teacher
from qmoe_jax.finetuning.training import Run
from qmoe_jax.quantization.settings import QuantizationSettings

MEMORY = streaming.Settings(tokens_per_batch=512, experts_per_group=4)
SETTINGS = finetuning.Settings(epochs=3, tokens_per_batch=256, learning_rate=3e-3, held_out=0.2, patience=3)


@pytest.fixture(scope="module")
def compressed(tiny, tmp_path_factory):
    """(compressed checkpoint, original, documents)"""
    original = qmoe_jax.open_checkpoint(tiny.checkpoint)
    task = original.family.task
    vocabulary = task.vocabulary(tiny.vocabulary)
    documents = list(task.load(tiny.calibration, vocabulary, tiny_model.NUM_CALIBRATION))
    output = tmp_path_factory.mktemp("compressed") / "out"
    rtn = QuantizationSettings("rtn")
    compress_examples(original, vocabulary, None, documents, rtn, MEMORY, output=output, provenance=original.provenance)
    return qmoe_jax.open_checkpoint(output), original, documents


@pytest.fixture(scope="module")
def tuned(compressed, tmp_path_factory):
    """(checkpoint, report) of a fine-tuning that nobody interrupts."""
    output = tmp_path_factory.mktemp("tuned") / "out"
    report = finetuning.finetune_examples(*compressed, SETTINGS, output=output)
    return qmoe_jax.open_checkpoint(output), report


def test_it_comes_nearer_to_the_original_with_the_same_symbols(compressed, tuned):
    checkpoint, report = tuned
    before, original, documents = compressed
    assert report["after"] < 0.9 * report["before"]
    assert [set(epoch) for epoch in report["epochs"]] == [{"held_out", "trained_on"}] * 4
    assert checkpoint.manifest["layers"].keys() == before.manifest["layers"].keys()
    for layer in checkpoint.config.sparse_layers:
        sizes = [c.manifest["layers"][layer]["bytes"] for c in (checkpoint, before)]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.02)  # Levels are packed, by how much they differ.
    manifests = {"before": before.manifest, "after": checkpoint.manifest}
    found = {when: sum(layer["bytes"] for layer in m["layers"].values()) for when, m in manifests.items()}
    assert report["bytes_experts"] == found
    for layer in checkpoint.config.sparse_layers:
        ((_, _, new),), ((_, _, old),) = checkpoint.experts(layer), before.experts(layer)
        for matrix in old:
            np.testing.assert_array_equal(new[matrix].symbols(), old[matrix].symbols())
            assert np.any(new[matrix].levels != old[matrix].levels)
            new[matrix].validate()
    embedding = "token_embedder/embedding"  # not among the parts
    np.testing.assert_array_equal(checkpoint.read(embedding), before.read(embedding))
    assert all(np.any(checkpoint.read(n) != before.read(n)) for n in before.specs if n.endswith("/query/kernel"))
    assert checkpoint.provenance["checkpoint"] == original.path and checkpoint.quantization == before.quantization
    (how,) = checkpoint.provenance["finetuned"]
    assert (how["checkpoint"], how["original"]) == (before.path, original.path)
    assert how["manifest_sha256"] == before.manifest["sha256"] and how["settings"]["epochs"] == 3
    assert not (pathlib.Path(checkpoint.path) / "progress").exists()


def test_what_is_stored_has_the_divergence_that_is_reported(compressed, tuned):
    """Of the documents held out, by the definition, from whole distributions in float64."""
    (before, original, documents), (checkpoint, report) = compressed, tuned
    _, held_out = finetuning.training.split(len(documents), SETTINGS)
    total, count = np.zeros(2), 0
    teacher_model, teacher_params = qmoe_jax.load(original.path)
    teacher_params = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), teacher_params)
    models = [qmoe_jax.load(path) for path in (before.path, checkpoint.path)]
    for i in held_out:
        encoder, decoder = documents[i]
        tokens = [t[None] for t in (encoder, decoder[:-1], decoder[1:])]
        log_p = log_probabilities(qmoe_jax.forward(teacher_model, teacher_params, *tokens))
        for which, (model, params) in enumerate(models):
            total[which] += np.sum(
                np.exp(log_p) * (log_p - log_probabilities(qmoe_jax.forward(model, params, *tokens)))
            )
        count += len(decoder) - 1
    np.testing.assert_allclose([report["before"], report["after"]], total / count, rtol=5e-3)


def log_probabilities(logits):
    logits = np.asarray(logits, np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def test_interrupted_it_goes_on_and_ends_in_the_same_bytes(compressed, tuned, tmp_path, monkeypatch):
    output, states = tmp_path / "out", Run.states
    steps = []

    def stops(run, state):
        for after in states(run, state):
            steps.append(after.steps)
            yield after
            if after.steps in (2, 5):
                raise KeyboardInterrupt

    monkeypatch.setattr(Run, "states", stops)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt) as caught:
            finetuning.finetune_examples(*compressed, SETTINGS, output=output, commit_share=1)
        assert "run the same command to go on" in caught.value.__notes__[0]
        assert not (output / "manifest.json").exists()
        with pytest.raises(qmoe_jax.CheckpointError, match="is unfinished"):
            qmoe_jax.open_checkpoint(output)
    monkeypatch.setattr(teacher, "predict", None)  # Is not asked again.
    other = finetuning.Settings(learning_rate=1e-3)
    with pytest.raises(OtherRunError, match=r"finetune.learning_rate \(it began with 0.003"):
        finetuning.finetune_examples(*compressed, other, output=output)
    report = finetuning.finetune_examples(*compressed, SETTINGS, output=output, commit_share=1)
    assert steps == sorted(set(steps)), "no step twice"
    assert report["epochs"] == tuned[1]["epochs"]
    found, expected = (qmoe_jax.open_checkpoint(c).manifest for c in (output, tuned[0].path))
    assert json.dumps(found) == json.dumps(expected)


def test_without_gain_the_best_state_is_the_first(compressed, tmp_path):
    """A rate at which nothing can be learnt: levels and norms come out as they were."""
    settings = finetuning.Settings(
        parts=("levels", "norms"), learning_rate=50.0, epochs=9, patience=1, tokens_per_batch=256, held_out=0.2
    )
    report = finetuning.finetune_examples(*compressed, settings, output=tmp_path / "out")
    assert report["after"] == report["before"] and len(report["epochs"]) == 2
    checkpoint, (before, _, _) = qmoe_jax.open_checkpoint(tmp_path / "out"), compressed
    for part, old in checkpoint.manifest["layers"].items():
        assert [s["sha256"] for s in old["shards"]] == [s["sha256"] for s in before.manifest["layers"][part]["shards"]]
    assert checkpoint.manifest["dense"]["sha256"] == before.manifest["dense"]["sha256"]


def test_a_decoder(tmp_path):
    config = random_decoders.CONFIGS["qwen3_moe"]
    write_huggingface(tmp_path / "model", config, random_decoders.random_params(config))
    original = qmoe_jax.open_checkpoint(tmp_path / "model")
    rng = np.random.default_rng(0)
    documents = [(rng.integers(3, 61, n).astype(np.int32),) for n in rng.integers(8, 30, 12)]
    compress_examples(
        original, None, None, documents[:2], QuantizationSettings("rtn"), MEMORY, output=tmp_path / "compressed"
    )
    checkpoint = qmoe_jax.open_checkpoint(tmp_path / "compressed")
    settings = finetuning.Settings(parts=finetuning.PARTS, epochs=2, tokens_per_batch=128, learning_rate=3e-3)
    report = finetuning.finetune_examples(checkpoint, original, documents, settings, output=tmp_path / "out")
    assert report["after"] < report["before"] and all(report["parameters"].values())
    model, params = qmoe_jax.load(tmp_path / "out")
    assert np.isfinite(qmoe_jax.forward(model, params, documents[0][0][None])).all()


# --- Parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", random_decoders.CONFIGS)
def test_each_parameter_is_of_the_part_that_its_name_says(name):
    config = random_decoders.CONFIGS[name]
    family = qmoe_jax.FAMILIES[name]
    shapes = {n: s for n, s in family.param_shapes(config).items() if family.expert_of(n) is None}
    found = {n: parts.part_of(n, s, config) for n, s in shapes.items()}
    assert {found[n] for n in shapes if n.endswith("/scale")} == {"norms"}
    assert {found[n] for n in shapes if n.endswith("router/kernel")} == {"routers"}
    assert {found[n] for n in shapes if "embed_tokens" in n or "lm_head" in n} == {"embeddings"}
    assert {found[n] for n in shapes if "/self_attn/" in n and n.endswith("/kernel")} == {"attention"}


def test_levels_that_crossed_rise_again():
    levels = jnp.array([[[-1.0, 2.0], [3.0, 1.0]]])
    np.testing.assert_array_equal(parts.rising(levels), [[[-1, 2], [2, 2]]])


@pytest.mark.parametrize("num_levels", [2, 3, 5, 8])
def test_levels_that_share_a_ladder_share_it_after_training(num_levels):
    """Equal steps are trained as steps, and take no more than a field a row; other ladders stay."""
    rng = np.random.default_rng(0)
    symbols = rng.integers(0, num_levels + 1, (2, 5, 16)).astype(np.uint8)
    ladder = np.arange(num_levels) - num_levels // 2
    ladder = np.where(ladder < 0, ladder, ladder + 1).astype(np.float32)
    steps = (0.25 + rng.random((2, 5, 1))).astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
    experts = CompressedExperts.from_symbols(symbols, (steps * ladder).astype(ml_dtypes.bfloat16), "gap")
    trained = parts.trainable({"wi": experts}, None, ["levels"])
    if num_levels == 5:
        assert not trained
        return
    assert trained["wi"].shape == (2, 5, 1 if num_levels > 3 else num_levels)
    x = jnp.asarray(rng.standard_normal(16), jnp.float32)
    output = lambda trained: parts.placed({"wi": experts}, trained)["wi"].expert(0) @ x
    slope = jax.jacobian(output)(trained)["wi"][:, 0]  # [out, out, levels or 1]
    weights = np.concatenate([[0], ladder])[symbols[0]]
    expected = weights @ np.asarray(x)
    found = np.diagonal(slope)  # [levels or 1, out]
    found = found[0] if num_levels > 3 else ladder @ found
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.05)  # Levels' slopes are bfloat16.
    moved = parts.placed({"wi": experts}, {"wi": trained["wi"] * 1.37})["wi"]
    moved.validate()
    if num_levels > 3:
        levels = np.asarray(moved.levels, np.float64)
        step = levels[:, :, num_levels // 2, None]
        np.testing.assert_array_equal((step * ladder).astype(ml_dtypes.bfloat16).astype(np.float64), levels)


def test_levels_keep_to_the_mantissa_bits_that_they_had():
    old = np.array([[[-1.5, 0.75]], [[-1.0078125, 1.0]]], ml_dtypes.bfloat16)  # need 1 and 7 bits
    experts = CompressedExperts.from_symbols(np.ones((2, 1, 4), np.uint8), old, "gap")
    value = jnp.array([[[-1.26, 0.6]], [[-1.26, 0.999]]])
    found = parts.with_trained_levels(experts, value).levels.astype(jnp.float32)
    np.testing.assert_array_equal(found, [[[-1.5, 0.5]], [[-1.2578125, 1.0]]])


# --- The teacher -----------------------------------------------------------------------------------------------------


def test_divergence_is_that_of_the_definition_and_with_fewer_tokens_a_bound():
    rng = np.random.default_rng(0)
    p, q = (3 * rng.standard_normal((4, 5, 40)) for _ in range(2))
    log_p, log_q = log_probabilities(p), log_probabilities(q)
    exact = np.sum(np.exp(log_p) * (log_p - log_q), -1)

    def with_top(k):
        tokens = np.argsort(-log_p, -1)[..., :k]
        top = np.take_along_axis(log_p, tokens, -1)
        others = np.log(np.maximum(1 - np.exp(top).sum(-1, keepdims=True), 1e-7))
        return teacher.divergence(jnp.asarray(q, jnp.float32), np.concatenate([top, others], -1), tokens)

    np.testing.assert_allclose(with_top(40), exact, rtol=1e-5)
    assert np.all(with_top(10) <= exact + 1e-5) and np.all(with_top(10) >= 0)
    tokens = np.argsort(-log_p, -1)[..., :10]
    merged = np.sum(np.exp(np.take_along_axis(log_p, tokens, -1)) * np.take_along_axis(log_p - log_q, tokens, -1), -1)
    rest = [1 - np.exp(np.take_along_axis(x, tokens, -1)).sum(-1) for x in (log_p, log_q)]
    np.testing.assert_allclose(with_top(10), merged + rest[0] * np.log(rest[0] / rest[1]), rtol=1e-4)


# --- What is refused -------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_before_anything_is_written(compressed, tiny, tmp_path):
    checkpoint, original, documents = compressed
    output = tmp_path / "out"
    with pytest.raises(qmoe_jax.CheckpointError, match="is not compressed"):
        finetuning.finetune_examples(original, original, documents, SETTINGS, output=output)
    with pytest.raises(qmoe_jax.CheckpointError, match="Give the original model's checkpoint"):
        finetuning.finetune_examples(checkpoint, checkpoint, documents, SETTINGS, output=output)
    with pytest.raises(ValueError, match="1 documents, of which 1 are held out"):
        finetuning.finetune_examples(checkpoint, original, documents[:1], SETTINGS, output=output)
    other = qmoe_jax.open_checkpoint(tiny.checkpoint, top_k=2)
    with pytest.raises(ValueError, match="they differ in top_k: 1, 2"):
        finetuning.finetune_examples(checkpoint, other, documents, SETTINGS, output=output)
    with pytest.raises(ValueError, match="is the checkpoint that is read"):
        texts = dict(vocabulary=tiny.vocabulary, calibration=tiny.calibration)
        qmoe_jax.finetune(checkpoint.path, original, checkpoint.path, num_calibration=5, **texts)
    assert not output.exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("parts", ("experts",)), ("parts", ()), ("epochs", 0), ("learning_rate", float("nan")), ("held_out", 1.0)],
)
def test_settings_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field}: found"):
        finetuning.Settings(**{field: value})


def test_recovered_is_a_share_of_what_was_lost():
    assert finetune.recovered(2.0, 2.4, 2.1) == pytest.approx(0.75)
    assert finetune.recovered(2.0, 2.0, 2.0) is None
