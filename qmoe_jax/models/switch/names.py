"""What parameters are called in PyTorch: one table, read both ways.

Hugging Face's SwitchTransformers and the published QMoE models share these names. PyTorch's matrices are [out, in]
where T5X's kernels are [in, out], and each expert's matrix is a tensor of its own.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from qmoe_jax.errors import CheckpointError, listed

SAME, TRANSPOSED = False, True

# {stack}: encoder or decoder. {layer}: all layers count, from 0. {matrix}: wi, wo; gated: wi_0, wi_1, wo.
# Of two rows with the same T5X name the first is written, and both are read; the embedding comes up to three times.
TABLE = (
    ("token_embedder/embedding", "shared.weight", SAME),  # [vocabulary, d_model]
    ("token_embedder/embedding", "encoder.embed_tokens.weight", SAME),
    ("token_embedder/embedding", "decoder.embed_tokens.weight", SAME),
    ("decoder/logits_dense/kernel", "lm_head.weight", TRANSPOSED),
    ("decoder/logits_dense/kernel", "decoder.lm_head.weight", TRANSPOSED),
    ("encoder/encoder_norm/scale", "encoder.final_layer_norm.weight", SAME),
    ("decoder/decoder_norm/scale", "decoder.final_layer_norm.weight", SAME),
    *(
        (
            f"{t5x}/rel_embedding",
            f"{{stack}}.block.{block}.layer.0.SelfAttention.relative_attention_bias.weight",
            TRANSPOSED,
        )
        for t5x, block in (
            ("{stack}/relpos_bias", "0"),
            ("{stack}/layers_{layer}/relpos_bias", "{layer}"),  # Models that T5X scanned: each layer has its own.
        )
    ),
    *(
        row
        for stack, attention, norm, sublayer, hf_attention in (
            ("encoder", "attention", "pre_attention_layer_norm", 0, "SelfAttention"),
            ("decoder", "self_attention", "pre_self_attention_layer_norm", 0, "SelfAttention"),
            ("decoder", "encoder_decoder_attention", "pre_cross_attention_layer_norm", 1, "EncDecAttention"),
        )
        for row in (
            (
                f"{stack}/layers_{{layer}}/{norm}/scale",
                f"{stack}.block.{{layer}}.layer.{sublayer}.layer_norm.weight",
                SAME,
            ),
            *(
                (
                    f"{stack}/layers_{{layer}}/{attention}/{name}/kernel",
                    f"{stack}.block.{{layer}}.layer.{sublayer}.{hf_attention}.{name[0]}.weight",  # q, k, v, o
                    TRANSPOSED,
                )
                for name in ("query", "key", "value", "out")
            ),
        )
    ),
    *(
        (f"{stack}/layers_{{layer}}/{t5x}", f"{stack}.block.{{layer}}.layer.{sublayer}.{pytorch}", transposed)
        for stack, sublayer in (("encoder", 1), ("decoder", 2))
        for t5x, pytorch, transposed in (
            ("pre_mlp_layer_norm/scale", "layer_norm.weight", SAME),
            ("mlp/{matrix}/kernel", "mlp.{matrix}.weight", TRANSPOSED),
            ("mlp/router/router_weights/w/kernel", "mlp.router.classifier.weight", TRANSPOSED),
            ("mlp/expert/{matrix}/kernel", "mlp.experts.expert_{expert}.{matrix}.weight", TRANSPOSED),
        )
    ),
)
_FIELDS = {"stack": "encoder|decoder", "layer": r"\d+", "matrix": "wi|wi_0|wi_1|wo", "expert": r"\d+"}


class Tensors(NamedTuple):
    """The PyTorch tensors that make one T5X parameter."""

    names: tuple[str, ...]  # one, or one for each expert
    transposed: bool
    stacked: bool  # experts' matrices


def _pattern(template: str) -> re.Pattern:
    pattern = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    for field, values in _FIELDS.items():
        pattern = pattern.replace(f"{{{field}}}", f"(?P<{field}>{values})")
    return re.compile(pattern)


@functools.cache
def _patterns() -> list[tuple[re.Pattern, re.Pattern]]:
    """The table's first two columns."""
    return [(_pattern(t5x), _pattern(pytorch)) for t5x, pytorch, _ in TABLE]


def to_pytorch(name: str, num_experts: int) -> Tensors:
    """What the T5X parameter `name` ('/'-joined, unscanned) is called in PyTorch. Raises KeyError if it isn't known."""
    for (pattern, _), (_, pytorch, transposed) in zip(_patterns(), TABLE, strict=True):
        if match := pattern.fullmatch(name):
            fields, stacked = match.groupdict(), "{expert}" in pytorch
            experts = range(num_experts) if stacked else [None]
            return Tensors(tuple(pytorch.format(**fields, expert=e) for e in experts), transposed, stacked)
    raise KeyError(name)


def from_pytorch(names: Iterable[str]) -> tuple[dict[str, Tensors], list[str]]:
    """The T5X parameters that tensors make, and the names that nothing is known of.

    Raises:
      CheckpointError: experts are missing.
    """
    found: dict[str, dict[int, tuple[int, str, bool, bool]]] = {}  # parameter -> expert -> row of the table, ...
    foreign = []
    for name in names:
        translated = _from_pytorch(name)
        if translated is None:
            foreign.append(name)
            continue
        parameter, expert, row, transposed, stacked = translated
        tensor = (row, name, transposed, stacked)
        experts = found.setdefault(parameter, {})
        experts[expert] = min(tensor, experts.get(expert, tensor))

    # Block 0 has the bias that the stack shares, unless other blocks have theirs.
    if any(re.fullmatch(r"\w+/layers_\d+/relpos_bias/rel_embedding", name) for name in found):
        for stack in ("encoder", "decoder"):
            if f"{stack}/relpos_bias/rel_embedding" in found:
                found[f"{stack}/layers_0/relpos_bias/rel_embedding"] = found.pop(f"{stack}/relpos_bias/rel_embedding")

    num_experts = 1 + max((e for experts in found.values() for e in experts), default=0)
    parameters, missing = {}, []
    for parameter, experts in found.items():
        stacked = experts[min(experts)][3]
        expected = range(num_experts) if stacked else [0]
        if absent := [e for e in expected if e not in experts]:
            missing.append(f"{parameter}: {', '.join(map(str, absent[:8]))}{', ...' if len(absent) > 8 else ''}")
            continue
        tensors = [experts[e] for e in expected]
        parameters[parameter] = Tensors(tuple(name for _, name, _, _ in tensors), tensors[0][2], stacked)
    if missing:
        raise CheckpointError(listed(f"Of {num_experts} experts some are missing:", missing))
    return parameters, foreign


def _from_pytorch(name: str) -> tuple[str, int, int, bool, bool] | None:
    """Parameter, expert (0 if it isn't one), row of the table, whether transposed, whether an expert's."""
    for row, ((_, pattern), (t5x, _, transposed)) in enumerate(zip(_patterns(), TABLE, strict=True)):
        if match := pattern.fullmatch(name):
            fields = match.groupdict()
            return t5x.format(**fields), int(fields.get("expert") or 0), row, transposed, "expert" in fields
    return None


def t5x_shape(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The T5X parameter's shape. Raises CheckpointError where experts' shapes differ."""
    first = shapes[tensors.names[0]]
    for name in tensors.names:
        if shapes[name] != first:
            raise CheckpointError(
                f"Tensor {name!r} has shape {list(shapes[name])}, but {tensors.names[0]!r} {list(first)}."
            )
    shape = first[::-1] if tensors.transposed else first
    return (len(tensors.names), *shape) if tensors.stacked else shape
