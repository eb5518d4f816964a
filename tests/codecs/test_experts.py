"""CompressedExperts: a pytree of compressed matrices, equal to levels[trits]."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_jax import codecs
from qmoe_jax.codecs.experts import CompressedExperts, concatenate, split


def example(experts=3, out=8, width=22, zeros=0.8, seed=0):
    """trits uint8 [experts, out, in], levels float32 [experts, out, 2] and the weights they mean, float32."""
    rng = np.random.default_rng(seed)
    p = [zeros, (1 - zeros) / 2, (1 - zeros) / 2]
    trits = rng.choice(3, (experts, out, width), p=p).astype(np.uint8)
    levels = (rng.uniform(0.1, 1, (experts, out, 2)) * [-1, 1]).astype(np.float32)
    stored = levels.astype(ml_dtypes.bfloat16).astype(np.float32)
    weights = np.zeros(trits.shape, np.float32)
    for trit in (1, 2):
        weights = np.where(trits == trit, stored[:, :, trit - 1, None], weights)
    return trits, levels, weights


@settings(max_examples=6, deadline=None)  # Each compiles for itself.
@given(
    st.integers(1, 4),
    st.integers(1, 9),
    st.sampled_from([1, 2, 3, 31, 64]),
    st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    st.integers(0, 99),
)
def test_dense_weights_are_the_levels_of_the_trits(experts, out, width, zeros, seed):
    trits, levels, weights = example(experts, out, width, zeros, seed)
    compressed = CompressedExperts.from_symbols(trits, levels, codec="dictionary")
    np.testing.assert_array_equal(compressed.to_dense(), weights)
    np.testing.assert_array_equal(compressed.symbols(), trits)
    np.testing.assert_array_equal(compressed.expert(experts - 1), weights[-1])


def test_experts_of_unequal_rates_are_told_apart():
    trits, levels, weights = example(experts=4, out=16, width=100)
    trits[0] = weights[0] = 0
    trits[3] = weights[3] = 0
    compressed = CompressedExperts.from_symbols(trits, levels, codec="dictionary")
    for expert in range(4):
        np.testing.assert_array_equal(compressed.expert(expert), weights[expert])


def test_published_edge_rows_decode_to_their_weights(fixture_path):
    golden = np.load(fixture_path("ista_edge_rows.npz"))
    for name, width in (("w64", 64), ("w33", 33), ("four_values", 8)):
        levels = golden[f"{name}_ter_minmax_bf16_bits"].view(ml_dtypes.bfloat16).reshape(1, -1, 2)
        stored = {
            "codewords": golden[f"{name}_w_comp"].view(np.uint16),
            "row_offsets": golden[f"{name}_row_off"][None],
            "levels": levels,
        }
        compressed = CompressedExperts.from_stored(stored, "dictionary", (1, levels.shape[1], width))
        expected = golden[f"{name}_decoded_bf16_bits"].view(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(compressed.expert(0), expected)


def test_nbytes_counts_codewords_offsets_and_levels():
    trits, levels, _ = example(experts=3, out=8, width=22)
    n = sum(codecs.get("dictionary").encode(matrix)[0].size for matrix in trits)
    assert (
        CompressedExperts.from_symbols(trits, levels, codec="dictionary").nbytes
        == 2 * n + 4 * 3 * (8 + 1) + 2 * 3 * 8 * 2
    )


def test_concatenated_groups_equal_the_whole():
    trits, levels, weights = example(experts=5)
    whole = CompressedExperts.from_symbols(trits, levels, codec="dictionary")
    groups = [slice(0, 2), slice(2, 3), slice(3, 5)]
    joined = concatenate([CompressedExperts.from_symbols(trits[g], levels[g], codec="dictionary") for g in groups])
    assert jax.tree.structure(joined) == jax.tree.structure(whole)
    jax.tree.map(np.testing.assert_array_equal, joined, whole)
    np.testing.assert_array_equal(joined.to_dense(), weights)


@pytest.mark.parametrize("codec", codecs.CODECS)
def test_split_parts_hold_their_experts_and_join_to_the_whole(codec):
    trits, levels, weights = example(experts=6, out=40)
    trits[2] = weights[2] = 0  # Streams differ in length.
    whole = CompressedExperts.from_symbols(trits, levels, codec)
    parts = split(whole, 3)
    for i, part in enumerate(parts):
        np.testing.assert_array_equal(part.to_dense(), weights[2 * i : 2 * i + 2])
        part.validate()
    jax.tree.map(np.testing.assert_array_equal, concatenate(parts), whole)
    with pytest.raises(ValueError, match="6 experts can't be split into 4"):
        split(whole, 4)


def test_groups_of_other_width_are_not_joined():
    parts = [CompressedExperts.from_symbols(*example(width=w)[:2], codec="dictionary") for w in (8, 10)]
    with pytest.raises(ValueError, match="differ in"):
        concatenate(parts)


def test_is_a_pytree_that_goes_through_jit():
    trits, levels, weights = example()
    compressed = CompressedExperts.from_symbols(trits, levels, codec="dictionary")
    leaves, structure = jax.tree.flatten(compressed)
    assert sorted(str(leaf.dtype) for leaf in leaves) == ["bfloat16", "int32", "uint16"]
    np.testing.assert_array_equal(jax.tree.unflatten(structure, leaves).to_dense(), weights)

    doubled = jax.jit(lambda c: jax.tree.map(lambda a: a * 2 if a.dtype == jnp.bfloat16 else a, c))(compressed)
    np.testing.assert_array_equal(doubled.to_dense(), 2 * weights)
    np.testing.assert_array_equal(jax.jit(lambda c: c.to_dense().sum(0))(compressed), weights.sum(0))


def test_one_expert_by_traced_index_in_a_scan():
    trits, levels, weights = example(experts=4)
    compressed = CompressedExperts.from_symbols(trits, levels, codec="dictionary")
    order = jnp.array([2, 0, 3, 3, 1])
    _, found = jax.lax.scan(lambda _, e: (None, compressed.expert(e)), None, order)
    np.testing.assert_array_equal(found, weights[np.array(order)])


@pytest.mark.parametrize("codec", codecs.CODECS)
def test_experts_that_there_are_not_are_refused(codec):
    """Concrete indices are NumPy's; traced ones can't be looked at, and are clamped."""
    trits, levels, weights = example()
    compressed = CompressedExperts.from_symbols(trits, levels, codec=codec)
    experts = len(trits)
    np.testing.assert_array_equal(compressed.expert(-1), weights[-1])
    np.testing.assert_array_equal(compressed.expert(np.int64(1)), weights[1])
    for index in (experts, 99, -experts - 1):
        with pytest.raises(IndexError, match=f"expert {index}: there are {experts}"):
            compressed.expert(index)
    for index in (1.0, None, "1", [0, 1]):
        with pytest.raises(TypeError):
            compressed.expert(index)
    for start, stop in ((-2, 4), (0, experts + 1), (2, 2), (2, 1), (-2, -1)):
        with pytest.raises(IndexError, match="expected a range within"):
            compressed.take(start, stop)
    with pytest.raises(TypeError):
        compressed.take(0.0, 2)
    traced = jax.jit(lambda c, e: c.expert(e))
    np.testing.assert_array_equal(traced(compressed, 99), weights[-1])
    np.testing.assert_array_equal(traced(compressed, -5), weights[0])


@pytest.mark.parametrize("codec", codecs.CODECS)
def test_stored_levels_that_no_trained_model_has_are_refused(codec):
    trits, levels, _ = example()
    levels[1, 5, 1] = 3e38
    stored = CompressedExperts.from_symbols(trits, levels, codec=codec).stored()
    with pytest.raises(ValueError, match="levels: expert 1, row 5 has .*3.*e.38.*expected at most 10000"):
        CompressedExperts.from_stored(stored, codec, trits.shape)


def test_unknown_codec_is_refused_with_the_known_ones():
    trits, levels, _ = example()
    with pytest.raises(ValueError, match="'zip'. Known codecs: .*dictionary"):
        CompressedExperts.from_symbols(trits, levels, codec="zip")


@pytest.mark.parametrize("bad", [(np.nan, 1.0), (-1.0, np.inf), (1.0, -1.0)])
def test_bad_levels_are_refused_with_expert_and_row(bad):
    trits, levels, _ = example()
    levels[1, 5] = bad
    with pytest.raises(ValueError, match="levels: expert 1, row 5"):
        CompressedExperts.from_symbols(trits, levels, codec="dictionary")


def test_three_levels_are_refused_by_the_dictionary():
    trits, levels, _ = example()
    with pytest.raises(ValueError, match="3 in a row, .* Codec gap"):
        CompressedExperts.from_symbols(trits, np.append(levels, levels[..., 1:], axis=-1), codec="dictionary")


def test_levels_of_another_shape_are_refused():
    trits, levels, _ = example()
    with pytest.raises(ValueError, match=r"levels: shape \[3, 7, 2\], expected \[3, 8, 2\]"):
        CompressedExperts.from_symbols(trits, levels[:, 1:], codec="dictionary")


def corrupt_codeword(data):
    """Another sequence, longer or shorter, at the start of expert 1, row 4."""
    i = data["row_offsets"][0, -1] + data["row_offsets"][1, 4]
    data["codewords"][i] = 25 if data["codewords"][i] != 25 else 0


def swap_offsets(data):
    data["row_offsets"][1, 4:6] = data["row_offsets"][1, 4:6][::-1].copy()


def shift_offset(data):
    """Row 4 of expert 1 takes a codeword of row 5."""
    data["row_offsets"][1, 5] += 1


def late_start(data):
    data["row_offsets"][1, 0] = 1


def drop_codeword(data):
    data["codewords"] = data["codewords"][:-1]


def negative_offset(data):
    data["row_offsets"][1, 5] = -(2**31)


def wide_codewords(data):
    data["codewords"] = data["codewords"].astype(np.int32)


def drop_row(data):
    data["row_offsets"] = data["row_offsets"][:, 1:]


def no_offsets(data):
    del data["row_offsets"]


@pytest.mark.parametrize(
    "damage, message",
    [
        (corrupt_codeword, "expert 1, row 4 holds"),
        (swap_offsets, "expert 1, row 4 goes"),
        (shift_offset, "expert 1, row 4 holds"),
        (negative_offset, "expert 1, row 4 goes"),
        (late_start, "expert 1 begins at 1"),
        (drop_codeword, "row_offsets count"),
        (wide_codewords, "expected uint16"),
        (drop_row, r"expected int32 \[3, 9\]"),
        (no_offsets, "found arrays"),
    ],
)
def test_malformed_streams_are_refused_by_name(damage, message):
    trits, levels, _ = example(zeros=0.5)
    compressed = CompressedExperts.from_symbols(trits, levels, codec="dictionary")
    stored = {name: np.array(array) for name, array in compressed.stored().items()}
    damage(stored)
    with pytest.raises(ValueError, match=message):
        CompressedExperts.from_stored(stored, "dictionary", compressed.shape)


def test_validate_finds_what_changed_after_construction():
    trits, levels, _ = example()
    compressed = CompressedExperts.from_symbols(trits, levels, codec="dictionary")
    compressed.validate()
    with pytest.raises(ValueError, match="expert 0, row"):
        jax.tree.map(lambda a: a + 1 if a.dtype == jnp.uint16 else a, compressed).validate()


def test_decoding_garbage_stays_within_bounds():
    """Nothing is promised about the weights, but they come from the arrays that were given."""
    trits, levels, _ = example(experts=2, out=8, width=40)
    compressed = CompressedExperts.from_symbols(trits, levels, codec="dictionary")
    rng = np.random.default_rng(0)

    def garbage(a):
        return a if a.dtype == jnp.bfloat16 else jnp.asarray(rng.integers(0, 2**16, a.shape), a.dtype)

    known = np.append(0, np.asarray(compressed.levels, np.float32))
    assert np.isin(jax.tree.map(garbage, compressed).to_dense(), known).all()
