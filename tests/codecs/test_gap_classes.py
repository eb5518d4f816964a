"""Codec gap with columns in classes."""

import jax.numpy as jnp
import numpy as np
import pytest

from qmoe_jax.codecs import gap
from qmoe_jax.codecs.experts import CompressedExperts, concatenate, convert


def ever_sparser(shape, num_levels=2, seed=0):
    """Symbols uint8 of `shape`, from one in three zeros in the first column to nearly all in the last."""
    rng = np.random.default_rng(seed)
    zero = rng.random(shape) < np.linspace(1 / 3, 0.99, shape[2])
    return np.where(zero, 0, rng.integers(1, num_levels + 1, shape)).astype(np.uint8)


def compress(symbols, classes, num_levels=2):
    levels = np.tile(np.arange(num_levels) - 0.5, (*symbols.shape[:2], 1))
    return CompressedExperts.from_symbols(symbols, levels, classes=classes)


@pytest.mark.parametrize("num_levels", [2, 3, 7])
@pytest.mark.parametrize("classes, shape", [(4, (3, 130, 64)), (2, (2, 40, 1600)), (3, (1, 200, 48)), (4, (2, 1, 128))])
def test_symbols_come_back_resident_and_stored(classes, shape, num_levels):
    symbols = ever_sparser(shape, num_levels)
    compressed = compress(symbols, classes, num_levels)
    np.testing.assert_array_equal(compressed.symbols(), symbols)
    stored = compressed.stored()
    assert compressed.nbytes == sum(a.nbytes for a in stored.values())
    loaded = CompressedExperts.from_stored(stored, "gap", shape)
    np.testing.assert_array_equal(loaded.symbols(), symbols)
    for name, array in compressed.data.items():
        np.testing.assert_array_equal(loaded.data[name], array)
    loaded.validate()


def test_each_class_costs_what_it_would_alone():
    symbols = ever_sparser((2, 128, 256))
    together = compress(symbols, 4)
    alone = [compress(part, 1) for part in np.split(symbols, 4, axis=2)]
    np.testing.assert_array_equal(together.data["parameters"].T, [part.data["parameters"] for part in alone])
    for e in range(2):
        # Runs end with blocks, of which a part by itself has four.
        bits = sum(32 * int(part.data["word_counts"][e]) for part in alone)
        assert 32 * int(together.data["word_counts"][e]) <= bits
    assert compress(symbols, 1).nbytes > 1.1 * together.nbytes
    assert together.stored()["block_starts"].nbytes == compress(symbols, 1).stored()["block_starts"].nbytes


def test_experts_are_taken_joined_and_converted_as_others_are():
    symbols = ever_sparser((4, 70, 128))
    whole = compress(symbols, 4)
    for again in (concatenate([whole.take(0, 1), whole.take(1, 4)]), convert(whole, "gap", experts_per_group=3)):
        for name, array in whole.data.items():
            np.testing.assert_array_equal(again.data[name], array)
    np.testing.assert_array_equal(convert(whole, "dictionary").symbols(), symbols)
    with pytest.raises(ValueError, match="differ in .*classes"):
        concatenate([whole, compress(symbols, 1)])


@pytest.mark.parametrize("columns, classes", [(37, 4), (2880, 4), (64, 0), (16, 2)])
def test_columns_that_cannot_be_in_so_many_classes(columns, classes):
    assert not (classes > 0 and gap.may_have_classes(columns, classes))
    with pytest.raises(ValueError, match=f"classes: {columns} columns"):
        compress(np.zeros((1, 3, columns), np.uint8), classes)


def test_the_dictionary_has_no_classes():
    with pytest.raises(ValueError, match="codec 'dictionary' has none"):
        CompressedExperts.from_symbols(np.zeros((1, 2, 64), np.uint8), np.zeros((1, 2, 2)), "dictionary", classes=4)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(parameters=(1, 2, 17)), "parameters: expert 1 has"),
        (dict(parameters=(0, 3, 1)), "words: expert 0, class"),
        (dict(block_starts=(1, 2, 5)), "words: expert 1, class 0, block 1 .from row 128 on. ends at bit"),
        (dict(words=(3, 0xFFFFFFFF)), "words: expert 0, class 0, block 0"),
    ],
)
def test_damage_is_named(change, message):
    stored = {name: np.array(a) for name, a in compress(ever_sparser((2, 140, 64)), 4).stored().items()}
    for name, (*where, value) in change.items():
        stored[name][tuple(where)] = value
    with pytest.raises(ValueError, match=message):
        CompressedExperts.from_stored(stored, "gap", (2, 140, 64))


def test_classes_that_do_not_fit_the_columns_are_refused():
    stored = compress(ever_sparser((2, 140, 64)), 4).stored() | {"parameters": np.ones((2, 3), np.uint8)}
    with pytest.raises(ValueError, match="parameters: 3 classes"):
        CompressedExperts.from_stored(stored, "gap", (2, 140, 64))


def test_garbage_decodes_to_something():
    rng = np.random.default_rng(0)
    whole = compress(ever_sparser((2, 70, 128)), 4)
    data = {
        name: jnp.asarray(rng.integers(np.iinfo(a.dtype).min, np.iinfo(a.dtype).max, a.shape, a.dtype, endpoint=True))
        for name, a in whole.data.items()
    }
    garbage = CompressedExperts(data, whole.levels, "gap", whole.shape, whole.bound)
    assert garbage.symbols().shape == whole.shape
