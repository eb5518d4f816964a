"""What a thread compiles ahead is what the call then runs."""

import re
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qmoe_jax.quantization import ahead
from qmoe_jax.quantization.asymmetric import match_outputs
from qmoe_jax.quantization.settings import QuantizationSettings
from qmoe_jax.quantization.sharding import expert_sharding

SHAPE = (2, 8, 16)


METHODS = {
    "gptq": dict(method="gptq"),
    "rd": dict(method="rd", lagrangian=1e-3, steps=0),
    "rd, equal steps": dict(method="rd", lagrangian=1e-3, steps=1),
}


@pytest.fixture(params=METHODS.values(), ids=METHODS)
def settings(request):
    return QuantizationSettings(**request.param)


def arrays():
    X = np.random.default_rng(0).normal(size=(SHAPE[0], 32, SHAPE[2]))
    W = np.random.default_rng(1).normal(size=SHAPE)
    values = (W, np.einsum("etc,etd->ecd", X, X), np.ones(SHAPE[:2]))
    return jax.device_put([jnp.asarray(a, jnp.float32) for a in values], expert_sharding(SHAPE[0]))


def test_a_method_is_not_compiled_again(settings, caplog):
    W, H, importance = arrays()
    with ahead.compiling([settings], [SHAPE]):
        ahead.ready(settings.rounding, SHAPE)
        with jax.log_compiles():
            settings.rounding(W, H, importance)
            if settings.calibration.asymmetric:
                how = settings.calibration
                ahead.ready(match_outputs, SHAPE)
                match_outputs(W, H, W, damping=how.damping, block_size=how.block_size)
    compiled = [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]
    assert not [line for line in compiled if re.search(r"_gptq|_rate_distortion|jit\(quantize\)|match_outputs", line)]


class Slow:
    """A method whose compilation takes until it is let go, or fails."""

    def __init__(self):
        self.go, self.begun = threading.Event(), []

    def compile(self, W, H):
        self.begun.append(W.shape)
        self.go.wait(60)
        raise RuntimeError("the compiler failed")


def test_what_has_not_begun_is_left():
    slow, others = Slow(), [(2, 8, 16 + n) for n in range(3)]
    settings = SimpleNamespace(rounding=slow, calibration=SimpleNamespace(asymmetric=False))
    with pytest.raises(ZeroDivisionError), ahead.compiling([settings], [SHAPE, *others]):
        threading.Timer(0.2, slow.go.set).start()
        raise ZeroDivisionError  # as a run that ends in an error
    assert len(slow.begun) <= 1
    ahead.ready(slow, SHAPE)  # It failed: the call itself will tell.
    ahead.ready(slow, others[0])  # Nobody compiles it.
