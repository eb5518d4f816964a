"""What every parameter has to be before anything is computed from it."""

import numpy as np

from qmoe_jax.checkpoints.errors import CheckpointError


def check_finite(name: str, array: np.ndarray, first_expert: int = 0) -> None:
    """Checks that a parameter holds neither NaN nor Inf, without a mask as large as the parameter.

    Args:
      name: the parameter, '/'-joined.
      array: its values; experts are axis 0 of parameters below 'mlp/expert/'.
      first_expert: where `array` begins on that axis.

    Raises:
      CheckpointError: it does; names the parameter, and of the experts' parameters the expert.
    """
    array = np.asarray(array)
    rows = array.reshape(-1 if array.size else 0, int(np.prod(array.shape[1:])))
    is_expert = "/mlp/expert/" in f"/{name}"
    stride = 1 if is_expert else max(1, (1 << 22) // max(1, rows.shape[1]))
    for start in range(0, len(rows), stride):
        bad = ~np.isfinite(rows[start : start + stride])
        if bad.any():
            expert = f", expert {first_expert + start}" if is_expert else ""
            first = np.unravel_index(start * rows.shape[1] + np.argmax(bad), array.shape)
            raise CheckpointError(
                f"Parameter {name!r}{expert}: NaN or Inf, first {array[first]} at {[int(i) for i in first]}."
            )
