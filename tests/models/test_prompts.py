"""What families make of a prompt, and of what is written after it."""

import dataclasses

import numpy as np
import pytest
import tokenizers
from tiny_vocabulary import train_pieces

from qmoe_jax.models.decoder.task import NextToken
from qmoe_jax.models.decoder.vocabulary import Vocabulary as TokenizerJson
from qmoe_jax.models.switch import EOS, PAD, SpanCorruption, Vocabulary


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "spm.model"
    path.write_bytes(train_pieces())
    return Vocabulary.load(path)


def test_sentinels_are_filled_in(vocabulary):
    task, (first, second, third) = SpanCorruption(), map(vocabulary.sentinel, range(3))
    tokens, options = task.prompt(vocabulary, "the cat <extra_id_0> on the <extra_id_1>")
    assert tokens[-1] == EOS and tokens.dtype == np.int32
    assert options == dict(prefix=(first,), stop=(EOS, third), banned=(PAD,))
    sat, mat = vocabulary.encode("sat"), vocabulary.encode("mat")
    written = [first, *sat, second, *mat, first, *mat, EOS, PAD]  # What comes again is noise.
    filled = task.completed(vocabulary, tokens, np.array(written))
    assert list(task.pieces(vocabulary, tokens, iter(written))) == [filled]
    assert filled == vocabulary.decode(vocabulary.encode("the cat") + sat + vocabulary.encode("on the") + mat)
    assert "<extra_id_1>" in task.completed(vocabulary, tokens, np.array([first, *sat, EOS]))


def test_a_prompt_without_sentinels_is_continued(vocabulary):
    task, first = SpanCorruption(), vocabulary.sentinel(0)
    tokens, options = task.prompt(vocabulary, "the cat")
    assert list(tokens) == [*vocabulary.encode("the cat"), first, EOS]
    assert options["prefix"] == (first,) and options["stop"] == (EOS, vocabulary.sentinel(1))
    sat = vocabulary.encode("sat")
    expected = vocabulary.decode(vocabulary.encode("the cat") + sat)
    assert task.completed(vocabulary, tokens, np.array([first, *sat, EOS])) == expected


@dataclasses.dataclass
class Letters:
    """A vocabulary of letters."""

    bos: int | None = 1
    eos: int | None = 2

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i > 2)

    def is_settled(self, ids):
        return True


def test_a_decoder_goes_on_from_a_text():
    task = NextToken()
    tokens, options = task.prompt(Letters(), "ab")
    assert list(tokens) == [1, 97, 98] and options == {"stop": (2,), "pad": 2}
    assert task.completed(Letters(), tokens, np.array([99, 2, 2])) == "abc"
    assert list(task.pieces(Letters(), tokens, iter([99, 2]))) == ["ab", "c", "", ""]
    taken = []
    pieces = task.pieces(Letters(), tokens, (taken.append(token) or token for token in (99, 100)))
    assert next(pieces) == "ab" and taken == [] and next(pieces) == "c" and taken == [99]
    tokens, options = task.prompt(Letters(bos=None, eos=None), "ab")
    assert list(tokens) == [97, 98] and options == {}


@pytest.mark.parametrize(("task", "words"), [(SpanCorruption(), None), (NextToken(), Letters())])
def test_an_empty_prompt(task, words, vocabulary):
    with pytest.raises(ValueError, match=r"^it is empty"):
        task.prompt(words or vocabulary, "")


@pytest.mark.parametrize("task", [SpanCorruption(), NextToken()])
def test_targets_are_what_is_predicted(task):
    ids = np.arange(1, 6, dtype=np.int32)
    example = (ids, ids) if isinstance(task, SpanCorruption) else (ids,)
    assert list(task.targets(example)) == [2, 3, 4, 5]
    assert len(task.targets(example)) == task.predicted([example])[0]


# --- Text in pieces ---------------------------------------------------------------------------------------------------

TEXT = "a € ou um café, 日本 🙂"


def byte_level():
    """As Qwen's and gpt-oss': a token may be a part of a character."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=270, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer


def byte_fallback():
    """As Mixtral's: what has no token of its own is several of one byte each."""
    words = ["<unk>", "<s>", "</s>", "▁", *"aoumcf,", *(f"<0x{i:02X}>" for i in range(256))]
    model = tokenizers.models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_pieces_make_the_whole_text(make):
    tokenizer = make()
    words, task = TokenizerJson(tokenizer), NextToken()
    prompt = np.array(words.encode(TEXT[:4]), np.int32)
    rest = words.encode(TEXT[4:])
    pieces = list(task.pieces(words, prompt, iter(rest)))
    assert "".join(pieces) == words.decode([*prompt, *rest])
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert len([p for p in pieces if p]) > 8 and any(p.endswith("🙂") for p in pieces)
    # Whatever a model writes, also what isn't text.
    rng = np.random.default_rng(0)
    for _ in range(200):
        cut = rng.integers(0, len(rest))
        written = [*rng.integers(0, words.size + 2, rng.integers(0, 12)), *rest[cut : cut + 5]]
        pieces = list(task.pieces(words, prompt, iter(written)))
        assert "".join(pieces) == task.completed(words, prompt, np.array(written, np.int32))
