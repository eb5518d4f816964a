"""The Lagrangian that gives a target rate, on synthetic models; and which settings ask for one."""

import functools
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from qmoe_jax.quantization.account import entropy
from qmoe_jax.quantization.methods import DEFAULT_TARGET_BITS, METHODS
from qmoe_jax.quantization.rate_control import RateControl
from qmoe_jax.quantization.rate_distortion import rate_distortion
from qmoe_jax.quantization.settings import QuantizationSettings
from qmoe_jax.quantization.trials import TRIAL_EXPERTS, TRIAL_WEIGHTS, trial_experts

EXPERTS, D_MODEL, D_FF, LAYERS = 4, 32, 64, 10


def layers(growth=1.0, seed=0):
    """(matrix, W, H, importance) in the order in which they come; scales differ by layer and matrix.

    growth: of the weights from layer to layer.
    """
    rng = np.random.default_rng(seed)
    for layer in range(LAYERS):
        for matrix, rows, columns in (("wi", D_FF, D_MODEL), ("wo", D_MODEL, D_FF)):
            scale = (1.0 if matrix == "wi" else 0.2) * 2 ** rng.normal(scale=0.3) * growth**layer
            W = rng.normal(size=(EXPERTS, rows, columns)) * scale
            mix = np.eye(columns) + 0.3 * rng.normal(size=(EXPERTS, columns, columns))
            X = rng.normal(size=(EXPERTS, 2 * columns, columns)) @ mix * rng.lognormal(sigma=0.5, size=columns)
            H = X.swapaxes(1, 2) @ X / columns
            importance = rng.lognormal(size=(EXPERTS, rows)) if matrix == "wi" else None
            yield matrix, *(None if x is None else jnp.asarray(x, jnp.float32) for x in (W, H, importance))


def bits_at(W, H, importance, lagrangian, stored=None):
    """Mean entropy of the experts' symbols, or what `stored` makes of it."""
    per_row = jnp.full(W.shape[:2], lagrangian) if importance is None else lagrangian / importance
    symbols = np.asarray(rate_distortion(W, H, per_row, block_size=32).symbols)
    bits = float(np.mean([entropy(s) for s in symbols]))
    return stored(bits) if stored else bits


def rates_of_half(W, H, importance, stored, tried, lagrangians):
    tried.append(lagrangians)
    few = slice(0, EXPERTS // 2)
    half = W[few], H[few], None if importance is None else importance[few]
    return [bits_at(*half, lagrangian, stored) for lagrangian in lagrangians]


def quantize_all(target, stored=None, growth=1.0, all_layers=None):
    """As the pipeline does: half of the experts are tried. Returns mean bits per weight, Lagrangians, trials."""
    control = RateControl(target, dict.fromkeys(("wi", "wo"), LAYERS * EXPERTS * D_MODEL * D_FF))
    lagrangians, bits, trials = [], [], []
    for matrix, W, H, importance in all_layers or layers(growth):
        tried = []
        rates = functools.partial(rates_of_half, W, H, importance, stored, tried)
        lagrangians.append(control.find(matrix, W.size, 0.3, rates))
        bits.append(bits_at(W, H, importance, lagrangians[-1], stored))
        if matrix == "wo":  # as a layer is finished when all its matrices are
            control.spent("wi", bits[-2], W.size)
            control.spent("wo", bits[-1], W.size)
            state = json.loads(json.dumps(control.state()))
            control = RateControl(target, dict.fromkeys(("wi", "wo"), 0))
            control.restore(state)
        trials.append(len(tried))
    assert not any(control.left.values())
    return np.mean(bits), np.array(lagrangians), trials


@pytest.mark.long
def test_three_bits_are_found():
    def rates(W, H, importance, lagrangians):
        return [bits_at_equal_steps(W, H, importance, lagrangian) for lagrangian in lagrangians]

    control = RateControl(3.0, dict.fromkeys(("wi", "wo"), 3 * EXPERTS * D_MODEL * D_FF))
    bits = []
    for matrix, W, H, importance in itertools.islice(layers(), 6):
        lagrangian = control.find(matrix, W.size, 0.3, functools.partial(rates, W[:2], H[:2], importance))
        bits.append(bits_at_equal_steps(W, H, importance, lagrangian))
        if matrix == "wo":
            control.spent("wi", bits[-2], W.size)
            control.spent("wo", bits[-1], W.size)
    assert abs(np.mean(bits) / 3 - 1) < 0.01


def bits_at_equal_steps(W, H, importance, lagrangian):
    per_row = jnp.full(W.shape[:2], lagrangian) if importance is None else lagrangian / importance[: len(W)]
    symbols = np.asarray(rate_distortion(W, H, per_row, steps=7, descents=1, refits=1, block_size=32).symbols)
    return float(np.mean([entropy(s) for s in symbols]))


def with_overhead(bits):
    """What a codec makes of entropy: a little above it, and levels."""
    return 1.03 * bits + 0.05


@pytest.mark.parametrize("target", [*(pytest.param(t, marks=pytest.mark.long) for t in (0.35, 0.7)), 1.3])
@pytest.mark.parametrize("stored", [None, with_overhead], ids=["entropy", "overhead"])
def test_all_matrices_together_have_the_target_rate_at_about_one_lagrangian(target, stored):
    bits, lagrangians, trials = quantize_all(target, stored)
    assert abs(bits / target - 1) < 0.015
    later = lagrangians[6:]
    assert np.quantile(later, 0.9) / np.quantile(later, 0.1) < 4
    assert np.mean(trials) < 1.5


@pytest.mark.parametrize("target", [pytest.param(0.35, marks=pytest.mark.long), 0.7, 1.3])
def test_a_trend_is_followed(target):
    bits, lagrangians, _ = quantize_all(target, growth=1.05)  # squares of weights grow by more than twice
    assert abs(bits / target - 1) < 0.03
    assert lagrangians.max() / lagrangians.min() < 20


def test_more_bits_are_a_smaller_lagrangian():
    lagrangians = [np.median(quantize_all(target)[1]) for target in (0.3, 0.7, 1.2)]
    assert lagrangians[0] > 2 * lagrangians[1] > 4 * lagrangians[2]


@pytest.mark.parametrize("change", ["hessians", "weights", "importance"])
def test_lagrangian_has_the_scale_of_the_error(change):
    _, W, H, importance = next(layers())

    def first(W, H, importance):
        control = RateControl(0.7, {"wi": 10 * W.size, "wo": 10 * W.size})
        return control.find("wi", W.size, 1.0, lambda tried: [bits_at(W, H, importance, t) for t in tried])

    scaled = {
        "hessians": (W, 16 * H, importance),
        "weights": (4 * W, H, importance),
        "importance": (W, H, 16 * importance),
    }
    np.testing.assert_allclose(first(*scaled[change]), 16 * first(W, H, importance), rtol=0.05)


@pytest.mark.parametrize("hopeless", ["starved", "zeros", "out_of_reach"])
def test_hopeless_matrices_do_not_break_it(hopeless):
    def some(i, matrix, W, H, importance):
        return matrix, W * (hopeless != "zeros" or i > 3), H * (hopeless != "starved" or i > 3), importance

    two_bits = (lambda bits: 2.0) if hopeless == "out_of_reach" else None
    _, lagrangians, _ = quantize_all(0.7, two_bits, all_layers=[some(i, *layer) for i, layer in enumerate(layers())])
    assert (lagrangians > 0).all() and np.isfinite(lagrangians.astype(np.float32)).all()


@pytest.mark.parametrize("experts", [1, 7, 8, 100, 128, 2048])
@pytest.mark.parametrize("weights", [100, 50_000, 12_779_520])
def test_experts_that_are_tried_are_enough_and_make_even_groups(experts, weights):
    few = trial_experts(experts, weights)
    assert few == experts or (few >= TRIAL_EXPERTS and few * weights >= TRIAL_WEIGHTS)
    assert few == experts or few < 2 * max(TRIAL_EXPERTS, TRIAL_WEIGHTS / weights + 1)
    if experts in (8, 128, 2048):
        assert experts % few == 0


# --- Settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_settings_that_are_not_given_are_the_methods_own(method):
    s = QuantizationSettings(method=method)
    ours = method == "rd"
    assert (s.router_weighted, s.sequential, s.asymmetric) == (ours,) * 3
    assert s.mask_special_tokens is not ours and s.shrinkage == 0
    # A field of other methods only is None.
    assert (s.activation_order, s.refits) == {"rd": (True, 2), "gptq": (False, 0), "rtn": (None, None)}[method]
    assert s.lagrangian is None and s.target_bits == (DEFAULT_TARGET_BITS if ours else None)
    assert s.calibrated is (method != "rtn")


def test_settings_that_are_given_are_kept():
    s = QuantizationSettings(
        method="rd",
        activation_order=False,
        mask_special_tokens=True,
        router_weighted=False,
        sequential=False,
        asymmetric=False,
        shrinkage=3.0,
        refits=0,
        lagrangian=0.5,
    )
    assert not (s.activation_order or s.router_weighted or s.sequential or s.asymmetric)
    assert s.mask_special_tokens and s.shrinkage == 3 and s.refits == 0
    assert s.lagrangian == 0.5 and s.target_bits is None
    s = QuantizationSettings(method="gptq", sequential=True, asymmetric=True, refits=1, activation_order=True)
    assert s.sequential and s.asymmetric and s.refits == 1 and s.activation_order


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(method="gptq", lagrangian=0.1), "only method 'rd'"),
        (dict(method="rtn", target_bits=0.7), "only method 'rd'"),
        (dict(method="rd", lagrangian=0.1, target_bits=0.7), "not both"),
        (dict(method="rd", bits=2), "give target_bits or steps instead"),
        (dict(method="gptq", group_size=16), "group_size: there is no such setting"),
        (dict(method="rtn", level_bits=4), "only method 'rd'"),
        (dict(method="rd", lagrangian=0.0), "lagrangian: found 0.0"),
        (dict(method="rd", lagrangian=float("nan")), "lagrangian: found nan"),
        (dict(method="rd", target_bits=float("inf")), "target_bits: found inf"),
        (dict(method="rd", target_bits=0.01), "target_bits: found 0.01, expected 0.05 to"),
        (dict(method="rd", target_bits=1.9, steps=0), "target_bits: found 1.9, .* what ternary weights can carry"),
        (dict(method="rd", target_bits=3.1), "target_bits: found 3.1, expected 0.05 to 3 bits"),
        (dict(method="rd", steps=8), r"steps: found 8, expected 0 \(ternary\) to 7"),
        (dict(method="rd", descents=-1), "descents: found -1"),
        (dict(method="rd", level_bits=8), "level_bits: found 8"),
        (dict(method="rd", refits=-1), "refits: found -1"),
        (dict(method="gptq", refits=2), "refits: found 2"),
        (dict(method="gptq", refits=1, bits=2), "only ternary levels"),
        (dict(method="gptq", asymmetric=True), "needs quantization.sequential"),
        (dict(method="rd", sequential=False), "needs quantization.sequential"),
        (dict(method="rd", shrinkage=-1.0), "shrinkage: found -1.0"),
        (dict(method="gptq", shrinkage=float("inf")), "shrinkage: found inf"),
    ],
    ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        QuantizationSettings(**settings)
