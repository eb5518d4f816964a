"""The carried model has to be a real language model whose experts matter: otherwise compressing it shows nothing."""

import pathlib

import numpy as np
import pytest
from carried_models import entropy_of_tokens, loss, loss_quantized, loss_without_experts, unused_experts

from qmoe_jax.checkpoints import open_checkpoint
from qmoe_jax.models.switch import Vocabulary, load_examples

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


@pytest.fixture(scope="module")
def bfloat16_loss(checkpoint, validation):
    return loss(checkpoint, validation)


def test_it_predicts_far_better_than_token_frequencies(bfloat16_loss, validation):
    assert bfloat16_loss < entropy_of_tokens(np.concatenate([decoder[1:] for _, decoder in validation.pairs])) - 1.5


def test_every_expert_is_used(checkpoint, validation):
    assert checkpoint.config.num_experts >= 8
    assert not unused_experts(checkpoint, validation)


def test_without_its_experts_it_is_much_worse(checkpoint, validation, bfloat16_loss):
    assert loss_without_experts(checkpoint, validation) > bfloat16_loss + 0.5


@pytest.mark.long
def test_rounding_hurts_and_gptq_hurts_much_less(checkpoint, vocabulary, validation, bfloat16_loss):
    calibration = load_examples(MODEL / "train.jsonl.gz", vocabulary, 600)
    given = checkpoint, vocabulary, calibration, validation
    above = {method: loss_quantized(method, *given) - bfloat16_loss for method in ("rtn", "gptq")}
    assert above["rtn"] > 0.05
    assert above["gptq"] < 0.3 * above["rtn"]


def test_it_is_small():
    assert sum(f.stat().st_size for f in MODEL.rglob("*") if f.is_file()) <= 12e6
