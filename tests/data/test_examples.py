import json

import numpy as np
import pytest
from tiny_vocabulary import SENTENCES

from qmoe_jax.errors import DataError
from qmoe_jax.models.switch import Vocabulary, corrupt, load_examples


def write(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def filled(vocabulary, encoder, decoder):
    """Text of the document behind an example."""
    spans = {}
    for token in decoder[1:]:
        if vocabulary.is_sentinel(token):
            span = spans.setdefault(int(token), [])
        else:
            span.append(int(token))
    return vocabulary.decode([i for token in encoder[:-1] for i in spans.get(int(token), [token])])


def test_documents_come_in_order_and_whole(tmp_path, vocabulary):
    texts = [f"{a} {b}" for a in SENTENCES for b in SENTENCES]
    examples = load_examples(write(tmp_path / "a.jsonl", texts), vocabulary, 10)
    assert [filled(vocabulary, *pair) for pair in examples.pairs] == texts[:10]
    assert (len(examples), examples.num_read, examples.num_too_long, examples.num_too_short) == (10, 10, 0, 0)
    assert all(encoder[-1] == 1 and decoder[0] == 0 for encoder, decoder in examples.pairs)


def test_long_and_empty_documents_are_skipped_counted_and_take_no_part_in_chance(tmp_path, vocabulary):
    usable = [SENTENCES[i % 4] for i in range(6)]
    long = " ".join(SENTENCES)
    mixed = [long, *usable[:3], "", long, *usable[3:], long, "not read"]
    limit = max(len(vocabulary.encode(s)) for s in usable) + 1  # end of sequence counts
    skipping = load_examples(write(tmp_path / "a.jsonl", mixed), vocabulary, 6, max_length=limit)
    plain = load_examples(write(tmp_path / "b.jsonl", usable), vocabulary, 6)
    for found, expected in zip(skipping.pairs, plain.pairs, strict=True):
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])
    assert (skipping.num_read, skipping.num_too_long, skipping.num_too_short) == (9, 2, 1)


def test_one_token_more_than_the_limit_is_too_long(tmp_path, vocabulary):
    path = write(tmp_path / "a.jsonl", SENTENCES[:1])
    length = len(vocabulary.encode(SENTENCES[0])) + 1
    assert load_examples(path, vocabulary, 1, max_length=length).num_too_long == 0
    with pytest.raises(DataError, match=f"1 have more than {length - 1} tokens"):
        load_examples(path, vocabulary, 1, max_length=length - 1)


def test_every_call_starts_the_generator_anew(tmp_path, vocabulary):
    path = write(tmp_path / "a.jsonl", SENTENCES)
    first, again, other = (load_examples(path, vocabulary, 4, seed=seed) for seed in (0, 0, 1))
    same = lambda x, y: all(
        np.array_equal(a, b) for p, q in zip(x.pairs, y.pairs, strict=True) for a, b in zip(p, q, strict=True)
    )
    assert same(first, again) and not same(first, other)


def test_one_generator_runs_over_all_documents(tmp_path, vocabulary):
    rng = np.random.RandomState(0)
    examples = load_examples(write(tmp_path / "a.jsonl", SENTENCES), vocabulary, 4)
    for text, pair in zip(SENTENCES, examples.pairs, strict=True):
        expected = corrupt(np.array([*vocabulary.encode(text), 1]), rng, sentinel=vocabulary.sentinel(0))
        np.testing.assert_array_equal(pair[0], expected[0])
        np.testing.assert_array_equal(pair[1], expected[1])


def test_without_end_of_sequence_the_decoder_need_not_predict_it(tmp_path, vocabulary):
    path = write(tmp_path / "a.jsonl", SENTENCES)
    with_eos = load_examples(path, vocabulary, 4)
    without = load_examples(path, vocabulary, 4, append_eos=False)
    assert all((decoder == 1).sum() == 1 for _, decoder in with_eos.pairs)
    assert all((decoder == 1).sum() == 0 and encoder[-1] == 1 for encoder, decoder in without.pairs)


def test_number_of_targets(tmp_path, vocabulary):
    examples = load_examples(write(tmp_path / "a.jsonl", SENTENCES), vocabulary, 4)
    assert examples.num_targets == sum(len(decoder[1:]) for _, decoder in examples.pairs)


def test_fewer_documents_than_asked_for(tmp_path, vocabulary):
    path = write(tmp_path / "few.jsonl", [*SENTENCES, "", " ".join(SENTENCES * 20)])
    with pytest.raises(
        DataError, match=r"few\.jsonl: 9 documents .* only 4 of its 6 .*1 have more than 568 .*1 are empty"
    ):
        load_examples(path, vocabulary, 9)


def test_not_enough_sentinels(tmp_path, pieces_path):
    path = write(tmp_path / "a.jsonl", SENTENCES)
    with pytest.raises(ValueError, match="568 tokens needs 29 sentinels, the vocabulary has 28"):
        load_examples(path, Vocabulary.load(pieces_path, num_sentinels=28), 1)
    load_examples(path, Vocabulary.load(pieces_path, num_sentinels=29), 1)


@pytest.mark.parametrize("options", [{"num_documents": 0}, {"num_documents": 1, "max_length": 1}])
def test_parameters_out_of_range(tmp_path, vocabulary, options):
    with pytest.raises(ValueError, match="at least"):
        load_examples(write(tmp_path / "a.jsonl", SENTENCES), vocabulary, **options)


def test_a_sentinel_that_is_none_is_told_with_file_and_line(tmp_path, vocabulary):
    texts = [*SENTENCES[:2], "the <extra_id_100> cat"]
    path = write(tmp_path / "a.jsonl", texts)
    assert len(load_examples(path, vocabulary, 2)) == 2
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: the text has <extra_id_100>, .* sentinels 0 to 99"):
        load_examples(path, vocabulary, 3)
    (tmp_path / "a.txt").write_text(f"{SENTENCES[0]}\n\n{SENTENCES[1]}\n<extra_id_{'9' * 5_000}>\n")
    with pytest.raises(DataError, match=r"a\.txt, line 3: the text has <extra_id_99999"):
        load_examples(tmp_path / "a.txt", vocabulary, 2)
