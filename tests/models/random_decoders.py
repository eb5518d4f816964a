"""Tiny decoder-only models of every family, with every parameter random: ones and zeros would hide mistakes."""

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from qmoe_jax.models.decoder.config import Rope
from qmoe_jax.models.deepseek_v3 import DeepseekV3Config
from qmoe_jax.models.families import family_of
from qmoe_jax.models.gpt_oss import GptOssConfig
from qmoe_jax.models.gpt_oss.config import alternating
from qmoe_jax.models.mixtral import MixtralConfig
from qmoe_jax.models.olmoe import OlmoeConfig
from qmoe_jax.models.qwen3_moe import Qwen3MoeConfig

SIZES = dict(vocab_size=61, d_model=24, num_layers=3, num_heads=4, d_ff=16, num_experts=8, eos=(2,))
GROUPED = dict(SIZES, num_kv_heads=2, head_dim=8)
YARN = Rope(1e4, "yarn", 4.0, 8, mscale=1.0, mscale_all_dim=0.8)
CONFIGS = {
    "olmoe": OlmoeConfig(**GROUPED | {"num_kv_heads": 4, "head_dim": 6}, top_k=3, clip_qkv=1.5),
    "mixtral": MixtralConfig(**GROUPED, top_k=2, sliding_window=5),
    "qwen3_moe": Qwen3MoeConfig(**GROUPED, top_k=3, dense_ff=20, mlp_only_layers=(1,), tied=True),
    "deepseek_v3": DeepseekV3Config(
        **SIZES,
        top_k=3,
        dense_ff=20,
        first_k_dense=1,
        q_lora_rank=10,
        kv_lora_rank=12,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=5,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        rope=YARN,
    ),
    "gpt_oss": GptOssConfig(
        **GROUPED,
        top_k=2,
        layer_types=alternating(3),
        sliding_window=4,
        rope=Rope(1.5e5, "yarn", 4.0, 8, truncate=False),
    ),
}


def random_params(config, seed=0):
    """Parameters, nested, float32; kernels are such that activations keep their size."""
    rng, flat = np.random.RandomState(seed), {}
    for name, shape in family_of(config).param_shapes(config).items():
        values = rng.standard_normal(shape)
        if name.endswith("/scale"):
            values = 1 + 0.3 * values
        elif name.endswith(("/kernel", "/embedding")):
            values *= shape[-2] ** -0.5 if name.endswith("/kernel") else 1
        else:  # biases, sinks, corrections
            values *= 0.3
        flat[name] = jnp.asarray(values, jnp.float32)
    return traverse_util.unflatten_dict(flat, sep="/")


def model_and_params(name, dtype=jnp.float32, mesh=None, seed=0):
    config = CONFIGS[name]
    return family_of(config).model(config, dtype, mesh), random_params(config, seed)
