"""Architectures: the published sizes, where sparse layers sit, and the way to a dict and back."""

import dataclasses
import json
import math

import pytest

from qmoe_jax.checkpoints import param_shapes
from qmoe_jax.models.families import mismatches, preset
from qmoe_jax.models.switch.config import PRESETS, ModelConfig, mixed


def count(name: str) -> tuple[int, int]:
    """Parameters of a published model: all, and those of experts."""
    sizes = {n: math.prod(shape) for n, shape in param_shapes(preset(name)).items()}
    return sum(sizes.values()), sum(size for n, size in sizes.items() if "/mlp/expert/" in n)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("switch_base_128", 7), ("switch_large_128", 26), ("switch_xxl_128", 395), ("switch_c_2048", 1571)],
)
def test_presets_have_as_many_parameters_as_switch_transformers_table_9(name, billions):
    parameters, _ = count(name)
    assert int(parameters / 1e9) == pytest.approx(billions, abs=1)


@pytest.mark.parametrize(
    ("name", "gigabytes"), [("switch_base_128", 14.9), ("switch_large_128", 52.7), ("switch_c_2048", 3142)]
)
def test_bfloat16_sizes_are_those_of_qmoe_table_6(name, gigabytes):
    parameters, _ = count(name)
    # In units of 1e9 bytes. Tied models fall short by less than 0.1, one more embedding.
    assert 2 * parameters / 1e9 == pytest.approx(gigabytes, rel=0.005)


def test_experts_of_switch_c():
    _, experts = count("switch_c_2048")
    assert experts == 30 * 2048 * 2 * 2080 * 6144  # 1.57e12


def test_every_size_in_the_bucket_has_a_preset():
    sizes = [f"switch_base_{e}" for e in (8, 16, 32, 64, 128, 256)]
    assert list(PRESETS) == [*sizes, "switch_large_128", "switch_xxl_128", "switch_c_2048"]
    for name, config in PRESETS.items():
        assert config.num_experts == int(name.split("_")[-1])
        assert len(config.sparse_layers) == (30 if name == "switch_c_2048" else 24 if config.d_model > 768 else 12)


def test_unknown_preset_names_those_there_are():
    with pytest.raises(ValueError, match=r"switch_base_100.*switch_base_8, .*switch_c_2048"):
        preset("switch_base_100")


@pytest.mark.parametrize(
    ("layers", "sparse", "placed"),
    [
        (12, 6, (1, 3, 5, 7, 9, 11)),
        (24, 12, tuple(range(1, 24, 2))),
        (15, 15, tuple(range(15))),
        (12, 3, (3, 7, 11)),
        (4, 1, (3,)),
    ],
)
def test_mixed_placement_of_sparse_layers(layers, sparse, placed):
    assert mixed(layers, sparse) == placed


def test_sparse_layers_are_named_encoder_first():
    config = dataclasses.replace(PRESETS["switch_base_8"], encoder_sparse_layers=(1, 10), decoder_sparse_layers=(0,))
    assert config.sparse_layers == ("encoder/layers_1", "encoder/layers_10", "decoder/layers_0")


@pytest.mark.parametrize("name", PRESETS)
def test_dict_round_trip_through_json(name):
    config = PRESETS[name]
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config), "it is a static argument of jitted functions"


def test_all_unknown_and_missing_fields_are_listed():
    fields = PRESETS["switch_base_8"].to_dict()
    del fields["d_ff"], fields["num_heads"]
    with pytest.raises(ValueError, match=r"unknown fields \['depth', 'topk'\].*missing fields \['d_ff', 'num_heads'\]"):
        ModelConfig.from_dict({**fields, "topk": 2, "depth": 3})


def test_fields_with_defaults_may_be_left_out():
    fields = PRESETS["switch_base_8"].to_dict()
    for name in ("gated", "tied", "relpos_per_layer", "top_k", "batch_prioritized"):
        del fields[name]
    assert ModelConfig.from_dict(fields) == PRESETS["switch_base_8"]


def test_mismatches_lists_all_that_a_parameter_tree_tells_and_no_routing_settings():
    expected = PRESETS["switch_base_8"]
    found = dataclasses.replace(expected, d_ff=2048, tied=False, top_k=2, router_group_size=16)
    assert mismatches(found, expected) == ["d_ff: found 2048, expected 3072", "tied: found False, expected True"]
    assert mismatches(expected, expected) == []
