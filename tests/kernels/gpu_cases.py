"""What the GPU kernels are tested on without a GPU, and the truth to compare with."""

import jax
import jax.numpy as jnp
import numpy as np

from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels.compressed_ragged_dot.gpu import Config

# Tokens, group sizes, out, in. Block sizes never divide them; most share shapes, so that they compile once.
CASES = {
    "one, several and more than a block": (14, [1, 3, 10], 10, 37),
    "zeros": (14, [0, 14, 0], 10, 37),
    "tokens without expert": (14, [2, 0, 3], 10, 37),
    "no token assigned": (14, [0, 0, 0], 10, 37),
    "more promised than there are": (14, [2, 19, 3], 10, 37),
    "one token": (1, [0, 1, 0], 7, 130),
    "no tokens": (0, [0, 0, 0], 7, 130),
    "one row": (6, [2, 2, 2], 1, 40),
    "one column": (6, [2, 4, 0], 20, 1),
}

# Small, so that several blocks of everything are met.
FEW = Config(rows=4, codewords=2, warps=1, tokens=4, many_tokens=1000)
MANY = Config(rows=4, codewords=2, warps=1, many_tokens=0, dense_tokens=16, dense_rows=16, dense_columns=16)
A_FEW_EXPERTS_AT_A_TIME = Config(**{**vars(MANY), "dense_weights": 1})
WAYS = {"few tokens": FEW, "many tokens": MANY, "many tokens, an expert at a time": A_FEW_EXPERTS_AT_A_TIME}
# The interpreter of Triton takes milliseconds an instruction.
RUNS = [(case, way, "float32") for case in CASES for way in ("few tokens", "many tokens")]
RUNS += [("one, several and more than a block", way, "bfloat16") for way in WAYS]


def example(tokens, experts, out, width, zeros=0.7, seed=0):
    """lhs float32 [tokens, in], the compressed experts, and their weights, float64 [experts, out, in]."""
    rng = np.random.default_rng(seed)
    trits = rng.choice(3, (experts, out, width), p=[zeros, (1 - zeros) / 2, (1 - zeros) / 2]).astype(np.uint8)
    levels = rng.integers(1, 128, (experts, out, 2)) / 64 * [-1, 1]  # exact in bfloat16
    weights = np.where(trits == 0, 0, np.where(trits == 1, levels[..., :1], levels[..., 1:]))
    lhs = rng.standard_normal((tokens, width)).astype(np.float32)
    return lhs, CompressedExperts.from_trits(trits, levels), weights


def reference(lhs, weights, group_sizes):
    """float64 [tokens, out]: token by token."""
    product = np.zeros((lhs.shape[0], weights.shape[1]))
    expert_of_token = np.repeat(np.arange(len(group_sizes)), group_sizes)[: lhs.shape[0]]
    for token, expert in enumerate(expert_of_token):
        product[token] = weights[expert] @ np.asarray(lhs[token], np.float64)
    return product


def assert_equals_reference(found, lhs, weights, group_sizes, bfloat16_error=2**-8):
    """To float32's precision, or that of one rounding to bfloat16."""
    tolerance = {"rtol": bfloat16_error, "atol": 1e-3} if found.dtype == jnp.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    expected = reference(np.asarray(lhs, np.float32), weights, group_sizes)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, **tolerance)


# The paper's largest shape and small ones, all ways through the kernels, and the largest dense tile.
COMPILED = {
    "one token": (1, (128, 3072, 768)),
    "8 tokens": (8, (128, 2080, 6144)),
    "4096 tokens": (4096, (128, 768, 3072)),
    "40 000 tokens": (40_000, (128, 768, 3072)),
}
# Lane-instructions per weight that an H200 issues while it reads a bfloat16 weight.
BUDGET = 12.3
# Of a codeword, at P(0) = .885.
WEIGHTS = 21.7


def abstract_arguments(tokens, shape, dtype):
    """lhs, rhs, group_sizes without values, to lower with."""
    experts, out, width = shape
    codewords = experts * out * -(-width // 20)
    data = {
        "codewords": jax.ShapeDtypeStruct((codewords,), jnp.uint16),
        "row_offsets": jax.ShapeDtypeStruct((experts, out + 1), jnp.int32),
    }
    levels = jax.ShapeDtypeStruct((experts, out, 2), jnp.bfloat16)
    rhs = CompressedExperts(data, levels, "dictionary", shape, bound=codewords // experts)
    return jax.ShapeDtypeStruct((tokens, width), dtype), rhs, jax.ShapeDtypeStruct((experts,), jnp.int32)


def check_compiled(kernels, capsys):
    """Prints what ptxas says; no register is spilled, and decoding stays well inside the budget."""
    with capsys.disabled():
        print("", *kernels, sep="\n  ")
    for kernel in kernels:
        assert ".target sm_90" in kernel.ptx
        assert kernel.spilled == 0, str(kernel)
        if kernel.name == "multiply_few":
            # The longest loop is the one over codewords, a lane one codeword, for several tokens if there are.
            assert max(kernel.loops) / WEIGHTS < 0.75 * BUDGET, str(kernel)
