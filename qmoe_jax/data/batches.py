"""Examples padded into arrays of a few fixed shapes, so that jitted functions compile a few times only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from qmoe_jax.data.span_corruption import corrupt
from qmoe_jax.data.vocabulary import EOS, PAD, Vocabulary


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


def make_batches(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    tokens_per_batch: int,
    *,
    encoder_multiple: int = 32,
    decoder_multiple: int = 8,
) -> list[Batch]:
    """Batches of examples of similar length; every example is in exactly one row.

    Encoder lengths are rounded up to `encoder_multiple`. All examples of one rounded length form batches of
    one shape, whose row count is a power of two; the last of them is filled up with empty rows.

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
    groups: dict[int, list[int]] = {}
    for i, (encoder, _) in enumerate(pairs):
        groups.setdefault(_round_up(len(encoder), encoder_multiple), []).append(i)

    batches = []
    for encoder_length, members in sorted(groups.items()):
        decoder_length = _round_up(max(len(pairs[i][1]) - 1 for i in members), decoder_multiple)
        rows = _power_of_two_below(tokens_per_batch // (encoder_length + decoder_length))
        while rows >= 2 * len(members):
            rows //= 2
        members = sorted(members, key=lambda i: len(pairs[i][0]))
        for first in range(0, len(members), rows):
            indices = members[first : first + rows]
            batches.append(_pad(pairs, indices, rows, encoder_length, decoder_length))
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


def _round_up(n: int, multiple: int) -> int:
    return max(-(-n // multiple), 1) * multiple


def _power_of_two_below(n: int) -> int:
    return 1 << (max(n, 1).bit_length() - 1)


# ----------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------


def token_stream(documents: Iterable[str], vocabulary: Vocabulary) -> np.ndarray:
    """All documents one after the other, each ended by `EOS`: int32 [tokens]."""
    encoded = vocabulary.encode_batch(list(documents))
    return np.concatenate([np.zeros(0, np.int32), *(np.array([*ids, EOS], np.int32) for ids in encoded)])


def training_batches(
    stream: np.ndarray,
    vocabulary: Vocabulary,
    batch_size: int,
    length: int,
    rng: np.random.RandomState,
    *,
    noise_density: float = 0.15,
    mean_span: float = 3.0,
) -> Iterator[Batch]:
    """Endless batches of corrupted windows of a token stream, all of one shape and without padding.

    A window is `length - 1` consecutive tokens from anywhere in the stream and `EOS`, so that it ends as the
    paper's documents do. `Batch.indices` is where it begins.

    Args:
      stream: int32 [tokens], from `token_stream`.
      vocabulary: gives the sentinels.
      batch_size: windows per batch.
      length: tokens of a window before corruption.
      rng: decides windows and corruption.
      noise_density: see `corrupt`.
      mean_span: see `corrupt`.

    Raises:
      ValueError: the stream is shorter than a window.
    """
    if length < 2 or len(stream) < length - 1:
        raise ValueError(f"Windows of {length} tokens from {len(stream)} tokens of text: too short.")
    return _training_batches(stream, vocabulary, batch_size, length, rng, noise_density, mean_span)


def _training_batches(stream, vocabulary, batch_size, length, rng, noise_density, mean_span) -> Iterator[Batch]:
    while True:
        begins = rng.randint(0, len(stream) - (length - 1) + 1, size=batch_size)
        pairs = [
            corrupt(
                np.append(stream[i : i + length - 1], EOS),
                rng,
                sentinel=vocabulary.sentinel(0),
                noise_density=noise_density,
                mean_span=mean_span,
                eos=EOS,
                start=PAD,
            )
            for i in begins
        ]
        encoder, decoder = (np.stack(side) for side in zip(*pairs, strict=True))  # [b, Le], [b, Ld + 1]
        yield Batch(begins.astype(np.int32), encoder, decoder[:, :-1], decoder[:, 1:])
