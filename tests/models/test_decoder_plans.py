"""What plans say that a layer and the loss of a decoder take on the device: about what XLA says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from random_decoders import CONFIGS

from qmoe_jax import streaming
from qmoe_jax.compression import planning
from qmoe_jax.models.decoder import stream
from qmoe_jax.models.families import family_of, preset
from qmoe_jax.quantization.settings import QuantizationSettings

ROWS, LENGTH = 4, 256


def shapes_below(config, prefixes):
    family = family_of(config)
    shapes = {n: s for n, s in family.param_shapes(config).items() if n.startswith(tuple(prefixes))}
    return {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items() if not family.expert_of(n)}


def taken(lowered, params):
    """Bytes beside parameters."""
    found = lowered.compile().memory_analysis()
    of_params = sum(4 * p.size for p in params.values())
    everything = found.temp_size_in_bytes + found.argument_size_in_bytes + found.output_size_in_bytes
    return everything - of_params


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_bytes_of_a_layer_and_of_the_loss(name):
    config = dataclasses.replace(CONFIGS[name], vocab_size=4096, tied=False)
    family = family_of(config)
    model, longest = family.streamed(config, np.float32), {stream.TEXT: LENGTH}
    x = jax.ShapeDtypeStruct((ROWS, LENGTH, config.d_model), jnp.float32)

    layer = model.layers[-1]
    params = shapes_below(config, [f"{layer.name}/"])
    nested = traverse_util.unflatten_dict({n.removeprefix(f"{layer.name}/"): p for n, p in params.items()}, sep="/")
    xla = taken(stream._layer.lower(layer.attend.args[0], nested, x), params)
    assert 0.9 * xla < family.attention_bytes(config, longest, ROWS * LENGTH) < 1.8 * xla

    params = shapes_below(config, model.losses_with)
    targets = (jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32),) * 2
    nested = traverse_util.unflatten_dict(params, sep="/")
    xla = taken(stream._losses.lower(model.losses.args[0], nested, x, targets), params)
    assert 0.8 * xla < family.loss_bytes(config, longest) < 1.8 * xla


@pytest.mark.parametrize(("name", "billions"), [("deepseek_v3", 671), ("kimi_k2", 1027), ("qwen3_30b_a3b", 30.5)])
def test_published_models_are_read_as_bfloat16(name, billions):
    config = preset(name)
    work = planning.greatest_workload(family_of(config).task, 100, 10, 512)
    found = planning.plan(
        config,
        work,
        streaming.Settings(),
        QuantizationSettings(),
        grids=planning.grids_of(config),
        is_cpu=False,
        resident_bytes=0,
    )
    assert found["read_bytes"] == pytest.approx(2e9 * billions, rel=0.01)
