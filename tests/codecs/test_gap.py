"""The gap codec against a coder that takes the format's description bit by bit."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qmoe_jax.codecs import gap
from qmoe_jax.codecs.experts import CompressedExperts, concatenate
from qmoe_jax.codecs.packed_levels import pack_levels, unpack_levels

ALL_M = [*range(1, 17), 18, 20, 22, 24, 28, 32, 36, 40, 48, 56, 64]
SYMBOL_BITS = {2: {1: "0", 2: "1"}, 3: {1: "10", 2: "0", 3: "11"}}


# --- The format, one bit at a time -----------------------------------------------------------------------------------


def remainder_bits(r, m):
    b = math.ceil(math.log2(m))
    cut = 2**b - m
    value, count = (r, b - 1) if r < cut else (r + cut, b)
    return "".join(str(value >> i & 1) for i in reversed(range(count)))


def reference_encode(symbols, m, num_levels):
    """symbols [out, in] -> bits as a string, the bit at which each block of 32 rows begins."""
    stream, starts = "", []
    for first in range(0, len(symbols), 32):
        starts.append(len(stream))
        zeros = 0
        for s in symbols[first : first + 32].reshape(-1).tolist():
            if s == 0:
                zeros += 1
            else:
                stream += "1" * (zeros // m) + "0" + remainder_bits(zeros % m, m) + SYMBOL_BITS[num_levels][s]
                zeros = 0
        stream += "1" * math.ceil(zeros / m)
    return stream, starts


def reference_tokens(stream, m, num_levels):
    """The whole tokens of a string of bits: (first bit, bit after the last, weights, symbol of the last of them)."""
    remainders = {remainder_bits(r, m): r for r in range(m)}
    symbols = {bits: s for s, bits in SYMBOL_BITS[num_levels].items()}
    at = 0
    while at < len(stream):
        if stream[at] == "1":
            yield at, at + 1, m, 0
            at += 1
            continue
        first = next((i for i in range(at + 1, len(stream)) if stream[at + 1 : i] in remainders), len(stream))
        end = next((i for i in range(first, len(stream) + 1) if stream[first:i] in symbols), None)
        if end is None:
            return
        yield at, end, remainders[stream[at + 1 : first]] + 1, symbols[stream[first:end]]
        at = end


def bits_of(words):
    return "".join(str(int(w) >> i & 1) for w in words for i in range(32))


def random_symbols(seed, shape, zeros, num_levels=2):
    rng = np.random.default_rng(seed)
    return rng.choice(num_levels + 1, shape, p=[zeros] + [(1 - zeros) / num_levels] * num_levels).astype(np.uint8)


def random_levels(seed, shape, num_levels=2):
    return np.sort(np.random.default_rng(seed).standard_normal((*shape[:2], num_levels)), axis=-1)


def compress(symbols, num_levels=2):
    return CompressedExperts.from_symbols(symbols, random_levels(0, symbols.shape, num_levels), "gap")


def assert_same(a, b):
    """Two CompressedExperts, bit by bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


# Around the borders of segments (512 columns at most) and blocks (32 rows).
SHAPES = [
    (1, 1, 1),
    (2, 70, 1),
    (3, 5, 2),
    (2, 31, 37),
    (1, 65, 64),
    (3, 33, 5),
    (2, 2, 1023),
    (2, 3, 1025),
    (1, 1, 3000),
]


@st.composite
def experts(draw):
    """Symbols uint8 [experts, out, in] and the number of levels: of any density, some with long runs and empty rows."""
    shape, num_levels = draw(st.sampled_from(SHAPES)), draw(st.sampled_from([2, 3]))
    zeros = draw(st.sampled_from([0.0, 0.3, 0.885, 0.99, 0.999, 1.0]))
    symbols = random_symbols(draw(st.integers(0, 2**32 - 1)), shape, zeros, num_levels)
    first, length = (draw(st.integers(0, shape[1] * shape[2])) for _ in range(2))
    symbols[draw(st.integers(0, shape[0] - 1))].reshape(-1)[first : first + length] = draw(st.integers(0, num_levels))
    symbols[:, draw(st.integers(0, shape[1] - 1))] *= draw(st.integers(0, 1))
    return symbols, num_levels


# --- Encoding and decoding -------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(experts())
@example((np.zeros((3, 33, 5), np.uint8), 2))
@example((np.full((3, 33, 5), 3, np.uint8), 3))
@example((np.eye(65, 64, dtype=np.uint8)[None], 2))
def test_symbols_survive_the_round_trip(case):
    symbols, num_levels = case
    compressed = compress(symbols, num_levels)
    np.testing.assert_array_equal(compressed.symbols(), symbols)
    stored = compressed.stored()
    assert_same(CompressedExperts.from_stored(stored, "gap", symbols.shape), compressed)
    assert compressed.nbytes == sum(a.nbytes for a in stored.values())


@settings(max_examples=60, deadline=None)
@given(experts())
def test_streams_are_those_of_the_description(case):
    symbols, num_levels = case
    stored = compress(symbols, num_levels).stored()
    borders = np.cumsum(stored["word_counts"])
    for e, words in enumerate(np.split(stored["words"], borders[:-1])):
        stream, starts = reference_encode(symbols[e], int(stored["parameters"][e]), num_levels)
        assert bits_of(words) == stream + "0" * (-len(stream) % 32 + 32)
        assert stored["block_starts"][e].tolist() == starts


@settings(max_examples=40, deadline=None)
@given(experts())
def test_segments_point_to_the_token_of_their_first_weight(case):
    symbols, num_levels = case
    _, out, width = symbols.shape
    data = gap.encode_experts(symbols, num_levels)
    for e, matrix in enumerate(symbols):
        m = int(data["parameters"][e])
        stream, block_starts = reference_encode(matrix, m, num_levels)
        found = {}
        for block, begin in enumerate(block_starts):
            end = [*block_starts, len(stream)][block + 1]
            weight = 32 * width * block
            for at, _, weights, _ in reference_tokens(stream[begin:end], m, num_levels):
                found |= {w: (begin + at, w - weight) for w in range(weight, weight + weights)}
                weight += weights
        for row in range(out):
            for segment, column in enumerate(range(0, width, gap.segment_columns(width))):
                start, skip = found[row * width + column]
                assert (data["starts"][e, row, segment], data["skips"][e, row, segment]) == (start, skip)


@pytest.mark.parametrize("num_levels", [2, 3])
@pytest.mark.parametrize("zeros", [0.1, 0.5, 0.8, 0.885, 0.97, 0.99, 0.999])
def test_the_parameter_is_the_one_that_costs_least(zeros, num_levels):
    symbols = random_symbols(0, (1, 40, 100), zeros, num_levels)
    data = gap.encode_experts(symbols, num_levels)
    costs = {m: len(reference_encode(symbols[0], m, num_levels)[0]) for m in ALL_M}
    assert costs[int(data["parameters"][0])] == min(costs.values())
    assert data["words"].size == math.ceil(min(costs.values()) / 32) + 1


@pytest.mark.parametrize("num_levels", [2, 3])
@pytest.mark.parametrize("m", ALL_M)
def test_every_window_begins_with_the_tokens_of_the_description(m, num_levels):
    table = gap.window_table(num_levels)[ALL_M.index(m)]
    for window in range(0, 4096, 37):
        stream = "".join(str(window >> i & 1) for i in range(12))
        _, ends, weights, symbols = zip(*reference_tokens(stream, m, num_levels), strict=True)
        entry = int(table[window])
        assert (entry & 15, entry >> 4 & 127, entry >> 11 & 15) == (ends[0], weights[0], symbols[0])
        assert (entry >> 15 & 15, entry >> 19) == (ends[-1], sum(weights))


def test_chunks_of_rows_give_the_same_streams(monkeypatch):
    symbols = random_symbols(1, (2, 150, 51), zeros=0.97)
    symbols[0, 20:100] = 0
    whole = gap.encode_experts(symbols, 2)
    monkeypatch.setattr(gap, "CHUNK_WEIGHTS", 1)
    chunked = gap.encode_experts(symbols, 2)
    for name in whole:
        np.testing.assert_array_equal(chunked[name], whole[name])


def test_all_experts_at_once_equals_one_by_one():
    symbols = np.concatenate([random_symbols(i, (1, 33, 77), zeros) for i, zeros in enumerate((0.3, 0.885, 1, 0.99))])
    whole = gap.encode_experts(symbols, 2)
    assert len(set(whole["parameters"])) > 2
    parts = [gap.encode_experts(symbols[i : i + 1], 2) for i in range(4)]
    for name in whole:
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])


def test_weights_are_the_levels_of_the_symbols_of_any_expert():
    """By a traced index, of experts that were put together from groups."""
    symbols, levels = random_symbols(0, (5, 40, 70), 0.8, 3), random_levels(1, (5, 40), 3)
    groups = [slice(0, 2), slice(2, 3), slice(3, 5)]
    joined = concatenate([CompressedExperts.from_symbols(symbols[g], levels[g], "gap") for g in groups])
    assert_same(joined, CompressedExperts.from_symbols(symbols, levels, "gap"))
    by_symbol = np.pad(levels.astype(ml_dtypes.bfloat16).astype(np.float32), ((0, 0), (0, 0), (1, 0)))
    weights = np.take_along_axis(by_symbol, symbols.astype(int), axis=-1)
    order = np.array([2, 0, 4, 4, 1])
    _, found = jax.lax.scan(lambda _, e: (None, joined.expert(e)), None, order)
    np.testing.assert_array_equal(found, weights[order])
    np.testing.assert_array_equal(joined.to_dense(), weights)
    assert joined.resident_nbytes == joined.data["words"].nbytes + 5 * (4 + 40 * (4 + 1) + 1 + 40 * 3 * 2)


def test_groups_of_other_levels_are_not_joined():
    with pytest.raises(ValueError, match="differ in"):
        concatenate([compress(np.zeros((1, 2, 3), np.uint8), num_levels) for num_levels in (2, 3)])


@pytest.mark.parametrize(
    "symbols, num_levels, message",
    [
        (np.full((1, 2, 4), 3, np.uint8), 2, r"found the value 3, expected 0 \(zero\) to 2"),
        (np.zeros((1, 2, 4), np.int32), 2, "dtype int32, expected uint8"),
        (np.zeros((2, 4), np.uint8), 2, r"shape \[2, 4\], expected \[experts, out, in\]"),
        (np.zeros((1, 0, 4), np.uint8), 2, "none of them zero"),
        (np.zeros((1, 2, 4), np.uint8), 15, "15 in a row, expected 2 to 14"),
    ],
)
def test_what_is_not_symbols_is_refused(symbols, num_levels, message):
    with pytest.raises(ValueError, match=message):
        gap.encode_experts(symbols, num_levels)


# --- What is stored --------------------------------------------------------------------------------------------------


def gaussian_levels(rng, out, width):
    """Minimum and maximum of rows of normal numbers: float32 [1, out, 2]."""
    W = rng.standard_normal((out, width), np.float32)
    return np.stack([W.min(1), W.max(1)], axis=-1)[None]


def bits_per_weight(out, width, zeros):
    """Of independent trits, everything counted."""
    rng = np.random.default_rng(0)
    levels = gaussian_levels(rng, out, width)
    uniform = rng.random((1, out, width), np.float32)
    symbols = (uniform >= zeros).astype(np.uint8) + (uniform >= (1 + zeros) / 2)
    stored = CompressedExperts.from_symbols(symbols, levels, "gap").stored()
    return 8 * sum(a.nbytes for a in stored.values()) / symbols.size


@pytest.mark.parametrize(
    "out, width, limit", [(2080, 6144, 0.66), (6144, 2080, 0.66), (768, 3072, 0.69), (3072, 768, 0.69)]
)
def test_the_papers_trits_take_few_bits(out, width, limit):
    assert bits_per_weight(out, width, 0.885) <= limit


@pytest.mark.parametrize(
    "zeros", [0.5, 0.55, 0.6, 0.618, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.96, 0.97, 0.98]
)
def test_bits_are_within_five_per_cent_of_the_entropy(zeros):
    entropy = -zeros * math.log2(zeros) - (1 - zeros) * math.log2((1 - zeros) / 2)
    assert bits_per_weight(768, 3072, zeros) <= 1.05 * entropy


def finite_bfloat16():
    return st.integers(0, 2**16 - 1).filter(lambda bits: bits >> 7 & 255 != 255)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(finite_bfloat16(), min_size=18, max_size=18), min_size=1, max_size=3), st.sampled_from([2, 3]))
@example([[0] * 18, [1] * 18], 3)  # Zeros; equal levels, the least subnormal.
@example([[0x8000, 0] * 9], 2)  # Both zeros.
@example([[0x0080, 0x7F7F, 0xFF7F, 0x807F, 0x007F, 0x0001] * 3], 3)  # Extremes of all exponents.
@example([[0x3F80] * 18, [0x4000] * 18], 2)  # No mantissa, one exponent.
def test_levels_are_stored_without_loss(bits, num_levels):
    levels = np.array(bits, np.uint16).view(ml_dtypes.bfloat16).reshape(len(bits), -1, num_levels)
    order = np.argsort(levels.astype(np.float32), axis=-1, kind="stable")
    levels = np.take_along_axis(levels, order, axis=-1)
    compressed = CompressedExperts.from_symbols(np.zeros((*levels.shape[:2], 5), np.uint8), levels, "gap")
    _, found = gap.unpack(compressed.stored(), compressed.shape)
    np.testing.assert_array_equal(np.asarray(found).view(np.uint16), (levels + levels.dtype.type(0)).view(np.uint16))


def test_levels_take_the_bits_that_they_need():
    """Three exponents in two bits, one bit of mantissa; a sign only where the level's place doesn't tell it."""
    levels = np.random.default_rng(0).permuted(np.tile(np.float32([1, 1.5, 2, 3, 4, 6]), (2, 200)), axis=1)
    levels = levels.reshape(2, 600, 2) * np.float32([-1, 1])
    levels[1, 7] = 1.5, 2
    stored = CompressedExperts.from_symbols(np.zeros((2, 600, 8), np.uint8), levels, "gap").stored()
    assert stored["level_formats"].tolist() == [[127, 2, 1, 2, 2], [127, 2, 1, 1, 2]]
    assert stored["level_words"].size == math.ceil(1200 * 3 / 32) + math.ceil(1200 * 4 / 32)


def magnitudes_of_one_kind(seed, out, num_levels, unused):
    """Rising levels, most within a factor of two, bfloat16 [2, out, L]; a share of rows has none but zeros."""
    rng = np.random.default_rng(seed)
    levels = np.exp(0.3 * rng.standard_normal((2, out, num_levels))) * np.where(np.arange(num_levels) < 1, -1, 1)
    levels = np.sort(levels, axis=-1).astype(np.float32)
    levels[rng.random((2, out)) < unused] = 0
    return levels.astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("unused", [0, 0.6, 1])
@pytest.mark.parametrize("out, num_levels", [(1, 2), (300, 2), (200, 3)])
@pytest.mark.parametrize("of_mantissa", [0xFFFF, 0xFFF0])
def test_levels_that_are_alike_take_about_their_entropy(out, num_levels, unused, of_mantissa):
    levels = (magnitudes_of_one_kind(0, out, num_levels, unused).view(np.uint16) & of_mantissa).view(ml_dtypes.bfloat16)
    words, formats = pack_levels(levels)
    found = unpack_levels(words, formats, out, gap.LEVELS)
    np.testing.assert_array_equal(found.view(np.uint16), levels.view(np.uint16))
    _, counts = np.unique(levels[levels != 0].view(np.uint16) & 0x7FFF, return_counts=True)
    entropy = -(counts * np.log2(counts / counts.sum())).sum()
    assert 32 * words.size <= 1.1 * entropy + 0.2 * counts.sum() + 2 * (64 + out)


def test_garbage_for_levels_gives_numbers_or_an_error():
    rng = np.random.default_rng(0)
    words, formats = pack_levels(magnitudes_of_one_kind(0, 100, 2, 0.5))
    assert (formats[:, 3] >= 4).all()
    refused = 0
    for _ in range(300):
        bad_words, bad_formats = words.copy(), formats.copy()
        if rng.random() < 0.5:
            bad_formats[rng.integers(2), rng.integers(5)] = rng.integers(256)
        bad_words[rng.integers(0, words.size, 2)] = rng.integers(0, 2**32, 2, dtype=np.uint32)
        try:
            levels = unpack_levels(bad_words[: rng.integers(words.size + 1)], bad_formats, 100, gap.LEVELS)
            assert np.isfinite(levels.astype(np.float32)).all()
        except ValueError as e:
            assert "level_" in str(e)
            refused += 1
    assert refused > 250


# --- Damage ----------------------------------------------------------------------------------------------------------


STORED = ("words", "word_counts", "parameters", "block_starts", "level_words", "level_formats")


@functools.cache
def sound():
    return compress(np.stack([random_symbols(i, (70, 40), zeros) for i, zeros in enumerate((0.6, 0.9, 0.97))]))


def damaged(**changes):
    """The stored arrays with some replaced; a function is given the array's copy to change."""
    stored = {name: np.array(a) for name, a in sound().stored().items()}
    for name, change in changes.items():
        if callable(change):
            change(stored[name])
        else:
            stored[name] = change
    return stored


def put(*index_and_value):
    *index, value = index_and_value
    return lambda a: a.__setitem__(tuple(index), value)


def add(*index_and_value):
    *index, value = index_and_value
    return lambda a: a.__setitem__(tuple(index), a[tuple(index)] + np.array(value).astype(a.dtype))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(parameters=put(1, 0)), "parameters: expert 1 has 0"),
        (dict(parameters=put(1, 17)), "parameters: expert 1 has 17"),
        (dict(parameters=put(1, 255)), "parameters: expert 1 has 255"),
        (dict(parameters=put(1, 2)), "words: expert 1, block"),
        (dict(parameters=np.zeros(3, np.int8)), "parameters: int8"),
        (dict(block_starts=put(1, 0, 1)), "block_starts: expert 1 begins at bit 1, expected 0"),
        (dict(block_starts=add(1, 1, 1)), "expert 1, block 0 .*ends at bit .*, but the next one begins at"),
        (dict(block_starts=put(2, 2, 2**32 - 1)), "expert 2, block 1"),
        (dict(block_starts=np.zeros((3, 2), np.uint32)), r"block_starts: uint32 \[3, 2\], expected uint32 \[3, 3\]"),
        (dict(word_counts=add(0, 1)), "words: found"),
        (dict(word_counts=add([0, 1], [1, -1])), "words: expert 1, block"),
        (dict(word_counts=put(0, -5)), "word_counts: expert 0 has -5"),
        (dict(word_counts=put(0, 2**31 - 1)), "words: found"),
        (dict(words=np.zeros(0, np.uint32)), "words: found 0"),
        (dict(words=put(-1, 1)), "expert 2 ends at bit .*, but is not zero after it"),
        (dict(words=put(slice(None), 0xFFFFFFFF)), "words: expert 0, block"),
        (dict(words=put(slice(None), 0)), "words: expert 0, block"),
        (dict(level_words=np.zeros(0, np.uint32)), "level_words: found 0"),
        (dict(level_formats=put(1, 0, 254)), "level_words: expert 1, row"),
        (dict(level_formats=put(1, 4, 3)), "level_formats: expert 1 has 3 levels, expected 2"),
        (dict(level_formats=put(1, 4, 0)), "level_formats: expert 1"),
        (dict(level_formats=put(1, 1, 9)), "level_formats: expert 1"),
        (dict(level_formats=put(1, 2, 200)), "level_formats: expert 1"),
        (dict(extra=np.zeros(1)), "found arrays"),
    ],
)
def test_malformed_arrays_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        CompressedExperts.from_stored(damaged(**changes), "gap", sound().shape)


def test_arrays_that_lack_are_named():
    stored = damaged()
    del stored["level_words"]
    with pytest.raises(ValueError, match="expected .*level_words"):
        CompressedExperts.from_stored(stored, "gap", sound().shape)


@pytest.mark.parametrize("shape", [(3, 70, 41), (3, 69, 40), (3, 71, 40), (3, 70, 1), (2, 70, 40)])
def test_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="expert|expected|count"):
        CompressedExperts.from_stored(damaged(), "gap", shape)


def test_the_last_non_zero_has_to_lie_inside():
    """Three zeros and a non-zero, 0110 at m = 4, in a matrix of four weights, and of three."""
    for width in (4, 3):
        stored = compress(np.ones((1, 1, width), np.uint8)).stored()
        stored |= {"words": np.array([0b0110, 0], np.uint32), "parameters": np.array([4], np.uint8)}
        if width == 4:
            assert CompressedExperts.from_stored(stored, "gap", (1, 1, 4)).symbols().tolist() == [[[0, 0, 0, 1]]]
    with pytest.raises(ValueError, match="expert 0, block 0 .* has a non-zero beyond its end"):
        CompressedExperts.from_stored(stored, "gap", (1, 1, 3))


def test_a_word_too_many_is_refused():
    counts = sound().stored()["word_counts"]
    stored = damaged(word_counts=add(1, 1), words=np.insert(damaged()["words"], counts[0] + counts[1], 0))
    with pytest.raises(ValueError, match=f"expert 1 ends at bit .* takes {counts[1]} words, .* says {counts[1] + 1}"):
        CompressedExperts.from_stored(stored, "gap", sound().shape)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(STORED), st.data())
def test_flipped_bits_are_refused_or_mean_other_weights(name, data):
    """No crash, no hang; and what is taken for whole decodes to symbols and levels, and says so when it is packed."""
    stored = damaged()
    content = stored[name].reshape(-1).view(np.uint8)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, content.size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = CompressedExperts.from_stored(stored, "gap", sound().shape)
    except ValueError as e:
        assert "expert" in str(e) or "found" in str(e)
        return
    assert np.asarray(found.symbols()).max() <= 2
    found.validate()
    for name, array in found.stored().items():
        if not name.startswith("level"):
            np.testing.assert_array_equal(array, stored[name])


@pytest.mark.parametrize("num_levels", [2, 3])
def test_decoding_garbage_stays_within_bounds_and_ends(num_levels):
    """Nothing is promised about the symbols, but they are symbols."""
    symbols = random_symbols(0, (2, 33, 1100), 0.9, num_levels)
    compressed = compress(symbols, num_levels)
    rng = np.random.default_rng(0)
    for kind in (0, 0xFF, None):

        def garbage(a, kind=kind):
            if a.dtype == jnp.bfloat16:
                return a
            size = a.size * a.dtype.itemsize
            content = rng.integers(0, 256, size) if kind is None else np.full(size, kind)
            return jnp.asarray(content.astype(np.uint8).view(a.dtype).reshape(a.shape))

        found = jax.tree.map(garbage, compressed).symbols()
        assert found.shape == symbols.shape and np.asarray(found).max() <= num_levels


@pytest.mark.parametrize("name", ["starts", "skips"])
def test_validate_finds_offsets_that_point_elsewhere(name):
    compressed = sound()
    compressed.validate()
    data = compressed.data | {name: compressed.data[name].at[1, 40, 0].add(1)}
    with pytest.raises(ValueError, match=f"{name}: expert 1, row 40"):
        type(compressed)(data, compressed.levels, "gap", compressed.shape, compressed.bound).validate()
