"""Symbols of many levels: round trips, codes, and stored bits against the entropy."""

import jax
import numpy as np
import pytest

from qmoe_jax.codecs import gap, gap_codes
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels.compressed_ragged_dot import arg_specs


def random_symbols(seed, shape, zeros, num_levels):
    rng = np.random.default_rng(seed)
    return rng.choice(num_levels + 1, shape, p=[zeros, *[(1 - zeros) / num_levels] * num_levels]).astype(np.uint8)


@pytest.mark.parametrize("num_levels", [4, 5, 9, 14])
def test_codes_are_complete_and_their_runs_ones(num_levels):
    for code in gap_codes.codes(num_levels):
        assert code.words.size == 1 + code.run * num_levels
        assert 1 <= code.lengths.min() and code.lengths.max() <= 11
        taken = np.zeros(1 << 11, int)  # words of 11 bits, by the token that each begins with
        for word, length in zip(code.words, code.lengths, strict=True):
            taken[word :: 1 << length] += 1
        assert (taken == 1).all()
        assert code.words[0] == (1 << code.lengths[0]) - 1


@pytest.mark.parametrize("num_levels", [4, 7, 14])
def test_symbols_survive_the_round_trip(num_levels):
    """Rows longer than a segment, more than a block; dense, sparse, with empty and full rows."""
    zeros = (0.0, 0.4, 0.97)
    symbols = np.concatenate([random_symbols(i, (1, 67, 1200), z, num_levels) for i, z in enumerate(zeros)])
    symbols[2, 30:66] = 0
    symbols[1, 3] = num_levels
    levels = np.sort(np.random.default_rng(0).standard_normal((3, 67, num_levels)), axis=-1)
    compressed = CompressedExperts.from_symbols(symbols, levels)
    np.testing.assert_array_equal(compressed.symbols(), symbols)
    stored = compressed.stored()
    again = CompressedExperts.from_stored(stored, "gap", symbols.shape)
    assert compressed.nbytes == sum(a.nbytes for a in stored.values())
    for x, y in zip(jax.tree.leaves(compressed), jax.tree.leaves(again), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_the_code_is_the_one_that_costs_least():
    symbols = random_symbols(0, (1, 40, 300), 0.5, 6)
    best = gap.encode_experts(symbols, 6)
    sizes = [gap.encode_experts(symbols, 6, [n])["words"].size for n in range(0, 128, 3)]
    assert best["words"].size <= min(sizes)


@pytest.mark.parametrize("distribution", arg_specs.TAILS)
@pytest.mark.parametrize("rate", [0.3, 0.5, 1.0, 1.5, 2.0, 3.0])
def test_stored_bits_are_close_to_the_entropy(distribution, rate):
    """With all metadata; experiments/benchmarks/codes.py has the larger shape, with at most two per cent."""
    symbols, levels = arg_specs.rounded(distribution, rate, 1, 768, 2048)
    share = np.bincount(symbols.reshape(-1)) / symbols.size
    entropy = -sum(p * np.log2(p) for p in share if p > 0)
    assert abs(entropy - rate) < 0.01
    experts = CompressedExperts.from_symbols(symbols, levels)
    assert 8 * experts.nbytes / symbols.size <= 1.03 * entropy


def test_a_ladder_takes_one_scale_of_each_row():
    rng = np.random.default_rng(0)
    scale = rng.integers(8, 16, (2, 300, 1)) * 2.0 ** rng.integers(-9, -6, (2, 300, 1))
    scale[1, 5] = 0  # a row of zeros
    ladder = np.array([-0.93, -0.4, -0.11, 0.13, 0.52, 1])
    symbols = random_symbols(0, (2, 300, 40), 0.5, 6)
    levels = np.float32(scale) * np.float32(ladder)
    compressed = CompressedExperts.from_symbols(symbols, levels)
    stored = compressed.stored()
    assert stored["level_formats"][:, 4].tolist() == [128 + 6] * 2
    assert stored["level_words"].nbytes <= 2 * (6 * 4 + 300 * 6 / 8 + 4)  # three bits of exponent, three of mantissa
    again = CompressedExperts.from_stored(stored, "gap", symbols.shape)
    np.testing.assert_array_equal(np.asarray(again.levels), np.asarray(compressed.levels))
    other = CompressedExperts.from_symbols(symbols, levels + 0.01 * np.sort(rng.random((2, 300, 6)), axis=-1))
    assert other.stored()["level_formats"][:, 4].tolist() == [6, 6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["level_words"].__setitem__(3, 0x7FC00000), "expert 0 has the ladder"),
        (lambda s: s["level_formats"].__setitem__((0, 4), 128 + 15), "level_formats: expert 0"),
        (lambda s: s["level_formats"].__setitem__((0, 4), 128), "level_formats: expert 0"),
        (lambda s: s["level_formats"].__setitem__((0, 4), 6), "level_words: found"),
        (lambda s: s["parameters"].__setitem__(0, 200), "parameters: expert 0 has 200"),
    ],
)
def test_damage_is_named(change, message):
    symbols, levels = arg_specs.rounded("gaussian", 2.0, 1, 40, 50)
    levels = levels * np.float32([1, 1.1, 1, 1, 1, 1])  # a ladder, of steps that differ
    stored = {name: np.array(a) for name, a in CompressedExperts.from_symbols(symbols, levels).stored().items()}
    change(stored)
    with pytest.raises(ValueError, match=message):
        CompressedExperts.from_stored(stored, "gap", symbols.shape)
