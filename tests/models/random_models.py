"""Small random models and documents, so that the model is tested where no checkpoint is."""

import dataclasses

import numpy as np
from flax import traverse_util

from qmoe_jax.checkpoints import param_shapes
from qmoe_jax.models.switch.config import ModelConfig

# One dense and one sparse layer per stack, and heads * head_dim other than d_model.
SWITCH = ModelConfig(
    vocab_size=40,
    d_model=12,
    d_ff=20,
    num_heads=2,
    head_dim=5,
    num_encoder_layers=2,
    num_decoder_layers=2,
    num_experts=4,
    encoder_sparse_layers=(1,),
    decoder_sparse_layers=(0,),
    min_expert_capacity=1,
)
CONFIGS = {
    "relu, tied, top-1": SWITCH,
    "gated, untied, top-2, own position biases": dataclasses.replace(
        SWITCH, gated=True, tied=False, top_k=2, relpos_per_layer=True, num_experts=3, decoder_sparse_layers=(0, 1)
    ),
}

# Gated and untied; experts choose in the encoder, among the tokens of a batch; top-2 in the decoder.
EXPERTS_CHOOSE = dataclasses.replace(
    SWITCH, gated=True, tied=False, top_k=2, experts_choose=1.0, encoder_sparse_layers=(0, 1), router_group_size=8
)


def random_params(config: ModelConfig, seed: int = 0):
    """Nested float32 parameters, large enough for routing and attention to be decided."""
    rng = np.random.default_rng(seed)
    flat = {}
    for name, shape in param_shapes(config).items():
        value = rng.normal(size=shape)
        if name.endswith("scale"):
            value = 1 + 0.2 * value
        elif name.endswith("kernel"):
            value = value * shape[-2] ** -0.5
        flat[name] = value.astype(np.float32)
    return traverse_util.unflatten_dict(flat, sep="/")


def random_pairs(config: ModelConfig, lengths, seed: int = 0):
    """Corrupted documents (encoder int32 [Le], decoder int32 [Ld]) of the given (Le, Ld); the decoder starts with 0."""
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.integers(2, config.vocab_size, n).astype(np.int32)
    return [(draw(e), np.append(np.int32(0), draw(d - 1))) for e, d in lengths]


def padded(pairs, encoder_length=None, decoder_length=None):
    """(encoder tokens, decoder inputs, decoder targets), int32 [documents, length] each, padded with 0."""
    encoder_length = encoder_length or max(len(e) for e, _ in pairs)
    decoder_length = decoder_length or max(len(d) - 1 for _, d in pairs)
    tokens = [np.zeros((len(pairs), n), np.int32) for n in (encoder_length, decoder_length, decoder_length)]
    for row, (encoder, decoder) in enumerate(pairs):
        for array, ids in zip(tokens, (encoder, decoder[:-1], decoder[1:]), strict=True):
            array[row, : len(ids)] = ids
    return tokens
