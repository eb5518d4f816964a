"""A SentencePiece vocabulary with sentinels at its end, as T5 and Switch Transformers use it."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import sentencepiece

from qmoe_jax.errors import DataError
from qmoe_jax.files import read_bytes

PAD = 0  # also the token that starts a decoder
EOS = 1

# T5X pads the embedding to a multiple of 128 rows, so that it splits evenly over devices.
_EMBEDDING_MULTIPLE = 128
_SENTINEL = re.compile(r"<extra_id_([0-9]+)>")
_MOST_DIGITS = 9  # of a sentinel's number


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Pieces 0 ... n - 1 of a SentencePiece model, then the sentinels, counted from the end.

    With T5's 32000 pieces and 100 sentinels, sentinel 0 is id 32099 and sentinel 99 is id 32000.

    Attributes:
      pieces: the SentencePiece model; `Vocabulary.load` reads it from a file.
      num_sentinels: sentinels after the last piece.
      path: the file it came from, for messages.
    """

    pieces: sentencepiece.SentencePieceProcessor
    num_sentinels: int = 100
    path: str = "<memory>"

    @classmethod
    def load(cls, path: str | os.PathLike, num_sentinels: int = 100) -> Vocabulary:
        """Reads a SentencePiece model file.

        Raises:
          DataError: there is no such file, it is not a SentencePiece model, or its padding is not id 0 and
            its end of sequence id 1.
        """
        try:
            proto = read_bytes(path, error=DataError)
        except DataError as e:
            raise DataError(
                f"{e} Expected a SentencePiece model file, usually called spiece.model, spm.model or "
                "sentencepiece.model."
            ) from e
        try:
            # The bytes, not the file name: SentencePiece logs to stderr when it cannot open a file.
            pieces = sentencepiece.SentencePieceProcessor(model_proto=proto) if proto else None
        except Exception as e:  # RuntimeError, OSError, TypeError: depends on where parsing stopped and the release
            raise DataError(f"{path}: not a SentencePiece model ({e}).") from e
        if pieces is None or pieces.get_piece_size() == 0:
            raise DataError(f"{path}: not a SentencePiece model (no pieces in its {len(proto)} bytes).")
        if (pieces.pad_id(), pieces.eos_id()) != (PAD, EOS):
            raise DataError(
                f"{path}: padding is id {pieces.pad_id()} and end of sequence id {pieces.eos_id()}, expected "
                f"{PAD} and {EOS}. This is not the vocabulary of a T5 or Switch model."
            )
        return cls(pieces, num_sentinels, str(path))

    @property
    def size(self) -> int:
        """Ids there are: pieces and sentinels."""
        return self.pieces.get_piece_size() + self.num_sentinels

    def sentinel(self, k: int) -> int:
        """Id of the k-th sentinel. Raises DataError if there are not that many."""
        if not 0 <= k < self.num_sentinels:
            raise DataError(f"Sentinel {k} was asked for, but {self.path} is used with {self.num_sentinels}.")
        return self.size - 1 - k

    def check_text(self, text: str) -> None:
        """Raises DataError, in words for the place of the text before it, for a sentinel that there isn't."""
        if "<extra_id_" not in text:
            return
        for k in _SENTINEL.findall(text):
            if len(k) > _MOST_DIGITS or int(k) >= self.num_sentinels:
                raise DataError(
                    f"the text has <extra_id_{k[:20]}>, but {self.path} is used with sentinels 0 to "
                    f"{self.num_sentinels - 1}. Take the document out, or write it in another way."
                )

    def is_sentinel(self, ids: Any) -> Any:
        """Whether ids (a number, or an array of any shape) are sentinels. Same shape, bool."""
        return ids >= self.size - self.num_sentinels

    def check(self, embedding_rows: int) -> None:
        """Raises DataError unless a model with so many embedding rows can belong to this vocabulary.

        T5X pads the embedding up to a multiple of 128 rows (32128 for 32100 ids); more rows than that mean
        that the model knows ids that the vocabulary lacks.
        """
        found = (
            f"{self.path} has {self.size} ids ({self.pieces.get_piece_size()} pieces, {self.num_sentinels} "
            f"sentinels), the model's embedding has {embedding_rows} rows"
        )
        if self.size > embedding_rows:
            raise DataError(f"{found}: the vocabulary is larger than the embedding. Use the model's vocabulary.")
        if embedding_rows - self.size >= _EMBEDDING_MULTIPLE:
            raise DataError(
                f"{found}: the vocabulary is smaller than the ids the model was trained on (at most "
                f"{_EMBEDDING_MULTIPLE - 1} rows can be padding). Use the model's vocabulary."
            )

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without end of sequence; '<extra_id_k>' becomes sentinel k."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of several texts; much faster than one by one."""
        # With its one group, split alternates text and sentinel numbers: [text, k, text, k, ..., text].
        parts = [_SENTINEL.split(text) for text in texts]
        encoded = iter(self.pieces.encode([text for split in parts for text in split[::2]]))
        result = []
        for split in parts:
            ids = next(encoded)
            for k in split[1::2]:
                ids = ids + [self.sentinel(int(k[:_MOST_DIGITS]))] + next(encoded)
            result.append(ids)
        return result

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, with sentinels as '<extra_id_k>'.

        Padding and end of sequence show as nothing. An id past the vocabulary, which a model can predict when
        its embedding is padded, shows as '<unused_id>'. Raises DataError for a negative id.
        """
        num_pieces = self.pieces.get_piece_size()
        words, run = [], []
        for i in map(int, ids):
            if i < 0:
                raise DataError(f"Token id {i} is negative, expected ids of {self.path} (0 to {self.size - 1}).")
            if i < num_pieces:
                run.append(i)
                continue
            words += [
                self.pieces.decode(run),
                f"<extra_id_{self.size - 1 - i}>" if i < self.size else f"<unused_{i}>",
            ]
            run = []
        words.append(self.pieces.decode(run))
        return " ".join(word for word in words if word)
