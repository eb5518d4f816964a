"""Rows' levels in the bits that they need.

A field is sign, exponent and mantissa, the mantissa in its lowest bits: the upper ones of bfloat16's 7, as many as
the expert's fields need. Exponent 0 means zero, any other is bfloat16's - base + 1. The sign takes a bit, or, where all
are positive (0) or all those but zero of a row's first L // 2 levels and no others negative (2), none.

Formats, uint8 [experts, 5]: base exponent, exponent bits, mantissa bits, signs (0, 1 or 2), kind. Words, uint32 [k]:
all experts' fields from the least significant bit up, each expert's padded to whole words. By kind, an expert's words
are

    L          a field for each level of each row
    128 + L    a ladder, L float32 that all rows share, and a field for each row, its scale. Level k of a row is
               bfloat16(scale * ladder[k]), the product a float32, both rounded to nearest even
    64 + L     a field for each row, its step. The levels are bfloat16(step * k), k = -L / 2 .. -1, 1 .. L / 2

A ladder's largest magnitude is 1, so that a row's scale is the magnitude of its largest level.
"""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np

STEPS, LADDER = 64, 128  # Added to L in `level_formats`.


def place(codes: np.ndarray, at: np.ndarray, num_words: int) -> np.ndarray:
    """uint32 [num_words]: codes of up to 32 bits, int64, each from bit `at` on. They must not overlap."""
    shifted = codes.astype(np.uint64) << (at & 31).astype(np.uint64)
    word = at >> 5
    # A sum of distinct bits is exact: below 2^32.
    low = np.bincount(word, (shifted & 0xFFFFFFFF).astype(np.uint32), num_words)
    high = np.bincount(word + 1, (shifted >> 32).astype(np.uint32), num_words + 1)[:num_words]
    return (low + high).astype(np.uint32)


def pack_levels(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """levels bfloat16 [experts, out, L] -> words uint32 [k], formats uint8 [experts, 5].

    An expert whose levels are those of a ladder is stored so where that takes fewer words.
    """
    words, formats = zip(*map(_pack_expert, levels), strict=True)
    return np.concatenate(words), np.stack(formats)


def _pack_expert(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """levels bfloat16 [out, L] -> words uint32 [k], format uint8 [5]."""
    num_levels = levels.shape[1]
    fields, form = _pack_fields(levels.reshape(-1), num_levels)
    best = fields, [*form, num_levels]
    scale = np.abs(levels.astype(np.float32)).max(-1).astype(ml_dtypes.bfloat16)
    fields, form = _pack_fields(scale, 1)
    step = np.ascontiguousarray(levels[:, num_levels // 2])
    if num_levels % 2 == 0 and _same(_of_ladder(step, numbers(num_levels)), levels):
        fields, form = _pack_fields(step, 1)
        best = fields, [*form, STEPS + num_levels]
    elif num_levels + fields.size < best[0].size and (ladder := find_ladder(levels)) is not None:
        best = np.concatenate([ladder.view(np.uint32), fields]), [*form, LADDER + num_levels]
    return best[0], np.array(best[1], np.uint8)


def find_ladder(levels: np.ndarray) -> np.ndarray | None:
    """The float32 [L] of which all rows of levels, bfloat16 [out, L], are multiples; None where there is none.

    bfloat16(scale * ladder) are exactly the levels, with the magnitude of a row's largest as its scale.
    """
    exact = levels.astype(np.float64)
    scale = np.abs(exact).max(-1, keepdims=True)
    rows = scale[:, 0] > 0
    if not rows.any():
        return None
    scale, values = scale[rows], exact[rows]
    # What rounds to a level lies within half a step of it: at most the one above, half of that below a power of two.
    step = np.spacing(np.abs(levels[rows])).astype(np.float64)
    below = np.where(np.frexp(np.abs(values))[0] == 0.5, step / 4, step / 2)
    low = np.where(values > 0, values - below, values - step / 2) / scale
    high = np.where(values < 0, values + below, values + step / 2) / scale
    low, high = low.max(0), high.min(0)
    ladder = ((low + high) / 2).astype(np.float32)
    ladder = np.where((low <= 1) & (high >= 1), 1, np.where((low <= -1) & (high >= -1), -1, ladder)).astype(np.float32)
    return ladder if _same(_of_ladder(np.abs(exact).max(-1), ladder), levels) else None


def numbers(num_levels: int) -> np.ndarray:
    """-K .. -1, 1 .. K, float32 [2 K]: of which levels at equal steps are multiples."""
    up = np.arange(1, num_levels // 2 + 1, dtype=np.float32)
    return np.concatenate([-up[::-1], up])


def _same(found: np.ndarray, expected: np.ndarray) -> bool:
    return np.array_equal(found.view(np.uint16), expected.view(np.uint16))


def _of_ladder(scale: np.ndarray, ladder: np.ndarray) -> np.ndarray:
    """bfloat16 [out, L]: scale [out], ladder [L]."""
    return (scale.astype(np.float32)[:, None] * ladder.astype(np.float32)).astype(ml_dtypes.bfloat16)


def _pack_fields(values: np.ndarray, of_row: int) -> tuple[np.ndarray, list[int]]:
    """bfloat16 [rows * of_row] -> words uint32 [k]; base exponent, exponent bits, mantissa bits, signs."""
    bits = values.view(np.uint16).astype(np.int64)
    zero = bits & 0x7FFF == 0
    exponent = bits >> 7 & 255
    base = int(np.where(zero, 255, exponent).min())
    span = int(np.where(zero, 0, exponent - base + 1).max())
    mantissas = int(np.bitwise_or.reduce(bits & 127))
    mantissa_bits = 8 - (mantissas & -mantissas).bit_length() if mantissas else 0
    exponent_bits = max(1, span.bit_length())  # Orbax refuses empty arrays.
    negative = bits >> 15
    signs = int(negative.max())
    if signs and np.array_equal(negative, _first(of_row, bits.size) & ~zero):
        signs, negative = 2, np.zeros_like(negative)
    exponent = np.where(zero, 0, exponent - base + 1)
    codes = negative << exponent_bits + mantissa_bits | exponent << mantissa_bits | (bits & 127) >> 7 - mantissa_bits
    width = exponent_bits + mantissa_bits + signs % 2
    words = place(codes, width * np.arange(values.size), -(-width * values.size // 32))
    return words, [base if span else 0, exponent_bits, mantissa_bits, signs]


def _first(of_row: int, count: int) -> np.ndarray:
    """Which of a row's levels are in its first half, bool [count], row after row."""
    return np.arange(count) % of_row < of_row // 2


def unpack_levels(words: np.ndarray, formats: np.ndarray, out: int, held: Sequence[int]) -> np.ndarray:
    """Inverse of `pack_levels`, for rows of as many levels as one of `held`.

    Raises ValueError, naming the expert and the row, for what that doesn't return.
    """
    limits = np.array([254, 8, 7, 2, LADDER + max(held)])
    kinds = formats[:, 4] // STEPS * STEPS
    odd = (kinds == STEPS) & (formats[:, 4] % 2 == 1)
    for expert in np.flatnonzero((formats > limits).any(-1) | ~np.isin(formats[:, 4] % STEPS, held) | odd):
        raise ValueError(f"level_formats: expert {expert} has {formats[expert].tolist()}, expected at most {limits}.")
    num_levels = int(formats[0, 4]) % STEPS
    for expert in np.flatnonzero(formats[:, 4] % STEPS != num_levels):
        raise ValueError(
            f"level_formats: expert {expert} has {formats[expert, 4] % STEPS} levels, expected {num_levels}."
        )
    fields = out * np.where(kinds > 0, 1, num_levels)
    ladders = kinds == LADDER
    counts = np.where(ladders, num_levels, 0) - (-_width(formats) * fields // 32)
    if (needed := int(counts.sum())) != words.size:
        raise ValueError(f"level_words: found {words.size}, but level_formats count {needed}.")

    levels = np.empty((len(formats), out, num_levels), ml_dtypes.bfloat16)
    for expert, own in enumerate(np.split(words, np.cumsum(counts)[:-1])):
        if kinds[expert] == 0:
            levels[expert] = _unpack_fields(own, formats[expert], fields[expert], expert).reshape(out, num_levels)
            continue
        ladder = own[:num_levels].view(np.float32) if ladders[expert] else numbers(num_levels)
        if ladders[expert] and not (np.abs(ladder) <= 1).all():
            raise ValueError(f"level_words: expert {expert} has the ladder {ladder}, expected magnitudes of at most 1.")
        scale = _unpack_fields(own[num_levels:] if ladders[expert] else own, formats[expert], out, expert)
        levels[expert] = _of_ladder(scale, ladder)
    return levels


def _width(formats: np.ndarray) -> np.ndarray:
    """Bits of a field, int64 [...], of formats [..., 5]."""
    return formats[..., 1:3].sum(-1, dtype=np.int64) + formats[..., 3] % 2


def _unpack_fields(words: np.ndarray, form: np.ndarray, count: int, expert: int) -> np.ndarray:
    """Inverse of `_pack_fields`: bfloat16 [count]."""
    base, exponent_bits, mantissa_bits, signs, kind = form.astype(np.uint64)
    at = int(_width(form)) * np.arange(count)
    padded = np.append(words, np.zeros(2, np.uint32)).astype(np.uint64)
    codes = (padded[at >> 5] | padded[(at >> 5) + 1] << 32) >> (at & 31).astype(np.uint64)
    mantissa = (codes & (1 << mantissa_bits) - 1) << 7 - mantissa_bits
    exponent = codes >> mantissa_bits & (1 << exponent_bits) - 1
    sign = codes >> mantissa_bits + exponent_bits & signs % 2
    if signs == 2:
        sign = (_first(1 if kind >= STEPS else int(kind), count) & (exponent > 0)).astype(np.uint64)
    bits = sign << 15 | np.where(exponent == 0, 0, exponent + base - 1) << 7 | mantissa
    bad = (exponent + base > 255) & (exponent > 0) | (exponent == 0) & (mantissa > 0)
    for i in np.flatnonzero(bad):
        row = i if kind >= STEPS else i // int(kind)
        raise ValueError(f"level_words: expert {expert}, row {row} holds a level that is not a number.")
    return bits.astype(np.uint16).view(ml_dtypes.bfloat16)
