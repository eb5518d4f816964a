"""Documents made into examples as in the paper: too long ones skipped and counted, never clipped."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from qmoe_jax.data.text import Paths, read_documents
from qmoe_jax.errors import DataError
from qmoe_jax.models.switch.span_corruption import corrupt, noise_counts
from qmoe_jax.models.switch.vocabulary import EOS, PAD, Vocabulary

_TOKENIZED_AT_ONCE = 256  # documents
_SHORTEST = 2  # tokens, end of sequence included; with fewer there is nothing to corrupt


@dataclasses.dataclass(frozen=True)
class Examples(Sequence):
    """Corrupted documents; a sequence of `pairs`.

    Attributes:
      pairs: (encoder int32 [Le], decoder int32 [Ld]) per document; decoder inputs are `decoder[:-1]`, targets
        `decoder[1:]`.
      num_read: documents read to get them.
      num_too_long: documents skipped for their length.
      num_too_short: documents skipped because they are empty.
    """

    pairs: list[tuple[np.ndarray, np.ndarray]]
    num_read: int
    num_too_long: int
    num_too_short: int

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i):
        return self.pairs[i]

    @property
    def num_targets(self) -> int:
        """Tokens that the decoder predicts."""
        return sum(len(decoder) - 1 for _, decoder in self.pairs)


def load_examples(
    paths: Paths,
    vocabulary: Vocabulary,
    num_documents: int,
    *,
    max_length: int = 568,
    seed: int = 0,
    noise_density: float = 0.15,
    mean_span: float = 3.0,
    append_eos: bool = True,
    window: int | None = None,
) -> Examples:
    """The first `num_documents` usable documents, corrupted by one generator (paper, section 4.1).

    Args:
      paths: see `read_documents`.
      vocabulary: tokenises, and gives the sentinels.
      num_documents: how many.
      max_length: longest document, in tokens with end of sequence. The paper's 568 become 512 in the encoder.
      seed: of NumPy's legacy generator. The paper seeds alike for calibration and for validation.
      noise_density: see `corrupt`.
      mean_span: see `corrupt`.
      append_eos: documents end with `EOS`, which the decoder then has to predict. False is for models that
        were trained on windows of text without it.
      window: documents are joined end to end and cut into windows of so many tokens, as in T5's pretraining; each
        window then counts as a document. None: each document by itself, as in the paper.

    Raises:
      DataError: fewer usable documents than asked for, or text that cannot be read (see `read_documents`).
      ValueError: parameters out of range.
    """
    if num_documents < 1:
        raise ValueError(f"num_documents is {num_documents}, expected at least 1.")
    if window is not None and not _SHORTEST <= window <= max_length:
        raise ValueError(f"window is {window}, expected {_SHORTEST} to max_length = {max_length} tokens.")
    if max_length < _SHORTEST:
        raise ValueError(f"max_length is {max_length}, expected at least {_SHORTEST} tokens.")
    _, spans = noise_counts(max_length, noise_density, mean_span)
    if spans + 1 > vocabulary.num_sentinels:
        raise ValueError(
            f"A document of {max_length} tokens needs {spans + 1} sentinels, the vocabulary has "
            f"{vocabulary.num_sentinels}. Lower max_length or noise_density, or raise mean_span."
        )
    rng = np.random.RandomState(seed)
    end = [EOS] if append_eos else []
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    num_read = num_too_long = num_too_short = 0

    documents = read_documents(paths, vocabulary.check_text)
    rest: list[int] = []  # of a window
    while len(pairs) < num_documents:
        texts = list(itertools.islice(documents, min(_TOKENIZED_AT_ONCE, num_documents - len(pairs))))
        if not texts:
            break
        num_read += len(texts)
        pieces = [ids + end for ids in vocabulary.encode_batch(texts)]
        if window is not None:
            joined = rest + list(itertools.chain.from_iterable(pieces))
            cut = len(joined) - len(joined) % window
            pieces, rest = [joined[i : i + window] for i in range(0, cut, window)], joined[cut:]
        for ids in pieces[: num_documents - len(pairs)]:
            if len(ids) > max_length:
                num_too_long += 1
            elif len(ids) < _SHORTEST:
                num_too_short += 1
            else:
                pairs.append(
                    corrupt(
                        np.array(ids, np.int32),
                        rng,
                        sentinel=vocabulary.sentinel(0),
                        noise_density=noise_density,
                        mean_span=mean_span,
                        eos=EOS,
                        start=PAD,
                    )
                )
    if len(pairs) < num_documents:
        raise DataError(
            f"{paths}: {num_documents} documents were asked for, but only {len(pairs)} of its {num_read} can "
            f"be used ({num_too_long} have more than {max_length} tokens, {num_too_short} are empty). Ask "
            "for fewer, or give more text."
        )
    return Examples(pairs, num_read, num_too_long, num_too_short)
