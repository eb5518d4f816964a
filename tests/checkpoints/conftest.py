"""What tests of checkpoints share."""

import pytest
from t5x_by_hand import SCALE, WI, values


@pytest.fixture
def arrays():
    """Two parameters of a Switch Transformer's encoder, by name."""
    return {WI: values(4, 6, 10), SCALE: values(6, seed=1)}
