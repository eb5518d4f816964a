"""What the GPU kernels are tested on without a GPU, and the truth to compare with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qmoe_jax.codecs import gap
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels.compressed_ragged_dot.gpu import Config

# Name of a codec and how many levels a row has.
CODECS = {
    "dictionary": ("dictionary", 2),
    "gap": ("gap", 2),
    "gap with three levels": ("gap", 3),
    "gap with nine levels": ("gap", 9),
}

# Tokens, group sizes, out, in, zeros. Block sizes never divide them; most share shapes, so that they compile once.
CASES = {
    "one, several and more than a block": (14, [1, 3, 10], 10, 37, 0.7),
    "zeros": (14, [0, 14, 0], 10, 37, 0.7),
    "tokens without expert": (14, [2, 0, 3], 10, 37, 0.7),
    "no token assigned": (14, [0, 0, 0], 10, 37, 0.7),
    "more promised than there are": (14, [2, 19, 3], 10, 37, 0.7),
    "one token": (1, [0, 1, 0], 7, 130, 0.7),
    "no tokens": (0, [0, 0, 0], 7, 130, 0.7),
    "one row": (6, [2, 2, 2], 1, 40, 0.7),
    "one column": (6, [2, 4, 0], 20, 1, 0.7),
    "long rows": (4, [3, 0, 1], 5, 2100, 0.99),
    "rows of two segments": (2, [0, 2, 0], 3, 1100, 0.98),
}

# Small, so that several blocks of everything are met.
FEW = Config(rows=4, codewords=2, warps=1, tokens=4, many_tokens=1000)
MANY = Config(rows=4, codewords=2, warps=1, many_tokens=0, dense_tokens=16, dense_rows=16, dense_columns=16)
A_FEW_EXPERTS_AT_A_TIME = Config(**{**vars(MANY), "dense_weights": 1})
WAYS = {"few tokens": FEW, "many tokens": MANY, "many tokens, an expert at a time": A_FEW_EXPERTS_AT_A_TIME}
# Codec, case, way, dtype.
RUNS = [(codec, case, way, "float32") for codec in ("dictionary", "gap") for case in CASES for way in list(WAYS)[:2]]
RUNS = [run for run in RUNS if "rows" not in run[1] or run[0] == "gap" and run[1:3] != ("long rows", "many tokens")]
RUNS += [(codec, "one, several and more than a block", way, "bfloat16") for codec in CODECS for way in WAYS]

# What every branch of the kernels is met by; the others are beside them in `make test-all`.
SHORT = ("one, several and more than a block", "more promised than there are", "rows of two segments")


def runs():
    """RUNS, marked."""

    def short(codec, case, way, dtype):
        return case in SHORT and (dtype == "float32" or way == "few tokens" or codec == "gap")

    return [pytest.param(*run, marks=[] if short(*run) else pytest.mark.long) for run in RUNS]


def example(tokens, experts, out, width, zeros=0.7, seed=0, codec="dictionary"):
    """lhs float32 [tokens, in], the compressed experts, and their weights, float64 [experts, out, in]."""
    rng = np.random.default_rng(seed)
    name, num_levels = CODECS[codec]
    p = [zeros, *[(1 - zeros) / num_levels] * num_levels]
    symbols = rng.choice(num_levels + 1, (experts, out, width), p=p).astype(np.uint8)
    levels = np.sort(rng.integers(-127, 128, (experts, out, num_levels))) / 64  # exact in bfloat16
    values = np.concatenate([np.zeros((experts, out, 1)), levels], -1)
    weights = np.take_along_axis(values, symbols.astype(int), -1)
    lhs = rng.standard_normal((tokens, width)).astype(np.float32)
    return lhs, CompressedExperts.from_symbols(symbols, levels, name), weights


def with_classes(tokens, experts, out, width, classes):
    """`example` for codec gap whose columns are ever sparser, in so many classes."""
    lhs, rhs, weights = example(tokens, experts, out, width, 0.0, codec="gap")
    zero = np.random.default_rng(1).random((experts, out, width)) < np.linspace(0.3, 0.98, width)
    symbols = np.where(zero, 0, rhs.symbols()).astype(np.uint8)
    return lhs, CompressedExperts.from_symbols(symbols, rhs.levels, classes=classes), np.where(zero, 0, weights)


def reference(lhs, weights, group_sizes):
    """float64 [tokens, out]: token by token."""
    product = np.zeros((lhs.shape[0], weights.shape[1]))
    expert_of_token = np.repeat(np.arange(len(group_sizes)), group_sizes)[: lhs.shape[0]]
    for token, expert in enumerate(expert_of_token):
        product[token] = weights[expert] @ np.asarray(lhs[token], np.float64)
    return product


def assert_equals_reference(found, lhs, weights, group_sizes, bfloat16_error=2**-8):
    """To what sums in float32 leave of the terms' sizes, and one rounding to bfloat16."""
    lhs = np.asarray(lhs, np.float32)
    expected = reference(lhs, weights, group_sizes)
    allowed = 3e-7 * reference(np.abs(lhs), np.abs(weights), group_sizes)
    if found.dtype == jnp.bfloat16:
        allowed += bfloat16_error * np.abs(expected)
    error = np.abs(np.asarray(found, np.float64) - expected)
    assert (error <= allowed).all(), f"error {error.max()}, where {allowed.flat[error.argmax()]} is allowed"


# The paper's largest shape and small ones, all ways through the kernels, and the largest dense tile.
COMPILED = {
    "one token": (1, (128, 3072, 768)),
    "8 tokens": (8, (128, 2080, 6144)),
    "4096 tokens": (4096, (128, 768, 3072)),
    "40 000 tokens": (40_000, (128, 768, 3072)),
}
# Lane-instructions per weight that an H200 issues while it reads a bfloat16 weight.
BUDGET = 12.3
# Of a codeword, and of a step of `gap`, two windows, at P(0) = .885.
WEIGHTS = {"dictionary": 21.7, "gap": 2 * 16.4}


def abstract_arguments(tokens, shape, dtype, codec="dictionary"):
    """lhs, rhs, group_sizes without values, to lower with."""
    experts, out, width = shape
    name, num_levels = CODECS[codec]
    segments = -(-width // gap.SEGMENT)
    arrays = {
        "dictionary": {
            "codewords": ((experts * out * -(-width // 20),), jnp.uint16),
            "row_offsets": ((experts, out + 1), jnp.int32),
        },
        "gap": {
            "words": ((experts * out * -(-width // 48),), jnp.uint32),
            "word_counts": ((experts,), jnp.int32),
            "starts": ((experts, out, segments), jnp.uint32),
            "skips": ((experts, out, segments), jnp.uint8),
            "parameters": ((experts,), jnp.uint8),
        },
    }
    data = {array: jax.ShapeDtypeStruct(*kind) for array, kind in arrays[name].items()}
    levels = jax.ShapeDtypeStruct((experts, out, num_levels), jnp.bfloat16)
    rhs = CompressedExperts(data, levels, name, shape, bound=1)
    return jax.ShapeDtypeStruct((tokens, width), dtype), rhs, jax.ShapeDtypeStruct((experts,), jnp.int32)


def check_compiled(kernels, codec, capsys):
    """Prints what ptxas says; no register is spilled, and decoding stays well inside the budget."""
    weights = WEIGHTS[CODECS[codec][0]]
    with capsys.disabled():
        for kernel in kernels:
            print(f"\n  {codec}: {kernel}", end="")
            if kernel.name.endswith("multiply_few"):
                print(", a weight", *(f"{loop / weights:.1f}" for loop in kernel.loops), end="")
    for kernel in kernels:
        assert ".target sm_90" in kernel.ptx
        assert kernel.spilled == 0, str(kernel)
        if kernel.name.endswith("multiply_few"):
            # The longest loop is the one over the stream, for several tokens if there are; the shortest for one.
            assert max(kernel.loops) / weights < 0.75 * BUDGET, str(kernel)
            assert min(kernel.loops) / weights < 5, str(kernel)
