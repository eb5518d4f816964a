"""Examples padded into arrays of a few fixed shapes, so that jitted functions compile a few times only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from qmoe_jax.models.common import shapes
from qmoe_jax.models.switch.span_corruption import corrupt
from qmoe_jax.models.switch.vocabulary import PAD, Vocabulary


class Batch(NamedTuple):
    """Padded examples; a row that is all padding has index -1.

    Attributes:
      indices: int32 [b], which example a row holds.
      encoder_input_tokens: int32 [b, Le].
      decoder_input_tokens: int32 [b, Ld]; its first token is the padding id as well.
      decoder_target_tokens: int32 [b, Ld], 0 where nothing is predicted.
    """

    indices: np.ndarray
    encoder_input_tokens: np.ndarray
    decoder_input_tokens: np.ndarray
    decoder_target_tokens: np.ndarray

    @property
    def tokens(self) -> tuple[np.ndarray, ...]:
        """All but the indices."""
        return self[1:]

    def length(self, stream: str) -> int:
        """Padded length of the encoder or the decoder."""
        return (self.encoder_input_tokens if stream == "encoder" else self.decoder_input_tokens).shape[1]


def make_batches(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    tokens_per_batch: int,
    *,
    encoder_multiple: int = 32,
    decoder_multiple: int = 8,
) -> list[Batch]:
    """Batches of examples of similar length; every example is in exactly one row.

    Encoder lengths are rounded up to `encoder_multiple`. All examples of one rounded length form batches of
    one shape, whose row count is a power of two; the last of them is filled up with empty rows. Where there are too few
    of a length for one batch, they join the next longer ones: a shape costs more, as programs are compiled for each.

    Args:
      pairs: (encoder [Le], decoder [Ld + 1]) per example, as `load_examples` gives them.
      tokens_per_batch: most tokens in a batch, with padding, encoder and decoder; but one row at least.
      encoder_multiple: encoder lengths are multiples of it.
      decoder_multiple: decoder lengths are multiples of it.

    Returns:
      Batches, shortest first. With `real = batch.indices >= 0`, `result[batch.indices[real]] = rows[real]`
      puts rows back into the order of `pairs`.

    Raises:
      ValueError: tokens_per_batch or a multiple is less than 1.
    """
    if min(tokens_per_batch, encoder_multiple, decoder_multiple) < 1:
        raise ValueError(
            f"tokens_per_batch {tokens_per_batch}, encoder_multiple {encoder_multiple} and decoder_multiple "
            f"{decoder_multiple} have to be at least 1."
        )

    def decoder_length(members: list[int]) -> int:
        longest = max(len(pairs[i][1]) - 1 for i in members)
        return max(-(-longest // decoder_multiple), 1) * decoder_multiple

    def most_rows(encoder_length: int, members: list[int]) -> int:
        return tokens_per_batch // (encoder_length + decoder_length(members))

    batches = []
    for encoder_length, rows, members in shapes([len(encoder) for encoder, _ in pairs], encoder_multiple, most_rows):
        members = sorted(members, key=lambda i: len(pairs[i][0]))
        length = decoder_length(members)
        for first in range(0, len(members), rows):
            indices = members[first : first + rows]
            batches.append(_pad(pairs, indices, rows, encoder_length, length))
    return batches


def _pad(pairs, indices: Sequence[int], rows: int, encoder_length: int, decoder_length: int) -> Batch:
    batch = Batch(
        np.full(rows, -1, np.int32),
        np.full((rows, encoder_length), PAD, np.int32),
        np.full((rows, decoder_length), PAD, np.int32),
        np.full((rows, decoder_length), PAD, np.int32),
    )
    batch.indices[: len(indices)] = indices
    for row, i in enumerate(indices):
        encoder, decoder = pairs[i]
        batch.encoder_input_tokens[row, : len(encoder)] = encoder
        batch.decoder_input_tokens[row, : len(decoder) - 1] = decoder[:-1]
        batch.decoder_target_tokens[row, : len(decoder) - 1] = decoder[1:]
    return batch


# --- Training ---------------------------------------------------------------------------------------------------------


def training_batches(
    ids: Sequence[np.ndarray],
    vocabulary: Vocabulary,
    tokens_per_batch: int,
    rng: np.random.RandomState,
    *,
    encoder_multiple: int = 64,
) -> Iterator[Batch]:
    """Endless batches of corrupted documents: every document once an epoch, its corruption new each time.

    Documents keep their own lengths, as in evaluation. A model trained on windows of one length learns where each
    sentinel stands in them, and does markedly worse on documents.

    Args:
      ids: tokens of each document, at least 2, end of sequence included.
      vocabulary: gives the sentinels.
      tokens_per_batch: see `make_batches`, as is encoder_multiple.
      rng: decides corruption and order.
      encoder_multiple: large, for few shapes.

    Raises:
      ValueError: there are no documents.
    """
    if not ids:
        raise ValueError("No documents to train on.")
    return _training_batches(ids, vocabulary, tokens_per_batch, rng, encoder_multiple)


def _training_batches(ids, vocabulary, tokens_per_batch, rng, encoder_multiple) -> Iterator[Batch]:
    while True:
        pairs = [corrupt(document, rng, sentinel=vocabulary.sentinel(0)) for document in ids]
        rng.shuffle(pairs)  # Documents of like length meet others in each epoch.
        batches = make_batches(pairs, tokens_per_batch, encoder_multiple=encoder_multiple, decoder_multiple=16)
        for i in rng.permutation(len(batches)):
            yield batches[i]
