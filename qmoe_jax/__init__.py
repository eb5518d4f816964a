"""QMoE in JAX: mixture-of-experts models below one bit per parameter, from native T5X checkpoints.

model, params = qmoe_jax.load("checkpoint")     # of any layout
logits = qmoe_jax.forward(model, params, encoder_input_tokens, decoder_input_tokens)
"""

from __future__ import annotations

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qmoe_jax import codecs, kernels, quantization
from qmoe_jax.checkpoints import CheckpointError, open_checkpoint
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.config import PRESETS, ModelConfig
from qmoe_jax.models.decoding import generate
from qmoe_jax.models.expert_parallel import check_mesh, expert_mesh, place_param
from qmoe_jax.models.switch import SwitchTransformer, as_tokens

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "CheckpointError",
    "CompressedExperts",
    "ModelConfig",
    "SwitchTransformer",
    "codecs",
    "expert_mesh",
    "forward",
    "generate",
    "kernels",
    "load",
    "open_checkpoint",
    "quantization",
]


def load(
    path: str | os.PathLike, *, dtype: Any = jnp.float32, mesh: Mesh | None = None, **overrides: Any
) -> tuple[SwitchTransformer, Any]:
    """The model and its whole parameter tree from a checkpoint of any layout.

    Args:
      path: a compressed checkpoint; a directory of Hugging Face's SwitchTransformers, or of a published QMoE
        model; or a T5X checkpoint: step directory, its parent (newest complete step), or file.
      dtype: of activations, float32 or bfloat16. Parameters keep the stored dtype.
      mesh: from `expert_mesh`: every layer's experts are spread over its devices; None: one device.
      **overrides: fields of `ModelConfig` that the checkpoint doesn't tell, such as top_k=2.

    Returns:
      The Flax model, and its parameters by T5X's names. Experts of a compressed checkpoint are `CompressedExperts`.

    Raises:
      CheckpointError: nothing readable there; says what was found and what was expected.
      ValueError: another dtype, fields that `ModelConfig` doesn't have, or devices that don't divide the experts.
    """
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"dtype {dtype!r}: expected float32 or bfloat16.")
    checkpoint = open_checkpoint(path, **overrides)
    if mesh is not None:
        check_mesh(mesh, checkpoint.config.num_experts)
    params = checkpoint.load(functools.partial(place_param, mesh=mesh))
    return SwitchTransformer(checkpoint.config, dtype, mesh), params


@functools.partial(jax.jit, static_argnames=("model", "capacity_factor"))
def _forward(model, params, encoder_input_tokens, decoder_input_tokens, decoder_target_tokens, capacity_factor):
    tokens = (encoder_input_tokens, decoder_input_tokens, decoder_target_tokens)
    return model.apply({"params": params}, *tokens, capacity_factor=capacity_factor)


def forward(
    model: SwitchTransformer,
    params: Any,
    encoder_input_tokens: jax.Array,
    decoder_input_tokens: jax.Array,
    decoder_target_tokens: jax.Array | None = None,
    capacity_factor: float | None = None,
) -> jax.Array:
    """Logits, float32 [batch, decoder length, vocabulary].

    Args:
      model: from `load`.
      params: from `load`.
      encoder_input_tokens: int32 [batch, length]; 0 is padding in all three.
      decoder_input_tokens: int32 [batch, decoder length], targets shifted right by one.
      decoder_target_tokens: int32 [batch, decoder length], which T5X makes its masks from; None: positions with a
        decoder input, and the first, are real.
      capacity_factor: T5X's evaluation capacity factor; None: no token is dropped.

    Raises:
      ValueError: token arrays don't fit each other, or hold ids that the model doesn't have.
    """
    given = {
        "encoder_input_tokens": encoder_input_tokens,
        "decoder_input_tokens": decoder_input_tokens,
        "decoder_target_tokens": decoder_target_tokens,
    }
    tokens = {n: as_tokens(n, t, model.config.vocab_size) for n, t in given.items() if t is not None}
    encoder, inputs = tokens["encoder_input_tokens"], tokens["decoder_input_tokens"]
    targets = tokens.get("decoder_target_tokens")
    if len(encoder) != len(inputs) or (targets is not None and targets.shape != inputs.shape):
        shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in tokens.items())
        raise ValueError(f"{shapes}: expected one batch size, and targets as long as the decoder's inputs.")
    return _forward(model, params, encoder, inputs, targets, capacity_factor)
