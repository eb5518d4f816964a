"""What tests of checkpoints share."""

import pytest
from compressed_models import copy, experts, gap_original, original  # noqa: F401, fixtures
from t5x_by_hand import SCALE, WI, values


@pytest.fixture
def arrays():
    """Two parameters of a Switch Transformer's encoder, by name."""
    return {WI: values(4, 6, 10), SCALE: values(6, seed=1)}
