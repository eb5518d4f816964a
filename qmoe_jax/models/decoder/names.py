"""What parameters are called in Hugging Face's files: a table for each family, of which most is the same.

A row is a parameter's name and a tensor's, as templates whose {fields} are filled alike; {expert} counts tensors of
which each is one expert's. Most families add but their experts and router to `COMMON`. No file is opened here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

SAME, TRANSPOSED = False, True
LAYER, TENSOR_LAYER = "model/layers_{layer}", "model.layers.{layer}"
FIELDS = {
    "layer": r"\d+",
    "norm": "input_layernorm|post_attention_layernorm",
    "projection": "q_proj|k_proj|v_proj|o_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj",
    "inner_norm": "q_norm|k_norm|q_a_layernorm|kv_a_layernorm",
    "matrix": "gate_proj|up_proj|down_proj",
}


class Part(NamedTuple):
    """Which outputs of a tensor are a parameter's, where several share one.

    Attributes:
      index: of the parameter among them.
      of: how many they are.
      interleaved: output j is of parameter j % of; otherwise they lie side by side.
    """

    index: int
    of: int
    interleaved: bool = False

    def of_outputs(self, size: int) -> slice:
        """Of all `size` outputs of the tensor."""
        if self.interleaved:
            return slice(self.index, size, self.of)
        return slice(self.index * size // self.of, (self.index + 1) * size // self.of)


class Row(NamedTuple):
    """A line of a table.

    Attributes:
      parameter: template of its name here.
      tensor: template of the name, or of the names, in the file.
      transposed: the last two axes are the other way round there: [out, in].
      part: which outputs it is, None: all.
      beside: templates of tensors that it takes to make sense of this one, which is packed.
      packed: how: 'mxfp4'; '': it isn't. (float8 is found by its scales, whatever the tensor.)
    """

    parameter: str
    tensor: str
    transposed: bool = SAME
    part: Part | None = None
    beside: tuple[str, ...] = ()
    packed: str = ""


class Stored(NamedTuple):
    """The tensors that make one parameter; see `Row`.

    Attributes:
      names: of one, or of one for each expert, which are stacked on a new first axis.
      stacked: whether they are.
    """

    names: tuple[str, ...]
    stacked: bool
    transposed: bool
    part: Part | None
    beside: tuple[str, ...]
    packed: str


COMMON = (
    Row("model/embed_tokens/embedding", "model.embed_tokens.weight"),  # [vocabulary, d_model]
    Row("model/norm/scale", "model.norm.weight"),
    Row("lm_head/kernel", "lm_head.weight", TRANSPOSED),
    *(
        Row(f"{LAYER}/{ours}", f"{TENSOR_LAYER}.{theirs}", transposed)
        for ours, theirs, transposed in (
            ("{norm}/scale", "{norm}.weight", SAME),
            ("self_attn/{projection}/kernel", "self_attn.{projection}.weight", TRANSPOSED),
            ("self_attn/{projection}/bias", "self_attn.{projection}.bias", SAME),
            ("self_attn/{inner_norm}/scale", "self_attn.{inner_norm}.weight", SAME),
            ("mlp/{matrix}/kernel", "mlp.{matrix}.weight", TRANSPOSED),
        )
    ),
)
EXPERTS = Row(
    f"{LAYER}/mlp/experts/{{matrix}}/kernel", f"{TENSOR_LAYER}.mlp.experts.{{expert}}.{{matrix}}.weight", TRANSPOSED
)
ROUTER = Row(f"{LAYER}/mlp/router/kernel", f"{TENSOR_LAYER}.mlp.gate.weight", TRANSPOSED)

# Tensors without parameters, in any family: what they are.
LEFT_OUT = {r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq": "frequencies, which config.json tells"}


def stored(rows: Sequence[Row], parameter: str, num_experts: int) -> Stored:
    """The tensors that make a parameter; of several rows the first is what is written. Raises KeyError."""
    return ways_stored(rows, parameter, num_experts)[0]


def ways_stored(rows: Sequence[Row], parameter: str, num_experts: int) -> list[Stored]:
    """All ways in which a parameter may be stored, at least one. Raises KeyError for one that isn't known."""
    ways = []
    for row in rows:
        if match := re.fullmatch(_pattern(row.parameter), parameter):
            stacked = "{expert}" in row.tensor
            names = tuple(
                row.tensor.format(**match.groupdict(), expert=e) for e in range(num_experts if stacked else 1)
            )
            beside = tuple(name.format(**match.groupdict()) for name in row.beside)
            ways.append(Stored(names, stacked, row.transposed, row.part, beside, row.packed))
    if not ways:
        raise KeyError(parameter)
    return ways


def why_left_out(left_out: Mapping[str, str], tensor: str) -> str | None:
    """What a tensor is that no parameter is made of, on purpose; None: it is foreign, or a parameter's."""
    return next((why for pattern, why in left_out.items() if re.fullmatch(pattern, tensor)), None)


def _pattern(template: str) -> str:
    pattern = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    for field, values in FIELDS.items():
        pattern = pattern.replace(f"{{{field}}}", f"(?P<{field}>{values})")
    return pattern
