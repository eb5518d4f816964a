"""Four bits a weight: no code, for a processor that multiplies faster than it can decode.

Above some 1.5 bits a weight of entropy, decoding `gap` on a CPU takes as long as reading dense float32. Where there is
memory for four bits a weight, experts that are stored as `gap` may stand in memory so (`load(..., codec="nibbles")`).

Resident, and stored likewise:

    nibbles  uint8 [experts, out, ceil(in / 2)]  two symbols a byte, the first in the lower half; a last half is zero

Stored, beside them, levels as `gap` stores them (`packed_levels`): level_words, level_formats.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from qmoe_jax.codecs.checks import checked_arrays, checked_symbols
from qmoe_jax.codecs.packed_levels import pack_levels, unpack_levels

LEVELS = range(2, 16)


def encode_experts(symbols: jax.Array | np.ndarray, num_levels: int) -> dict[str, np.ndarray]:
    """Symbols uint8 [experts, out, in] -> `data` (see the module's docstring).

    Raises ValueError for another dtype, an empty axis, symbols above `num_levels`, or a number of levels that is not
    in LEVELS.
    """
    symbols = checked_symbols(symbols, num_levels, LEVELS)
    padded = np.pad(symbols, ((0, 0), (0, 0), (0, symbols.shape[2] % 2)))
    return {"nibbles": padded[..., ::2] | padded[..., 1::2] << 4}


def pack(data: Mapping[str, jax.Array], levels: ArrayLike, shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """What a checkpoint stores, of `data` and levels bfloat16 [experts, out, L]."""
    level_words, level_formats = pack_levels(np.asarray(levels))
    return {"nibbles": np.asarray(data["nibbles"]), "level_words": level_words, "level_formats": level_formats}


def stored_nbytes(data: Mapping[str, jax.Array], levels: jax.Array, shape: tuple[int, int, int]) -> int:
    """Bytes of all that `pack` returns."""
    return data["nibbles"].size + sum(array.nbytes for array in pack_levels(np.asarray(levels)))


def unpack(stored: Mapping[str, np.ndarray], shape: tuple[int, int, int]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """`data` and levels bfloat16 [experts, out, L] of what `pack` returned.

    Raises ValueError, naming the expert and the row: arrays missing or of another dtype or shape; symbols above L;
    levels that don't decode to finite numbers.
    """
    experts, out, columns = shape
    expected = {
        "nibbles": (np.uint8, (experts, out, -(-columns // 2))),
        "level_words": (np.uint32, (None,)),
        "level_formats": (np.uint8, (experts, 5)),
    }
    stored = checked_arrays("nibbles", stored, shape, expected)
    levels = unpack_levels(stored["level_words"], stored["level_formats"], out, LEVELS)
    nibbles, most = stored["nibbles"], levels.shape[-1]
    bad = ((nibbles & 15 > most) | (nibbles >> 4 > most)).any(-1)
    for expert, row in np.argwhere(bad):
        raise ValueError(f"nibbles: expert {expert}, row {row} has a symbol above {most}, its last level.")
    if columns % 2:
        for expert, row in np.argwhere(nibbles[..., -1] >> 4):
            raise ValueError(f"nibbles: expert {expert}, row {row} is not zero after its last weight.")
    return {"nibbles": nibbles}, levels


def take(data: Mapping[str, np.ndarray], start: int, stop: int) -> dict[str, np.ndarray]:
    """Experts start:stop alone."""
    return {"nibbles": data["nibbles"][start:stop]}


def static_bound(data: Mapping[str, np.ndarray]) -> int:
    """Nothing has to be known of sizes."""
    return 0


def decode_expert(
    data: Mapping[str, jax.Array], shape: tuple[int, int, int], num_levels: int, bound: int, expert: ArrayLike
) -> jax.Array:
    """Symbols uint8 [out, in] of one expert."""
    nibbles = data["nibbles"][expert]
    return jnp.stack([nibbles & 15, nibbles >> 4], axis=-1).reshape(shape[1], -1)[:, : shape[2]]
