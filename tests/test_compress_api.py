"""`qmoe_jax.compress`, as README has it; old names of the package."""

import importlib
import warnings

import numpy as np
import pytest

import qmoe_jax
from qmoe_jax import moved


def test_compress_with_few_words(tiny, tmp_path):
    texts = dict(vocabulary=tiny.vocabulary, calibration=tiny.calibration, validation=tiny.validation)
    counts = dict(num_calibration=20, num_validation=7)
    report = qmoe_jax.compress(tiny.checkpoint, tmp_path / "out", target_bits=1.4, **texts, **counts)
    assert report["method"] == "rd" and report["target_bits"] == 1.4 and report["experts_total"] == 24
    model, params = qmoe_jax.load(tmp_path / "out")
    kernel = params["encoder"]["layers_0"]["mlp"]["expert"]["wi"]["kernel"]
    assert isinstance(kernel, qmoe_jax.CompressedExperts) and kernel.codec == "gap"
    tokens = np.ones((1, 4), np.int32)
    assert np.isfinite(qmoe_jax.forward(model, params, tokens, tokens)).all()
    with pytest.raises(ValueError, match="quantization.method: found 'magic'"):
        qmoe_jax.compress(tiny.checkpoint, tmp_path / "other", method="magic", **texts, **counts)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("module", sorted(set(moved.MODULES) - {"qmoe_jax.experiment"}))
def test_old_modules_lead_to_the_new_ones_with_a_warning(module):
    old, new = importlib.import_module(module), [importlib.import_module(m) for m in moved.MODULES[module]]
    name = next(n for n, value in vars(new[0]).items() if not n.startswith("_") and hasattr(value, "__module__"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = getattr(old, name)
    assert found is getattr(new[0], name)
    assert module == new[0].__name__ or any(name in str(w.message) for w in caught) or name in vars(old)
    with pytest.raises(AttributeError, match="no attribute 'not_there'"):
        old.not_there  # noqa: B018


def test_old_names_that_were_public():
    with pytest.warns(DeprecationWarning, match="quantization.pipeline.compress is now .*compress_examples"):
        from qmoe_jax.quantization.pipeline import compress  # noqa: F401
    with pytest.warns(DeprecationWarning, match="from_trits is now from_symbols"):
        experts = qmoe_jax.CompressedExperts.from_trits(np.ones((1, 2, 3), np.uint8), np.float32([[[-1, 1]] * 2]))
    np.testing.assert_array_equal(experts.to_dense(), -np.ones((1, 2, 3)))
