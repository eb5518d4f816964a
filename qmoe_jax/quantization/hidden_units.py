"""Hidden units in order of use.

An expert computes the same whatever order its hidden units are in, so that order costs nothing to store. Some are used
far more than others: sorted by how many weights of the last matrix's column are not zero, density falls along the rows
of that matrix, and classes of columns, each with a code of its own, take fewer bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from qmoe_jax.codecs import gap
from qmoe_jax.models.family import Expert
from qmoe_jax.quantization.gptq import Quantized

CLASSES = 4


def classes_of_columns(expert: Expert, codec: str | None, rows: int, columns: int) -> int:
    """Of the last matrix [rows, columns] of experts: more than one where hidden units are to be in order of use.

    Not with a bias for each hidden unit, which would have to go along. With few rows classes cost more than they save.
    """
    possible = codec == "gap" and not expert.biases and rows >= CLASSES * gap.BLOCK_ROWS
    return CLASSES if possible and gap.may_have_classes(columns, CLASSES) else 1


def in_order_of_use(expert: Expert, quantized: Mapping[str, Quantized]) -> dict[str, Quantized]:
    """The same experts with their hidden units sorted, the most used one first.

    Args:
      expert: what they are, without biases.
      quantized: by matrix name; hidden units are rows [experts, d_ff, d_model] of all but the last, whose columns they
        are.
    """
    order = most_used_first(np.count_nonzero(np.asarray(quantized[expert.last].symbols), axis=1))  # [experts, d_ff]

    def sort(matrix: str, q: Quantized) -> Quantized:
        axis = 2 if matrix == expert.last else 1
        take = lambda a, axis: _take(a, jnp.asarray(order), axis)
        q = q._replace(Q=take(q.Q, axis), symbols=take(q.symbols, axis))
        return q if axis == 2 else q._replace(levels=take(q.levels, 1))

    return {matrix: sort(matrix, q) for matrix, q in quantized.items()}


def most_used_first(counts: np.ndarray) -> np.ndarray:
    """Columns by how many of their weights are not zero [..., columns]; of equal ones the first is first."""
    return np.argsort(-counts.astype(np.int64), axis=-1, kind="stable")


def _take(a: jax.Array, order: jax.Array, axis: int) -> jax.Array:
    return jnp.take_along_axis(a, jnp.expand_dims(order, tuple(set(range(1, a.ndim)) - {axis})), axis)
