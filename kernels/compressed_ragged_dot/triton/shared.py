"""Triton kernels for all codecs: the dense product. `gpu.multiply` says what it takes.

Importing needs the package triton.
"""

import jax
import triton
import triton.language as tl

from qmoe_jax.kernels.compressed_ragged_dot import gpu

# Columns of the list of work.
EXPERT, RANK, START, SIZE, FIRST, TABLE, ITEM_COLUMNS = (tl.constexpr(i) for i in range(gpu.ITEM_COLUMNS + 1))


def multiply_dense(launch, lhs, dense, items, out, config):
    per_item = -(-out.shape[1] // config.dense_rows)
    return launch(
        _multiply_dense,
        *(lhs, dense, items, out),
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        input_output_aliases={3: 0},
        grid=(per_item * items.shape[0],),
        num_warps=config.dense_warps,
        num_stages=3,
        **{"OUT": out.shape[1], "WIDTH": lhs.shape[1], "PER_ITEM": per_item},
        **{"TOKENS": config.dense_tokens, "ROWS": config.dense_rows, "COLUMNS": config.dense_columns},
    )


@triton.jit
def _multiply_dense(
    lhs,  # [tokens, WIDTH]
    dense,  # [ranks, OUT, WIDTH]
    items,  # [items, ITEM_COLUMNS]
    before,
    product,  # out, the same buffer as before: [tokens, OUT]
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    PER_ITEM: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of tokens of one expert x a tile of its rows."""
    item = items + tl.program_id(0) // PER_ITEM * ITEM_COLUMNS
    rows = tl.program_id(0) % PER_ITEM * ROWS + tl.arange(0, ROWS)
    start, size = tl.load(item + START).to(tl.int64), tl.load(item + SIZE)
    if size > 0:
        token = tl.arange(0, TOKENS)
        x_rows = lhs + (start + token) * WIDTH
        W_rows = dense + (tl.load(item + RANK) * OUT + rows) * WIDTH
        accumulator = tl.zeros((TOKENS, ROWS), tl.float32)
        for k in range(0, WIDTH, COLUMNS):
            columns = k + tl.arange(0, COLUMNS)
            inside = columns < WIDTH
            x = tl.load(x_rows[:, None] + columns, mask=(token < size)[:, None] & inside, other=0)
            W = tl.load(W_rows + columns[:, None], mask=inside[:, None] & (rows < OUT), other=0)
            if x.dtype == tl.bfloat16:
                accumulator = tl.dot(x, W, accumulator)
            else:
                # Three times eight bits are float32's 24: the parts are exact in bfloat16.
                for _ in tl.static_range(3):
                    part = (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
                    accumulator = tl.dot(part.to(tl.bfloat16), W, accumulator)
                    x -= part
        y = product + (start + token)[:, None] * OUT + rows
        mask = (token < size)[:, None] & (rows < OUT)
        tl.store(y, accumulator.to(product.dtype.element_ty), mask=mask)
