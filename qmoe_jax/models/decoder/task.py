"""The next token as the task of a streamed pass: an example is (tokens int32 [length],).

tokens[:-1] is fed, tokens[1:] is predicted. No token is left out of Hessians.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qmoe_jax.data.text import Paths, read_documents
from qmoe_jax.errors import DataError
from qmoe_jax.models.common import shapes
from qmoe_jax.models.decoder.stream import TEXT
from qmoe_jax.models.decoder.vocabulary import Vocabulary
from qmoe_jax.models.family import Example

NOTHING = -1  # a target where nothing is predicted
LENGTH_MULTIPLE = 32  # of padded rows
_TOKENIZED_AT_ONCE = 64  # documents
_SHORTEST = 2  # tokens


class Batch(NamedTuple):
    """Padded examples; a row that is all padding has index -1.

    Attributes:
      indices: int32 [rows], which example a row holds.
      inputs: int32 [rows, length], 0 after an example's end.
      targets: int32 [rows, length], -1 where nothing is predicted.
    """

    indices: np.ndarray
    inputs: np.ndarray
    targets: np.ndarray

    @property
    def tokens(self) -> tuple[np.ndarray, ...]:
        return self[1:]

    def length(self, stream: str) -> int:
        return self.inputs.shape[1]


@dataclasses.dataclass(frozen=True)
class Examples(Sequence):
    """Pieces of text; a sequence of `windows`.

    Attributes:
      windows: (tokens int32 [length],) each.
      num_read: documents read to get them.
      num_too_long: documents skipped for their length.
      num_too_short: documents skipped because they have fewer than two tokens.
    """

    windows: list[Example]
    num_read: int
    num_too_long: int
    num_too_short: int

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i):
        return self.windows[i]

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted."""
        return sum(len(tokens) - 1 for (tokens,) in self.windows)


def load_examples(
    paths: Paths,
    vocabulary: Vocabulary,
    num_documents: int,
    *,
    max_length: int = 2048,
    window: int | None = None,
    append_eos: bool = True,
    seed: int = 0,
) -> Examples:
    """The first `num_documents` windows of text, or documents.

    Args:
      paths: see `read_documents`.
      vocabulary: tokenises; each example begins with its BOS, if it has one.
      num_documents: how many.
      max_length: longest example, in tokens with BOS.
      window: documents are joined end to end and cut into examples of so many tokens, as models of this kind are
        trained and as their perplexity is measured. None: each document by itself; too long ones are skipped.
      append_eos: documents end with EOS, if it is known.
      seed: nothing is drawn; here for tasks that draw.

    Raises:
      DataError: fewer usable ones than asked for, or text that cannot be read (see `read_documents`).
      ValueError: parameters out of range.
    """
    if num_documents < 1:
        raise ValueError(f"num_documents is {num_documents}, expected at least 1.")
    begin = [] if vocabulary.bos is None else [vocabulary.bos]
    end = [vocabulary.eos] if append_eos and vocabulary.eos is not None else []
    shortest = _SHORTEST + len(begin)
    if max_length < shortest:
        raise ValueError(f"max_length is {max_length}, expected at least {shortest} tokens.")
    if window is not None and not shortest <= window <= max_length:
        raise ValueError(f"window is {window}, expected {shortest} to max_length = {max_length} tokens.")

    windows: list[Example] = []
    num_read = num_too_long = num_too_short = 0
    documents = read_documents(paths)
    rest: list[int] = []  # of a window
    while len(windows) < num_documents:
        texts = list(itertools.islice(documents, _TOKENIZED_AT_ONCE))
        if not texts:
            break
        num_read += len(texts)
        pieces = [ids + end for ids in vocabulary.encode_batch(texts)]
        if window is not None:
            size, joined = window - len(begin), rest + list(itertools.chain.from_iterable(pieces))
            cut = len(joined) - len(joined) % size
            pieces, rest = [joined[i : i + size] for i in range(0, cut, size)], joined[cut:]
        for ids in pieces:
            if len(windows) == num_documents:
                break
            if len(begin) + len(ids) > max_length:
                num_too_long += 1
            elif len(ids) < _SHORTEST:
                num_too_short += 1
            else:
                windows.append((np.array(begin + ids, np.int32),))
    if len(windows) < num_documents:
        kind = "documents" if window is None else f"windows of {window} tokens"
        skipped = f" ({num_too_long} have more than {max_length} tokens, {num_too_short} are empty)"
        raise DataError(
            f"{paths}: {num_documents} {kind} were asked for, but its {num_read} documents give only {len(windows)}"
            f"{skipped if window is None else ''}. Ask for fewer, or give more text."
        )
    return Examples(windows, num_read, num_too_long, num_too_short)


def make_batches(examples: Sequence[Example], tokens_per_batch: int) -> list[Batch]:
    """Batches of examples of similar length; every example is in exactly one row.

    Lengths are rounded up to a multiple. All examples of one rounded length form batches of one shape, whose row count
    is a power of two; the last of them is filled up with empty rows. Too few for a batch join the next longer ones.

    Args:
      examples: (tokens [length],) each.
      tokens_per_batch: most tokens in a batch, with padding; but one row at least.

    Raises ValueError if tokens_per_batch is less than 1.
    """
    if tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch: found {tokens_per_batch}, expected at least 1.")
    lengths = [len(tokens) - 1 for (tokens,) in examples]
    groups = shapes(lengths, LENGTH_MULTIPLE, lambda length, _: tokens_per_batch // length)
    return [batch for group in groups for batch in _of_one_shape(examples, *group)]


def _of_one_shape(examples, length: int, rows: int, members: list[int]) -> Iterator[Batch]:
    for first in range(0, len(members), rows):
        batch = Batch(
            np.full(rows, -1, np.int32), np.zeros((rows, length), np.int32), np.full((rows, length), NOTHING, np.int32)
        )
        for row, i in enumerate(members[first : first + rows]):
            tokens = examples[i][0]
            batch.indices[row] = i
            batch.inputs[row, : len(tokens) - 1] = tokens[:-1]
            batch.targets[row, : len(tokens) - 1] = tokens[1:]
        yield batch


class NextToken:
    """See `family.Task`."""

    vocabulary = staticmethod(Vocabulary.load)
    load = staticmethod(load_examples)
    batches = staticmethod(make_batches)

    def check(self, examples: Sequence[Example], vocab_size: int) -> None:
        if not examples:
            raise ValueError("There are no documents.")
        for i, (tokens,) in enumerate(examples):
            if len(tokens) < _SHORTEST:
                raise ValueError(f"Document {i} has {len(tokens)} tokens; expected at least {_SHORTEST}.")
            if tokens.min() < 0 or tokens.max() >= vocab_size:
                raise ValueError(
                    f"Document {i} has token ids from {tokens.min()} to {tokens.max()}; the model's embedding has 0 to "
                    f"{vocab_size - 1}. Is this the model's vocabulary?"
                )

    def inputs(self, tokens: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        return tokens[:1]

    def lengths(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        return {TEXT: self.predicted(examples)}

    def predicted(self, examples: Sequence[Example]) -> np.ndarray:
        return np.array([len(tokens) - 1 for (tokens,) in examples])

    def targets(self, example: Example) -> np.ndarray:
        return example[0][1:]

    def special(self, examples: Sequence[Example], vocabulary: Vocabulary) -> dict[str, np.ndarray]:
        """None are."""
        return {TEXT: np.zeros(int(self.predicted(examples).sum()), bool)}

    def longest(self, max_length: int) -> dict[str, int]:
        return {TEXT: max_length - 1}

    def filled(self, rows: int, lengths: Mapping[str, int]) -> tuple[np.ndarray, ...]:
        tokens = np.ones((rows, lengths[TEXT]), np.int32)
        return tokens, tokens

    def prompt(self, vocabulary: Vocabulary, text: str) -> tuple[np.ndarray, dict[str, Any]]:
        """A text to go on from, after BOS, until the vocabulary's EOS."""
        ids = vocabulary.encode(text)
        if not ids:
            raise ValueError("it is empty; give a text to go on from")
        ids = [*([] if vocabulary.bos is None else [vocabulary.bos]), *ids]
        end = vocabulary.eos
        return np.array(ids, np.int32), {} if end is None else {"stop": (end,), "pad": end}

    def completed(self, vocabulary: Vocabulary, tokens: np.ndarray, written: np.ndarray) -> str:
        return vocabulary.decode([*tokens.tolist(), *written.tolist()])

    def pieces(self, vocabulary: Vocabulary, tokens: np.ndarray, written: Iterable[int]) -> Iterator[str]:
        ids, shown = tokens.tolist(), 0
        for token in itertools.chain([None], written):
            ids += [] if token is None else [int(token)]
            if vocabulary.is_settled(ids):
                text = vocabulary.decode(ids)
                yield text[shown:]
                shown = len(text)
        yield vocabulary.decode(ids)[shown:]
