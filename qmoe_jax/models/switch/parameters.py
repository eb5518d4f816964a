"""From a parameter tree to the model it belongs to, and from a model to its parameters' names and shapes."""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping
from typing import Any

from qmoe_jax.errors import CheckpointError, listed
from qmoe_jax.models.names import NUMBER
from qmoe_jax.models.switch.config import ModelConfig

RELPOS_BUCKETS = 32
_STRUCTURE = (
    "num_encoder_layers",
    "num_decoder_layers",
    "encoder_sparse_layers",
    "decoder_sparse_layers",
    "gated",
    "tied",
    "relpos_per_layer",
)
_HEADS = "num_heads * head_dim"
_SIZES = ("vocab_size", "d_model", "d_ff", "num_heads", _HEADS, "num_experts")

Axes = tuple[str | int, ...]  # sizes, by name where they depend on the model
Shape = tuple[int, ...]


def param_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Shapes of all parameters of a model, by '/'-joined (unscanned) name. Kernels are [in, out]."""
    structure = {field: getattr(config, field) for field in _STRUCTURE}
    sizes = {size: getattr(config, size) for size in _SIZES if size != _HEADS}
    sizes[_HEADS] = config.num_heads * config.head_dim
    return {
        n: tuple(sizes[a] if isinstance(a, str) else a for a in axes) for n, axes in _param_axes(**structure).items()
    }


def infer_config(shapes: Mapping[str, Shape], **overrides: Any) -> ModelConfig:
    """The Switch Transformer that a parameter tree belongs to.

    Every size is what most of the parameters with that size say, so that one of wrong shape shows as such.

    Args:
      shapes: shapes by '/'-joined (unscanned) name.
      **overrides: fields of the config, foremost those the tree doesn't tell (top_k, ...). Least expert
        capacity is, unless given, 4 for tied and 2 for untied models, as published.

    Raises:
      CheckpointError: this isn't a Switch Transformer, or parameters are missing, unknown or of wrong shape:
        all are listed.
    """
    structure = _infer_structure(shapes)
    axes = _param_axes(**structure)
    votes: dict[str, collections.Counter] = {size: collections.Counter() for size in _SIZES}
    for name in axes:
        if name in shapes and len(axes[name]) == len(shapes[name]):
            for axis, size in zip(axes[name], shapes[name], strict=True):
                if axis in votes:
                    votes[axis][size] += 1
    sizes = {size: votes[size].most_common(1)[0][0] for size in _SIZES if votes[size]}

    problems = _differences(shapes, {name: _resolve(axes[name], sizes) for name in axes})
    if _HEADS in sizes and "num_heads" in sizes and sizes[_HEADS] % sizes["num_heads"]:
        problems.append(
            f"attention kernels have {sizes[_HEADS]} columns, not a multiple of the {sizes['num_heads']} "
            "heads (rows of rel_embedding)"
        )
    _raise_if(problems)

    joined = sizes.pop(_HEADS)
    inferred = {**structure, **sizes, "head_dim": joined // sizes["num_heads"]}
    # Switch-XXL and Switch-C, the untied top-1 models, were trained with 2; all others with 4.
    inferred["min_expert_capacity"] = 4 if structure["tied"] or overrides.get("top_k", 1) > 1 else 2
    config = ModelConfig.from_dict({**inferred, **overrides})
    _raise_if(_differences(shapes, param_shapes(config)))  # overrides that contradict the tree
    return config


def expert_parameter(layer: str, matrix: str) -> str:
    """Name of the parameter [experts, in, out] that holds a matrix of a layer's experts."""
    return f"{layer}/mlp/expert/{matrix}/kernel"


def expert_of(name: str) -> tuple[str, str] | None:
    """Layer and matrix of a parameter that holds experts; None: it is another parameter."""
    layer, inside, rest = name.partition("/mlp/expert/")
    return (layer, rest.partition("/")[0]) if inside else None


def is_small(name: str) -> bool:
    """Whether a parameter is a norm or a router."""
    return name.endswith("/scale") or "/router/" in name


def _param_axes(
    num_encoder_layers: int,
    num_decoder_layers: int,
    encoder_sparse_layers: tuple[int, ...],
    decoder_sparse_layers: tuple[int, ...],
    gated: bool,
    tied: bool,
    relpos_per_layer: bool,
) -> dict[str, Axes]:
    """What the axes of every parameter are, by name."""
    scale: dict[str, Axes] = {"scale": ("d_model",)}
    relpos: dict[str, Axes] = {"relpos_bias/rel_embedding": ("num_heads", RELPOS_BUCKETS)}
    attention: dict[str, Axes] = {
        "query/kernel": ("d_model", _HEADS),
        "key/kernel": ("d_model", _HEADS),
        "value/kernel": ("d_model", _HEADS),
        "out/kernel": (_HEADS, "d_model"),
    }
    wi = ("wi_0", "wi_1") if gated else ("wi",)
    dense: dict[str, Axes] = {f"{name}/kernel": ("d_model", "d_ff") for name in wi}
    dense["wo/kernel"] = ("d_ff", "d_model")
    sparse: dict[str, Axes] = {f"expert/{name}": ("num_experts", *axes) for name, axes in dense.items()}
    sparse["router/router_weights/w/kernel"] = ("d_model", "num_experts")

    encoder = {"pre_attention_layer_norm": scale, "attention": attention, "pre_mlp_layer_norm": scale}
    decoder = {
        "pre_self_attention_layer_norm": scale,
        "self_attention": attention,
        "pre_cross_attention_layer_norm": scale,
        "encoder_decoder_attention": attention,
        "pre_mlp_layer_norm": scale,
    }

    tree: dict[str, Axes] = {"token_embedder/embedding": ("vocab_size", "d_model")}
    for stack, layer, num_layers, sparse_layers in (
        ("encoder", encoder, num_encoder_layers, encoder_sparse_layers),
        ("decoder", decoder, num_decoder_layers, decoder_sparse_layers),
    ):
        if not relpos_per_layer:
            tree |= {f"{stack}/{name}": axes for name, axes in relpos.items()}
        for i in range(num_layers):
            modules = {**layer, "mlp": sparse if i in sparse_layers else dense}
            tree |= {
                f"{stack}/layers_{i}/{module}/{name}": axes
                for module, params in modules.items()
                for name, axes in params.items()
            }
            if relpos_per_layer:
                tree |= {f"{stack}/layers_{i}/{name}": axes for name, axes in relpos.items()}
        tree[f"{stack}/{stack}_norm/scale"] = ("d_model",)
    if not tied:
        tree["decoder/logits_dense/kernel"] = ("d_model", "vocab_size")
    return tree


def _infer_structure(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The fields of `_STRUCTURE`, from names alone."""
    structure: dict[str, Any] = {}
    absent = []
    for stack in ("encoder", "decoder"):
        layers = {int(m[1]) for name in shapes if (m := re.match(rf"{stack}/layers_({NUMBER})/", name))}
        experts = rf"{stack}/layers_({NUMBER})/mlp/(?:expert|router)/"
        if (last := max(layers, default=-1)) >= len(shapes):
            raise CheckpointError(
                f"Not a Switch Transformer: {len(shapes)} parameters, but one of them is of {stack}/layers_{last}."
            )
        structure[f"num_{stack}_layers"] = max(layers, default=-1) + 1
        structure[f"{stack}_sparse_layers"] = tuple(
            sorted({int(m[1]) for name in shapes if (m := re.match(experts, name))})
        )
        if not layers:
            absent.append(f"no {stack} ('{stack}/layers_0/...')")
    if not structure["encoder_sparse_layers"] and not structure["decoder_sparse_layers"]:
        absent.append("no experts ('.../mlp/expert/...')")
    if absent:
        raise CheckpointError(
            f"Not a Switch Transformer: {', '.join(absent)}. Its {len(shapes)} parameters are "
            f"{', '.join(sorted(shapes)[:5])}{', ...' if len(shapes) > 5 else ''}."
        )
    single = sum(bool(re.search(r"/mlp/(expert/)?wi/", name)) for name in shapes)
    double = sum(bool(re.search(r"/mlp/(expert/)?wi_[01]/", name)) for name in shapes)
    structure["gated"] = double > single
    structure["tied"] = not any(name.startswith("decoder/logits_dense/") for name in shapes)
    structure["relpos_per_layer"] = any(re.search(r"/layers_\d+/relpos_bias/", name) for name in shapes)
    return structure


def _resolve(axes: Axes, sizes: Mapping[str, int]) -> tuple[int | str, ...]:
    """Sizes of the axes; one that isn't known stays a name."""
    return tuple(sizes.get(axis, axis) if isinstance(axis, str) else axis for axis in axes)


def _differences(shapes: Mapping[str, Shape], expected: Mapping[str, Axes]) -> list[str]:
    """All missing, misshapen and unknown parameters, one line each."""
    lines = [f"missing: {name}, expected {_text(expected[name])}" for name in expected if name not in shapes]
    lines += [
        f"wrong shape: {name}, found {_text(shapes[name])}, expected {_text(expected[name])}"
        for name in expected
        if name in shapes and tuple(shapes[name]) != expected[name]
    ]
    unknown = [name for name in shapes if name not in expected]
    extra_mlp = [name for name in unknown if "extra_mlp" in name]
    if extra_mlp:
        lines.append(f"not supported: ST-MoE's extra MLP, {len(extra_mlp)} parameters from {extra_mlp[0]}")
    lines += [f"unknown: {name} {_text(shapes[name])}" for name in unknown if name not in extra_mlp]
    return lines


def _text(shape: Axes) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _raise_if(problems: list[str]) -> None:
    if problems:
        head = f"The parameters aren't those of a Switch Transformer; {len(problems)} differ:"
        raise CheckpointError(listed(head, problems))
