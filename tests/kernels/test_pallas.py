"""The Pallas kernels: interpreted, lowered for an H200, compiled to machine code. None of it needs a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_cases import (
    CASES,
    CODECS,
    COMPILED,
    WAYS,
    abstract_arguments,
    assert_equals_reference,
    check_compiled,
    example,
    runs,
    with_classes,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx import kernels, lower

from qmoe_jax.codecs import dictionary, gap
from qmoe_jax.kernels.compressed_ragged_dot import gpu, pallas


@pytest.mark.parametrize("codec, case, way, dtype", runs())
def test_interpreted_equals_the_reference(codec, case, way, dtype):
    tokens, group_sizes, out, width, zeros = CASES[case]
    lhs, rhs, weights = example(tokens, 3, out, width, zeros, codec=codec)
    lhs = jnp.asarray(lhs, dtype)
    found = pallas.multiply(lhs, rhs, jnp.array(group_sizes), config=WAYS[way], interpret=True)
    assert found.dtype == dtype
    assert_equals_reference(found, lhs, weights, group_sizes)


@pytest.mark.parametrize("way", list(WAYS)[:2])
def test_columns_in_classes(way):
    lhs, rhs, weights = with_classes(12, 2, out=9, width=1600, classes=2)
    found = pallas.multiply(lhs, rhs, jnp.array([1, 10]), config=WAYS[way], interpret=True)
    assert_equals_reference(found, lhs, weights, [1, 10])


@pytest.mark.parametrize("codec", CODECS)
def test_bfloat16_is_accumulated_in_float32(codec):
    lhs, rhs, weights = example(20, 3, out=9, width=600, zeros=0.5, codec=codec)
    lhs = jnp.asarray(lhs, jnp.bfloat16)
    found = pallas.multiply(lhs, rhs, jnp.array([15, 0, 5]), interpret=True)
    assert_equals_reference(found, lhs, weights, [15, 0, 5])


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=6, deadline=None)
@given(
    group_sizes=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    unassigned=st.integers(0, 3),
    out=st.sampled_from([1, 7, 32]),
    width=st.sampled_from([1, 2, 15, 1300]),
    zeros=st.sampled_from([0.0, 0.885, 1.0]),
    many=st.booleans(),
)
@pytest.mark.long
def test_any_shape_and_density_with_default_block_sizes(codec, group_sizes, unassigned, out, width, zeros, many):
    tokens = sum(group_sizes) + unassigned
    lhs, rhs, weights = example(tokens, len(group_sizes), out, width, zeros, codec=codec)
    config = gpu.CODECS[rhs.codec].heuristic(tokens, rhs.shape, lhs.dtype)
    config = gpu.Config(**{**vars(config), "many_tokens": 0 if many else 10_000})
    found = pallas.multiply(lhs, rhs, jnp.array(group_sizes), config=config, interpret=True)
    assert_equals_reference(found, lhs, weights, group_sizes)


@pytest.mark.parametrize("codec", ["dictionary", "gap"])
def test_inside_scan_with_group_sizes_that_change(codec):
    lhs, rhs, weights = example(6, 3, out=5, width=8, codec=codec)
    sizes = np.array([[6, 0, 0], [1, 2, 3], [0, 0, 0]], np.int32)
    run = jax.jit(lambda sizes: jax.lax.map(lambda s: pallas.multiply(lhs, rhs, s, interpret=True), sizes))
    for found, group_sizes in zip(run(sizes), sizes, strict=True):
        assert_equals_reference(found, lhs, weights, group_sizes)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("codec", ["dictionary", "gap"])
@pytest.mark.long
def test_under_shard_map_over_experts(codec, way):
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    lhs, experts, weights = zip(*(example(4, 1, out=5, width=30, seed=e, codec=codec) for e in range(2)), strict=True)
    bound = max(rhs.bound for rhs in experts)
    stacked = jax.tree.map(stack_padded, *(dataclasses.replace(rhs, bound=bound) for rhs in experts))
    sizes = jnp.array([[3], [4]])
    P = jax.sharding.PartitionSpec

    def run(interpret):
        def local(lhs, rhs, sizes):
            rhs = jax.tree.map(lambda leaf: leaf[0], rhs)
            return pallas.multiply(lhs[0], rhs, sizes[0], config=WAYS[way], interpret=interpret)[None]

        # Interpreted, Pallas does not stand the check of what varies over which axes.
        specs = {"in_specs": P("expert"), "out_specs": P("expert"), "check_vma": not interpret}
        return jax.jit(jax.shard_map(local, mesh=mesh, **specs))

    run(interpret=False).trace(np.stack(lhs), stacked, sizes)
    found = run(interpret=True)(np.stack(lhs), stacked, sizes)
    for e in range(2):
        assert_equals_reference(found[e], lhs[e], weights[e], sizes[e])


def stack_padded(*arrays):
    """Arrays, of one shape but for streams, which differ in length: [len(arrays), ...]."""
    longest = max(a.shape[0] for a in arrays)
    return jnp.stack([jnp.pad(a, [(0, longest - a.shape[0])] + [(0, 0)] * (a.ndim - 1)) for a in arrays])


def test_the_table_says_what_the_dictionary_says():
    words = dictionary.decode_table()
    table = gpu.dictionary.table()
    for codeword in np.random.default_rng(0).integers(0, dictionary.ENTRIES, 500):
        trits = [int(words[codeword, half] >> shift) & 3 for half in (0, 1) for shift in range(4, 32, 2)]
        found = [0] * len(trits)
        for field in (table[codeword] >> np.array([0, 7, 14])) & 127:
            if field & 32:
                found[field & 31] = 2 if field & 64 else 1
        assert found == trits
        assert table[codeword] >> 27 == 2 * (words[codeword, 0] & 15)


@pytest.mark.parametrize("num_levels", [2, 3])
def test_the_table_of_gap_says_what_its_tokens_say(num_levels):
    table = gpu.gap.table(num_levels)
    for window in np.random.default_rng(0).integers(0, 1 << gap.WINDOW, 60):
        for entry, m in zip(table[:, window].tolist(), gap.PARAMETERS, strict=True):
            bits = format(window, f"0{gap.WINDOW}b")[::-1]
            weights = tokens(bits[: entry & 31], m, num_levels)
            assert weights and entry >> 25 == len(weights)
            nonzeros = [(place, symbol) for place, symbol in enumerate(weights) if symbol]
            first, second = (entry >> shift & 15 for shift in gpu.gap.LEVEL_SHIFTS)
            found = [] if entry >> gpu.gap.PLACE_SHIFT & 2**15 else [(entry >> gpu.gap.PLACE_SHIFT & 127, first + 1)]
            found += [] if entry & gpu.gap.NO_SECOND else [(len(weights) - 1, second + 1)]
            assert found == nonzeros


def tokens(bits, m, num_levels):
    """The weights' symbols of whole tokens of the codec `gap`, read bit by bit."""
    weights, position = [], 0

    def bit():
        nonlocal position
        position += 1
        return int(bits[position - 1])

    while position < len(bits):
        if bit():
            weights += [0] * m
            continue
        b = max(0, m - 1).bit_length()
        cut = 2**b - m
        remainder = 0
        for _ in range(b - 1):
            remainder = 2 * remainder + bit()
        if b and remainder >= cut:
            remainder = 2 * remainder + bit() - cut
        symbol = 1 + bit() if num_levels == 2 else 2 if not bit() else 1 + 2 * bit()
        weights += [0] * remainder + [symbol]
    return weights


@pytest.mark.parametrize("way", WAYS)
def test_arrays_of_any_content_end_and_stay_in_bounds(way):
    rng = np.random.default_rng(0)
    lhs, rhs, _ = example(14, 3, out=10, width=1100, codec="gap")
    data = {}
    for name, array in rhs.data.items():
        limits = np.iinfo(array.dtype)
        data[name] = jnp.asarray(rng.integers(limits.min, limits.max, array.shape, array.dtype, endpoint=True))
    rhs = type(rhs)(data, rhs.levels, rhs.codec, rhs.shape, rhs.bound)
    sizes = jnp.array([1, 3, 10])
    found = np.asarray(pallas.multiply(lhs, rhs, sizes, config=WAYS[way], interpret=True))
    assert np.isfinite(found).all()


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.integers(1, 40),
    st.sampled_from([1, 2, 8]),
)
@pytest.mark.long
def test_work_covers_every_assigned_token_once(group_sizes, tokens, block):
    streams = jnp.arange(len(group_sizes), dtype=jnp.int32)[:, None] * jnp.array([100, 1])
    items = np.asarray(gpu.work(jnp.array(group_sizes), tokens, block, streams))
    covered = [(token, e) for e, _, start, size, _, _ in items for token in range(start, start + size)]
    assert covered == list(enumerate(np.repeat(np.arange(len(group_sizes)), group_sizes)[:tokens]))
    assert items[:, 3].max(initial=0) <= block
    active = sorted({int(e) for e in items[items[:, 3] > 0, 0]})
    assert all(active[rank] == e and f == 100 * e and t == e for e, rank, _, size, f, t in items if size)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("tokens, shape", COMPILED.values(), ids=COMPILED.keys())
@pytest.mark.parametrize("codec", CODECS)
def test_compiles_for_an_h200_without_spills(codec, tokens, shape, dtype, capsys):
    lowered = lower(pallas.multiply, *abstract_arguments(tokens, shape, dtype, codec))
    check_compiled(kernels(lowered), codec, capsys)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_without_a_gpu_the_named_implementation_says_so():
    lhs, rhs, _ = example(6, 3, out=5, width=8)
    with pytest.raises(NotImplementedError, match="'pallas' cannot run here: it needs a GPU; JAX's devices are 'cpu'"):
        pallas.compressed_ragged_dot(lhs, rhs, jnp.array([6, 0, 0]))
