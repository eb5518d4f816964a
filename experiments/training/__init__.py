"""What train.py trains, a file for each task that models are trained for.

Each has a class that is made from the config (`configs/train_*.py`) and offers

    model, tokens                     the Flax module, without parameters; how many tokens of text there are
    init(key) -> params
    batches(rng) -> iterator          endless tuples of arrays, for `losses`
    losses(params, batch) -> Losses   of one batch, differentiable
    save(workdir, params, step)       the checkpoint, in bfloat16
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Losses(NamedTuple):
    """Of a batch, float32 scalars: cross-entropy per predicted token; of routers, means over sparse layers."""

    loss: jax.Array
    balance: jax.Array
    z: jax.Array


class Router(NamedTuple):
    """Of one sparse layer: logits float32 [batch, length, experts], and which tokens are real, bool [batch, length].

    Experts that choose their tokens are `balanced` already.
    """

    logits: jax.Array
    real: jax.Array
    balanced: bool = False


def router_losses(routers: Iterable[Router], top_k: int) -> tuple[jax.Array, jax.Array]:
    """Balance loss, of those not balanced already, and z loss (Zoph et al. 2022, equation 5); means over `routers`."""
    routers = list(routers)
    balance = jnp.stack([balance_loss(r.logits, r.real, top_k) for r in routers if not r.balanced])
    z = jnp.stack([jnp.mean(jax.nn.logsumexp(r.logits, -1) ** 2, where=r.real) for r in routers])
    return balance.mean(), z.mean()


def balance_loss(logits: jax.Array, mask: jax.Array, top_k: int = 1) -> jax.Array:
    """experts * sum_e f_e P_e, with f_e the share of real tokens routed to e and P_e its mean probability.

    (Fedus et al. 2021, equation 4.) `logits` are [batch, length, experts], `mask` is bool [batch, length]. At least
    about `top_k`, where tokens are spread evenly.
    """
    experts = logits.shape[-1]
    probabilities = jax.nn.softmax(logits)
    chosen = jax.nn.one_hot(jax.lax.top_k(logits, top_k)[1], experts).sum(-2)
    weight = (mask / jnp.sum(mask))[..., None]
    return experts * jnp.sum(jnp.sum(chosen * weight, (0, 1)) * jnp.sum(probabilities * weight, (0, 1)))
