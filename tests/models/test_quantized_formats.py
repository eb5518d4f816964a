"""float8 with block scales and MXFP4, whole and slice by slice."""

import ml_dtypes
import numpy as np
import pytest

from qmoe_jax.models.quantized_formats import dequantize_float8, dequantize_mxfp4, float8_blocks

RNG = np.random.RandomState(0)
FLOAT8 = RNG.standard_normal((11, 9)).astype(ml_dtypes.float8_e4m3fn)
SCALES = RNG.rand(3, 3).astype(np.float32)


def test_float8():
    expected = FLOAT8.astype(np.float32) * np.kron(SCALES, np.ones((4, 4), np.float32))[:11, :9]
    np.testing.assert_array_equal(dequantize_float8(FLOAT8, SCALES, (4, 4)), expected)


@pytest.mark.parametrize(
    "rows, columns", [(range(11), range(2, 5)), (range(3, 9), range(9)), (range(7, 8), range(8, 9))]
)
def test_slices_of_float8(rows, columns):
    whole = dequantize_float8(FLOAT8, SCALES, (4, 4))
    part = FLOAT8[rows.start : rows.stop, columns.start : columns.stop]
    scales = SCALES[float8_blocks(rows, columns, (4, 4))]
    found = dequantize_float8(part, scales, (4, 4), (rows.start, columns.start))
    np.testing.assert_array_equal(found, whole[rows.start : rows.stop, columns.start : columns.stop])


def test_scales_have_to_fit():
    with pytest.raises(ValueError, match=r"scales \[3, 3\], expected \[1, 1\]"):
        dequantize_float8(FLOAT8, SCALES)


def test_mxfp4():
    """All sixteen values, low nibble first, at two scales; exact in bfloat16."""
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    blocks = np.array([[[[16 * (2 * i % 16 + 1) + 2 * i % 16 for i in range(16)]]]], np.uint8)
    for scale in (127, 120):
        found = dequantize_mxfp4(blocks, np.full((1, 1, 1), scale, np.uint8))
        assert found.dtype == ml_dtypes.bfloat16
        expected = np.array(values + values, np.float32) * 2.0 ** (scale - 127)
        np.testing.assert_array_equal(found.astype(np.float32), expected[None, None])


def test_slices_of_mxfp4():
    blocks = RNG.randint(0, 256, (3, 5, 2, 16)).astype(np.uint8)
    scales = RNG.randint(110, 130, (3, 5, 2)).astype(np.uint8)
    whole = dequantize_mxfp4(blocks, scales)
    assert whole.shape == (3, 5, 64)
    np.testing.assert_array_equal(dequantize_mxfp4(blocks[1:, ::2], scales[1:, ::2]), whole[1:, ::2])
    with pytest.raises(ValueError, match="expected"):
        dequantize_mxfp4(blocks, scales[:2])
