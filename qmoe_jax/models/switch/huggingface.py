"""Switch Transformers as Hugging Face's SwitchTransformers, and as the published QMoE models are kept.

What their parameters are called, and what config.json says. Which layers are sparse is read off the names: Hugging
Face's rule (layer i is sparse iff i % step == 1) differs from T5X's for steps above 2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qmoe_jax.errors import CheckpointError, listed
from qmoe_jax.models.fields import problems_of_values
from qmoe_jax.models.names import COPY, Shape, Tensors
from qmoe_jax.models.switch.config import ModelConfig
from qmoe_jax.models.switch.names import TABLE
from qmoe_jax.models.switch.parameters import RELPOS_BUCKETS, expert_parameter, infer_config

MODEL_TYPE = "switch_transformers"
EMBEDDING, HEAD = "token_embedder/embedding", "decoder/logits_dense/kernel"
EMBEDDINGS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # shared.weight, once more each
HEADS = ("lm_head.weight", "decoder.lm_head.weight")
ROUTER = "/mlp/router/router_weights/w/kernel"
# Hugging Face counts an expert's tokens per sequence, T5X by groups and a factor: here no token is dropped.
NO_TOKEN_IS_DROPPED = 1_000_000
# What the reference's GPU kernels were compiled for: d_model, d_ff.
KERNEL_SHAPES = ((768, 3072), (1024, 4096), (2080, 6144))


_KINDS: dict[str, Any] = {
    **dict.fromkeys(
        """
        vocab_size d_model d_kv d_ff num_heads num_layers num_decoder_layers num_experts t5x_step
        relative_attention_num_buckets relative_attention_max_distance
        """.split(),
        int,
    ),
    "tie_word_embeddings": bool,
    "is_gated_act": bool,
    "layer_norm_epsilon": float,
    "dense_act_fn": str,
    "feed_forward_proj": str,
}
# What a model of this family computes; others are refused, as their logits would be wrong.
_COMPUTED: dict[str, dict[bool, tuple[Any, ...]]] = {  # by setting, and whether MLPs are gated
    "layer_norm_epsilon": dict.fromkeys((False, True), (1e-6,)),
    "relative_attention_max_distance": dict.fromkeys((False, True), (128,)),
    "dense_act_fn": {False: ("relu",), True: ("gelu_new",)},
    "feed_forward_proj": {False: ("relu",), True: ("gated-gelu",)},
    "is_gated_act": {False: (False,), True: (True,)},
}


class HuggingFace:
    """See `family.Names`."""

    def parameters(self, shapes: Mapping[str, Shape], described: Mapping[str, Any]) -> dict[str, Tensors]:
        if odd := problems_of_values(described, _KINDS):
            raise CheckpointError(listed(f"config.json doesn't describe a {MODEL_TYPE} model:", odd))
        tensors, foreign = TABLE.parameters(shapes)
        _move_shared_biases(tensors)
        # The large published models, all untied, have the head under this name, whatever config.json says.
        if described.get("tie_word_embeddings", True) and "decoder.lm_head.weight" not in shapes:
            tensors.pop(HEAD, None)  # The embedding again.
        elif HEAD not in tensors:
            raise CheckpointError("lm_head.weight is missing, though config.json has tie_word_embeddings false.")
        if foreign:
            raise CheckpointError(listed(f"{len(foreign)} tensors are not of a {MODEL_TYPE} model:", foreign))
        return tensors

    def tensors(self, name: str, config: ModelConfig) -> Tensors:
        # Where logits aren't tied, transformers doesn't tie the stacks' embeddings either.
        copies = EMBEDDINGS if name == EMBEDDING and not config.tied else ()
        return TABLE.tensors(name, config.num_experts)._replace(copies=copies)

    def config(self, shapes: Mapping[str, Shape], described: Mapping[str, Any], **overrides: Any) -> ModelConfig:
        config = infer_config(shapes, **overrides)
        # Published models are known with other numbers of layers in config.json than in their tensors.
        sizes = {k: v for k, v in _sizes(config).items() if k not in ("num_layers", "num_decoder_layers")}
        problems = [
            f"{k}: {described[k]}, but the tensors say {v}" for k, v in sizes.items() if described.get(k, v) != v
        ]
        for setting, allowed in _COMPUTED.items():
            found = described.get(setting)
            if found is not None and found not in allowed[config.gated]:
                problems.append(f"{setting}: {found!r}, supported is {allowed[config.gated][0]!r}")
        if problems:
            raise CheckpointError(listed("config.json doesn't fit the tensors beside it:", problems))
        return config

    def describe(self, config: ModelConfig, dtypes: Mapping[str, Any], step: int | None) -> dict[str, Any]:
        if problems := _why_not_held(config):
            raise CheckpointError(listed("Hugging Face's SwitchTransformers can't hold this model:", problems))
        steps = {
            stack: sparse_step(getattr(config, f"num_{stack}_layers"), getattr(config, f"{stack}_sparse_layers"))
            for stack in ("encoder", "decoder")
        }
        return {
            "architectures": ["SwitchTransformersForConditionalGeneration"],
            "model_type": MODEL_TYPE,
            **_sizes(config),
            "num_sparse_encoder_layers": len(config.encoder_sparse_layers),
            "num_sparse_decoder_layers": len(config.decoder_sparse_layers),
            "encoder_sparse_step": steps["encoder"],
            "decoder_sparse_step": steps["decoder"],
            "relative_attention_max_distance": 128,
            "tie_word_embeddings": config.tied,
            "dense_act_fn": "relu",
            "feed_forward_proj": "relu",
            "is_gated_act": False,
            "layer_norm_epsilon": 1e-6,
            "expert_capacity": NO_TOKEN_IS_DROPPED,
            "router_bias": False,
            "router_dtype": "float32",
            "router_ignore_padding_tokens": False,
            "router_jitter_noise": 0.0,
            "router_type": "tokens_masked",
            "router_aux_loss_coef": 0.001,
            "router_z_loss_coef": 0.001,
            "add_router_probs": False,
            "dropout_rate": 0.1,
            "initializer_factor": 1.0,
            "is_encoder_decoder": True,
            "use_cache": True,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
            "torch_dtype": str(dtypes[EMBEDDING]),
            **({} if step is None else {"t5x_step": step}),
        }

    def why_left_out(self, config: ModelConfig, tensor: str) -> str | None:
        # One of each is read; where logits are tied, the heads are the embedding too.
        return COPY if tensor in ("shared.weight", *EMBEDDINGS, *HEADS) else None

    def lost(self, config: ModelConfig) -> list[str]:
        lost = ["T5X's capacity factor: Hugging Face counts tokens per sequence; written so that none is dropped"]
        if config.relpos_per_layer:
            lost.append(
                "position biases of all layers but the first: they are written, and read again by this project, but "
                "transformers uses the first layer's for all, with other results"
            )
        return lost


class Published(HuggingFace):
    """The published QMoE models: the names are Hugging Face's, and the experts, compressed, lie in files of their own.

    config.json is one that the reference's loader takes, under transformers 4.28.
    """

    def tensors(self, name: str, config: ModelConfig) -> Tensors:
        # Tied models have the head too.
        copies = (*EMBEDDINGS, *(["lm_head.weight"] if config.tied else [])) if name == EMBEDDING else ()
        return TABLE.tensors(name, config.num_experts)._replace(copies=copies)

    def config(self, shapes: Mapping[str, Shape], described: Mapping[str, Any], **overrides: Any) -> ModelConfig:
        # No file tells the experts' shapes: a row's width isn't stored.
        d_ff: Any = described.get("d_ff")
        experts = {}
        for name, shape in shapes.items():
            if name.endswith(ROUTER):
                layer, (d_model, num_experts) = name.removesuffix(ROUTER), shape
                experts[expert_parameter(layer, "wi")] = (num_experts, d_model, d_ff)
                experts[expert_parameter(layer, "wo")] = (num_experts, d_ff, d_model)
        return super().config({**shapes, **experts}, described, **overrides)

    def describe(self, config: ModelConfig, dtypes: Mapping[str, Any], step: int | None) -> dict[str, Any]:
        fields = super().describe(config, dtypes, None)
        full = [
            getattr(config, f"{stack}_sparse_layers") == tuple(range(getattr(config, f"num_{stack}_layers")))
            for stack in ("encoder", "decoder")
        ]
        problems = []
        if any(full) and not all(full):
            problems.append(
                "every layer of one stack is sparse, but not of the other; the loader knows all or i % step == 1"
            )
        if config.relpos_per_layer:
            problems.append("every layer has its own position bias; the loader's model has one per stack")
        if problems:
            raise CheckpointError(listed("The published QMoE models' layout can't hold this model:", problems))
        fields |= {
            "expert_capacity": 1024,
            "router_jitter_noise": 0,
            "use_cache": False,
            "transformers_version": "4.28.0",
        }
        return fields | ({"is_full_sparse": True} if all(full) else {})

    def lost(self, config: ModelConfig) -> list[str]:
        if (config.d_model, config.d_ff) in KERNEL_SHAPES:
            return []
        known = ", ".join(f"{d} x {f}" for d, f in KERNEL_SHAPES)
        return [f"use on a GPU: the reference's kernels know d_model x d_ff of {known}, and give zeros for others"]


def _move_shared_biases(tensors: dict[str, Tensors]) -> None:
    """Block 0 has the position bias that the stack shares, unless other blocks have theirs."""
    if any(re.fullmatch(r"\w+/layers_\d+/relpos_bias/rel_embedding", name) for name in tensors):
        for stack in ("encoder", "decoder"):
            if f"{stack}/relpos_bias/rel_embedding" in tensors:
                tensors[f"{stack}/layers_0/relpos_bias/rel_embedding"] = tensors.pop(
                    f"{stack}/relpos_bias/rel_embedding"
                )


def _sizes(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that tensors tell too."""
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_kv": config.head_dim,
        "d_ff": config.d_ff,
        "num_heads": config.num_heads,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_experts": config.num_experts,
        "relative_attention_num_buckets": RELPOS_BUCKETS,
    }


def sparse_step(num_layers: int, sparse_layers: tuple[int, ...]) -> int | None:
    """Hugging Face's step that gives these sparse layers; None if there is none.

    Layer i is sparse iff i % step == 1; a step of 1 means all layers, of 0 none.
    """
    for step in (0, 1, *range(2, num_layers + 1)):
        rule = lambda i, step=step: step > 0 and (step == 1 or i % step == 1)
        if sparse_layers == tuple(i for i in range(num_layers) if rule(i)):
            return step
    return None


def _why_not_held(config: ModelConfig) -> list[str]:
    """What of a model SwitchTransformers can't compute; empty if it can all."""
    problems = []
    if config.gated:
        problems.append("its MLPs are gated (wi_0, wi_1); SwitchTransformers has wi alone")
    if config.experts_choose is not None:
        problems.append("the encoder's experts choose their tokens; in SwitchTransformers tokens choose")
    if config.top_k > 1:
        problems.append(f"each token goes to {config.top_k} experts; SwitchTransformers routes to one")
    for stack in ("encoder", "decoder"):
        layers, sparse = getattr(config, f"num_{stack}_layers"), getattr(config, f"{stack}_sparse_layers")
        if sparse_step(layers, sparse) is None:
            problems.append(f"sparse layers {sparse} of {layers} in the {stack}; it makes layers i % step == 1 sparse")
    return problems
