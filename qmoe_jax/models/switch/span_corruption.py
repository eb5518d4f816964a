"""Span corruption: random spans of a text become sentinels in the encoder, and the decoder predicts them.

The paper's data (section 4.1) is C4 corrupted this way, as in T5's pre-training (Raffel et al. 2020, section
3.1.4). The order of random calls is part of the recipe: seeded alike, it gives the same examples to the bit.
"""

from __future__ import annotations

import numpy as np


def corrupt(
    ids: np.ndarray,
    rng: np.random.RandomState,
    *,
    sentinel: int,
    noise_density: float = 0.15,
    mean_span: float = 3.0,
    eos: int = 1,
    start: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Corrupts one document.

        ids      a b c d e f g          with spans (c d) and (f g):
        encoder  a b S0 e S1 eos
        decoder  start S0 c d S1 f g S2

    The decoder's inputs are `decoder[:-1]` and its targets `decoder[1:]`.

    Args:
      ids: int [n], n >= 2; the paper's documents end with `eos`.
      rng: NumPy's legacy generator, advanced by the call.
      sentinel: id of the first sentinel; sentinel k is id `sentinel - k`. One more than the spans are used.
      noise_density: share of the tokens that is corrupted; at least one token is, and one isn't.
      mean_span: mean length of a corrupted span.
      eos: appended to the encoder.
      start: first token of the decoder.

    Returns:
      encoder int32 [n - noise + spans + 1] and decoder int32 [noise + spans + 2].

    Raises:
      ValueError: a document of fewer than 2 tokens, or a density or span length out of range.
    """
    ids = np.asarray(ids)
    if ids.ndim != 1 or len(ids) < 2:
        raise ValueError(f"Span corruption needs at least 2 tokens in one dimension, found shape {ids.shape}.")
    noise = noise_mask(len(ids), rng, noise_density, mean_span)  # [n]
    begins = noise & ~np.concatenate([[False], noise[:-1]])  # [n], first token of each span
    span = np.cumsum(begins)
    encoder = np.where(begins, sentinel + 1 - span, ids)[begins | ~noise]
    decoder = np.insert(ids[noise], np.flatnonzero(begins[noise]), sentinel - np.arange(span[-1]))
    return (
        np.concatenate([encoder, [eos]]).astype(np.int32),
        np.concatenate([[start], decoder, [sentinel - span[-1]]]).astype(np.int32),
    )


def noise_counts(length: int, noise_density: float = 0.15, mean_span: float = 3.0) -> tuple[int, int]:
    """How many tokens of a document of `length` >= 2 are corrupted, in how many spans; not left to chance.

    Raises ValueError unless 0 < noise_density < 1 and mean_span >= 1.
    """
    if not 0 < noise_density < 1:
        raise ValueError(f"noise_density is {noise_density}, expected more than 0 and less than 1.")
    if not mean_span >= 1:
        raise ValueError(f"mean_span is {mean_span}, expected at least 1 token.")
    noise = min(max(round(length * noise_density), 1), length - 1)
    # Every span is preceded by a token that is kept.
    spans = min(max(round(noise / mean_span), 1), length - noise)
    return noise, spans


def noise_mask(length: int, rng: np.random.RandomState, noise_density: float, mean_span: float) -> np.ndarray:
    """Random spans: bool [length], True where corrupted. It begins with a kept token and ends with a span."""
    noise, spans = noise_counts(length, noise_density, mean_span)
    corrupted = _random_parts(noise, spans, rng)
    kept = _random_parts(length - noise, spans, rng)
    lengths = np.stack([kept, corrupted], axis=1).ravel()  # [2 * spans], kept and corrupted in turn
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def _random_parts(total: int, parts: int, rng: np.random.RandomState) -> np.ndarray:
    """Cuts `total` items into non-empty runs, all ways equally likely. Returns their lengths, int [parts]."""
    cuts = np.arange(total - 1) < parts - 1  # a cut after item i, or none
    rng.shuffle(cuts)
    bounds = np.concatenate([[0], np.flatnonzero(cuts) + 1, [total]])
    return np.diff(bounds)
