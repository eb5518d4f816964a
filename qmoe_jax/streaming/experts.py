"""The experts of a layer on the rows that are routed to them, group by group."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.models.expert_parallel import part_of_mesh, place_batch, place_experts
from qmoe_jax.models.experts import apply_experts, grouped, single
from qmoe_jax.models.family import Expert, Routing
from qmoe_jax.streaming.buffers import Rows
from qmoe_jax.streaming.settings import Settings


class Routed:
    """Which rows go to which expert: expert, gate [rows, choices]. Expert `num_experts`: no choice."""

    def __init__(self, expert: np.ndarray, gate: np.ndarray, num_experts: int):
        self.expert, self.gate = expert, gate
        # Rows in the order of their experts, and where each expert's begin, for each choice.
        self.orders = [np.argsort(choice, kind="stable") for choice in expert.T]
        bounds = np.arange(num_experts + 1)
        self.begins = [np.searchsorted(c[order], bounds) for c, order in zip(expert.T, self.orders, strict=True)]

    def to_expert(self, e: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows that have chosen expert e, in order, and their gates."""
        routed = [order[b[e] : b[e + 1]] for order, b in zip(self.orders, self.begins, strict=True)]
        rows = np.concatenate(routed)
        gates = np.concatenate([self.gate[rows, choice] for choice, rows in enumerate(routed)])
        in_order = np.argsort(rows)
        return rows[in_order], gates[in_order]


class ExpertGroup(NamedTuple):
    """Experts start:stop of a layer, and what arrives at them.

    Attributes:
      layer: its name.
      stream: whose activations arrive.
      expert: what the experts are.
      start: first expert.
      stop: one past the last expert.
      kernels: by name, [experts, in, out] or `CompressedExperts`; biases, where there are any, [experts, out].
      inputs: inputs of the experts, of all tokens [tokens, d_model], in the list buffers' order. With several
        processes, `Rows` of those that are routed to the group.
      tokens: per expert of the group, the tokens routed to it as any of their choices, or that it chose (rows of
        `inputs`), in order.
      gates: per expert, the gate by which its output is multiplied for each of these tokens, float32.
    """

    layer: str
    stream: str
    expert: Expert
    start: int
    stop: int
    kernels: dict[str, Any]
    inputs: np.ndarray | Rows
    tokens: Sequence[np.ndarray]
    gates: Sequence[np.ndarray]


class Delivery(NamedTuple):
    """A group of experts, the rows that are to go through it, and where the results go.

    Attributes:
      start, stop, kernels, inputs: as in `ExpertGroup`.
      h: [rows, d_model], inputs of the experts.
      routed: which of these rows go to which expert.
      results: [rows, d_model], to which gate * expert(h) is added.
      tokens: int [rows], which token of all each row is, rising; None: row i is token i.
    """

    start: int
    stop: int
    kernels: dict[str, Any]
    h: np.ndarray
    routed: Routed
    results: np.ndarray
    inputs: np.ndarray | Rows
    tokens: np.ndarray | None = None

    def group(self, layer: str, stream: str, expert: Expert) -> ExpertGroup:
        """What a quantizer sees of it."""
        rows, gates = zip(*map(self.routed.to_expert, range(self.start, self.stop)), strict=True)
        tokens = rows if self.tokens is None else [self.tokens[r] for r in rows]
        return ExpertGroup(
            layer, stream, expert, self.start, self.stop, self.kernels, self.inputs, list(tokens), list(gates)
        )


def add_experts(delivery: Delivery, expert: Expert, kernels: dict[str, Any], settings: Settings) -> None:
    """results += gate * expert(h), with these kernels in place of the delivery's."""
    is_compressed = isinstance(kernels[expert.last], CompressedExperts)
    add = _add_group if settings.mesh is not None or is_compressed else _add_one_by_one
    add(delivery, expert, kernels, settings)


def _add_one_by_one(delivery: Delivery, expert: Expert, kernels: dict[str, Any], settings: Settings) -> None:
    """Expert by expert, so that what a token gets doesn't depend on which experts make a group, to the bit."""
    device, h = jax.local_devices()[0], delivery.h
    for e in range(delivery.start, delivery.stop):
        rows_of_e, gates = delivery.routed.to_expert(e)
        if not len(rows_of_e):
            continue
        own = jax.device_put({m: kernel[e - delivery.start] for m, kernel in kernels.items()}, device)
        for chunk in chunks(np.arange(len(rows_of_e)), settings.tokens_per_expert_call):
            rows, gate = rows_of_e[chunk], gates[chunk]
            padded = _pad(rows, len(h))
            y = _gated_expert(
                expert, np.take(h, padded, axis=0, mode="clip"), np.pad(gate, (0, len(padded) - len(rows))), own
            )
            delivery.results[rows] += np.asarray(y)[: len(rows)]


def _add_group(delivery: Delivery, expert: Expert, kernels: dict[str, Any], settings: Settings) -> None:
    """All rows of a group of experts at once."""
    start, stop, routed, h = delivery.start, delivery.stop, delivery.routed, delivery.h
    mesh = None if settings.mesh is None else part_of_mesh(settings.mesh, stop - start)
    kernels = {m: place_experts(kernel, mesh) for m, kernel in kernels.items()}
    for choice, (order, begins) in enumerate(zip(routed.orders, routed.begins, strict=True)):
        group = order[begins[start] : begins[stop]]  # In one choice no row occurs twice.
        own, gate = routed.expert[:, choice] - start, routed.gate[:, choice]
        if mesh is not None:
            group = np.sort(group)
        for rows in chunks(group, settings.tokens_per_expert_call):
            padded = _pad(rows, len(h))
            inputs = np.take(h, padded, axis=0, mode="clip")
            gates = np.take(gate, padded, mode="clip")
            if mesh is not None:
                whose = np.full(len(padded), stop - start, np.int32)
                whose[: len(rows)] = own[rows]
                y = _experts_over_mesh(expert, mesh, *place_batch((inputs, whose, gates), mesh), kernels)
            else:
                sizes = np.bincount(own[rows], minlength=stop - start)
                y = _gated_experts(expert, inputs, gates, kernels, sizes.astype(np.int32))
            delivery.results[rows] += np.asarray(y)[: len(rows)]


def chunks(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for i in range(0, len(rows), size):
        yield rows[i : i + size]


def _pad(rows: np.ndarray, fill: int) -> np.ndarray:
    """Rows, and `fill` up to a power of two, so that few shapes are compiled."""
    padded = np.full(max(16, 1 << (len(rows) - 1).bit_length()), fill)
    padded[: len(rows)] = rows
    return padded


@functools.partial(jax.jit, static_argnums=0)
def _gated_expert(expert: Expert, h, gate, kernels):
    """gate * expert(h) for one expert's rows; kernels [in, out]."""
    return gate[:, None].astype(h.dtype) * expert(h, kernels, single)


@functools.partial(jax.jit, static_argnums=0)
def _gated_experts(expert: Expert, h, gate, kernels, group_sizes):
    """gate * expert(h) for rows sorted by expert."""
    return gate[:, None].astype(h.dtype) * expert(h, kernels, grouped(group_sizes))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _experts_over_mesh(expert: Expert, mesh: Mesh, h, index, gate, kernels):
    return apply_experts(expert, h, Routing(index[:, None], gate[:, None]), kernels, mesh)
