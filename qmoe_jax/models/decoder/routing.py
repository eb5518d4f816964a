"""Routers: which experts a token goes to, and by what their outputs are multiplied. Always in float32.

Gates are what is used in the end, renormalised and scaled where a model does so. Of equal scores the first are taken.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from qmoe_jax.models.common import fan_in_normal
from qmoe_jax.models.family import Routing


def softmax_then_choose(logits: jax.Array, top_k: int, renormalise: bool) -> Routing:
    """The `top_k` most probable experts: OLMoE, Mixtral, Qwen3-MoE.

    Args:
      logits: [..., experts].
      top_k: choices of a token.
      renormalise: gates are divided by their sum.

    Returns:
      [..., top_k] each.
    """
    gate, expert = jax.lax.top_k(jax.nn.softmax(logits), top_k)
    if renormalise:
        gate = gate / jnp.sum(gate, axis=-1, keepdims=True)
    return Routing(expert.astype(jnp.int32), gate)


def choose_then_softmax(logits: jax.Array, top_k: int) -> Routing:
    """The experts with the `top_k` largest logits, and the softmax over these: gpt-oss."""
    logit, expert = jax.lax.top_k(logits, top_k)
    return Routing(expert.astype(jnp.int32), jax.nn.softmax(logit))


def sigmoid_in_groups(
    logits: jax.Array, correction: jax.Array, top_k: int, groups: int, kept: int, renormalise: bool, scale: float
) -> Routing:
    """Scores are sigmoids; a correction, learnt to even the load, helps to choose, and isn't in the gates: DeepSeek-V3.

    Experts are in groups of consecutive ones. A group counts by the sum of its two best, and only experts of the `kept`
    best groups are chosen from (DeepSeek-AI 2024, section 2.1.2).

    Args:
      logits: [..., experts].
      correction: float32 [experts].
      top_k: choices of a token.
      groups: how many.
      kept: groups that a token's choices may come from.
      renormalise: gates are divided by their sum.
      scale: gates are multiplied by it, last.

    Returns:
      [..., top_k] each.
    """
    scores = jax.nn.sigmoid(logits)
    merit = scores + correction
    if kept < groups:
        in_groups = merit.reshape(*merit.shape[:-1], groups, -1)  # [..., groups, experts of a group]
        best_two = jnp.sum(jax.lax.top_k(in_groups, 2)[0], axis=-1)
        group = jax.lax.top_k(best_two, kept)[1]  # [..., kept]
        stays = jnp.any(group[..., None] == jnp.arange(groups), axis=-2)  # [..., groups]
        merit = jnp.where(stays[..., None], in_groups, -jnp.inf).reshape(merit.shape)
    expert = jax.lax.top_k(merit, top_k)[1]
    gate = jnp.take_along_axis(scores, expert, axis=-1)
    if renormalise:
        gate = gate / (jnp.sum(gate, axis=-1, keepdims=True) + 1e-20)
    return Routing(expert.astype(jnp.int32), gate * scale)


class Router(nn.Module):
    """Logits are h kernel + bias. `choose` makes choices of them; it gets the correction, too, if there is one."""

    shape: tuple[int, int]  # d_model, experts
    choose: Callable[..., Routing]
    biased: bool = False
    corrected: bool = False

    @nn.compact
    def __call__(self, h: jax.Array) -> Routing:
        """Routing [..., choices] of h [..., d_model]."""

        def vector(name: str) -> jax.Array:
            return self.param(name, nn.initializers.zeros, self.shape[1:], jnp.float32).astype(jnp.float32)

        kernel = self.param("kernel", fan_in_normal(self.shape[0]), self.shape, jnp.float32)
        logits = jnp.matmul(h.astype(jnp.float32), kernel.astype(jnp.float32), precision="highest")
        if self.biased:
            logits = logits + vector("bias")
        self.sow("intermediates", "logits", logits)
        return self.choose(logits, vector("correction")) if self.corrected else self.choose(logits)
