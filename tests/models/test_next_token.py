"""Text to windows of tokens, batches of these, and the vocabulary that they come from."""

import json

import numpy as np
import pytest
import tokenizers

from qmoe_jax.errors import DataError
from qmoe_jax.models.decoder.task import NextToken, load_examples, make_batches
from qmoe_jax.models.decoder.vocabulary import Vocabulary

WORDS = ["<unk>", "<s>", "</s>", *"a b c d e f g h".split()]
TASK = NextToken()


@pytest.fixture
def directory(tmp_path):
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("a b c\n\nd e f g h a\n\nb c\n\nd")
    return tmp_path


def settings(directory, **values):
    (directory / "tokenizer_config.json").write_text(json.dumps(values))


def windows(directory, n, **options):
    return [t.tolist() for (t,) in load_examples(directory / "text.txt", TASK.vocabulary(directory), n, **options)]


def test_documents(directory):
    settings(directory, eos_token="</s>")
    assert windows(directory, 3) == [[3, 4, 5, 2], [6, 7, 8, 9, 10, 3, 2], [4, 5, 2]]
    found = load_examples(directory / "text.txt", TASK.vocabulary(directory), 2, max_length=4, append_eos=False)
    assert [t.tolist() for (t,) in found] == [[3, 4, 5], [4, 5]]
    assert (found.num_read, found.num_too_long, found.num_targets) == (4, 1, 3)


def test_windows_begin_with_bos(directory):
    settings(directory, eos_token={"content": "</s>"}, bos_token="<s>", add_bos_token=True)
    assert windows(directory, 3, window=5) == [[1, 3, 4, 5, 2], [1, 6, 7, 8, 9], [1, 10, 3, 2, 4]]
    settings(directory, eos_token="</s>", bos_token="<s>")
    assert windows(directory, 2, window=5) == [[3, 4, 5, 2, 6], [7, 8, 9, 10, 3]]
    assert windows(directory, 2, window=5, append_eos=False) == [[3, 4, 5, 6, 7], [8, 9, 10, 3, 4]]


def test_bos_of_the_tokenizer_itself(directory):
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", "$A $B", [("<s>", 1)])
    tokenizer.save(str(directory / "tokenizer.json"))
    vocabulary = Vocabulary.load(directory / "tokenizer.json")
    assert vocabulary.bos == 1 and vocabulary.eos is None
    assert vocabulary.encode("a h") == [3, 10]
    assert vocabulary.decode([1, 3, 10, 2]) == "a h"


def test_too_little_text(directory):
    with pytest.raises(DataError, match="9 documents were asked for.*give only 3.*1 are empty"):
        windows(directory, 9)
    with pytest.raises(DataError, match="3 windows of 7 tokens"):
        windows(directory, 3, window=7)


@pytest.mark.parametrize("options", [dict(window=1), dict(window=9, max_length=8), dict(max_length=1)])
def test_lengths_out_of_range(directory, options):
    with pytest.raises(ValueError, match="expected"):
        windows(directory, 1, **options)


def test_vocabularies_that_do_not_fit(directory):
    vocabulary = Vocabulary.load(directory)
    assert vocabulary.size == len(WORDS)
    vocabulary.check(len(WORDS))
    vocabulary.check(64)
    with pytest.raises(DataError, match="larger than the embedding"):
        vocabulary.check(len(WORDS) - 1)
    with pytest.raises(DataError, match="far smaller"):
        vocabulary.check(5000)
    with pytest.raises(DataError, match="negative"):
        vocabulary.decode([-1])


def test_files_that_are_none(directory):
    with pytest.raises(DataError, match="is missing"):
        Vocabulary.load(directory / "other.json")
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        Vocabulary.load(directory)


def test_named_tokens_have_to_be_there(directory):
    settings(directory, eos_token="<end>")
    with pytest.raises(DataError, match="<end>"):
        Vocabulary.load(directory)


def test_batches_hold_every_example_once():
    rng = np.random.RandomState(0)
    examples = [(rng.randint(0, 9, n).astype(np.int32),) for n in (2, 33, 34, 65, 20, 30, 40)]
    batches = make_batches(examples, 100)
    assert sorted(i for b in batches for i in b.indices if i >= 0) == list(range(7))
    assert {b.inputs.shape for b in batches} == {(2, 32), (1, 64)}
    for batch in batches:
        for row, i in enumerate(batch.indices):
            tokens = examples[i][0] if i >= 0 else np.zeros(1, np.int32)
            n = len(tokens) - 1
            np.testing.assert_array_equal(batch.inputs[row, :n], tokens[:-1])
            np.testing.assert_array_equal(
                batch.targets[row], np.pad(tokens[1:], (0, batch.length("text") - n), constant_values=-1)
            )
    with pytest.raises(ValueError, match="tokens_per_batch"):
        make_batches(examples, 0)


def test_examples_are_checked():
    with pytest.raises(ValueError, match="no documents"):
        TASK.check([], 9)
    with pytest.raises(ValueError, match="Document 1 has 1 tokens"):
        TASK.check([(np.array([1, 2]),), (np.array([1]),)], 9)
    with pytest.raises(ValueError, match="Document 0 has token ids from 1 to 9"):
        TASK.check([(np.array([1, 9]),)], 9)


def test_what_counts():
    examples = [(np.arange(5),), (np.arange(3),)]
    np.testing.assert_array_equal(TASK.lengths(examples)["text"], [4, 2])
    np.testing.assert_array_equal(TASK.predicted(examples), [4, 2])
    assert TASK.special(examples, None)["text"].tolist() == [False] * 6
    assert TASK.longest(512) == {"text": 511}
    assert [t.shape for t in TASK.filled(2, {"text": 7})] == [(2, 7), (2, 7)]
