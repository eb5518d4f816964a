"""Span corruption as the task of a streamed pass: an example is (encoder [Le], decoder [Ld]).

decoder[:-1] is fed, decoder[1:] is predicted. Special are sentinels in the encoder and, in the decoder, tokens whose
successor, the target, is one (paper, section 3.3).

A prompt has sentinels where words are missing, and the decoder writes each sentinel and what it stands for. A prompt
without any is continued: a sentinel is put at its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qmoe_jax.models.family import Example
from qmoe_jax.models.switch.batches import Batch, make_batches
from qmoe_jax.models.switch.examples import load_examples
from qmoe_jax.models.switch.span_corruption import noise_counts
from qmoe_jax.models.switch.vocabulary import EOS, PAD, Vocabulary


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

    def inputs(self, tokens: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        return tokens

    def lengths(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        return {
            "encoder": np.array([len(encoder) for encoder, _ in examples]),
            "decoder": np.array([len(decoder) - 1 for _, decoder in examples]),
        }

    def predicted(self, examples: Sequence[Example]) -> np.ndarray:
        return self.lengths(examples)["decoder"]

    def targets(self, example: Example) -> np.ndarray:
        return example[1][1:]

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

    def prompt(self, vocabulary: Vocabulary, text: str) -> tuple[np.ndarray, dict[str, Any]]:
        ids = vocabulary.encode(text)
        if not ids:
            raise ValueError("it is empty; give a text, with <extra_id_0> where it should be filled in.")
        asked = [i for i in ids if vocabulary.is_sentinel(i)]
        if len(set(asked)) < len(asked):
            raise ValueError("a sentinel occurs twice; number them <extra_id_0>, <extra_id_1>, ...")
        if not asked:
            asked = [vocabulary.sentinel(0)]
            ids = [*ids, *asked]
        stop = (EOS, vocabulary.sentinel(len(asked)))
        return np.array([*ids, EOS], np.int32), dict(prefix=tuple(asked[:1]), stop=stop, banned=(PAD,))

    def completed(self, vocabulary: Vocabulary, tokens: np.ndarray, written: np.ndarray) -> str:
        fills: dict[int, list[int]] = {}
        current = None
        for token in map(int, written):
            if vocabulary.is_sentinel(token):
                current = token if token not in fills else None  # A sentinel that comes again is noise.
                if current is not None:
                    fills[current] = []
            elif current is not None and token not in (PAD, EOS):
                fills[current].append(token)
        return vocabulary.decode([t for i in map(int, tokens) for t in fills.get(i, [i]) if t != EOS])

    def pieces(self, vocabulary: Vocabulary, tokens: np.ndarray, written: Iterable[int]) -> Iterator[str]:
        """All at once: what is filled in stands between what comes after it."""
        yield self.completed(vocabulary, tokens, np.fromiter(written, np.int32))
