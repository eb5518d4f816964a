"""Inferring the architecture: known sizes, published parameter counts, and trees that aren't right."""

import dataclasses

import numpy as np
import pytest

from qmoe_jax.checkpoints.t5x import open_t5x
from qmoe_jax.errors import CheckpointError
from qmoe_jax.models.families import check_preset
from qmoe_jax.models.switch.config import PRESETS, ModelConfig
from qmoe_jax.models.switch.parameters import infer_config, param_shapes

SMALL = ModelConfig(
    vocab_size=512,
    d_model=80,
    d_ff=192,
    num_heads=3,
    head_dim=16,
    num_encoder_layers=4,
    num_decoder_layers=2,
    num_experts=8,
    encoder_sparse_layers=(1, 3),
    decoder_sparse_layers=(1,),
)
WI = "encoder/layers_1/mlp/expert/wi/kernel"


def shapes_of(path):
    return {name: spec.shape for name, spec in open_t5x(path).specs.items()}


BASE_TINY = dataclasses.replace(
    SMALL,
    d_model=64,
    d_ff=128,
    num_heads=4,
    num_decoder_layers=4,
    decoder_sparse_layers=(1, 3),
)


@pytest.mark.parametrize(
    ("fixture", "expected"),
    [
        ("switch_base_tiny", BASE_TINY),
        ("switch_base_tiny_orbax", BASE_TINY),
        ("switch_base_scan_tiny", dataclasses.replace(BASE_TINY, relpos_per_layer=True)),
        (
            "switch_c_tiny",
            dataclasses.replace(
                SMALL,
                num_encoder_layers=2,
                num_experts=16,
                encoder_sparse_layers=(0, 1),
                decoder_sparse_layers=(0, 1),
                tied=False,
                min_expert_capacity=2,
            ),
        ),
        (
            "switch_xxl_tiny",
            dataclasses.replace(
                BASE_TINY,
                num_encoder_layers=2,
                num_decoder_layers=2,
                num_experts=4,
                encoder_sparse_layers=(1,),
                decoder_sparse_layers=(1,),
                gated=True,
                tied=False,
                min_expert_capacity=2,
            ),
        ),
        (
            "switch_mini",
            dataclasses.replace(
                BASE_TINY,
                vocab_size=4100,
                d_model=128,
                d_ff=512,
                num_heads=8,
                num_experts=16,
                encoder_sparse_layers=(0, 1, 2, 3),
                decoder_sparse_layers=(0, 1, 2, 3),
            ),
        ),
    ],
)
def test_fixture(fixture, expected, fixture_path):
    assert infer_config(shapes_of(fixture_path(fixture))) == expected


def test_what_the_tree_does_not_tell_is_given(fixture_path):
    config = infer_config(shapes_of(fixture_path("tokens_choose_tiny")), top_k=2, min_expert_capacity=4)
    assert (config.top_k, config.min_expert_capacity) == (2, 4)
    assert (config.gated, config.tied, config.encoder_sparse_layers) == (True, False, (3,))


@pytest.mark.parametrize("name", PRESETS)
def test_published_models_are_inferred_from_their_shapes(name):
    expected = PRESETS[name]
    config = infer_config(param_shapes(expected), router_group_size=expected.router_group_size)
    assert config == expected
    check_preset(config, name)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("switch_base_128", 7.4), ("switch_large_128", 26.3), ("switch_xxl_128", 395), ("switch_c_2048", 1571)],
)
def test_published_parameter_counts(name, billions):
    """Fedus et al. 2021, Table 9."""
    count = sum(np.prod(shape, dtype=np.int64) for shape in param_shapes(PRESETS[name]).values())
    assert count / 1e9 == pytest.approx(billions, rel=0.02)


@pytest.mark.parametrize("changes", [{}, {"gated": True}, {"tied": False}, {"relpos_per_layer": True}])
def test_names_and_shapes_round_trip(changes):
    config = dataclasses.replace(SMALL, **changes)
    assert infer_config(param_shapes(config), min_expert_capacity=config.min_expert_capacity) == config


def test_all_mismatches_with_a_preset_are_reported():
    with pytest.raises(CheckpointError) as e:
        check_preset(dataclasses.replace(PRESETS["switch_base_128"], d_ff=4096, num_experts=64), "switch_base_128")
    assert "d_ff: found 4096, expected 3072" in str(e.value)
    assert "num_experts: found 64, expected 128" in str(e.value)
    with pytest.raises(ValueError, match="switch_base_8"):
        check_preset(SMALL, "no_such_model")


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (lambda name: False, "no encoder.*no decoder.*no experts"),
        (lambda name: not name.startswith("encoder"), "no encoder"),
        (lambda name: not name.startswith("decoder"), "no decoder"),
        (lambda name: "expert" not in name and "router" not in name, "no experts"),
    ],
    ids=["empty", "decoder only", "encoder only", "dense"],
)
def test_not_a_switch_transformer(keep, message):
    shapes = {name: shape for name, shape in param_shapes(SMALL).items() if keep(name)}
    with pytest.raises(CheckpointError, match=f"Not a Switch Transformer: .*{message}"):
        infer_config(shapes)


def test_everything_that_is_wrong_is_listed_at_once():
    shapes = param_shapes(SMALL)
    del shapes["decoder/layers_0/self_attention/out/kernel"]
    del shapes["encoder/layers_3/mlp/router/router_weights/w/kernel"]
    shapes[WI] = (7, 80, 192)
    shapes["encoder/encoder_norm/scale"] = (80, 1)
    shapes["encoder/layers_0/attention/query/bias"] = (48,)
    with pytest.raises(CheckpointError) as e:
        infer_config(shapes)
    assert "5 differ" in str(e.value)
    for line in (
        "missing: decoder/layers_0/self_attention/out/kernel, expected [48, 80]",
        "missing: encoder/layers_3/mlp/router/router_weights/w/kernel, expected [80, 8]",
        f"wrong shape: {WI}, found [7, 80, 192], expected [8, 80, 192]",
        "wrong shape: encoder/encoder_norm/scale, found [80, 1], expected [80]",
        "unknown: encoder/layers_0/attention/query/bias [48]",
    ):
        assert f"  {line}" in str(e.value).splitlines()


def test_missing_parameter_whose_size_nothing_else_tells():
    shapes = param_shapes(SMALL)
    del shapes["token_embedder/embedding"]
    del shapes["encoder/relpos_bias/rel_embedding"]
    del shapes["decoder/relpos_bias/rel_embedding"]
    with pytest.raises(CheckpointError) as e:
        infer_config(shapes)
    assert "missing: token_embedder/embedding, expected [vocab_size, 80]" in str(e.value)
    assert "missing: encoder/relpos_bias/rel_embedding, expected [num_heads, 32]" in str(e.value)
    assert "missing: decoder/relpos_bias/rel_embedding, expected [num_heads, 32]" in str(e.value)


def test_heads_that_do_not_divide_the_kernels():
    shapes = param_shapes(SMALL)
    for stack in ("encoder", "decoder"):
        shapes[f"{stack}/relpos_bias/rel_embedding"] = (5, 32)
    with pytest.raises(CheckpointError, match="48 columns.*5 heads"):
        infer_config(shapes)


def test_long_lists_are_cut_with_a_count():
    shapes = {name: shape for name, shape in param_shapes(SMALL).items() if "attention/" not in name}
    with pytest.raises(CheckpointError) as e:
        infer_config(shapes)
    missing = 4 * 4 + 2 * 8
    assert f"{missing} differ" in str(e.value)
    assert f"and {missing - 20} more" in str(e.value)


def test_st_moe_is_not_supported():
    shapes = param_shapes(SMALL)
    shapes["encoder/layers_1/extra_mlp/wi/kernel"] = (80, 192)
    shapes["encoder/layers_1/pre_extra_mlp_layer_norm/scale"] = (80,)
    with pytest.raises(CheckpointError, match="not supported: ST-MoE's extra MLP, 2 parameters"):
        infer_config(shapes)


def test_override_that_contradicts_the_tree():
    with pytest.raises(CheckpointError, match=r"missing: decoder/logits_dense/kernel, expected \[80, 512\]"):
        infer_config(param_shapes(SMALL), tied=False)
    with pytest.raises(ValueError, match="no_such_field"):
        infer_config(param_shapes(SMALL), no_such_field=1)
