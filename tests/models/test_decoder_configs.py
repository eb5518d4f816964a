"""Architectures as config.json tells them: published ones, what is refused, and what is left out of files."""

import dataclasses
import math

import pytest
from random_decoders import CONFIGS

from qmoe_jax.errors import CheckpointError
from qmoe_jax.models.decoder.huggingface import check_quantization
from qmoe_jax.models.families import FAMILIES, PRESETS, family_of, mismatches
from qmoe_jax.models.names import COPY

COMMON = {"attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "use_cache": True}
YARN = {"beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
QWEN3 = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MIXTRAL = {
    "model_type": "mixtral",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 8,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {"quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05,
    "rope_scaling": YARN | {"factor": 32.0, "rope_type": "yarn", "truncate": False},
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
# Published config.json files, which are in the older style, and billions of parameters.
PUBLISHED = {
    "olmoe_1b_7b": (
        {
            "model_type": "olmoe",
            "attention_bias": False,
            "clip_qkv": None,
            "eos_token_id": 50279,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "max_position_embeddings": 4096,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 16,
            "num_key_value_heads": 16,
            "pad_token_id": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "vocab_size": 50304,
        },
        6.92,
    ),
    "mixtral_8x7b": (
        MIXTRAL
        | {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32}
        | {"max_position_embeddings": 32768},
        46.7,
    ),
    "mixtral_8x22b": (
        MIXTRAL
        | {"hidden_size": 6144, "intermediate_size": 16384, "num_attention_heads": 48, "num_hidden_layers": 56}
        | {"max_position_embeddings": 65536},
        140.6,
    ),
    "qwen3_30b_a3b": (
        QWEN3
        | {"hidden_size": 2048, "intermediate_size": 6144, "max_window_layers": 48, "moe_intermediate_size": 768}
        | {"num_attention_heads": 32, "num_hidden_layers": 48},
        30.5,
    ),
    "qwen3_235b_a22b": (
        QWEN3
        | {"hidden_size": 4096, "intermediate_size": 12288, "max_window_layers": 94, "moe_intermediate_size": 1536}
        | {"num_attention_heads": 64, "num_hidden_layers": 94},
        235.1,
    ),
    "deepseek_v3": (
        DEEPSEEK
        | {"model_type": "deepseek_v3", "bos_token_id": 0, "eos_token_id": 1, "first_k_dense_replace": 3}
        | {"n_group": 8, "n_routed_experts": 256, "topk_group": 4, "routed_scaling_factor": 2.5, "rope_theta": 10000}
        | {"num_attention_heads": 128, "num_key_value_heads": 128, "num_nextn_predict_layers": 1}
        | {"max_position_embeddings": 163840, "vocab_size": 129280}
        | {"rope_scaling": YARN | {"factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "type": "yarn"}},
        671.0,
    ),
    "kimi_k2": (
        DEEPSEEK
        | {"model_type": "kimi_k2", "bos_token_id": 163584, "eos_token_id": 163585, "first_k_dense_replace": 1}
        | {"n_group": 1, "n_routed_experts": 384, "topk_group": 1, "routed_scaling_factor": 2.827, "rope_theta": 5e4}
        | {"num_attention_heads": 64, "num_key_value_heads": 64, "num_nextn_predict_layers": 0}
        | {"max_position_embeddings": 131072, "vocab_size": 163840}
        | {"rope_scaling": YARN | {"beta_fast": 1, "factor": 32, "mscale": 1, "mscale_all_dim": 1, "type": "yarn"}},
        1026.4,
    ),
    "gpt_oss_20b": (GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32}, 20.9),
    "gpt_oss_120b": (GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128}, 116.8),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published(preset):
    described, billions = PUBLISHED[preset]
    config = PRESETS[preset]
    family = family_of(config)
    assert mismatches(family.huggingface.from_described(COMMON | described), config) == []
    weights = sum(math.prod(shape) for shape in family.param_shapes(config).values())
    assert weights / 1e9 == pytest.approx(billions, rel=2e-3)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_in_the_style_of_transformers_5(preset):
    old = COMMON | PUBLISHED[preset][0]
    scaling = dict(old.get("rope_scaling") or {})
    kind = scaling.pop("type", None) or scaling.pop("rope_type", "default")
    new = {name: value for name, value in old.items() if name not in ("rope_theta", "rope_scaling", "torch_dtype")}
    new |= {"rope_parameters": {**scaling, "rope_type": kind, "rope_theta": old["rope_theta"]}, "dtype": "bfloat16"}
    for a, b in (("num_experts", "num_local_experts"), ("num_local_experts", "num_experts")):
        if a in old:
            new[b] = new.pop(a)
    config = PRESETS[preset]
    assert family_of(config).huggingface.from_described(new) == family_of(config).huggingface.from_described(old)


FLOAT8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


@pytest.mark.parametrize(
    "preset, described",
    [
        ("deepseek_v3", {"quantization_config": FLOAT8}),
        ("deepseek_v3", {"quantization_config": FLOAT8 | {"scale_fmt": "ue8m0"}}),  # V3.1
        ("kimi_k2", {"quantization_config": FLOAT8}),
        ("gpt_oss_20b", {"quantization_config": MXFP4}),
        (
            "qwen3_30b_a3b",
            {"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0},
        ),  # Qwen3-Coder
    ],
)
def test_settings_of_published_models(preset, described):
    described = COMMON | PUBLISHED[preset][0] | described
    check_quantization(described)
    config = PRESETS[preset]
    assert mismatches(family_of(config).huggingface.from_described(described), config) == []


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_config_survives_json(name):
    config = CONFIGS[name]
    assert type(config).from_dict(config.to_dict()) == config
    family = family_of(config)
    assert (
        mismatches(family.huggingface.from_described(family.huggingface.to_described(config, "float32")), config) == []
    )


def refused(preset, **changes):
    described = {**COMMON, **PUBLISHED[preset][0], **changes}
    with pytest.raises(CheckpointError) as e:
        family_of(PRESETS[preset]).huggingface.from_described(described)
    return str(e.value)


@pytest.mark.parametrize(
    "preset, changes, named",
    [
        ("olmoe_1b_7b", {"hidden_act": "gelu"}, "hidden_act: found 'gelu'"),
        ("olmoe_1b_7b", {"rope_scaling": {"type": "longrope", "factor": 2}}, "rope_type: found 'longrope'"),
        ("olmoe_1b_7b", {"rope_scaling": {"type": "linear", "factor": 2, "low": 1}}, "rope setting low = 1"),
        ("olmoe_1b_7b", {"attention_softcap": 30.0}, "attention_softcap = 30.0"),
        ("olmoe_1b_7b", {"hidden_size": None}, "hidden_size: missing"),
        ("olmoe_1b_7b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("olmoe_1b_7b", {"num_experts_per_tok": 65}, "top_k: found 65"),
        ("olmoe_1b_7b", {"model_type": "olmo3"}, "model_type: found 'olmo3'"),
        ("mixtral_8x7b", {"num_key_value_heads": 5}, "multiple of num_kv_heads"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func: found 'softmax'"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method: found 'greedy'"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq: found 2"),
        ("deepseek_v3", {"n_group": 7}, "n_group 7"),
        ("gpt_oss_20b", {"layer_types": ["full_attention"]}, "layer_types"),
        ("gpt_oss_20b", {"experts_per_token": 5}, "contradict each other"),
        ("gpt_oss_20b", {"initial_context_length": 8192}, "initial_context_length: found 8192"),
        ("qwen3_30b_a3b", {"mlp_only_layers": list(range(48))}, "no layer has experts"),
    ],
)
def test_refused_by_name(preset, changes, named):
    assert named in refused(preset, **changes)


def test_all_problems_are_named_at_once():
    message = refused("deepseek_v3", hidden_act="relu", scoring_func="softmax", query_gate=True)
    assert all(name in message for name in ("hidden_act", "scoring_func", "query_gate"))


def test_overrides():
    family = FAMILIES["olmoe"]
    assert family.huggingface.from_described(COMMON | PUBLISHED["olmoe_1b_7b"][0], top_k=4).top_k == 4


def test_parameters_that_do_not_fit_are_named():
    config = CONFIGS["qwen3_moe"]
    family = family_of(config)
    shapes, described = family.param_shapes(config), family.huggingface.to_described(config, "float32")
    del shapes["model/norm/scale"]
    shapes["model/layers_0/mlp/router/kernel"] = (3, 3)
    shapes["model/layers_9/x"] = (1,)
    with pytest.raises(CheckpointError) as e:
        family.infer(shapes, described)
    for line in (
        "missing: model/norm/scale",
        "wrong shape: model/layers_0/mlp/router/kernel",
        "unknown: model/layers_9",
    ):
        assert line in str(e.value)
    with pytest.raises(CheckpointError, match=r"config\.json is needed"):
        family.infer(shapes)


def test_what_is_left_out_is_said():
    names, config = FAMILIES["deepseek_v3"].huggingface, PRESETS["deepseek_v3"]
    assert names.why_left_out(config, "model.layers.61.mlp.experts.0.up_proj.weight") == "multi-token head"
    assert names.why_left_out(config, "model.layers.62.mlp.experts.0.up_proj.weight") is None
    assert names.why_left_out(config, "model.layers.60.mlp.experts.0.up_proj.weight") is None
    none = dataclasses.replace(config, num_nextn_predict_layers=0)
    assert names.why_left_out(none, "model.layers.61.norm.weight") is None
    assert "config.json" in names.why_left_out(config, "model.layers.3.self_attn.rotary_emb.inv_freq")
    assert names.why_left_out(config, "lm_head.weight") is None
    assert names.why_left_out(dataclasses.replace(config, tied=True), "lm_head.weight") == COPY


def stored(config):
    """Names of all tensors that a model is written to, and nothing for their shapes."""
    names = family_of(config).huggingface
    return {t: () for n in family_of(config).param_shapes(config) for t in names.tensors(n, config).names}


def test_tensors_are_accounted_for():
    config = dataclasses.replace(CONFIGS["deepseek_v3"], num_nextn_predict_layers=1)
    names = family_of(config).huggingface
    described = names.to_described(config, "float32") | {"num_nextn_predict_layers": 1}
    head = {"model.layers.3.embed_tokens.weight": (), "model.layers.3.mlp.experts.7.up_proj.weight": ()}
    found = names.parameters({**stored(config), **head}, described)
    assert set(found) == set(family_of(config).param_shapes(config))
    with pytest.raises(CheckpointError, match=r"1 tensors are not of a DeepSeek-V3:\n  model.layers.4.other"):
        names.parameters({**stored(config), "model.layers.4.other": ()}, described)
    without = {t: s for t, s in stored(config).items() if t != "model.layers.2.mlp.experts.5.up_proj.weight"}
    with pytest.raises(CheckpointError, match="model/layers_2/mlp/experts/up_proj/kernel: 5"):
        names.parameters(without, described)


@pytest.mark.parametrize(
    "quantization, named",
    [
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            r"'compressed-tensors' \(format pack-quantized\) isn't read\. Take the model .* in bfloat16",
        ),
        ({"quant_method": "gptq", "bits": 4}, r"'gptq' \(bits 4\) isn't read"),
        ({"quant_method": "awq", "bits": 4}, r"'awq' \(bits 4\) isn't read"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes' .load_in_4bit True. isn't read"),
        ({"quant_method": "fp8", "weight_block_size": None}, "weight_block_size None"),
        (FLOAT8 | {"fmt": "e5m2"}, "float8 with fmt e5m2, expected e4m3"),
        ("int4", "quantization_config: found 'int4'"),
    ],
)
def test_formats_that_are_not_read(quantization, named):
    config = CONFIGS["qwen3_moe"]
    names = family_of(config).huggingface
    described = names.to_described(config, "float32") | {"quantization_config": quantization}
    with pytest.raises(CheckpointError, match=named):
        names.parameters(stored(config), described)


@pytest.mark.parametrize(
    "tensors, kind",
    [
        (("qweight", "qzeros", "scales", "g_idx"), "GPTQ or AWQ"),
        (("weight_packed", "weight_scale", "weight_shape"), "compressed-tensors"),
        (("weight", "weight.absmax", "weight.quant_state.bitsandbytes__nf4"), "bitsandbytes"),
    ],
)
def test_packed_weights_are_known_by_their_tensors(tensors, kind):
    config = CONFIGS["qwen3_moe"]
    names = family_of(config).huggingface
    projection = "model.layers.0.self_attn.q_proj"
    found = {n: s for n, s in stored(config).items() if n != f"{projection}.weight"}
    with pytest.raises(CheckpointError, match=f"packed by {kind}, such as '{projection}.*Take the model"):
        names.parameters(found | {f"{projection}.{t}": () for t in tensors}, names.to_described(config, "float32"))


def test_names_of_experts():
    names, config = FAMILIES["gpt_oss"].huggingface, PRESETS["gpt_oss_20b"]
    up = "model/layers_3/mlp/experts/up_proj/kernel"
    written = names.tensors(up, config)
    assert written.names == ("model.layers.3.mlp.experts.gate_up_proj",) and not written.transposed
    assert written.part.outputs(0, 4, 4) == slice(1, 8, 2)
    blocks, scales = (f"model.layers.3.mlp.experts.gate_up_proj_{kind}" for kind in ("blocks", "scales"))
    found, foreign = names.table.parameters([blocks, scales])
    assert not foreign and found[up].transposed and found[up].packed[0].beside == (scales,)
    assert found[up].shape({blocks: (32, 5760, 90, 16), scales: (32, 5760, 90)}) == (32, 2880, 2880)
    w3 = FAMILIES["mixtral"].huggingface.tensors("model/layers_0/mlp/experts/up_proj/kernel", PRESETS["mixtral_8x7b"])
    assert w3.names[7] == "model.layers.0.block_sparse_moe.experts.7.w3.weight" and len(w3.names) == 8
    with pytest.raises(KeyError):
        names.tensors("model/layers_3/mlp/experts/other/kernel", config)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_names_of_parameters(name):
    config = CONFIGS[name]
    family, layer = family_of(config), config.sparse_layers[0]
    shapes = family.param_shapes(config)
    for matrix in config.expert.matrices:
        parameter = family.expert_parameter(layer, matrix)
        assert family.expert_of(parameter) == (layer, matrix) and len(shapes[parameter]) == 3
    for bias in config.expert.biases:
        parameter = family.expert_parameter(layer, bias)
        assert family.expert_of(parameter) is None and len(shapes[parameter]) == 2
    small = [n for n in shapes if family.is_small(n)]
    assert f"{layer}/mlp/router/kernel" in small and "model/norm/scale" in small
    assert not any("proj" in n for n in small)
