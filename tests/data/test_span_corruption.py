import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmoe_jax.models.switch import corrupt

SENTINEL = 32099
lengths = st.integers(2, 700)
seeds = st.integers(0, 2**32 - 1)


def document(length, seed):
    """Ids that are neither special nor sentinels, ended like the paper's documents."""
    return np.append(np.random.default_rng(seed).integers(3, 32000, length - 1), 1).astype(np.int32)


def fill(encoder, decoder):
    """The document that an encoder and a decoder sequence came from, one token at a time."""
    spans, current = {}, None
    for token in decoder[1:].tolist():
        if token > 32000 - 1:
            current = token
            spans[current] = []
        else:
            spans[current].append(token)
    filled = []
    for token in encoder[:-1].tolist():
        filled += spans[token] if token in spans else [token]
    return filled


def test_golden_examples_to_the_bit(fixture_path):
    golden = np.load(fixture_path("span_corruption_golden.npz"))
    rng = np.random.RandomState(0)
    for i in range(12):
        encoder, decoder = corrupt(golden[f"ids_{i}"], rng, sentinel=SENTINEL)
        np.testing.assert_array_equal(encoder, golden[f"enc_{i}"], f"encoder of document {i}")
        np.testing.assert_array_equal(decoder, golden[f"dec_{i}"], f"decoder of document {i}")


def test_golden_examples_without_the_file():
    # Three lines of the same golden file, for when it is not here; chance has no part in them.
    encoder, decoder = corrupt(np.array([7436, 10917, 15475, 26705, 7117, 1]), np.random.RandomState(0), sentinel=32099)
    assert encoder.tolist() == [7436, 10917, 15475, 26705, 7117, 32099, 1]
    assert decoder.tolist() == [0, 32099, 1, 32098]


@given(lengths, seeds)
def test_filling_the_sentinels_gives_the_document_back(length, seed):
    ids = document(length, seed)
    encoder, decoder = corrupt(ids, np.random.RandomState(seed), sentinel=SENTINEL)
    assert encoder.dtype == decoder.dtype == np.int32
    assert fill(encoder, decoder) == ids.tolist()


@given(lengths, seeds)
def test_number_of_corrupted_tokens_and_spans(length, seed):
    encoder, decoder = corrupt(document(length, seed), np.random.RandomState(seed), sentinel=SENTINEL)
    in_decoder = decoder[decoder >= 32000]
    in_encoder = encoder[encoder >= 32000]
    noise = len(decoder) - 1 - len(in_decoder)
    # NumPy's rounding of .15 n, but one token at least.
    assert noise == max(1, np.round(0.15 * length))
    assert len(in_encoder) == max(1, np.round(noise / 3))
    assert len(encoder) == length - noise + len(in_encoder) + 1
    # Sentinels count down from the first, and the decoder ends with one that the encoder lacks.
    np.testing.assert_array_equal(in_encoder, SENTINEL - np.arange(len(in_encoder)))
    np.testing.assert_array_equal(in_decoder, SENTINEL - np.arange(len(in_encoder) + 1))
    assert decoder[0] == 0 and decoder[-1] == in_decoder[-1] and encoder[-1] == 1


@given(st.integers(2, 60), seeds, st.floats(0.01, 0.99), st.floats(1, 10))
def test_any_density_and_span_length(length, seed, density, mean_span):
    ids = document(length, seed)
    encoder, decoder = corrupt(
        ids, np.random.RandomState(seed), sentinel=SENTINEL, noise_density=density, mean_span=mean_span
    )
    assert fill(encoder, decoder) == ids.tolist()


def test_a_longest_document_fits_512_tokens():
    encoder, _ = corrupt(document(568, 0), np.random.RandomState(0), sentinel=SENTINEL)
    assert len(encoder) == 512


def test_every_way_to_cut_is_equally_likely():
    # 13 tokens, 2 corrupted; with spans of 1 token there are two spans and 10 ways to cut the 11 kept tokens.
    rng = np.random.RandomState(0)
    ids = np.arange(3, 16)
    counts = np.zeros(14)
    for _ in range(5000):
        encoder, _ = corrupt(ids, rng, sentinel=SENTINEL, mean_span=1)
        counts[np.flatnonzero(encoder == SENTINEL)[0]] += 1
    assert set(np.flatnonzero(counts)) == set(range(1, 11))
    assert np.abs(counts[1:11] - 500).max() < 5 * np.sqrt(500)


@pytest.mark.parametrize("ids", [[], [1], [[5, 6]]])
def test_too_short_to_corrupt(ids):
    with pytest.raises(ValueError, match="at least 2 tokens"):
        corrupt(np.array(ids, np.int32), np.random.RandomState(0), sentinel=SENTINEL)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"noise_density": 0.0}, "noise_density"),
        ({"noise_density": 1.0}, "noise_density"),
        ({"mean_span": 0.5}, "mean_span"),
    ],
)
def test_parameters_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        corrupt(np.arange(9), np.random.RandomState(0), sentinel=SENTINEL, **options)
