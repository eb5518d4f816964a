"""Settings of the other kinds of mixtures, and what experiments/studies/other_moes.py refuses."""

import importlib.util
import pathlib

import pytest
from test_convert import assert_fails, run  # noqa: F401, a fixture

from qmoe_jax.models.switch.config import ModelConfig

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def train_config():
    spec = importlib.util.spec_from_file_location("train_other_moes", ROOT / "configs/train_other_moes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config


@pytest.mark.long
def test_each_kind_is_a_model_of_its_own(train_config):
    models = {
        kind: ModelConfig.from_dict({**train_config(kind).model, "vocab_size": 100})
        for kind in ("gated", "tokens_choose", "experts_choose")
    }
    assert all(model.gated and not model.tied for model in models.values())
    assert [(m.top_k, m.experts_choose) for m in models.values()] == [(1, None), (2, None), (2, 1.0)]
    with pytest.raises(ValueError, match="expected one of gated, tokens_choose, experts_choose"):
        train_config("dense")


@pytest.mark.long
def test_models_are_given_by_kind(run, tmp_path):  # noqa: F811
    for model in ("dense=somewhere", "gated", ""):
        assert_fails(run("studies/other_moes", f"--model={model}", f"--output={tmp_path / 'out'}"), "expected KIND=DIR")
    assert_fails(run("studies/other_moes", f"--model=gated={tmp_path}", f"--output={tmp_path / 'out'}"), tmp_path)
