"""Span corruption as the task of a streamed pass: an example is (encoder [Le], decoder [Ld]).

decoder[:-1] is fed, decoder[1:] is predicted. Special are sentinels in the encoder and, in the decoder, tokens whose
successor, the target, is one (paper, section 3.3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qmoe_jax.models.family import Example
from qmoe_jax.models.switch.batches import Batch, make_batches
from qmoe_jax.models.switch.examples import load_examples
from qmoe_jax.models.switch.span_corruption import noise_counts
from qmoe_jax.models.switch.vocabulary import Vocabulary


class SpanCorruption:
    """See `family.Task`."""

    vocabulary = staticmethod(Vocabulary.load)
    load = staticmethod(load_examples)

    def check(self, examples: Sequence[Example], vocab_size: int) -> None:
        if not examples:
            raise ValueError("There are no documents.")
        for i, (encoder, decoder) in enumerate(examples):
            if len(encoder) < 1 or len(decoder) < 2:
                raise ValueError(
                    f"Document {i} has {len(encoder)} encoder and {len(decoder)} decoder tokens; expected at least 1 "
                    "and 2."
                )
            low, high = min(encoder.min(), decoder.min()), max(encoder.max(), decoder.max())
            if low < 0 or high >= vocab_size:
                raise ValueError(
                    f"Document {i} has token ids from {low} to {high}; the model's embedding has 0 to "
                    f"{vocab_size - 1}. Is this the model's vocabulary?"
                )

    def batches(self, examples: Sequence[Example], tokens_per_batch: int) -> list[Batch]:
        return make_batches(examples, tokens_per_batch)

    def lengths(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        return {
            "encoder": np.array([len(encoder) for encoder, _ in examples]),
            "decoder": np.array([len(decoder) - 1 for _, decoder in examples]),
        }

    def predicted(self, examples: Sequence[Example]) -> np.ndarray:
        return self.lengths(examples)["decoder"]

    def special(self, examples: Sequence[Example], vocabulary: Vocabulary) -> dict[str, np.ndarray]:
        return {
            "encoder": vocabulary.is_sentinel(np.concatenate([encoder for encoder, _ in examples])),
            "decoder": vocabulary.is_sentinel(np.concatenate([decoder[1:] for _, decoder in examples])),
        }

    def longest(self, max_length: int) -> dict[str, int]:
        """568 tokens are 512 for the encoder and 114 for the decoder."""
        noise, spans = noise_counts(max_length)
        return {"encoder": max_length - noise + spans + 1, "decoder": noise + spans + 1}

    def filled(self, rows: int, lengths: Mapping[str, int]) -> tuple[np.ndarray, ...]:
        encoder, decoder = (np.ones((rows, lengths[stack]), np.int32) for stack in ("encoder", "decoder"))
        return encoder, decoder, decoder
