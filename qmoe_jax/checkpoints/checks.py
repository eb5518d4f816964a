"""What every parameter has to be before anything is computed from it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from qmoe_jax.errors import CheckpointError, listed

if TYPE_CHECKING:
    from qmoe_jax.checkpoints.checkpoint import Checkpoint, StoredMatrix


MOST_WEIGHT = 1e4  # No trained model has a weight near it; a flipped bit of an exponent is far beyond.


def check_finite(name: str, array: np.ndarray, first_expert: int | None = None) -> None:
    """Checks that a parameter holds neither NaN nor Inf, without a mask as large as the parameter.

    One that holds a weight beyond `MOST_WEIGHT` is named in a warning.

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
    warned = False
    for start in range(0, len(rows), stride):
        some = rows[start : start + stride]
        largest = _largest(some)
        if largest <= MOST_WEIGHT or (warned and np.isfinite(largest)):
            continue
        bad = ~np.isfinite(some) if not np.isfinite(largest) else np.abs(some.astype(np.float32)) > MOST_WEIGHT
        expert = f", expert {first_expert + start}" if first_expert is not None else ""
        first = np.unravel_index(start * rows.shape[1] + np.argmax(bad), array.shape)
        found = f"first {array[first]} at {[int(i) for i in first]}"
        if not np.isfinite(largest):
            raise CheckpointError(f"Parameter {name!r}{expert}: NaN or Inf, {found}.")
        warnings.warn(
            f"Parameter {name!r}{expert}: weights beyond {MOST_WEIGHT:g}, {found}. No trained model has such: the file "
            "is probably damaged. Compare its SHA-256 with that of where it came from.",
            stacklevel=2,
        )
        warned = True


def _largest(array: np.ndarray) -> float:
    """The largest magnitude; NaN or Inf if there is one."""
    if array.size == 0:
        return 0.0
    if array.dtype.itemsize != 2:
        return max(abs(float(array.min())), abs(float(array.max())))  # Both are NaN if any is.
    # Many times as fast as NumPy's own for 16 bits: magnitudes are in the order of their bits.
    return float((array.view(np.uint16) & 0x7FFF).max().view(array.dtype))


def check_tree(checkpoint: Checkpoint, sizes: Mapping[str, Mapping[str, StoredMatrix]] | None = None) -> None:
    """Holds all that an opened checkpoint has against the architecture that it tells, whatever its layout.

    Args:
      checkpoint: its config and specs are there.
      sizes: of compressed experts, by layer and matrix; None: where they are compressed, they are left out.

    Raises CheckpointError that lists parameters, and compressed matrices, that are missing, foreign, of another shape,
    or no floating-point numbers.
    """
    family, config = checkpoint.family, checkpoint.config
    expected = dict(family.param_shapes(config))
    found = {name: tuple(spec.shape) for name, spec in checkpoint.specs.items()}
    if sizes is None and checkpoint.codec is not None:
        expected = {name: shape for name, shape in expected.items() if not checkpoint.is_expert(name)}
    for layer, matrices in (sizes or {}).items():
        for matrix, stored in matrices.items():
            experts, out, width = stored.shape
            found[family.expert_parameter(layer, matrix)] = (experts, width, out)
    problems = [f"missing: {name}, expected {list(shape)}" for name, shape in expected.items() if name not in found]
    problems += [f"unknown: {name} {list(shape)}" for name, shape in found.items() if name not in expected]
    problems += [
        f"wrong shape: {name}, found {list(shape)}, expected {list(expected[name])}"
        for name, shape in found.items()
        if name in expected and shape != tuple(expected[name])
    ]
    problems += [
        f"wrong dtype: {name}, found {spec.dtype}, expected floating-point numbers"
        for name, spec in checkpoint.specs.items()
        if not jnp.issubdtype(spec.dtype, jnp.floating)
    ]
    if problems:
        head = f"{checkpoint.path}: the parameters aren't those of {family.title} as its config has it:"
        raise CheckpointError(listed(head, problems))
