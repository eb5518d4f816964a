"""Fine-tuning layer by layer: what comes of it, and that a killed run goes on to the same bytes."""

import jax.numpy as jnp
import numpy as np
import pytest
from models import random_decoders

import qmoe_jax
from qmoe_jax import finetuning, streaming
from qmoe_jax.checkpoints.in_memory import write_huggingface
from qmoe_jax.compression.compress import compress_examples
from qmoe_jax.compression.progress import Progress
from qmoe_jax.quantization.settings import QuantizationSettings

MEMORY = streaming.Settings(tokens_per_batch=512, experts_per_group=4)
SETTINGS = finetuning.Settings(epochs=2, tokens_per_batch=256, learning_rate=3e-3, held_out=0.2)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """(compressed checkpoint, original, documents) of a decoder: all of its layers are one program."""
    folder, config = tmp_path_factory.mktemp("compressed"), random_decoders.CONFIGS["qwen3_moe"]
    write_huggingface(folder / "model", config, random_decoders.random_params(config))
    original = qmoe_jax.open_checkpoint(folder / "model")
    rng = np.random.default_rng(0)
    documents = [(rng.integers(3, 61, 20).astype(np.int32),) for _ in range(30)]
    rtn = QuantizationSettings("rtn")
    compress_examples(original, None, None, documents[:2], rtn, MEMORY, output=folder / "compressed")
    return qmoe_jax.open_checkpoint(folder / "compressed"), original, documents


@pytest.fixture(scope="module")
def tuned(compressed, tmp_path_factory):
    """(checkpoint, report) of a run that nobody interrupts."""
    output = tmp_path_factory.mktemp("layerwise") / "out"
    report = finetuning.finetune_layers(*compressed, SETTINGS, MEMORY, output=output)
    return qmoe_jax.open_checkpoint(output), report


def test_outputs_of_layers_come_nearer_to_the_original_s_with_the_same_symbols(compressed, tuned):
    (before, original, documents), (checkpoint, report) = compressed, tuned
    assert [layer["layer"] for layer in report["layers"]] == [
        layer.name for layer in original.family.streamed(original.config, jnp.float32).layers
    ]
    for layer in original.config.sparse_layers:
        ((_, _, new),), ((_, _, old),) = checkpoint.experts(layer), before.experts(layer)
        for matrix in old:
            np.testing.assert_array_equal(new[matrix].symbols(), old[matrix].symbols())
            assert np.any(new[matrix].levels != old[matrix].levels)
    errors = [last_activations(c, documents) for c in (before, checkpoint)]
    target = last_activations(original, documents)
    found = [np.mean(np.sum((e - target) ** 2, -1) / np.sum(target**2, -1)) for e in errors]
    assert found[1] < 0.9 * found[0]
    (how,) = checkpoint.provenance["finetuned"]
    assert how["settings"]["layerwise"] == "original" and how["checkpoint"] == before.path
    number = sum(report["parameters"].values())
    assert number > 0 and set(report["parameters"]) == set(SETTINGS.parts)


def last_activations(checkpoint, documents):
    """Of the last stream after its last layer, by the streamed pass."""
    settings = MEMORY._replace(round_weights=not checkpoint.is_compressed)
    with streaming.Pass(checkpoint, documents, settings, None, None, None, "", 0) as forward:
        forward.resume(None)
        for layer in forward.model.layers:
            forward.advance(layer)
        return np.array(forward.x[layer.stream].data, np.float64)


def test_the_errors_that_are_reported_are_those_of_what_is_stored(compressed, tuned):
    """Of the last layer, whose output is that of the whole pass."""
    (_, original, documents), (checkpoint, report) = compressed, tuned
    _, held_out = finetuning.training.split(len(documents), SETTINGS)
    held = [documents[i] for i in held_out]
    found, target = (last_activations(c, held) for c in (checkpoint, original))
    error = np.mean(np.sum((found - target) ** 2, -1) / np.sum(target**2, -1))
    assert report["layers"][-1]["after"] == pytest.approx(error, rel=0.02)


def test_interrupted_it_goes_on_and_ends_in_the_same_bytes(compressed, tuned, tmp_path, monkeypatch):
    output, commit, done = tmp_path / "out", Progress.commit, []

    def stops(progress, state, arrays):
        commit(progress, state, arrays)
        done.append(state["done"])
        if len(done) in (1, 3):
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "commit", stops)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt) as caught:
            finetuning.finetune_layers(*compressed, SETTINGS, MEMORY, output=output, commit_share=1)
        assert "run the same command to go on" in caught.value.__notes__[0]
        with pytest.raises(qmoe_jax.CheckpointError, match="is unfinished"):
            qmoe_jax.open_checkpoint(output)
    report = finetuning.finetune_layers(*compressed, SETTINGS, MEMORY, output=output, commit_share=1)
    assert done == sorted(set(done)), "no layer twice"
    assert report["layers"] == tuned[1]["layers"] and report["parameters"] == tuned[1]["parameters"]
    found, expected = (qmoe_jax.open_checkpoint(c).manifest for c in (output, tuned[0].path))
    assert found["layers"] == expected["layers"] and found["dense"] == expected["dense"]
    assert not (output / "progress").exists()


def test_what_does_not_fit_is_refused_before_anything_is_written(compressed, tmp_path):
    output = tmp_path / "out"
    everything = finetuning.Settings(parts=finetuning.PARTS)
    with pytest.raises(ValueError, match="'embeddings' lie outside layers"):
        finetuning.finetune_layers(*compressed, everything, MEMORY, output=output)
    with pytest.raises(ValueError, match="target: found 'both'"):
        finetuning.finetune_layers(*compressed, SETTINGS, MEMORY, output=output, target="both")
    assert not output.exists()
