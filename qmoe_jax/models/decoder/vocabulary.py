"""A vocabulary as Hugging Face keeps it, `tokenizer.json`, read by the `tokenizers` package."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qmoe_jax.errors import DataError
from qmoe_jax.files import read_bytes, read_json

if TYPE_CHECKING:
    import tokenizers

_BYTE = re.compile("<0x[0-9A-F]{2}>")
FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """See `load`.

    Attributes:
      tokenizer: what `tokenizer.json` describes.
      bos: id of the token that begins every text of the model, None: there is none.
      eos: id of the token that ends a text, None: it isn't known.
      path: the file it came from, for messages.
    """

    tokenizer: tokenizers.Tokenizer
    bos: int | None = None
    eos: int | None = None
    path: str = "<memory>"

    @classmethod
    def load(cls, path: str | os.PathLike) -> Vocabulary:
        """Reads tokenizer.json, or that of a directory, and what tokenizer_config.json beside it says of BOS and EOS.

        A text begins with BOS if the tokenizer itself puts it there, or if tokenizer_config.json has `add_bos_token`.

        Raises:
          DataError: there is no such file, or it isn't a tokenizer.
        """
        import tokenizers  # Here, as most runs do without it.

        file = pathlib.Path(path)
        file = file / FILE if file.is_dir() else file
        try:
            text = read_bytes(file, error=DataError).decode("utf-8")
        except ValueError as e:
            reason = e if isinstance(e, DataError) else f"{file} is not text."
            raise DataError(f"{reason} Expected a {FILE}.") from e
        with _no_panic(f"{file}: not a {FILE}"):
            tokenizer = tokenizers.Tokenizer.from_str(text)
            tokenizer.no_truncation()
            tokenizer.no_padding()
            letter = tokenizer.encode("a", add_special_tokens=True)
        settings = _settings(file.with_name(SETTINGS))
        bos = letter.ids[0] if letter.special_tokens_mask[:1] == [1] else None
        if bos is None and settings.get("add_bos_token"):
            bos = _id(tokenizer, settings, "bos_token", file)
        eos = _id(tokenizer, settings, "eos_token", file)
        return cls(tokenizer, bos, eos, str(file))

    @property
    def size(self) -> int:
        """One more than the largest id there is."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def check(self, embedding_rows: int) -> None:
        """Raises DataError unless a model with so many embedding rows can belong to this vocabulary.

        An embedding may be padded, at most by a sixteenth or 1024 rows: published ones are by up to 900.
        """
        found = f"{self.path} has ids up to {self.size - 1}, the model's embedding has {embedding_rows} rows"
        if self.size > embedding_rows:
            raise DataError(f"{found}: the vocabulary is larger than the embedding. Use the model's vocabulary.")
        if embedding_rows - self.size > max(1024, embedding_rows // 16):
            raise DataError(f"{found}: the vocabulary is far smaller than the embedding. Use the model's vocabulary.")

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS and EOS; special tokens written in it become their ids."""
        with _no_panic(f"{self.path}: can't tokenise a text"):
            return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of several texts; faster than one by one."""
        with _no_panic(f"{self.path}: can't tokenise a text"):
            return [e.ids for e in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids. Special tokens show as nothing, as do ids past the vocabulary, which a model may predict.

        Raises DataError for a negative id.
        """
        listed = [int(i) for i in ids]
        if min(listed, default=0) < 0:
            raise DataError(f"Token id {min(listed)} is negative, expected ids of {self.path} (0 to {self.size - 1}).")
        with _no_panic(f"{self.path}: can't decode ids"):
            return self.tokenizer.decode(listed, skip_special_tokens=True)

    def is_settled(self, ids: Sequence[int]) -> bool:
        """Whether the text of ids stays as it is, whatever follows: it doesn't end within a character.

        Nor with tokens that are one byte each: what these stand for, all that follow each other tell together.
        """
        shown = (self.tokenizer.id_to_token(i) for i in reversed(ids) if i not in self._special)
        last = next((token for token in shown if token is not None), "")
        return not _BYTE.fullmatch(last) and not self.decode(ids).endswith("\N{REPLACEMENT CHARACTER}")

    @functools.cached_property
    def _special(self) -> set[int]:
        """Ids that show as nothing."""
        return {i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}


@contextlib.contextmanager
def _no_panic(what: str) -> Iterator[None]:
    """Whatever the `tokenizers` package raises as DataError: plain Exception, or what Rust's panics become."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as e:
        raise DataError(f"{what} ({e}).") from e


def _settings(file: pathlib.Path) -> dict[str, Any]:
    """tokenizer_config.json; empty where there is none. Raises DataError if it isn't JSON."""
    return read_json(file, DataError) if os.path.lexists(file) else {}


def _id(tokenizer: tokenizers.Tokenizer, settings: dict[str, Any], name: str, file: pathlib.Path) -> int | None:
    """Id of a special token that tokenizer_config.json names: its text, or an object with its text as 'content'."""
    token = settings.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    if token is None:
        return None
    if not isinstance(token, str):
        raise DataError(f"{file.with_name(SETTINGS)}: {name} is {reprlib.repr(token)}, expected the text of a token.")
    found = tokenizer.token_to_id(token)
    if found is None:
        raise DataError(f"{file}: has no token {token!r}, which {SETTINGS} names as {name}.")
    return found
