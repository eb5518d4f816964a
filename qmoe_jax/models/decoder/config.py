"""What a decoder-only mixture of experts is made of: frozen descriptions, of which each family has its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax

from qmoe_jax.models.family import Expert
from qmoe_jax.models.fields import from_dict, problems_of_counts, problems_of_fields


def silu_gate(hidden: Sequence[jax.Array]) -> jax.Array:
    """silu(gate) * up."""
    gate, up = hidden
    return jax.nn.silu(gate) * up


MATRICES = ("gate_proj", "up_proj", "down_proj")
GATED = Expert(MATRICES, silu_gate)


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions (Su et al. 2021), stretched by YaRN (Peng et al. 2023) or evenly where `kind` says so.

    Attributes:
      theta: base of the wavelengths.
      kind: 'default', 'linear' or 'yarn', as Hugging Face calls them.
      factor: how many times longer texts may be than in pretraining.
      original_length: longest text in pretraining (YaRN, as all that follows).
      beta_fast: dimensions that turn more often than this within `original_length` stay as they are.
      beta_slow: those that turn less often are stretched by `factor`; between the two, partly.
      truncate: round the limits between these to whole dimensions.
      attention_factor: by which cos and sin are multiplied; None: .1 ln(factor) + 1, or the ratio of the mscales.
      mscale: multiplies .1 ln(factor) in it.
      mscale_all_dim: the same for the divisor, and in DeepSeek's softmax scale.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_length: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self):
        if problems := problems_of_fields(self):
            raise ValueError(f"rope: {'; '.join(problems)}.")
        if self.kind not in ("default", "linear", "yarn"):
            raise ValueError(f"rope kind: found {self.kind!r}, expected 'default', 'linear' or 'yarn'.")
        if self.theta <= 1 or self.factor < 1 or (self.kind == "yarn" and self.original_length < 1):
            raise ValueError(
                f"rope: found theta {self.theta}, factor {self.factor}, original_length {self.original_length}; "
                "expected theta > 1, factor >= 1 and, for YaRN, the length in pretraining."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What all of them tell.

    Attributes:
      vocab_size: rows of the embedding.
      d_model: width of the residual stream.
      num_layers: decoder layers, dense and sparse together.
      num_heads: heads of queries.
      d_ff: width of the hidden layer of one expert.
      num_experts: experts per sparse layer.
      top_k: experts per token.
      rope: rotary positions.
      norm_eps: added to the mean square in RMSNorm.
      tied: logits use the embedding instead of lm_head.
      max_length: longest text that the model was made for; nothing depends on it.
      bos: id of the token that begins a text, None: none; nothing depends on it.
      eos: ids of the tokens that end one; nothing depends on them.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    d_ff: int
    num_experts: int
    top_k: int
    rope: Rope = Rope()
    norm_eps: float = 1e-5
    tied: bool = False
    max_length: int = 4096
    bos: int | None = None
    eos: tuple[int, ...] = ()

    # Fields on which logits don't depend.
    BESIDE: ClassVar[tuple[str, ...]] = ("max_length", "bos", "eos")
    POSITIVE: ClassVar[tuple[str, ...]] = ("vocab_size", "d_model", "num_layers", "num_heads", "d_ff", "num_experts")

    def __post_init__(self):
        for field in dataclasses.fields(self):  # JSON has no tuples and no classes.
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        if isinstance(self.rope, dict):
            object.__setattr__(self, "rope", from_dict(Rope, self.rope, "rope"))
        if problems := problems_of_fields(self) or problems_of_counts(
            {"num_layers": self.num_layers}, self.num_experts
        ):
            raise ValueError(f"{type(self).__name__}: {'; '.join(problems)}.")
        if problems := self.problems():
            raise ValueError(f"{type(self).__name__}: {'; '.join(problems)}.")

    def problems(self) -> list[str]:
        """What cannot be, in words."""
        found = [f"{n}: found {getattr(self, n)}, expected at least 1" for n in self.POSITIVE if getattr(self, n) < 1]
        if self.norm_eps <= 0:
            found.append(f"norm_eps: found {self.norm_eps}, expected a number above 0")
        if getattr(self, "sliding_window", None) == 0:
            found.append("sliding_window: found 0, expected at least 1, or nothing")
        if not 1 <= self.top_k <= self.num_experts:
            found.append(f"top_k: found {self.top_k}, expected 1 to {self.num_experts} (num_experts)")
        if not found and not self.sparse_layers:
            found.append("no layer has experts")
        return found

    @property
    def expert(self) -> Expert:
        """What its experts are."""
        return GATED

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return True

    def window(self, layer: int) -> int | None:
        """How many tokens a query of a layer sees, its own among them; None: all before it."""
        return None

    @property
    def sparse_layers(self) -> tuple[str, ...]:
        return tuple(layer_name(i) for i in range(self.num_layers) if self.is_sparse(i))

    @property
    def dense_layers(self) -> tuple[str, ...]:
        return tuple(layer_name(i) for i in range(self.num_layers) if not self.is_sparse(i))

    @property
    def query_dim(self) -> int:
        """Width of a head's queries and keys."""
        raise NotImplementedError

    @property
    def dense_width(self) -> int:
        """Width of the hidden layer of a dense layer's MLP."""
        return self.d_ff

    @property
    def shared_width(self) -> int:
        """Width of the hidden layer of the expert that every token goes through; 0: there is none."""
        return 0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> DecoderConfig:
        """Inverse of `to_dict`. Raises ValueError that names all unknown or missing fields."""
        return from_dict(cls, fields, cls.__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedConfig(DecoderConfig):
    """One whose attention is grouped (Ainslie et al. 2023): several heads of queries share keys and values.

    Attributes:
      num_kv_heads: heads of keys and values.
      head_dim: width of one head; num_heads * head_dim may differ from d_model.
    """

    num_kv_heads: int
    head_dim: int

    POSITIVE: ClassVar[tuple[str, ...]] = (*DecoderConfig.POSITIVE, "num_kv_heads", "head_dim")

    @property
    def query_dim(self) -> int:
        return self.head_dim

    def problems(self) -> list[str]:
        found = super().problems()
        if not found and self.num_heads % self.num_kv_heads:
            found.append(f"num_heads: found {self.num_heads}, expected a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            found.append(f"head_dim: found {self.head_dim}, expected an even number")
        return found


def layer_name(layer: int) -> str:
    """What the names of a layer's parameters begin with."""
    return f"model/layers_{layer}"
