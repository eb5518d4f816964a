"""The Pallas kernels: interpreted, lowered for an H200, compiled to machine code. None of it needs a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_cases import CASES, COMPILED, RUNS, WAYS, abstract_arguments, assert_equals_reference, check_compiled, example
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx import kernels, lower

from qmoe_jax.codecs import dictionary
from qmoe_jax.kernels.compressed_ragged_dot import gpu, pallas


@pytest.mark.parametrize("case, way, dtype", RUNS)
def test_interpreted_equals_the_reference(case, way, dtype):
    tokens, group_sizes, out, width = CASES[case]
    lhs, rhs, weights = example(tokens, 3, out, width)
    lhs = jnp.asarray(lhs, dtype)
    found = pallas.multiply(lhs, rhs, jnp.array(group_sizes), config=WAYS[way], interpret=True)
    assert found.dtype == dtype
    assert_equals_reference(found, lhs, weights, group_sizes)


def test_bfloat16_is_accumulated_in_float32():
    lhs, rhs, weights = example(20, 3, out=9, width=600, zeros=0.5)
    lhs = jnp.asarray(lhs, jnp.bfloat16)
    found = pallas.multiply(lhs, rhs, jnp.array([15, 0, 5]), interpret=True)
    assert_equals_reference(found, lhs, weights, [15, 0, 5])


@settings(max_examples=6, deadline=None)
@given(
    group_sizes=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    unassigned=st.integers(0, 3),
    out=st.sampled_from([1, 7, 32]),
    width=st.sampled_from([1, 2, 15, 300]),
    zeros=st.sampled_from([0.0, 0.885, 1.0]),
    many=st.booleans(),
)
def test_any_shape_and_density_with_default_block_sizes(group_sizes, unassigned, out, width, zeros, many):
    tokens = sum(group_sizes) + unassigned
    lhs, rhs, weights = example(tokens, len(group_sizes), out, width, zeros)
    config = gpu.heuristic(tokens, rhs.shape, lhs.dtype)
    config = gpu.Config(**{**vars(config), "many_tokens": 0 if many else 10_000})
    found = pallas.multiply(lhs, rhs, jnp.array(group_sizes), config=config, interpret=True)
    assert_equals_reference(found, lhs, weights, group_sizes)


def test_inside_scan_with_group_sizes_that_change():
    lhs, rhs, weights = example(6, 3, out=5, width=8)
    sizes = np.array([[6, 0, 0], [1, 2, 3], [0, 0, 0]], np.int32)
    run = jax.jit(lambda sizes: jax.lax.map(lambda s: pallas.multiply(lhs, rhs, s, interpret=True), sizes))
    for found, group_sizes in zip(run(sizes), sizes, strict=True):
        assert_equals_reference(found, lhs, weights, group_sizes)


@pytest.mark.parametrize("way", WAYS)
def test_under_shard_map_over_experts(way):
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    lhs, rhs, weights = example(8, 2, out=5, width=30)
    halves = [example_of_one(rhs, e) for e in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *halves)
    lhs, sizes = lhs.reshape(2, 4, 30), jnp.array([[3], [4]])
    P = jax.sharding.PartitionSpec

    def run(interpret):
        def local(lhs, rhs, sizes):
            rhs = jax.tree.map(lambda leaf: leaf[0], rhs)
            return pallas.multiply(lhs[0], rhs, sizes[0], config=WAYS[way], interpret=interpret)[None]

        # Interpreted, Pallas does not stand the check of what varies over which axes.
        specs = {"in_specs": P("expert"), "out_specs": P("expert"), "check_vma": not interpret}
        return jax.jit(jax.shard_map(local, mesh=mesh, **specs))

    run(interpret=False).trace(lhs, stacked, sizes)
    found = run(interpret=True)(lhs, stacked, sizes)
    for e in range(2):
        assert_equals_reference(found[e], lhs[e], weights[e : e + 1], sizes[e])


def example_of_one(rhs, expert):
    """An expert alone, its codewords padded to those of the larger one."""
    counts = np.asarray(rhs.data["row_offsets"][:, -1])
    first = int(counts[:expert].sum())
    codewords = np.zeros(counts.max(), np.uint16)
    codewords[: counts[expert]] = rhs.data["codewords"][first : first + counts[expert]]
    data = {"codewords": jnp.asarray(codewords), "row_offsets": rhs.data["row_offsets"][expert][None]}
    levels = rhs.levels[expert][None]
    return type(rhs)(data, levels, rhs.codec, (1, *rhs.shape[1:]), codewords.size)


def test_the_table_says_what_the_dictionary_says():
    words = dictionary.decode_table()
    table = gpu.table()
    for codeword in np.random.default_rng(0).integers(0, dictionary.ENTRIES, 500):
        trits = [int(words[codeword, half] >> shift) & 3 for half in (0, 1) for shift in range(4, 32, 2)]
        found = [0] * len(trits)
        for field in (table[codeword] >> np.array([0, 7, 14])) & 127:
            if field & 32:
                found[field & 31] = 2 if field & 64 else 1
        assert found == trits
        assert table[codeword] >> 27 == 2 * (words[codeword, 0] & 15)


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.integers(1, 40),
    st.sampled_from([1, 2, 8]),
)
def test_work_covers_every_assigned_token_once(group_sizes, tokens, block):
    first = jnp.arange(len(group_sizes), dtype=jnp.int32) * 100
    items = np.asarray(gpu.work(jnp.array(group_sizes), tokens, block, first))
    covered = [(token, e) for e, _, start, size, _ in items for token in range(start, start + size)]
    assert covered == list(enumerate(np.repeat(np.arange(len(group_sizes)), group_sizes)[:tokens]))
    assert items[:, 3].max(initial=0) <= block
    active = sorted({int(e) for e in items[items[:, 3] > 0, 0]})
    assert all(active[rank] == e and f == 100 * e for e, rank, _, size, f in items if size)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("tokens, shape", COMPILED.values(), ids=COMPILED.keys())
def test_compiles_for_an_h200_without_spills(tokens, shape, dtype, capsys):
    lowered = lower(pallas.multiply, *abstract_arguments(tokens, shape, dtype))
    check_compiled(kernels(lowered), capsys)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_without_a_gpu_the_named_implementation_says_so():
    lhs, rhs, _ = example(6, 3, out=5, width=8)
    with pytest.raises(NotImplementedError, match="'pallas' cannot run here: it needs a GPU; JAX's devices are 'cpu'"):
        pallas.compressed_ragged_dot(lhs, rhs, jnp.array([6, 0, 0]))
