"""The carried model has to be a real language model whose experts matter: otherwise compressing it shows nothing."""

import pathlib

import numpy as np
import pytest
from watch import watched

from qmoe_jax import streaming
from qmoe_jax.checkpoints import open_checkpoint
from qmoe_jax.compression.compress import compress_examples
from qmoe_jax.models.switch import Vocabulary, load_examples
from qmoe_jax.quantization.settings import QuantizationSettings

MODEL = pathlib.Path(__file__).resolve().parents[1] / "experiments/tiny_model"


@pytest.fixture(scope="module")
def checkpoint():
    return open_checkpoint(MODEL)


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary.load(MODEL / "spm.model")


@pytest.fixture(scope="module")
def validation(vocabulary):
    return load_examples(MODEL / "validation.jsonl.gz", vocabulary, 200)


def loss(checkpoint, examples, look=lambda group: group.kernels):
    return watched(checkpoint, examples, streaming.Settings(), look).summary()["loss"]


@pytest.fixture(scope="module")
def bfloat16_loss(checkpoint, validation):
    return loss(checkpoint, validation)


def test_it_predicts_far_better_than_token_frequencies(bfloat16_loss, validation):
    counts = np.bincount(np.concatenate([decoder[1:] for _, decoder in validation.pairs]))
    p = counts[counts > 0] / counts.sum()
    assert bfloat16_loss < -np.sum(p * np.log(p)) - 1.5


def test_every_expert_is_used(checkpoint, validation):
    unused = []

    def hook(group):
        unused.extend((group.layer, group.start + i) for i, tokens in enumerate(group.tokens) if len(tokens) == 0)
        return group.kernels

    loss(checkpoint, validation, hook)
    assert checkpoint.config.num_experts >= 8 and not unused


def test_without_its_experts_it_is_much_worse(checkpoint, validation, bfloat16_loss):
    def silence(group):
        return {name: np.zeros_like(kernel) for name, kernel in group.kernels.items()}

    assert loss(checkpoint, validation, silence) > bfloat16_loss + 0.5


def test_rounding_hurts_and_gptq_hurts_much_less(checkpoint, vocabulary, validation, bfloat16_loss):
    calibration = load_examples(MODEL / "train.jsonl.gz", vocabulary, 600)
    above = {}
    for method in ("rtn", "gptq"):
        settings = QuantizationSettings(method=method)
        report = compress_examples(
            checkpoint, vocabulary, calibration, validation, settings, streaming.Settings(), codec=None
        )
        above[method] = report["loss"] - bfloat16_loss
    assert above["rtn"] > 0.05
    assert above["gptq"] < 0.3 * above["rtn"]


def test_it_is_small():
    assert sum(f.stat().st_size for f in MODEL.rglob("*") if f.is_file()) <= 12e6
