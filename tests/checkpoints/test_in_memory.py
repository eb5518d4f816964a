"""Models in memory as checkpoints, and written in Hugging Face's layout."""

import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from models.random_decoders import CONFIGS, random_params

from qmoe_jax.checkpoints import CheckpointError, open_checkpoint
from qmoe_jax.checkpoints.in_memory import InMemoryCheckpoint, write_huggingface


def flat(params):
    return {name: np.asarray(value) for name, value in traverse_util.flatten_dict(params, sep="/").items()}


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])  # experts one by one, and in one tensor
def test_what_is_written_is_read(family, tmp_path):
    config, params = CONFIGS[family], random_params(CONFIGS[family])
    write_huggingface(tmp_path / "out", config, params)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    written = open_checkpoint(tmp_path / "out")
    assert written.config.to_dict() | {"max_length": 0} == config.to_dict() | {"max_length": 0}
    found = flat(written.load())
    assert found.keys() == flat(params).keys()
    for name, value in flat(params).items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_dtype(tmp_path):
    config, params = CONFIGS["olmoe"], random_params(CONFIGS["olmoe"])
    write_huggingface(tmp_path, config, params, dtype="bfloat16")
    write_huggingface(tmp_path, config, params, dtype="bfloat16")  # again, over it
    name = "model/norm/scale"
    value = open_checkpoint(tmp_path).read(name)
    np.testing.assert_array_equal(value, flat(params)[name].astype(ml_dtypes.bfloat16))
    with pytest.raises(ValueError, match="float16"):
        write_huggingface(tmp_path, config, params, dtype="float16")


def test_parameters_that_do_not_fit_are_all_named(tmp_path):
    config, params = CONFIGS["olmoe"], flat(random_params(CONFIGS["olmoe"]))
    del params["model/norm/scale"]
    params["lm_head/kernel"] = params["lm_head/kernel"].T
    params["model/extra"] = np.zeros(3)
    with pytest.raises(CheckpointError) as error:
        write_huggingface(tmp_path / "out", config, params)
    for name in ("model/norm/scale", "lm_head/kernel", "model/extra"):
        assert name in str(error.value)
    assert not (tmp_path / "out").exists()


def test_slices():
    config, params = CONFIGS["olmoe"], random_params(CONFIGS["olmoe"])
    checkpoint = InMemoryCheckpoint(config, params)
    layer = config.sparse_layers[1]
    kernels = checkpoint.read_experts(layer, 2, 5)
    whole = flat(params)
    for matrix, name in checkpoint.matrices(layer).items():
        np.testing.assert_array_equal(kernels[matrix], whole[name][2:5])
