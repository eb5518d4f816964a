"""Makes the carried model's text and vocabulary from what every Python installation has.

    python experiments/tools/make_text.py --output=OUT

writes OUT/spm.model, OUT/train.jsonl.gz and OUT/validation.jsonl.gz: the language reference
(`pydoc_data.topics`), docstrings and comment blocks of the standard library, then as much of its source code
as `--code_fraction` allows, cut into pieces of about 40-150 tokens. Files are parsed, never imported. The
text depends on the Python version; the carried files were made with Python 3.11. Takes about a minute.
"""

import ast
import gzip
import hashlib
import io
import json
import pathlib
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import sentencepiece
from absl import app, flags

from qmoe_jax import reports

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # experiments/
import command_line

_OUTPUT = flags.DEFINE_string("output", None, "Folder for the three files.", required=True)
_VOCABULARY = flags.DEFINE_integer("vocabulary_size", 2_000, "SentencePiece pieces, without the sentinels.")
_NUM_VALIDATION = flags.DEFINE_integer("num_validation", 1_000, "Held-out pieces.")
_MIN = flags.DEFINE_integer("min_characters", 140, "Shortest piece.")
_MAX = flags.DEFINE_integer("max_characters", 420, "Longest piece.")
_CODE = flags.DEFINE_float("code_fraction", 0.4, "Largest share of the pieces that is source code.")

# Paths of the machine, addresses of people, tables of numbers.
_UNWANTED = re.compile(
    r"/home/|/root|/usr/local|/Users/|/tmp/|\.pyenv|[\w.+-]+@[\w-]+\.\w+"
    r"|(?:0x[0-9a-fA-F]+,? ){4}|[|+-]{2} +[|+-]"
)
_RULER = re.compile(r"([-=*_#~+.^])\1{4,}")
_QUOTES = {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'}
_SIGNS = {
    "\u2013": "-",
    "\u2014": "-",
    "\u2026": "...",
    "\u2265": ">=",
    "\u2264": "<=",
    "\u2192": "->",
    "\xa0": " ",
}
_TYPOGRAPHY = str.maketrans(_QUOTES | _SIGNS)
_SHINGLE = 8  # words


class Document(NamedTuple):
    source: str  # "topics", "docstring", "comment" or "code"
    text: str


# ----------------------------------------------------------------------------------------------------------
# Finding text
# ----------------------------------------------------------------------------------------------------------


def library_files(root: pathlib.Path) -> list[pathlib.Path]:
    """The standard library's Python files in a fixed order, without packages and test data."""
    skipped = {"site-packages", "dist-packages", "data", "__pycache__", "lib2to3", "encodings", "pydoc_data"}
    files = [f for f in root.rglob("*.py") if not skipped & set(f.relative_to(root).parts)]
    return sorted(f for f in files if not f.name.startswith("_sysconfigdata"))


def topics(root: pathlib.Path) -> Iterator[Document]:
    """The language reference, whose file is one assignment of a dict of strings."""
    path = root / "pydoc_data" / "topics.py"
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for _, text in sorted(ast.literal_eval(node.value).items()):
                yield Document("topics", text)


def docstrings(tree: ast.Module) -> Iterator[Document]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield Document("docstring", text)


def comments(source: str) -> Iterator[Document]:
    """Blocks of consecutive lines that hold nothing but a comment."""
    block, last = [], -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            if token.start[0] != last + 1 and block:
                yield Document("comment", "\n".join(block))
                block = []
            block.append(token.string.lstrip("#!").strip())
            last = token.start[0]
    if block:
        yield Document("comment", "\n".join(block))


def code(source: str, tree: ast.Module) -> Iterator[Document]:
    """Functions and methods without their docstring and comments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:]
            if node.body:
                yield Document("code", ast.unparse(node))


# ----------------------------------------------------------------------------------------------------------
# Cutting and cleaning
# ----------------------------------------------------------------------------------------------------------


def pieces(text: str, longest: int) -> Iterator[str]:
    """Paragraphs, filled up to `longest` characters; a longer one is cut at sentences, or else at words."""
    parts = []
    for paragraph in re.split(r"\n\s*\n", _RULER.sub("", text.translate(_TYPOGRAPHY))):
        paragraph = " ".join(paragraph.split())
        if not paragraph.isascii() or _UNWANTED.search(paragraph):
            continue
        sentences = re.split(r"(?<=[.:;?!]) ", paragraph) if len(paragraph) > longest else [paragraph]
        for sentence in sentences:
            parts += sentence.split() if len(sentence) > longest else [sentence]
    piece = ""
    for part in parts:
        if piece and len(piece) + 1 + len(part) > longest:
            yield piece
            piece = ""
        piece = f"{piece} {part}" if piece else part
    yield piece


def digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Unseen:
    """Tells pieces of which at most a quarter of the 8-word sequences occurred in an earlier piece."""

    def __init__(self):
        self._seen: set[int] = set()

    def __call__(self, piece: str) -> bool:
        words = re.findall(r"\w+", piece.lower())
        shingles = {hash(tuple(map(digest, words[i : i + _SHINGLE]))) for i in range(len(words) - _SHINGLE + 1)}
        if not shingles or len(shingles & self._seen) > len(shingles) / 4:
            return False
        self._seen |= shingles
        return True


def write(path: pathlib.Path, lines: Iterable[Document]) -> None:
    text = "".join(json.dumps({"text": d.text, "source": d.source}) + "\n" for d in lines)
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))


def main(_):
    output = pathlib.Path(_OUTPUT.value)
    output.mkdir(parents=True, exist_ok=True)
    root = pathlib.Path(sysconfig.get_path("stdlib"))

    # -- Text in order of preference: prose first, so that duplicates drop out of the lesser sources.
    documents, source_code = list(topics(root)), []
    parsed = []
    for path in library_files(root):
        try:
            with tokenize.open(path) as f, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old modules
                source = f.read()
                parsed.append((path, source, ast.parse(source)))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # the test suite holds broken files on purpose
    for _path, _source, tree in parsed:
        documents += docstrings(tree)
    for path, source, tree in parsed:
        documents += comments(source)
        if "test" not in path.parts and "tests" not in path.parts:
            source_code += code(source, tree)

    # -- A document is held out as a whole, so that no piece of it is trained on.
    unseen = Unseen()
    prose, held_out, extra = [], [], []
    for document in documents + sorted(source_code, key=lambda d: digest(d.text)):
        for piece in pieces(document.text, _MAX.value):
            if len(piece) < _MIN.value or not unseen(piece):
                continue
            target = extra if document.source == "code" else prose
            if digest(document.text) % 12 == 0:
                target = held_out
            target.append(Document(document.source, piece))
    extra = extra[: int(len(prose) * _CODE.value / (1 - _CODE.value))]

    order = lambda d: digest(d.text)
    train = sorted(prose + extra, key=order)
    # Held-out pieces in the proportions of the training text.
    num_code = round(_NUM_VALIDATION.value * len(extra) / len(train))
    held_code = sorted((d for d in held_out if d.source == "code"), key=order)[:num_code]
    held_prose = sorted((d for d in held_out if d.source != "code"), key=order)
    validation = sorted(held_code + held_prose[: _NUM_VALIDATION.value - len(held_code)], key=order)
    write(output / "train.jsonl.gz", train)
    write(output / "validation.jsonl.gz", validation)

    # -- Vocabulary
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(d.text for d in train),
        model_writer=model,
        vocab_size=_VOCABULARY.value,
        model_type="unigram",
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (output / "spm.model").write_bytes(model.getvalue())

    # -- What was made
    vocabulary = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    for name, lines in (("train", train), ("validation", validation)):
        lengths = sorted(map(len, vocabulary.encode([d.text for d in lines])))
        size = (output / f"{name}.jsonl.gz").stat().st_size
        percentile = lambda p, lengths=lengths: lengths[int(p * (len(lengths) - 1))]
        reports.say(
            f"{name}: {len(lines)} pieces, {sum(lengths)} tokens (5% {percentile(0.05)}, half {percentile(0.5)}, "
            f"95% {percentile(0.95)}, longest {lengths[-1]}), {size} bytes"
        )
        for source in ("topics", "docstring", "comment", "code"):
            reports.say(f"  {source}: {sum(d.source == source for d in lines)} pieces")


if __name__ == "__main__":
    app.run(command_line.without_traceback(main))
