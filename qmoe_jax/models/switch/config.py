"""What a Switch Transformer is made of: one frozen description, and the published sizes by name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from qmoe_jax.models.family import Expert
from qmoe_jax.models.fields import from_dict, problems_of_counts, problems_of_fields


def _relu(hidden: Sequence[jax.Array]) -> jax.Array:
    return jax.nn.relu(hidden[0])


def _gated_gelu(hidden: Sequence[jax.Array]) -> jax.Array:
    gate, up = hidden
    return jax.nn.gelu(gate, approximate=True) * up  # The tanh approximation, as T5X has it.


_SIZES = ("vocab_size", "d_model", "d_ff", "num_heads", "head_dim", "num_experts", "router_group_size")
PLAIN = Expert(("wi", "wo"), _relu)
GATED = Expert(("wi_0", "wi_1", "wo"), _gated_gelu)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of an encoder-decoder mixture of experts.

    Everything up to `relpos_per_layer` can be read off a checkpoint's parameter tree; what follows can't, and defaults
    to what Switch Transformers use.

    Attributes:
      vocab_size: rows of the embedding (padded size; the vocabulary may be smaller).
      d_model: width of the residual stream.
      d_ff: width of the hidden layer of dense and expert MLPs.
      num_heads: attention heads.
      head_dim: width of one head; num_heads * head_dim may differ from d_model.
      num_encoder_layers: encoder layers, dense and sparse together.
      num_decoder_layers: decoder layers, dense and sparse together.
      num_experts: experts per sparse layer.
      encoder_sparse_layers: indices of the encoder layers whose MLP is a mixture of experts.
      decoder_sparse_layers: the same for the decoder.
      gated: MLPs are gelu(x wi_0) * (x wi_1) wo instead of relu(x wi) wo.
      tied: logits use the embedding, scaled by 1 / sqrt(d_model), instead of decoder.logits_dense.
      relpos_per_layer: every layer has its own relative position bias (checkpoints of scanned models), instead of one
        per stack.
      top_k: experts per token, where tokens choose.
      experts_choose: capacity factor of the encoder's sparse layers if experts choose there, as in T5X's "experts
        choose" models (1.0): each takes its most probable tokens, factor * tokens / experts of every group. None:
        tokens choose. In the decoder they always do.
      batch_prioritized: in the encoder, tokens with a higher router probability get their slot first (matters only at
        finite capacity). None: when top_k > 1, as in T5X's "tokens choose" models.
      router_group_size: T5X's GROUP_SIZE, tokens per routing group (finite capacity, and where experts choose).
      min_expert_capacity: least slots per expert and group (likewise).
    """

    vocab_size: int
    d_model: int
    d_ff: int
    num_heads: int
    head_dim: int
    num_encoder_layers: int
    num_decoder_layers: int
    num_experts: int
    encoder_sparse_layers: tuple[int, ...]
    decoder_sparse_layers: tuple[int, ...]
    gated: bool = False
    tied: bool = True
    relpos_per_layer: bool = False
    top_k: int = 1
    experts_choose: float | None = None
    batch_prioritized: bool | None = None
    router_group_size: int = 8192
    min_expert_capacity: int = 4

    def __post_init__(self):
        for name in ("encoder_sparse_layers", "decoder_sparse_layers"):
            if isinstance(getattr(self, name), list):  # JSON has no tuples.
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if problems := problems_of_fields(self):
            raise ValueError(f"Model config: {'; '.join(problems)}.")
        counts = {name: getattr(self, name) for name in ("num_encoder_layers", "num_decoder_layers")}
        problems = problems_of_counts(counts, self.num_experts) + [
            f"{name}: found {getattr(self, name)}, expected at least 1"
            for name in (*counts, *_SIZES)
            if getattr(self, name) < 1
        ]
        if not 1 <= self.top_k <= self.num_experts:
            problems.append(f"top_k: found {self.top_k}, expected 1 to {self.num_experts} (num_experts)")
        if self.experts_choose is not None and not 0 < self.experts_choose < math.inf:
            problems.append(f"experts_choose: found {self.experts_choose}, expected a finite factor above 0, or None")
        for stack in ("encoder", "decoder"):
            layers, sparse = getattr(self, f"num_{stack}_layers"), getattr(self, f"{stack}_sparse_layers")
            if any(not 0 <= i < layers for i in sparse):
                problems.append(f"{stack}_sparse_layers: found {sparse}, expected indices below {layers}")
        if problems:
            raise ValueError(f"Model config: {'; '.join(problems)}.")

    @property
    def expert(self) -> Expert:
        """One MLP: relu(x wi) wo, or (gelu(x wi_0) * (x wi_1)) wo for gated models."""
        return GATED if self.gated else PLAIN

    @property
    def expert_matrices(self) -> tuple[str, ...]:
        """Names of the matrices of one MLP, in the order in which they are applied."""
        return self.expert.matrices

    @property
    def sparse_layers(self) -> tuple[str, ...]:
        """Parameter-tree paths of the sparse layers, encoder first, e.g. 'encoder/layers_1'."""
        encoder = [f"encoder/layers_{i}" for i in self.encoder_sparse_layers]
        return tuple(encoder + [f"decoder/layers_{i}" for i in self.decoder_sparse_layers])

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`. Raises ValueError that names all unknown or missing fields."""
        return from_dict(cls, fields, "Model config")


def mixed(num_layers: int, num_sparse: int) -> tuple[int, ...]:
    """T5X's MIXED placement: with stride s = layers // sparse, layer i is sparse iff i % s == s - 1."""
    stride = num_layers // num_sparse
    return tuple(range(stride - 1, num_layers, stride))


def _published(d_model, d_ff, num_heads, layers, sparse, experts, **kwargs) -> ModelConfig:
    return ModelConfig(
        vocab_size=32128,
        d_model=d_model,
        d_ff=d_ff,
        num_heads=num_heads,
        head_dim=64,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        num_experts=experts,
        encoder_sparse_layers=mixed(layers, sparse),
        decoder_sparse_layers=mixed(layers, sparse),
        **kwargs,
    )


# The models published in the T5X bucket (Fedus et al. 2021, Table 9; T5X gin files).
PRESETS: dict[str, ModelConfig] = {
    **{f"switch_base_{e}": _published(768, 3072, 12, 12, 6, e) for e in (8, 16, 32, 64, 128, 256)},
    "switch_large_128": _published(1024, 4096, 16, 24, 12, 128, router_group_size=4096),
    "switch_xxl_128": _published(
        4096, 10240, 64, 24, 12, 128, gated=True, tied=False, router_group_size=4096, min_expert_capacity=2
    ),
    "switch_c_2048": _published(
        2080, 6144, 30, 15, 15, 2048, tied=False, router_group_size=2048, min_expert_capacity=2
    ),
}


_NAMES = [field.name for field in dataclasses.fields(ModelConfig)]
TOLD = tuple(_NAMES[: _NAMES.index("top_k")])  # what a parameter tree tells
