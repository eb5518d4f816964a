"""The paper's codec: byte for byte as the reference writes it, and back."""

import functools
import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_jax.codecs import dictionary

DECODE_TABLE_SHA256 = "c09862c453fe122634070a475357ff81a679aff65829d84a56f806c02a54ed45"


def random_trits(seed: int, shape: tuple[int, ...], zeros: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.choice(3, shape, p=[zeros, (1 - zeros) / 2, (1 - zeros) / 2]).astype(np.uint8)


def trits_of_codewords(codewords: np.ndarray) -> np.ndarray:
    """Decodes one row by the format's description: a loop over the words of the decode table."""
    trits = []
    for word0, word1 in dictionary.decode_table()[codewords].tolist():
        for pair in range(word0 & 15):
            word = (word0, word1)[pair // 7] >> (4 + 4 * (pair % 7))
            trits += [word & 3, word >> 2 & 3]
    return np.array(trits, np.uint8)


@functools.cache
def known_entries() -> set[tuple[int, int]]:
    return set(map(tuple, dictionary.decode_table().tolist()))


@st.composite
def matrices(draw):
    """Ternary matrices of any shape and density, some with long runs and rows of zeros."""
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 70))
    zeros = draw(st.sampled_from([0.0, 0.3, 0.885, 0.99, 1.0]))
    trits = random_trits(draw(st.integers(0, 2**32 - 1)), (rows, columns), zeros)
    start, length = draw(st.integers(0, columns - 1)), draw(st.integers(0, columns))
    trits[:, start : start + length] = draw(st.integers(0, 2))
    trits[draw(st.integers(0, rows - 1))] *= draw(st.integers(0, 1))
    return trits


def test_decode_table_has_the_published_hash():
    table = dictionary.decode_table()
    assert table.dtype == np.uint32 and table.shape == (65_536, 2)
    assert hashlib.sha256(table.astype("<u4").tobytes()).hexdigest() == DECODE_TABLE_SHA256


def test_every_prefix_of_a_codeword_is_a_codeword():
    entries = {trits_of_codewords(np.array([c])).tobytes() for c in range(0, 65_536, 7)}
    every = {trits_of_codewords(np.array([c])).tobytes() for c in range(65_536)}
    assert len(every) == 65_536
    assert all(entry[:-2] in every for entry in entries if len(entry) > 2)


@pytest.mark.parametrize("name", "abcde")
def test_golden_matrices_give_the_same_bytes(fixture_path, name):
    golden = np.load(fixture_path("dictionary_golden.npz"))
    trits = golden[f"{name}_trits"]
    codewords, row_offsets = dictionary.encode(trits)
    assert codewords.dtype == np.uint16 and row_offsets.dtype == np.int32
    np.testing.assert_array_equal(codewords, golden[f"{name}_w_comp"])
    np.testing.assert_array_equal(row_offsets, golden[f"{name}_row_off"])
    np.testing.assert_array_equal(dictionary.decode(codewords, row_offsets, trits.shape[1]), trits)


@pytest.mark.parametrize("name, columns", [("w64", 64), ("w33", 33), ("four_values", 8)])
def test_golden_edge_rows_give_the_same_bytes(fixture_path, name, columns):
    golden = np.load(fixture_path("ista_edge_rows.npz"))
    trits = np.ascontiguousarray(golden[f"{name}_trits"][:, :columns])  # stored with the padding of odd rows
    stored = golden[f"{name}_w_comp"].view(np.uint16)
    codewords, row_offsets = dictionary.encode(trits)
    np.testing.assert_array_equal(codewords, stored)
    np.testing.assert_array_equal(row_offsets, golden[f"{name}_row_off"])
    np.testing.assert_array_equal(dictionary.decode(stored, row_offsets, columns), trits)


@settings(max_examples=20, deadline=None)
@given(matrices())
def test_matrices_survive_the_round_trip(trits):
    codewords, row_offsets = dictionary.encode(trits)
    np.testing.assert_array_equal(dictionary.decode(codewords, row_offsets, trits.shape[1]), trits)
    for row, expected in enumerate(trits):
        padded = np.append(expected, np.zeros(trits.shape[1] % 2, np.uint8))
        found = trits_of_codewords(codewords[row_offsets[row] : row_offsets[row + 1]])
        np.testing.assert_array_equal(found, padded)


@settings(max_examples=15, deadline=None)
@given(matrices())
def test_parse_is_greedy(trits):
    """No codeword could have been longer: with the next pair it is in the dictionary no more."""
    table, known = dictionary.decode_table(), known_entries()
    codewords, row_offsets = dictionary.encode(trits)
    following = np.setdiff1d(np.arange(1, codewords.size), row_offsets)  # codewords that do not begin a row
    for i in following:
        longer = table[codewords[i - 1]].tolist()
        pairs = longer[0] & 15
        if pairs == 14:
            continue
        first_pair = int(table[codewords[i], 0]) >> 4 & 15
        longer[pairs // 7] |= first_pair << (4 + 4 * (pairs % 7))
        assert (longer[0] + 1, longer[1] + 1) not in known


def test_all_experts_at_once_equals_one_by_one():
    trits = random_trits(0, (5, 33, 77), zeros=0.885)
    data = dictionary.encode_experts(trits)
    streams = [dictionary.encode(matrix) for matrix in trits]
    np.testing.assert_array_equal(data["codewords"], np.concatenate([c for c, _ in streams]))
    np.testing.assert_array_equal(data["row_offsets"], np.stack([o for _, o in streams]))


def test_chunks_of_rows_give_the_same_bytes(monkeypatch):
    trits = random_trits(1, (3, 20, 51), zeros=0.8)
    whole = dictionary.encode_experts(trits)
    monkeypatch.setattr(dictionary, "CHUNK_WEIGHTS", 7 * 51)
    chunked = dictionary.encode_experts(trits)
    for name in whole:
        np.testing.assert_array_equal(chunked[name], whole[name])


def test_likely_trits_take_the_published_rate():
    codewords, _ = dictionary.encode(random_trits(2, (100, 6144), zeros=0.885))
    assert codewords.size * 16 / (100 * 6144) == pytest.approx(0.7384, abs=0.003)


@pytest.mark.parametrize(
    "trits, message",
    [
        (np.full((2, 4), 3, np.uint8), "found the value 3"),
        (np.zeros((2, 4), np.int32), "dtype int32, expected uint8"),
        (np.zeros((2, 4)), "dtype float64, expected uint8"),
        (np.zeros(4, np.uint8), r"shape \[4\], expected \[rows, columns\]"),
        (np.zeros((2, 0), np.uint8), "at least one column"),
    ],
)
def test_what_is_not_trits_is_refused(trits, message):
    with pytest.raises(ValueError, match=message):
        dictionary.encode(trits)


def test_another_width_is_refused():
    codewords, row_offsets = dictionary.encode(random_trits(3, (3, 40), zeros=0.8))
    with pytest.raises(ValueError, match="row 0 holds 20 pairs of trits, expected 21 for a width of 42"):
        dictionary.decode(codewords, row_offsets, 42)


def test_signed_codewords_are_refused():
    codewords, row_offsets = dictionary.encode(random_trits(3, (3, 40), zeros=0.8))
    with pytest.raises(ValueError, match="int16 .*expected uint16"):
        dictionary.decode(codewords.view(np.int16), row_offsets, 40)
