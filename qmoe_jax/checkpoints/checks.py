"""What every parameter has to be before anything is computed from it."""

import ml_dtypes
import numpy as np

from qmoe_jax.errors import CheckpointError


def check_finite(name: str, array: np.ndarray, first_expert: int | None = None) -> None:
    """Checks that a parameter holds neither NaN nor Inf, without a mask as large as the parameter.

    Args:
      name: the parameter, '/'-joined.
      array: its values.
      first_expert: of a parameter whose axis 0 is experts, the one that `array` begins with; None: of any other.

    Raises:
      CheckpointError: it does; names the parameter, and of the experts' parameters the expert.
    """
    array = np.asarray(array)
    rows = array.reshape(-1 if array.size else 0, int(np.prod(array.shape[1:])))
    stride = 1 if first_expert is not None else max(1, (1 << 22) // max(1, rows.shape[1]))
    for start in range(0, len(rows), stride):
        some = rows[start : start + stride]
        if _all_finite(some):
            continue
        expert = f", expert {first_expert + start}" if first_expert is not None else ""
        first = np.unravel_index(start * rows.shape[1] + np.argmin(np.isfinite(some)), array.shape)
        raise CheckpointError(
            f"Parameter {name!r}{expert}: NaN or Inf, first {array[first]} at {[int(i) for i in first]}."
        )


def _all_finite(array: np.ndarray) -> bool:
    if array.dtype != ml_dtypes.bfloat16:
        return bool(np.isfinite(array).all())
    # Many times as fast as bfloat16's own isfinite: an exponent of ones.
    return array.size == 0 or int((array.view(np.uint16) & 0x7FFF).max()) < 0x7F80
