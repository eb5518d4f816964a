"""Weights that are stored quantized already, made into numbers again: float8 with block scales, and MXFP4.

Pure functions of NumPy arrays; each takes a slice of what is stored, so that no more has to be read than is wanted.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

# --- float8_e4m3 with a scale per block, as DeepSeek-V3 is published -------------------------------------------------

FLOAT8_BLOCK = (128, 128)


def float8_blocks(rows: range, columns: range, block: tuple[int, int]) -> tuple[slice, slice]:
    """Of the scales [out / block, in / block]: those of a slice of the weights, consecutive rows and columns."""
    bounds = ((r.start // b, -(-r.stop // b)) for r, b in zip((rows, columns), block, strict=True))
    first, second = (slice(*b) for b in bounds)
    return first, second


def dequantize_float8(
    values: np.ndarray, scales: np.ndarray, block: tuple[int, int] = FLOAT8_BLOCK, start: tuple[int, int] = (0, 0)
) -> np.ndarray:
    """values * scale of their block: float32 [out, in].

    Args:
      values: float8_e4m3fn [out, in], a slice of a tensor.
      scales: float32, those of the blocks that the slice touches (`float8_blocks`), `weight_scale_inv` in the files.
      block: rows and columns of a block; the last ones of a tensor may be smaller.
      start: row and column of the tensor at which the slice begins.

    Raises ValueError where the scales aren't those of such a slice.
    """
    ends = [s + n for s, n in zip(start, values.shape, strict=True)]
    wanted = float8_blocks(range(start[0], ends[0]), range(start[1], ends[1]), block)
    expected = tuple(s.stop - s.start for s in wanted)
    if scales.shape != expected:
        raise ValueError(f"scales {list(scales.shape)}, expected {list(expected)} for weights {list(values.shape)}.")
    # The block of each row and each column, counted from the slice's first.
    rows, columns = ((s + np.arange(n)) // b - s // b for s, n, b in zip(start, values.shape, block, strict=True))
    return values.astype(np.float32) * scales.astype(np.float32)[rows[:, None], columns]


# --- MXFP4: 4 bits and a power of two for 32 of them (OCP Microscaling Formats 1.0), as gpt-oss is published ---------

MXFP4_BLOCK = 32
_HALF = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
MXFP4_VALUES = np.array(_HALF + [-v for v in _HALF], np.float32)


def dequantize_mxfp4(blocks: np.ndarray, scales: np.ndarray, dtype: np.dtype | type = ml_dtypes.bfloat16) -> np.ndarray:
    """Weights [..., out, in] of any slice over the axes before the last of `blocks`.

    Args:
      blocks: uint8 [..., out, in / 32, 16]; 16 bytes hold 32 values, the low nibble first.
      scales: uint8 [..., out, in / 32]; s stands for 2^(s - 127).
      dtype: of the result. bfloat16 holds every value exactly.

    Raises ValueError for other shapes.
    """
    if blocks.shape != (*scales.shape, 16):
        raise ValueError(f"blocks {list(blocks.shape)}, scales {list(scales.shape)}: expected [..., 16] and [...].")
    nibbles = np.stack([blocks & 15, blocks >> 4], axis=-1)  # [..., out, in / 32, 16, 2]
    values = MXFP4_VALUES[nibbles].reshape(*scales.shape, 32)
    values = np.ldexp(values, scales.astype(np.int32)[..., None] - 127)
    return values.reshape(*scales.shape[:-1], scales.shape[-1] * 32).astype(dtype)
