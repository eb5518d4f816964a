"""Rows' levels in the bits that they need.

A field is sign, exponent and mantissa, the mantissa in its lowest bits: the upper ones of bfloat16's 7, as many as
the expert's fields need. Exponent 0 means zero, any other is bfloat16's - base + 1. The sign takes a bit, or, where all
are positive (0) or all those but zero of a row's first L // 2 levels and no others negative (2), none.

Formats, uint8 [experts, 5]: base exponent, exponent bits, mantissa bits, signs (0, 1 or 2; 4 more where fields are
Rice-coded), kind. Words, uint32 [k]: all experts' fields from the least significant bit up, each expert's padded to
whole words. By kind, an expert's words are

    L          a field for each level of each row
    128 + L    a ladder, L float32 that all rows share, and a field for each row, its scale. Level k of a row is
               bfloat16(scale * ladder[k]), the product a float32, both rounded to nearest even
    64 + L     a field for each row, its step. The levels are bfloat16(step * k), k = -L / 2 .. -1, 1 .. L / 2

A ladder's largest magnitude is 1, so that a row's scale is the magnitude of its largest level.

Rice-coded fields, where these take fewer words, are bits in this order, with v a field without its sign:

    16 bits    c, about the median of all v
    4 bits     k
    1 bit      whether there are unused rows
    then       (if so) for each row whether all its fields are 0: such rows have no further bits
    then       for each field floor(z / 2^k) ones and a zero, where z is 2 (v - c), or 2 (c - v) - 1 where v < c
    then       for each field the lowest k bits of z and, where fields have one, the sign
"""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np

STEPS, LADDER = 64, 128  # Added to L in `level_formats`.
RICE = 4  # Added to signs.
HEADER = np.array([16, 4, 1])  # bits: c, k, whether there are unused rows


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

    An expert whose levels are those of a ladder is stored so where that takes fewer words. Zeros lose their sign.
    """
    levels = levels + levels.dtype.type(0)
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
    """bfloat16 [out, L]: scale [out], ladder [L]. A scale of 0 gives 0, without a sign."""
    return (0 + scale.astype(np.float32)[:, None] * ladder.astype(np.float32)).astype(ml_dtypes.bfloat16)


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
    v = exponent << mantissa_bits | (bits & 127) >> 7 - mantissa_bits
    width = exponent_bits + mantissa_bits + signs % 2
    words = place(
        negative << exponent_bits + mantissa_bits | v, width * np.arange(values.size), -(-width * values.size // 32)
    )
    form = [base if span else 0, exponent_bits, mantissa_bits]
    shape = -1, of_row
    rice = _pack_rice(v.reshape(shape), negative.reshape(shape) if signs == 1 else None)
    return (rice, [*form, signs + RICE]) if rice.size < words.size else (words, [*form, signs])


def _pack_rice(v: np.ndarray, negative: np.ndarray | None) -> np.ndarray:
    """Fields without signs [rows, fields], and these, or None where fields have none -> words uint32 [k]."""
    used = v.any(-1) if negative is None else (v | negative).any(-1)
    v = v[used].reshape(-1)
    centre = int(np.median(v)) if v.size else 0
    z = np.where(v < centre, 2 * (centre - v) - 1, 2 * (v - centre))
    k = min(range(16), key=lambda k: int((z >> k).sum()) + k * z.size)
    low, low_bits = z & (1 << k) - 1, k
    if negative is not None:
        low, low_bits = low | negative[used].reshape(-1) << k, k + 1
    ends = np.cumsum((z >> k) + 1)  # of the ones and the zero
    unary = np.ones(int(ends[-1]) if z.size else 0, np.uint8)
    unary[ends - 1] = 0
    header = np.concatenate(
        [_bits(np.array([n]), int(w)) for n, w in zip((centre, k, not used.all()), HEADER, strict=True)]
    )
    flags = np.zeros(0, np.uint8) if used.all() else ~used
    bits = np.concatenate([header, flags, unary, _bits(low, low_bits)]).astype(np.uint8)
    return np.packbits(np.pad(bits, (0, -bits.size % 32)), bitorder="little").view("<u4").astype(np.uint32)


def _bits(numbers: np.ndarray, width: int) -> np.ndarray:
    """Of each number its lowest bits, from the lowest one up: uint8 [numbers * width]."""
    return (numbers[:, None] >> np.arange(width) & 1).astype(np.uint8).reshape(-1)


def _numbers(bits: np.ndarray, width: int) -> np.ndarray:
    """Inverse of `_bits`: int64 [numbers]."""
    return bits.reshape(-1, width).astype(np.int64) @ (1 << np.arange(width))


def _unpack_rice(words: np.ndarray, rows: int, of_row: int, signed: bool) -> tuple[np.ndarray, np.ndarray, int] | None:
    """Inverse of `_pack_rice`, of the first ones of `words`: v and negative int64 [rows * of_row], number of words.

    None where words end before, or where bits follow that aren't zero. v may be anything.
    """
    bits = np.unpackbits(words.astype("<u4").view(np.uint8), bitorder="little")
    at = int(HEADER.sum())
    if bits.size < at:
        return None
    centre, k, some_unused = (int(_numbers(b, b.size)[0]) for b in np.split(bits[:at], np.cumsum(HEADER)[:-1]))
    used = np.ones(rows, bool)
    if some_unused:
        used[:] = np.resize(1 - bits[at : at + rows], rows)
        at += rows
    count = int(used.sum()) * of_row
    ends = at + np.flatnonzero(bits[at:] == 0)[:count]
    if ends.size < count:
        return None
    quotient = np.diff(ends, prepend=at - 1) - 1
    at = int(ends[-1]) + 1 if count else at
    low_bits = k + signed
    if bits.size < at + count * low_bits:
        return None
    low = _numbers(bits[at : at + count * low_bits], low_bits) if low_bits else np.zeros(count, np.int64)
    at += count * low_bits
    if bits[at : -(-at // 32) * 32].any():
        return None
    z = quotient << k | low & (1 << k) - 1
    v, negative = np.zeros((2, rows, of_row), np.int64)
    v[used] = np.where(z & 1, centre - (z + 1 >> 1), centre + (z >> 1)).reshape(-1, of_row)
    negative[used] = (low >> k).reshape(-1, of_row)
    return v.reshape(-1), negative.reshape(-1), -(-at // 32)


def _first(of_row: int, count: int) -> np.ndarray:
    """Which of a row's levels are in its first half, bool [count], row after row."""
    return np.arange(count) % of_row < of_row // 2


def unpack_levels(words: np.ndarray, formats: np.ndarray, out: int, held: Sequence[int]) -> np.ndarray:
    """Inverse of `pack_levels`, for rows of as many levels as one of `held`.

    Raises ValueError, naming the expert and the row, for what that doesn't return.
    """
    limits = np.array([254, 8, 7, RICE + 2, LADDER + max(held)])
    kinds = formats[:, 4] // STEPS * STEPS
    odd = (kinds == STEPS) & (formats[:, 4] % 2 == 1) | (formats[:, 3] == RICE - 1)
    for expert in np.flatnonzero((formats > limits).any(-1) | ~np.isin(formats[:, 4] % STEPS, held) | odd):
        raise ValueError(f"level_formats: expert {expert} has {formats[expert].tolist()}, expected at most {limits}.")
    num_levels = int(formats[0, 4]) % STEPS
    for expert in np.flatnonzero(formats[:, 4] % STEPS != num_levels):
        raise ValueError(
            f"level_formats: expert {expert} has {formats[expert, 4] % STEPS} levels, expected {num_levels}."
        )
    levels = np.empty((len(formats), out, num_levels), ml_dtypes.bfloat16)
    at = 0
    for expert, form in enumerate(formats):
        ladder = numbers(num_levels)
        if kinds[expert] == LADDER:
            ladder = words[at : at + num_levels].view(np.float32)
            at += num_levels
        if at < words.size and not (kinds[expert] < LADDER or (np.abs(ladder) <= 1).all()):
            raise ValueError(f"level_words: expert {expert} has the ladder {ladder}, expected magnitudes of at most 1.")
        fields, count = _unpack_fields(words[at:], form, out, expert)
        at += count
        levels[expert] = fields if kinds[expert] == 0 else _of_ladder(fields[:, 0], ladder)
    if at != words.size:
        raise ValueError(f"level_words: found {words.size}, but level_formats count {at}.")
    return levels


def _unpack_fields(words: np.ndarray, form: np.ndarray, out: int, expert: int) -> tuple[np.ndarray, int]:
    """Inverse of `_pack_fields`, of the first ones of `words`: bfloat16 [out, fields of a row], number of words."""
    base, exponent_bits, mantissa_bits, signs, kind = form.tolist()
    of_row = kind if kind < STEPS else 1
    signs, is_rice = signs % RICE, signs >= RICE
    count, bits_of_v = out * of_row, exponent_bits + mantissa_bits
    width = bits_of_v + signs % 2
    words_at_most = -(-width * count // 32)
    if is_rice:
        found = _unpack_rice(words[:words_at_most], out, of_row, signs == 1)
        if found is None:
            raise ValueError(f"level_words: found {words.size} for expert {expert} on, which are not its levels.")
        v, sign, num_words = found
    elif words.size < (num_words := words_at_most):
        raise ValueError(
            f"level_words: found {words.size} for expert {expert} on, but level_formats count {num_words}."
        )
    else:
        at = width * np.arange(count)
        padded = np.append(words[:num_words], np.zeros(2, np.uint32)).astype(np.uint64)
        codes = (padded[at >> 5] | padded[(at >> 5) + 1] << 32) >> (at & 31).astype(np.uint64)
        v = (codes & (1 << bits_of_v) - 1).astype(np.int64)
        sign = (codes >> bits_of_v).astype(np.int64) & signs % 2
    exponent, mantissa = v >> mantissa_bits, (v & (1 << mantissa_bits) - 1) << 7 - mantissa_bits
    if signs == 2:
        sign = _first(of_row, count) & (exponent > 0)
    bad = (v < 0) | (v >> bits_of_v > 0) | (exponent + base > 255) & (exponent > 0) | (exponent == 0) & (mantissa > 0)
    for i in np.flatnonzero(bad):
        raise ValueError(f"level_words: expert {expert}, row {i // of_row} holds a level that is not a number.")
    bits = sign.astype(np.int64) << 15 | np.where(exponent == 0, 0, exponent + base - 1) << 7 | mantissa
    return bits.astype(np.uint16).view(ml_dtypes.bfloat16).reshape(out, of_row), num_words
