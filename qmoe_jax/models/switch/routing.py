"""The router of Switch Transformers, and what capacity drops: T5X's rules."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.models.common import Kernel
from qmoe_jax.models.experts import apply_experts, apply_experts_in_slots, apply_experts_to_chosen
from qmoe_jax.models.family import Routing
from qmoe_jax.models.switch.config import ModelConfig
from qmoe_jax.models.switch.layers import MlpKernels


def route(probabilities: jax.Array, top_k: int) -> Routing:
    """The `top_k` most probable experts of each token; ties go to the lowest index, gates aren't renormalised."""
    gate, expert = jax.lax.top_k(probabilities, top_k)
    return Routing(expert.astype(jnp.int32), gate)


# --- capacity -------------------------------------------------------------------------------------------------------


def padded_shape(batch: int, length: int, multiple: int) -> tuple[int, int]:
    """Smallest enlargement of one axis that makes batch * length a multiple (T5X; a tie goes to the length)."""
    new_length = next(n for n in range(length, length + multiple) if batch * n % multiple == 0)
    new_batch = next(n for n in range(batch, batch + multiple) if n * length % multiple == 0)
    if (new_batch - batch) * length < batch * (new_length - length):
        return new_batch, length
    return batch, new_length


def num_groups(tokens: int, group_size: int, experts: int) -> int:
    """Smallest number of routing groups that divides the tokens, is a multiple of the experts, and is large enough."""
    least = max(tokens // group_size, experts)
    return next(g for g in range(least, tokens + 1) if tokens % g == 0 and g % experts == 0)


def expert_capacity(factor: float, tokens_per_group: int, experts: int, least: int) -> int:
    """Slots of an expert in one group."""
    return max(round(factor * tokens_per_group / experts), least)


def kept(routing: Routing, experts: int, groups: int, capacity: int, prioritized: bool) -> jax.Array:
    """Which choices find a free slot: bool [tokens, top_k].

    In each group of consecutive tokens slots are given in token order, or by falling first-choice probability when
    `prioritized`; all first choices come before any second choice.
    """
    top_k = routing.expert.shape[-1]
    expert = routing.expert.reshape(groups, -1, top_k)  # [groups, tokens, top_k]
    if prioritized:
        order = jnp.argsort(-routing.gate.reshape(groups, -1, top_k)[..., 0], axis=-1, stable=True)
    else:
        order = jnp.broadcast_to(jnp.arange(expert.shape[1]), expert.shape[:2])
    expert = jnp.take_along_axis(expert, order[..., None], axis=1)
    queue = expert.swapaxes(1, 2).reshape(groups, -1)  # [groups, top_k * tokens]: first choices, then second ones
    one_hot = jax.nn.one_hot(queue, experts, dtype=jnp.int32)
    position = jnp.sum((jnp.cumsum(one_hot, axis=1) - 1) * one_hot, axis=-1)
    free = (position < capacity).reshape(groups, top_k, -1).swapaxes(1, 2)  # [groups, tokens, top_k], in `order`
    back = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(free, back[..., None], axis=1).reshape(-1, top_k)


# --- experts choose -------------------------------------------------------------------------------------------------


def experts_choose(probabilities: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """The tokens that each expert takes (Zhou et al. 2022, section 3): of every group its `capacity` most probable.

    A token may be taken by several experts, or by none. Of equally probable tokens the first are taken.

    Args:
      probabilities: the router's, softmax over experts: [groups, tokens of a group, experts].
      capacity: at most the tokens of a group.

    Returns:
      Tokens, counted over all groups, int32 [experts, groups * capacity]; their probabilities, of the same shape.
    """
    groups, size, experts = probabilities.shape
    gate, token = jax.lax.top_k(probabilities.swapaxes(1, 2), capacity)  # [groups, experts, capacity]
    token = token + size * jnp.arange(groups)[:, None, None]
    flat = lambda t: t.swapaxes(0, 1).reshape(experts, -1)
    return flat(token.astype(jnp.int32)), flat(gate)


class RouterWeights(nn.Module):
    """Holds router_weights/w/kernel [d_model, experts]."""

    config: ModelConfig

    def setup(self):
        self.w = Kernel((self.config.d_model, self.config.num_experts), self.config.d_model)


class Router(nn.Module):
    """Router probabilities, always computed in float32."""

    config: ModelConfig

    def setup(self):
        self.router_weights = RouterWeights(self.config)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [..., experts] of x [..., d_model]."""
        return jnp.matmul(x.astype(jnp.float32), self.router_weights.w().astype(jnp.float32), precision="highest")


class MoeMlp(nn.Module):
    """Mixture of experts (Fedus et al. 2021, section 2), evaluated as T5X does."""

    config: ModelConfig
    dtype: jnp.dtype
    prioritized: bool  # Batch-prioritised slots at finite capacity.
    experts_choose: bool = False  # Instead of the tokens.
    mesh: Mesh | None = None  # Over whose devices the experts are.

    def setup(self):
        self.router = Router(self.config)
        self.expert = MlpKernels(self.config, (self.config.num_experts,))

    def route(self, x: jax.Array) -> Routing:
        """Routing of x [batch, length, d_model], no token dropped: [batch, length, top_k] each.

        Where experts choose, each has a column [batch, length, experts]: expert `num_experts`, gate 0 for tokens that
        it didn't choose.
        """
        if not self.experts_choose:
            return route(jax.nn.softmax(self.router(x)), self.config.top_k)
        padded, _, token, gate = self._choose(x)
        experts = jnp.arange(self.config.num_experts, dtype=jnp.int32)
        gates = jnp.zeros((*padded.shape[:2], len(experts))).reshape(-1, len(experts))
        gates = gates.at[token, experts[:, None]].set(gate).reshape(*padded.shape[:2], -1)
        gates = gates[: x.shape[0], : x.shape[1]]
        return Routing(jnp.where(gates > 0, experts, len(experts)), gates)

    def _pad(self, x: jax.Array) -> jax.Array:
        """Padding tokens are zero vectors that compete like any other."""
        batch, length = padded_shape(x.shape[0], x.shape[1], self.config.num_experts)
        return jnp.pad(x, ((0, batch - x.shape[0]), (0, length - x.shape[1]), (0, 0)))

    def _choose(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """x [batch, length, d_model] with padding, the router's logits, and `experts_choose` in T5X's groups."""
        c, padded = self.config, self._pad(x)
        assert c.experts_choose is not None
        logits = self.router(padded)
        tokens = logits.shape[0] * logits.shape[1]
        groups = num_groups(tokens, c.router_group_size, c.num_experts)
        size = tokens // groups
        capacity = expert_capacity(c.experts_choose, size, c.num_experts, c.min_expert_capacity)
        probabilities = jax.nn.softmax(logits).reshape(groups, size, c.num_experts)
        # T5X has no answer for groups smaller than the least capacity; here every expert takes all of them.
        return padded, logits, *experts_choose(probabilities, min(capacity, size))

    def __call__(self, x: jax.Array, capacity_factor: float | None) -> jax.Array:
        """x [batch, length, d_model] -> the same shape; no token is dropped when `capacity_factor` is None.

        Where experts choose, capacity is the config's.
        """
        if self.experts_choose:
            return self._experts_choose(x)
        c = self.config
        batch, length, width = x.shape
        padded = x if capacity_factor is None else self._pad(x)
        tokens = padded.reshape(-1, width)
        logits = self.router(tokens)
        routing = route(jax.nn.softmax(logits), c.top_k)
        kernels = self.expert.kernels()
        if capacity_factor is not None:
            groups = num_groups(len(tokens), c.router_group_size, c.num_experts)
            capacity = expert_capacity(capacity_factor, len(tokens) // groups, c.num_experts, c.min_expert_capacity)
            free = kept(routing, c.num_experts, groups, capacity, self.prioritized)
            routing = Routing(routing.expert, jnp.where(free, routing.gate, 0.0))
        # T5X's least capacity makes mostly empty slots of a small batch; then sorting is cheaper.
        bounded = capacity_factor is not None and c.num_experts * groups * capacity <= 4 * routing.expert.size
        if not bounded or self.mesh is not None or any(isinstance(k, CompressedExperts) for k in kernels.values()):
            y = apply_experts(c.expert, tokens, routing, kernels, self.mesh)
        else:
            y = apply_experts_in_slots(c.expert, tokens, routing, kernels, min(groups * capacity, len(tokens)))

        def unpad(t):
            return t.reshape(*padded.shape[:2], -1)[:batch, :length]

        self.sow("intermediates", "router_logits", unpad(logits))
        self.sow("intermediates", "expert_index", unpad(routing.expert))
        self.sow("intermediates", "combine_weight", unpad(routing.gate))
        return unpad(y)

    def _experts_choose(self, x: jax.Array) -> jax.Array:
        padded, logits, token, gate = self._choose(x)
        y = apply_experts_to_chosen(
            self.config.expert, padded.reshape(-1, x.shape[-1]), token, gate, self.expert.kernels(), self.mesh
        ).reshape(padded.shape)
        self.sow("intermediates", "router_logits", logits[: x.shape[0], : x.shape[1]])
        return y[: x.shape[0], : x.shape[1]]
