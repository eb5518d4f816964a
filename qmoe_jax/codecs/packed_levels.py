"""Rows' levels in the bits that they need.

A level is sign, exponent and mantissa, the mantissa in its lowest bits: the upper ones of bfloat16's 7, as many as
the expert's levels need. Exponent 0 means that the level is zero, any other is bfloat16's - base + 1.

Formats, uint8 [experts, 5]: base exponent, exponent bits, mantissa bits, sign bits, levels of a row. Words, uint32 [k]:
all experts' levels as fields of bits, from the least significant bit up, each expert's padded to whole words.
"""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np


def place(codes: np.ndarray, at: np.ndarray, num_words: int) -> np.ndarray:
    """uint32 [num_words]: codes of up to 32 bits, int64, each from bit `at` on. They must not overlap."""
    shifted = codes.astype(np.uint64) << (at & 31).astype(np.uint64)
    word = at >> 5
    # A sum of distinct bits is exact: below 2^32.
    low = np.bincount(word, (shifted & 0xFFFFFFFF).astype(np.uint32), num_words)
    high = np.bincount(word + 1, (shifted >> 32).astype(np.uint32), num_words + 1)[:num_words]
    return (low + high).astype(np.uint32)


def level_formats(levels: np.ndarray) -> np.ndarray:
    """The least widths that hold all levels of each expert: uint8 [experts, 5] (see the module's docstring)."""
    experts, _, num_levels = levels.shape
    bits = levels.reshape(experts, -1).view(np.uint16)
    zero = bits & 0x7FFF == 0
    exponent = (bits >> 7 & 255).astype(int)
    base = np.where(zero, 255, exponent).min(-1)
    span = np.where(zero, 0, exponent - base[:, None] + 1).max(-1)
    mantissas = np.bitwise_or.reduce(bits & 127, axis=-1)
    trailing = np.array([7 if m == 0 else int(m & -m).bit_length() - 1 for m in mantissas.astype(int)])
    return np.stack(
        [
            np.where(span == 0, 0, base),
            [max(1, int(s).bit_length()) for s in span],  # Orbax refuses empty arrays.
            7 - trailing,
            (bits >> 15).max(-1),
            np.full(experts, num_levels),
        ],
        axis=-1,
    ).astype(np.uint8)


def level_counts(formats: np.ndarray, out: int) -> np.ndarray:
    """Words that each expert's levels take, int64 [experts]."""
    width = formats[:, 1:4].sum(-1, dtype=np.int64)
    return -(-width * out * formats[:, 4] // 32)


def _level_places(formats: np.ndarray, out: int, num_levels: int) -> np.ndarray:
    """Bit at which each level begins, int64 [experts, out * levels]."""
    counts = level_counts(formats, out)
    width = formats[:, 1:4].sum(-1, dtype=np.int64)
    return 32 * (np.cumsum(counts) - counts)[:, None] + width[:, None] * np.arange(out * num_levels)


def pack_levels(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """levels bfloat16 [experts, out, L] -> words uint32 [k], formats uint8 [experts, 5]."""
    experts, out, num_levels = levels.shape
    formats = level_formats(levels)
    base, exponent_bits, mantissa_bits, _, _ = formats.T.astype(np.int64)[:, :, None]  # [experts, 1]
    bits = levels.reshape(experts, -1).view(np.uint16).astype(np.int64)
    exponent = np.where(bits & 0x7FFF == 0, 0, (bits >> 7 & 255) - base + 1)
    mantissa = (bits & 127) >> 7 - mantissa_bits
    codes = bits >> 15 << exponent_bits + mantissa_bits | exponent << mantissa_bits | mantissa
    at = _level_places(formats, out, num_levels)
    return place(codes.reshape(-1), at.reshape(-1), int(level_counts(formats, out).sum())), formats


def unpack_levels(words: np.ndarray, formats: np.ndarray, out: int, held: Sequence[int]) -> np.ndarray:
    """Inverse of `pack_levels`, for rows of as many levels as one of `held`.

    Raises ValueError, naming the expert and the row, for what that doesn't return.
    """
    experts, most = len(formats), max(held)
    limits = np.array([254, 8, 7, 1, most])
    for expert in np.flatnonzero((formats > limits).any(-1) | ~np.isin(formats[:, 4], held)):
        raise ValueError(f"level_formats: expert {expert} has {formats[expert].tolist()}, expected at most {limits}.")
    num_levels = int(formats[0, 4])
    for expert in np.flatnonzero(formats[:, 4] != num_levels):
        raise ValueError(f"level_formats: expert {expert} has {formats[expert, 4]} levels, expected {num_levels}.")
    if (needed := int(level_counts(formats, out).sum())) != words.size:
        raise ValueError(f"level_words: found {words.size}, but level_formats count {needed}.")

    base, exponent_bits, mantissa_bits, signs, _ = formats.T.astype(np.uint64)[:, :, None]  # [experts, 1]
    at = _level_places(formats, out, num_levels)
    padded = np.append(words, np.zeros(2, np.uint32)).astype(np.uint64)
    codes = (padded[at >> 5] | padded[(at >> 5) + 1] << 32) >> (at & 31).astype(np.uint64)
    mantissa = (codes & (1 << mantissa_bits) - 1) << 7 - mantissa_bits
    exponent = codes >> mantissa_bits & (1 << exponent_bits) - 1
    sign = codes >> mantissa_bits + exponent_bits & signs
    bits = sign << 15 | np.where(exponent == 0, 0, exponent + base - 1) << 7 | mantissa
    bad = (exponent + base > 255) & (exponent > 0) | (exponent == 0) & (mantissa > 0)
    for expert, i in np.argwhere(bad):
        raise ValueError(f"level_words: expert {expert}, row {i // num_levels} holds a level that is not a number.")
    return bits.astype(np.uint16).reshape(experts, out, num_levels).view(ml_dtypes.bfloat16)
