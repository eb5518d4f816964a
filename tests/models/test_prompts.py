"""What families make of a prompt, and of what is written after it."""

import dataclasses

import numpy as np
import pytest
from tiny_vocabulary import train_pieces

from qmoe_jax.models.decoder.task import NextToken
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


def test_a_decoder_goes_on_from_a_text():
    task = NextToken()
    tokens, options = task.prompt(Letters(), "ab")
    assert list(tokens) == [1, 97, 98] and options == {"stop": (2,), "pad": 2}
    assert task.completed(Letters(), tokens, np.array([99, 2, 2])) == "abc"
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
