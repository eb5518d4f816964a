"""Every implementation of compressed_ragged_dot, against float64 NumPy."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from qmoe_jax import codecs
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels import compressed_ragged_dot, ragged_dot
from qmoe_jax.kernels.compressed_ragged_dot import arg_specs, cpu
from qmoe_jax.kernels.compressed_ragged_dot.api import IMPLEMENTATIONS

CASES = {
    "even": (6, [2, 2, 2]),
    "zeros": (5, [0, 5, 0]),
    "first expert only": (40, [40, 0, 0]),
    "last expert only": (40, [0, 0, 40]),
    "tokens without expert": (9, [2, 0, 3]),
    "no token assigned": (4, [0, 0, 0]),
    "no tokens": (0, [0, 0, 0]),
    "more than a block": (700, [1, 390, 309]),
    "one token": (1, [0, 1, 0]),
}


# Codec and number of levels.
TERNARY = ("dictionary", 2)
KINDS = {"dictionary": TERNARY, "gap": ("gap", 2), "gap of 3 levels": ("gap", 3), "nibbles": ("nibbles", 3)}


@pytest.fixture(
    params=[k if k != ("gap", 3) else pytest.param(k, marks=pytest.mark.long) for k in KINDS.values()], ids=KINDS.keys()
)
def kind(request):
    return request.param


def example(kind, tokens, experts, out, width, zeros=0.8, seed=0):
    """lhs float32 [tokens, in], the compressed experts, and their weights, float32 [experts, out, in]."""
    codec, L = kind
    rng = np.random.default_rng(seed)
    symbols = rng.choice(L + 1, (experts, out, width), p=[zeros, *[(1 - zeros) / L] * L]).astype(np.uint8)
    levels = np.sort(rng.integers(-127, 128, (experts, out, L)) / 64)  # exact in bfloat16
    weights = np.take_along_axis(np.insert(levels, 0, 0, axis=-1), symbols.astype(int), axis=-1)
    lhs = rng.standard_normal((tokens, width)).astype(np.float32)
    return lhs, CompressedExperts.from_symbols(symbols, levels, codec), weights.astype(np.float32)


def reference(lhs, weights, group_sizes):
    """float64 [tokens, out]."""
    expert = np.repeat(np.arange(len(group_sizes)), group_sizes)
    out = np.zeros((lhs.shape[0], weights.shape[1]))
    for token, e in enumerate(expert):
        out[token] = weights[e].astype(np.float64) @ np.asarray(lhs[token], np.float64)
    return out


# None, all names, and the C++ code for each instruction set.
@pytest.fixture(params=["default", *IMPLEMENTATIONS, *(f"cpu with {isa}" for isa in cpu.ISAS)])
def implementation(request, monkeypatch, kind):
    name, _, isa = request.param.partition(" with ")
    if isa:
        monkeypatch.setenv("QMOE_JAX_ISA", isa)
    lhs, rhs, _ = example(kind, 1, 1, out=1, width=1)
    name = None if name == "default" else name
    try:
        compressed_ragged_dot(lhs, rhs, jnp.array([1]), implementation=name)
    except NotImplementedError as e:
        pytest.skip(str(e))
    return name


@pytest.fixture
def needs_cpu(kind):
    _, rhs, _ = example(kind, 1, 1, out=1, width=1)
    if reason := cpu.why_not(rhs):
        pytest.skip(reason)


@pytest.mark.parametrize("tokens, group_sizes", CASES.values(), ids=CASES.keys())
def test_equals_the_reference(kind, implementation, tokens, group_sizes):
    lhs, rhs, weights = example(kind, tokens, 3, out=10, width=37)
    found = compressed_ragged_dot(lhs, rhs, jnp.array(group_sizes), implementation=implementation)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, reference(lhs, weights, group_sizes), rtol=1e-5, atol=1e-4)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    group_sizes=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    unassigned=st.integers(0, 5),
    out=st.sampled_from([1, 2, 7, 32]),
    width=st.sampled_from([1, 2, 15, 31, 64, 97]),
    zeros=st.sampled_from([0.0, 0.885, 1.0]),
)
@pytest.mark.long
def test_any_shape_and_density(kind, implementation, group_sizes, unassigned, out, width, zeros):
    lhs, rhs, weights = example(kind, sum(group_sizes) + unassigned, len(group_sizes), out, width, zeros)
    found = compressed_ragged_dot(lhs, rhs, jnp.array(group_sizes), implementation=implementation)
    np.testing.assert_allclose(found, reference(lhs, weights, group_sizes), rtol=1e-5, atol=1e-4)


# From the densest to the sparsest codes; a row has more than a segment of the gap codec, a matrix more than two blocks.
@pytest.mark.parametrize("zeros", [0.1, 0.885, 0.95, 0.98, 0.9995])
def test_many_rows_and_columns(kind, implementation, zeros):
    lhs, rhs, weights = example(kind, 8, 2, out=75, width=1100, zeros=zeros)
    found = compressed_ragged_dot(lhs, rhs, jnp.array([1, 7]), implementation=implementation)
    np.testing.assert_allclose(found, reference(lhs, weights, [1, 7]), rtol=1e-5, atol=1e-3)


def test_bfloat16_is_accumulated_in_float32(kind, implementation):
    lhs, rhs, weights = example(kind, 20, 3, out=9, width=600, zeros=0.5)
    lhs = jnp.asarray(lhs, jnp.bfloat16)
    group_sizes = [15, 0, 5]
    found = compressed_ragged_dot(lhs, rhs, jnp.array(group_sizes), implementation=implementation)
    assert found.dtype == jnp.bfloat16
    expected = reference(np.asarray(lhs, np.float32), weights, group_sizes)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-8, atol=1e-3)


def test_agrees_with_the_dense_product_to_float_precision(kind, implementation):
    lhs, rhs, _ = example(kind, 50, 4, out=24, width=50)
    group_sizes = jnp.array([20, 0, 3, 25])
    found = compressed_ragged_dot(lhs, rhs, group_sizes, implementation=implementation)
    dense = ragged_dot(lhs, rhs.to_dense().swapaxes(1, 2), group_sizes)
    np.testing.assert_allclose(found, dense, rtol=1e-6, atol=1e-5)


def test_inside_jit_and_scan(kind, implementation):
    lhs, rhs, weights = example(kind, 6, 3, out=5, width=8)
    sizes = np.array([[6, 0, 0], [1, 2, 3], [0, 0, 0]], np.int32)

    @jax.jit
    def run(rhs, sizes):
        def step(_, group_sizes):
            return None, compressed_ragged_dot(lhs, rhs, group_sizes, implementation=implementation)

        return jax.lax.scan(step, None, sizes)[1]

    expected = np.stack([reference(lhs, weights, s) for s in sizes])
    np.testing.assert_allclose(run(rhs, sizes), expected, rtol=1e-5, atol=1e-5)


def test_inside_while_loop(kind, implementation):
    lhs, rhs, weights = example(kind, 4, 2, out=6, width=6)
    group_sizes = jnp.array([1, 3])

    @jax.jit
    def twice(x):
        def step(state):
            i, x = state
            return i + 1, compressed_ragged_dot(x, rhs, group_sizes, implementation=implementation)

        return jax.lax.while_loop(lambda state: state[0] < 2, step, (0, x))[1]

    expected = reference(reference(lhs, weights, [1, 3]), weights, [1, 3])
    np.testing.assert_allclose(twice(lhs), expected, rtol=1e-5, atol=1e-4)


def test_under_shard_map_each_device_has_experts_of_its_own(kind, implementation):
    devices, experts, tokens = 4, 2, 6
    mesh = jax.make_mesh((devices,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    examples = [example(kind, tokens, experts, out=9, width=33, seed=i) for i in range(devices)]
    lhs = np.concatenate([lhs for lhs, _, _ in examples])
    group_sizes = np.array([[tokens, 0], [2, 3], [0, 0], [1, 5]], np.int32)
    # Streams differ in length: what is appended to make them equal is no one's.
    stream = {"dictionary": "codewords", "gap": "words", "nibbles": "nibbles"}[kind[0]]
    longest = max(len(rhs.data[stream]) for _, rhs, _ in examples)
    parts = [
        dataclasses.replace(
            rhs,
            data={**rhs.data, stream: jnp.resize(rhs.data[stream], (longest, *rhs.data[stream].shape[1:]))},
            bound=max(rhs.bound for _, rhs, _ in examples),
        )
        for _, rhs, _ in examples
    ]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *parts)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    def run(lhs, rhs, group_sizes):
        own = jax.tree.map(lambda a: a[0], rhs)
        return compressed_ragged_dot(lhs, own, group_sizes[0], implementation=implementation)

    expected = [reference(lhs, w, s) for (lhs, _, w), s in zip(examples, group_sizes, strict=True)]
    np.testing.assert_allclose(run(lhs, stacked, group_sizes), np.concatenate(expected), rtol=1e-5, atol=1e-4)


def test_more_tokens_promised_than_there_are_is_cut_off(kind, implementation):
    lhs, rhs, weights = example(kind, 10, 3, out=6, width=20)
    found = compressed_ragged_dot(lhs, rhs, jnp.array([4, 50, 3]), implementation=implementation)
    np.testing.assert_allclose(found, reference(lhs, weights, [4, 6, 0]), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("codec", codecs.CODECS)
@pytest.mark.parametrize("out, width", arg_specs.SHAPES)
def test_default_at_the_published_shapes(out, width, codec):
    rng = np.random.default_rng(0)
    trits = arg_specs.random_trits(1, out, width)
    rhs = CompressedExperts.from_symbols(trits, np.tile([-1.5, 2.0], (1, out, 1)), codec)
    lhs = rng.standard_normal((11, width)).astype(np.float32)
    found = compressed_ragged_dot(lhs, rhs, jnp.array([11]))
    expected = lhs.astype(np.float64) @ np.array([0, -1.5, 2.0])[trits[0]].T
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize(
    ("promised", "kept"),
    [
        ([-7, 4, -(2**31)], [0, 4, 0]),
        ([3, 2**31 - 1, 2**31 - 1], [3, 7, 0]),  # The sum is beyond int32.
        ([2**31 - 1, 1, 2], [10, 0, 0]),
        ([-(2**31), -(2**31), 12], [0, 0, 10]),
    ],
)
def test_group_sizes_that_cannot_be(kind, implementation, promised, kept):
    lhs, rhs, weights = example(kind, 10, 3, out=6, width=20)
    expected = reference(lhs, weights, kept)
    found = compressed_ragged_dot(lhs, rhs, jnp.array(promised), implementation=implementation)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    dense = ragged_dot(lhs, rhs.to_dense().swapaxes(1, 2), jnp.array(promised))
    np.testing.assert_allclose(dense, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("isa", cpu.ISAS)
@pytest.mark.parametrize("zeros", [0.6, 0.99])
def test_cpu_survives_malformed_arrays_that_nobody_checked(kind, needs_cpu, monkeypatch, isa, zeros):
    monkeypatch.setenv("QMOE_JAX_ISA", isa)
    lhs, rhs, _ = example(kind, 8, 3, out=40, width=1333, zeros=zeros)
    if reason := cpu.why_not(rhs):
        pytest.skip(reason)
    rng = np.random.default_rng(0)

    def noise(array):
        return jnp.asarray(rng.integers(0, 256, array.nbytes, np.uint8).view(array.dtype).reshape(array.shape))

    for broken in [*([name] for name in rhs.data), list(rhs.data)]:
        for _ in range(10):
            data = {**rhs.data, **{name: noise(rhs.data[name]) for name in broken}}
            found = compressed_ragged_dot(
                lhs, dataclasses.replace(rhs, data=data), jnp.array([3, 1, 4]), implementation="cpu"
            )
            assert np.isfinite(found).all()


def test_cpu_on_another_platform_is_refused_and_default_uses_xla(kind, needs_cpu):
    lhs, rhs, _ = example(kind, 6, 3, out=5, width=8)
    operands = (lhs, rhs, jnp.array([6, 0, 0]))

    def lowered(implementation):
        run = jax.jit(lambda *operands: compressed_ragged_dot(*operands, implementation=implementation))
        return run.trace(*operands).lower(lowering_platforms=("cuda",)).as_text()

    with pytest.raises(NotImplementedError, match="cuda"):
        lowered("cpu")
    assert cpu.TARGET not in lowered(None)


def test_without_the_library_cpu_is_refused_and_default_warns_once(monkeypatch):
    monkeypatch.setattr(cpu, "_load", lambda: (None, "its library was not built"))
    lhs, rhs, weights = example(TERNARY, 6, 3, out=5, width=8)
    with pytest.raises(NotImplementedError, match="'cpu' cannot run here: its library was not built"):
        compressed_ragged_dot(lhs, rhs, jnp.array([6, 0, 0]), implementation="cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            found = compressed_ragged_dot(lhs, rhs, jnp.array([6, 0, 0]))
    np.testing.assert_allclose(found, reference(lhs, weights, [6, 0, 0]), rtol=1e-5, atol=1e-4)
    assert sum("its library was not built" in str(warning.message) for warning in caught) == 1


def test_unknown_instruction_set_is_refused_with_the_known_ones(monkeypatch):
    monkeypatch.setenv("QMOE_JAX_ISA", "sse9")
    lhs, rhs, _ = example(TERNARY, 6, 3, out=5, width=8)
    with pytest.raises(ValueError, match="QMOE_JAX_ISA: found 'sse9', expected one of avx512, avx2, portable"):
        compressed_ragged_dot(lhs, rhs, jnp.array([6, 0, 0]), implementation="cpu")


def test_unknown_implementation_is_refused_with_the_known_ones():
    lhs, rhs, _ = example(TERNARY, 6, 3, out=5, width=8)
    with pytest.raises(ValueError, match="'rocm'. Known: .*xla"):
        compressed_ragged_dot(lhs, rhs, jnp.array([6, 0, 0]), implementation="rocm")


def test_arguments_that_do_not_fit_are_refused_by_name():
    lhs, rhs, weights = example(TERNARY, 6, 3, out=5, width=8)
    sizes = jnp.array([6, 0, 0])
    with pytest.raises(TypeError, match="rhs: found ndarray"):
        compressed_ragged_dot(lhs, weights, sizes)
    with pytest.raises(ValueError, match=r"lhs: shape \[6, 7\], expected \[tokens, 8\]"):
        compressed_ragged_dot(lhs[:, 1:], rhs, sizes)
    with pytest.raises(ValueError, match="lhs: dtype float16"):
        compressed_ragged_dot(lhs.astype(np.float16), rhs, sizes)
    with pytest.raises(ValueError, match=r"group_sizes: int32 \[2\], expected int32 \[3\]"):
        compressed_ragged_dot(lhs, rhs, sizes[1:])
    with pytest.raises(ValueError, match="group_sizes: float32"):
        compressed_ragged_dot(lhs, rhs, sizes.astype(jnp.float32))
