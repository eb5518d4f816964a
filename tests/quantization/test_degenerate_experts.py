"""Experts with no tokens, one, or all of them; hidden units that are silent; activations that aren't finite."""

import numpy as np
import pytest
import tiny_model
from watch import watched

from qmoe_jax import resources, streaming
from qmoe_jax.checkpoints import open_checkpoint
from qmoe_jax.models.switch.config import PLAIN
from qmoe_jax.quantization.quantizer import Quantizer
from qmoe_jax.quantization.settings import QuantizationSettings

D_MODEL, D_FF, TOKENS = 20, 28, 300
STARVED, LONELY, OVERLOADED, SILENT, NORMAL = range(5)
LAYER = "encoder/layers_0"


def quantized(settings):
    """Kernels before and after, and the layer's account, of a group with an expert of each kind."""
    rng = np.random.default_rng(0)
    kernels = {"wi": rng.normal(size=(5, D_MODEL, D_FF)), "wo": rng.normal(size=(5, D_FF, D_MODEL))}
    kernels = {m: tiny_model.bfloat16(k) for m, k in kernels.items()}  # as they are read
    kernels["wi"][SILENT] = -np.abs(kernels["wi"][SILENT])  # The inputs are positive.
    inputs = np.abs(rng.normal(size=(TOKENS, D_MODEL))).astype(np.float32)
    everything = np.arange(TOKENS)
    tokens = [everything[:0], everything[7:8], everything, everything[::3], everything[::2]]
    gates = [rng.uniform(0.2, 1, len(t)).astype(np.float32) for t in tokens]
    masks = {"encoder": np.ones(TOKENS, bool)}
    quantizer = Quantizer(settings, masks, {"encoder": ~masks["encoder"]}, 5, "gap", None, resources.Stages())
    group = streaming.ExpertGroup(LAYER, "encoder", PLAIN, 0, 5, kernels, inputs, tokens, gates)
    after = {m: np.asarray(k) for m, k in quantizer(group).items()}
    quantizer.finish(LAYER)
    return kernels, after, quantizer.accounts[LAYER], inputs


SETTINGS = [
    QuantizationSettings(token_cap=2.5),
    QuantizationSettings(token_cap=2.5, damping=0.0),
    QuantizationSettings(method="rd", lagrangian=0.05, steps=0, token_cap=2.5, min_tokens=0),
    QuantizationSettings(method="rd", lagrangian=0.05, steps=0, token_cap=2.5, min_tokens=0, damping=0.0),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.method}, damping {s.damping:g}")
def test_every_kind_has_an_outcome_that_is_reported(settings):
    before, after, account, inputs = quantized(settings)
    assert account.tokens == {STARVED: 0, LONELY: 1, OVERLOADED: 150, SILENT: 100, NORMAL: 150}
    assert account.overloaded == {OVERLOADED: TOKENS}
    assert "no calibration tokens" in account.fallback[STARVED]
    assert "wo is zero" in account.fallback[SILENT]
    # A Hessian of rank one is enough with damping; without, its factorisation may fail, which is said.
    assert set(account.fallback) <= {STARVED, SILENT} | ({LONELY} if settings.damping == 0 else set())
    for matrix, kernel in after.items():
        assert np.isfinite(kernel).all(), matrix
        for e in range(5):
            for row in kernel[e].T:  # ternary
                assert len(np.unique(row[row != 0])) <= 2, (matrix, e)
    # What has tokens is close on them.
    hidden = [np.maximum(inputs @ k["wi"][NORMAL], 0) @ k["wo"][NORMAL] for k in (before, after)]
    assert np.square(hidden[1] - hidden[0]).sum() < 0.5 * np.square(hidden[0]).sum()
    if settings.method == "gptq":  # The paper's way: to nearest, between the row's extremes.
        W = before["wi"][STARVED]
        low, high = W.min(0), W.max(0)
        np.testing.assert_array_equal(after["wi"][STARVED], np.where(high / 2 < W, high, np.where(low / 2 > W, low, 0)))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("encoder/layers_0/attention/out/kernel", "encoder/layers_0"),
        ("decoder/layers_0/mlp/wo/kernel", "decoder/layers_0"),
        ("encoder/layers_1/mlp/expert/wo/kernel", "encoder/layers_1"),
    ],
    ids=["attention", "dense", "experts"],
)
def test_activations_that_are_not_finite_stop_with_layer_and_document(name, layer, tmp_path):
    params = tiny_model.random_params()
    params[name] = np.full_like(params[name], 3e38)  # A finite number, but their sums aren't.
    checkpoint = open_checkpoint(tiny_model.write_checkpoint(tmp_path / "model", params))
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(2, 150, 9).astype(np.int32), rng.integers(2, 150, 5).astype(np.int32)) for _ in range(4)]
    seen = []

    def look(group):
        seen.append(group.layer)
        assert np.isfinite(group.inputs).all()
        return group.kernels

    with pytest.raises(ValueError, match=rf"{layer}: activations of document \d, token \d, are NaN or Inf"):
        watched(checkpoint, pairs, streaming.Settings(), look)
    assert all(before <= layer or before.startswith("encoder") for before in seen)
