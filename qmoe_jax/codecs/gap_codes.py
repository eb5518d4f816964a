"""The prefix codes of the codec `gap`, each known by its number.

A code has a run m, and a word of bits for each of the tokens

    run      the next m weights are zero
    (r, v)   the next r < m weights are zero, and then there is a non-zero with symbol v

in this order, token 0 and tokens 1 + r L + v - 1. The word of the run is all ones.

Two or three levels: Golomb codes, m their numbers, one of PARAMETERS. The run is `1`, (r, v) is `0`, r, v. With
b = ceil(log2 m) and cut = 2^b - m, r < cut takes b - 1 bits, and any other r is r + cut in b bits, most significant
first (truncated binary). v is 0 for symbol 1 and 1 for symbol 2 where there are two levels; 10, 0, 11 for symbols
1, 2, 3 where there are three. That is within one per cent of the entropy where most weights are zero.

Four levels and more: Huffman codes of independent symbols, with words of at most LONGEST bits. Code (side * 16 + i) * 8
+ j has m = RUNS[i], P(0) = ZEROS[i] / 1024, and a non-zero of magnitude k in proportion to (RATIOS[j] / 64)^k. L // 2
+ side levels are below zero, where side is 0, or for an odd L 0 or 1: the highest of those is of magnitude 1, as is the
lowest of the others. To have the same words everywhere, all is computed in integers:

    weight     floor(probability of the token * 2^40) + 1
    lengths    of words: package-merge (Larmore and Hirschberg 1990), which in equal weights takes tokens before
               packages, and of tokens those with lower numbers
    words      canonical, in order of length and number. Then the first bits, as many as the run's word has, are
               flipped in all words where that one has a zero.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

PARAMETERS = (*range(1, 17), 18, 20, 22, 24, 28, 32, 36, 40, 48, 56, 64)

ZEROS = (102, 146, 207, 284, 376, 478, 584, 683, 770, 841, 895, 935, 963, 983, 996, 1006)  # of 1024
RUNS = (1, 1, 1, 3, 4, 6, 8, 8, 10, 10, 10, 8, 10, 16, 24, 36)
RATIOS = (1, 4, 8, 12, 20, 28, 36, 52)  # of 64
LONGEST = 11

LEVELS = tuple(range(2, 15))

# Decoders look at this many bits at once; what the first token leaves is for more tokens.
WINDOW = 12


@dataclasses.dataclass(frozen=True, eq=False)
class Code:
    """A prefix code of tokens.

    Attributes:
      run: m.
      words: int64 [1 + m * L], first bit lowest.
      lengths: int64 [1 + m * L], bits of the words.
    """

    run: int
    words: np.ndarray
    lengths: np.ndarray


def numbers(num_levels: int) -> np.ndarray:
    """The numbers of the codes for so many levels, rising: int64 [codes]."""
    if num_levels <= 3:
        return np.array(PARAMETERS)
    return np.arange((1 + num_levels % 2) * len(ZEROS) * len(RATIOS))


@functools.cache
def codes(num_levels: int) -> tuple[Code, ...]:
    """The codes for so many levels, in order of their numbers."""
    make = _golomb if num_levels <= 3 else _huffman
    return tuple(make(int(number), num_levels) for number in numbers(num_levels))


def _golomb(m: int, num_levels: int) -> Code:
    b = (m - 1).bit_length()
    cut = (1 << b) - m
    symbols = ("0", "1") if num_levels == 2 else ("10", "0", "11")
    remainders = [format(r, f"0{b - 1}b") if r < cut else format(r + cut, f"0{b}b") for r in range(m)] if b else [""]
    words = ["1"] + ["0" + r + v for r in remainders for v in symbols]
    return Code(m, np.array([int(word[::-1], 2) for word in words]), np.array([len(word) for word in words]))


def _huffman(number: int, num_levels: int) -> Code:
    kind, ratio = divmod(number, len(RATIOS))
    side, kind = divmod(kind, len(ZEROS))
    m = RUNS[kind]
    lengths = _limited_lengths(token_weights(m, ZEROS[kind], RATIOS[ratio], num_levels, side))
    return Code(m, _words(lengths), lengths)


def token_weights(m: int, zero: int, ratio: int, num_levels: int, side: int) -> np.ndarray:
    """About 2^40 times the probability of each token: int64 [1 + m * L] (see the module's docstring)."""
    below = num_levels // 2 + side
    magnitudes = [*range(below, 0, -1), *range(1, num_levels - below + 1)]  # of symbols 1 to L
    symbols = [ratio ** (k - 1) * 64 ** (num_levels - k) for k in magnitudes]
    total = sum(symbols) << 10 * m
    tokens = [zero**m * sum(symbols)]
    tokens += [zero**r * (1024 - zero) * s << 10 * (m - 1 - r) for r in range(m) for s in symbols]
    return np.array([(token << 40) // total + 1 for token in tokens])


def _limited_lengths(weights: np.ndarray) -> np.ndarray:
    """Lengths of the words of the best code with none longer than LONGEST: int64 like `weights`."""
    n = weights.size
    order = np.argsort(weights, kind="stable")
    tokens = merged = weights[order]
    is_token = [np.ones(n, bool)]
    for _ in range(LONGEST - 1):
        packages = merged[: merged.size // 2 * 2].reshape(-1, 2).sum(-1)
        both = np.concatenate([tokens, packages])
        sort = np.argsort(both, kind="stable")
        merged = both[sort]
        is_token.append(sort < n)
    lengths = np.zeros(n, np.int64)
    taken = 2 * n - 2
    for row in reversed(is_token):
        count = int(row[:taken].sum())
        lengths[order[:count]] += 1  # The first of `tokens`, as these are sorted.
        taken = 2 * (taken - count)
    return lengths


def _words(lengths: np.ndarray) -> np.ndarray:
    """Words of a complete code, first bit lowest; that of token 0 is ones: int64 like `lengths`."""
    order = np.argsort(lengths, kind="stable")
    share = 1 << LONGEST - lengths[order]  # of all words of LONGEST bits
    first_bit_highest = np.zeros_like(lengths)
    first_bit_highest[order] = np.cumsum(share) - share
    words = np.zeros_like(lengths)
    for i in range(LONGEST):
        words |= (first_bit_highest >> LONGEST - 1 - i & 1) << i
    flip = ~words[0] & (1 << lengths[0]) - 1
    return (words ^ flip) & (1 << lengths) - 1


@functools.cache
def window_table(num_levels: int) -> np.ndarray:
    """What each window of bits, first bit lowest, begins with: uint32 [codes, 2^WINDOW], read-only.

    From the lowest bit of an entry:

        4 bits    length of the first token
        7 bits    weights that it stands for
        4 bits    symbol of the last of them, 0 in a run of zeros
        4 bits    length of all tokens that the window holds whole
        10 bits   weights that these stand for
    """
    table = np.stack([_windows(code, num_levels) for code in codes(num_levels)])
    table.setflags(write=False)
    return table


def _windows(code: Code, num_levels: int) -> np.ndarray:
    """The row of `window_table` for a code."""
    windows = np.arange(1 << WINDOW)
    token = np.zeros_like(windows)
    for i, (word, bits) in enumerate(zip(code.words.tolist(), code.lengths.tolist(), strict=True)):
        token[word :: 1 << bits] = i
    length = code.lengths[token]
    weights = np.where(token == 0, code.run, (token - 1) // num_levels + 1)
    symbol = np.where(token == 0, 0, (token - 1) % num_levels + 1)
    used, passed = length.copy(), weights.copy()
    for _ in range(WINDOW - 1):
        rest = windows >> used
        more = used + length[rest] <= WINDOW  # The bits above the window are none of its own.
        passed += np.where(more, weights[rest], 0)
        used += np.where(more, length[rest], 0)
    return (length | weights << 4 | symbol << 11 | used << 15 | passed << 19).astype(np.uint32)
