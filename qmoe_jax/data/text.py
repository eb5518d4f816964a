"""Documents from files: JSON lines (C4's layout) and plain text, compressed with gzip or not."""

from __future__ import annotations

import glob
import gzip
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator

from qmoe_jax.errors import DataError

_EXPECTED = 'Expected JSON lines, {"text": "..."} on each (.jsonl, .json), or plain text (.txt), with or without .gz'

_MOST_LINE = 100_000_000  # bytes

Paths = str | os.PathLike | Iterable[str | os.PathLike]


def read_documents(paths: Paths, check: Callable[[str], None] = lambda text: None) -> Iterator[str]:
    """Documents of one or several files, in order, read as they are asked for.

    Args:
      check: raises DataError for a text that can't be used; file and line are put before what it says.
      paths: a file, a glob pattern, several of both separated by commas, or a sequence of them. A pattern
        stands for its files in alphabetical order. The name tells the kind:
        `.jsonl`, `.json`: JSON lines, an object with a string "text" on each, others ignored (as in C4);
        `.txt`: UTF-8 text, whose documents are paragraphs, separated by blank lines;
        each also with `.gz`.

    Returns:
      Iterator of the texts. A document of a JSON file may be empty; one of a text file isn't.

    Raises:
      DataError: a file is missing or of an unknown kind (at once), or, when it is reached: empty, broken
        gzip, not UTF-8, a line that is empty, not JSON or without "text". The message names file and line.
    """
    files = find_files(paths)
    return (document for file in files for document in _read_file(file, check))


def find_files(paths: Paths) -> list[pathlib.Path]:
    """The files that `paths` stands for (see `read_documents`). Raises DataError if one cannot be read."""
    if isinstance(paths, str):
        # A file may have a comma in its name.
        paths = [paths] if os.path.exists(paths) else [p.strip() for p in paths.split(",") if p.strip()]
    elif isinstance(paths, os.PathLike):
        paths = [paths]
    files: list[pathlib.Path] = []
    for path in [os.fspath(p) for p in paths]:
        found = [path] if os.path.exists(path) else sorted(glob.glob(path))
        if not found:
            raise DataError(f"{path}: no such text file, and no file matches it as a pattern.")
        files += map(pathlib.Path, found)
    if not files:
        raise DataError("No text file was given.")
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: not a file. Name the text files in it, or a pattern such as {file}/*.jsonl.")
        if _kind(file) not in (".json", ".jsonl", ".txt"):
            raise DataError(f"{file}: unknown kind of text. {_EXPECTED}.")
    return files


def _kind(file: pathlib.Path) -> str:
    return (file.with_suffix("") if file.suffix == ".gz" else file).suffix


def _read_file(file: pathlib.Path, check: Callable[[str], None]) -> Iterator[str]:
    empty = True
    for number, document in _paragraphs(file) if _kind(file) == ".txt" else _json_texts(file):
        empty = False
        try:
            check(document)
        except DataError as e:
            raise DataError(f"{file}, line {number}: {e}") from e
        yield document
    if empty:
        raise DataError(f"{file}: empty, it holds no document. {_EXPECTED}.")


def _lines(file: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, from 1, as text."""
    number = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as f:
            while line := f.readline(_MOST_LINE + 1):
                number += 1
                if len(line) > _MOST_LINE:
                    raise DataError(f"{file}, line {number}: more than {_MOST_LINE:,} bytes. {_EXPECTED}.")
                # A byte order mark, which some editors put at the beginning, is not text.
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as e:
        raise DataError(
            f"{file}, line {number}: not UTF-8 (byte {e.object[e.start]:#04x} at position {e.start} of the "
            "line). Convert the file to UTF-8."
        ) from e
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise DataError(f"{file}, after line {number}: broken or truncated gzip file ({e}). Get it again.") from e
    except OSError as e:
        raise DataError(f"{file}: cannot read it ({e.strerror or e}).") from e


def _json_texts(file: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Texts, and on which line each is."""
    for number, line in _lines(file):
        where = f"{file}, line {number}"
        if not line.strip():
            raise DataError(f"{where}: empty line. Expected one JSON object per line.")
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise DataError(f"{where}: not JSON ({e}): {_shown(line)}. {_EXPECTED}.") from e
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise DataError(f'{where}: not an object with a string "text": {_shown(line)}. {_EXPECTED}.')
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise DataError(f"{where}: the text has half a surrogate pair at character {e.start}.") from e
        yield number, text


def _paragraphs(file: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Paragraphs, and on which line each begins."""
    paragraph: list[str] = []
    first = 0
    for number, line in _lines(file):
        if line.strip():
            first = first if paragraph else number
            paragraph.append(line.strip())
        elif paragraph:
            yield first, "\n".join(paragraph)
            paragraph = []
    if paragraph:
        yield first, "\n".join(paragraph)


def _shown(line: str, width: int = 60) -> str:
    line = line.strip()
    return repr(line if len(line) <= width else line[:width] + "...")
