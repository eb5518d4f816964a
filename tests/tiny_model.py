"""A Switch Transformer with random weights, a vocabulary and text: everything an experiment needs, in kilobytes."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import ml_dtypes
import numpy as np
from flax import traverse_util
from models import random_models
from tiny_vocabulary import SENTENCES, train_pieces

from qmoe_jax.checkpoints import write_t5x
from qmoe_jax.models.switch import Vocabulary
from qmoe_jax.models.switch.config import ModelConfig

# One dense layer, three sparse ones. No two sizes are alike, so that axes can't be mistaken for each other.
CONFIG = ModelConfig(
    vocab_size=256,
    d_model=20,
    d_ff=28,
    num_heads=2,
    head_dim=8,
    num_encoder_layers=2,
    num_decoder_layers=2,
    num_experts=8,
    encoder_sparse_layers=(0, 1),
    decoder_sparse_layers=(1,),
)
NUM_CALIBRATION = 20
NUM_VALIDATION = 7


def random_params(config: ModelConfig = CONFIG, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 parameters by '/'-joined name."""
    return traverse_util.flatten_dict(random_models.random_params(config, seed), sep="/")


def bfloat16(array: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, in the array's own dtype."""
    return array.astype(ml_dtypes.bfloat16).astype(array.dtype)


def write_checkpoint(directory, params=None, dtype: str = "float32") -> str:
    return str(write_t5x(directory, random_params() if params is None else params, step=3, dtype=dtype))


def write_texts(path: pathlib.Path, count: int, seed: int) -> str:
    """JSON lines with texts of 16 to 21 words: about 40 tokens, one shape of batches."""
    rng = np.random.default_rng(seed)
    words = sorted({word.strip(",") for sentence in SENTENCES for word in sentence.split()})
    texts = [" ".join(rng.choice(words, rng.integers(16, 22))) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@dataclasses.dataclass(frozen=True)
class Tiny:
    """Paths; the checkpoint is float32."""

    vocabulary: str
    calibration: str
    validation: str
    checkpoint: str

    def flags(self, **data) -> list[str]:
        """The experiments' flags for its text and vocabulary."""
        fields = {
            "vocabulary": self.vocabulary,
            "calibration": self.calibration,
            "validation": self.validation,
            "num_calibration": NUM_CALIBRATION,
            "num_validation": NUM_VALIDATION,
        }
        return [f"--config.data.{field}={value}" for field, value in (fields | data).items()]


def make(directory: pathlib.Path) -> Tiny:
    (directory / "spm.model").write_bytes(train_pieces())
    tiny = Tiny(
        vocabulary=str(directory / "spm.model"),
        calibration=write_texts(directory / "calibration.jsonl", NUM_CALIBRATION, seed=1),
        validation=write_texts(directory / "validation.jsonl", NUM_VALIDATION, seed=2),
        checkpoint=write_checkpoint(directory / "model"),
    )
    Vocabulary.load(tiny.vocabulary).check(CONFIG.vocab_size)
    return tiny
