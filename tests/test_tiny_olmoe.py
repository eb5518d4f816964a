"""The carried OLMoE has to be a real language model whose experts matter: otherwise compressing it shows nothing."""

import pathlib
import re

import numpy as np
import pytest
from carried_models import entropy_of_tokens, loss, loss_quantized, loss_without_experts, unused_experts

from qmoe_jax.checkpoints import open_checkpoint
from qmoe_jax.models.decoder.task import load_examples
from qmoe_jax.models.decoder.vocabulary import Vocabulary

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[1] / "experiments"
MODEL, TEXT = EXPERIMENTS / "tiny_olmoe", EXPERIMENTS / "tiny_model"
WINDOWS = 40


@pytest.fixture(scope="module")
def checkpoint():
    return open_checkpoint(MODEL)


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary.load(MODEL)


@pytest.fixture(scope="module")
def validation(vocabulary):
    return load_examples(TEXT / "validation.jsonl.gz", vocabulary, WINDOWS, window=256)


@pytest.fixture(scope="module")
def own_loss(checkpoint, validation):
    return loss(checkpoint, validation)


def test_its_loss_is_that_of_its_readme(own_loss):
    (said,) = re.findall(rf"first {WINDOWS} windows .*?(\d\.\d{{4}})", (MODEL / "README.md").read_text())
    assert own_loss == pytest.approx(float(said), abs=1e-4)


def test_it_predicts_far_better_than_token_frequencies(own_loss, validation):
    assert own_loss < entropy_of_tokens(np.concatenate([tokens[1:] for (tokens,) in validation])) - 1.5


def test_every_expert_is_used(checkpoint, validation):
    assert checkpoint.config.num_experts >= 16 and checkpoint.config.top_k == 4
    assert not unused_experts(checkpoint, validation)


def test_without_its_experts_it_is_much_worse(checkpoint, validation, own_loss):
    assert loss_without_experts(checkpoint, validation) > own_loss + 0.5


@pytest.mark.long
def test_rounding_hurts_and_gptq_hurts_much_less(checkpoint, vocabulary, validation, own_loss):
    calibration = load_examples(TEXT / "train.jsonl.gz", vocabulary, 200, window=256)
    given = checkpoint, vocabulary, calibration, validation
    above = {method: loss_quantized(method, *given) - own_loss for method in ("rtn", "gptq")}
    assert above["rtn"] > 0.05
    assert above["gptq"] < 0.5 * above["rtn"]


def test_it_is_small():
    assert sum(f.stat().st_size for f in MODEL.rglob("*") if f.is_file()) <= 8e6
