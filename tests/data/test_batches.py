import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_vocabulary import SENTENCES

from qmoe_jax.models.switch import make_batches, training_batches


def examples(lengths):
    """Pairs of ids without 0, except for the decoder's start."""
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(1, 1000, n).astype(np.int32)
    return [(draw(e), np.append(np.int32(0), draw(d))) for e, d in lengths]


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 60)), max_size=80), st.integers(1, 5000))
def test_every_example_is_in_exactly_one_row_with_all_its_tokens(lengths, tokens_per_batch):
    pairs = examples(lengths)
    found = []
    for batch in make_batches(pairs, tokens_per_batch):
        assert all(x.dtype == np.int32 for x in batch)
        for i, encoder, inputs, targets in zip(*batch, strict=True):
            if i < 0:
                assert not (encoder.any() or inputs.any() or targets.any())
                continue
            found.append(i)
            np.testing.assert_array_equal(np.trim_zeros(encoder, "b"), pairs[i][0])
            np.testing.assert_array_equal(np.trim_zeros(targets, "b"), pairs[i][1][1:])
            np.testing.assert_array_equal(inputs[: (targets > 0).sum()], pairs[i][1][:-1])
            assert not inputs[(targets > 0).sum() :].any()
    assert sorted(found) == list(range(len(pairs)))


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 60)), max_size=80), st.integers(500, 5000))
def test_batches_are_of_few_shapes_and_no_larger_than_allowed(lengths, tokens_per_batch):
    batches = make_batches(examples(lengths), tokens_per_batch)
    shapes = {(b.encoder_input_tokens.shape, b.decoder_target_tokens.shape) for b in batches}
    assert len({e[1] for e, _ in shapes}) == len(shapes)  # one shape per encoder length
    for batch in batches:
        rows, encoder_length = batch.encoder_input_tokens.shape
        assert encoder_length % 32 == 0 and batch.decoder_input_tokens.shape[1] % 8 == 0
        assert batch.encoder_input_tokens.size + batch.decoder_input_tokens.size <= tokens_per_batch
        assert (batch.indices >= 0).any() and len(batch.indices) == rows


def test_an_example_larger_than_a_batch_gets_one_of_its_own():
    batches = make_batches(examples([(500, 100)] * 3), 64)
    assert [b.indices.tolist() for b in batches] == [[0], [1], [2]]


def test_no_examples():
    assert make_batches([], 1000) == []


@pytest.mark.parametrize("options", [{"tokens_per_batch": 0}, {"tokens_per_batch": 9, "encoder_multiple": 0}])
def test_parameters_out_of_range(options):
    with pytest.raises(ValueError, match="at least 1"):
        make_batches(examples([(3, 2)]), **options)


@pytest.fixture(scope="module")
def documents(vocabulary):
    return [np.array([*vocabulary.encode(text), 1], np.int32) for text in SENTENCES]


def words(vocabulary, encoder, targets):
    """What corruption hid and what it left, in any order."""
    both = np.concatenate([encoder[encoder > 0][:-1], targets[targets > 0]])
    return tuple(sorted(both[~vocabulary.is_sentinel(both)]))


def test_training_sees_every_document_once_an_epoch_with_new_corruption(vocabulary, documents):
    batches = training_batches(documents, vocabulary, 200, np.random.RandomState(0))
    epochs = []
    for _ in range(2):
        rows = []
        while len(rows) < len(documents):
            batch = next(batches)
            np.testing.assert_array_equal(
                batch.decoder_input_tokens[:, 1:] * (batch.decoder_target_tokens[:, 1:] > 0),
                batch.decoder_target_tokens[:, :-1] * (batch.decoder_target_tokens[:, 1:] > 0),
            )
            for i, encoder, _, targets in zip(*batch, strict=True):
                if i >= 0:
                    rows.append((words(vocabulary, encoder, targets), tuple(encoder)))
        assert sorted(w for w, _ in rows) == sorted(tuple(sorted(d)) for d in documents)
        epochs.append(sorted(rows))
    assert epochs[0] != epochs[1]


def test_training_batches_are_the_same_for_the_same_seed(vocabulary, documents):
    first, again = (next(training_batches(documents, vocabulary, 200, np.random.RandomState(3))) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_training_without_documents(vocabulary):
    with pytest.raises(ValueError, match="No documents"):
        training_batches([], vocabulary, 200, np.random.RandomState(0))
