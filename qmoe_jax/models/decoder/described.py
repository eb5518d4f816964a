"""config.json of Hugging Face, read setting by setting: what isn't understood is refused, never ignored.

Two styles are in use: `rope_theta` and `rope_scaling` beside each other (all published models), and one
`rope_parameters` (transformers 5); `torch_dtype` or `dtype`.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from qmoe_jax.errors import CheckpointError, listed
from qmoe_jax.models.decoder.config import DecoderConfig, Rope
from qmoe_jax.models.fields import MOST_LAYERS, problems_of_values

# On these no logit depends: how the file came about, training, sampling, and what the checkpoint's layout sees to.
HARMLESS = frozenset(
    """
    architectures model_type transformers_version _name_or_path auto_map torch_dtype dtype quantization_config
    compression_config use_cache return_dict return_dict_in_generate output_attentions output_hidden_states
    output_router_logits output_scores initializer_range attention_dropout router_aux_loss_coef router_jitter_noise
    aux_loss_alpha seq_aux pretraining_tp ep_size pad_token_id sep_token_id cls_token_id mask_token_id
    decoder_start_token_id id2label label2id num_labels problem_type task_specific_params finetuning_task
    tokenizer_class prefix torchscript is_decoder is_encoder_decoder chunk_size_feed_forward unsloth_version
    unsloth_fixed use_bfloat16 gradient_checkpointing max_window_layers _attn_implementation attn_implementation
    _attn_implementation_autoset _from_model_config _commit_hash do_sample temperature top_k top_p typical_p
    repetition_penalty num_beams max_new_tokens min_length eos_token t5x_step
    """.split()
)
_ROPE = {  # ours: Hugging Face's
    "factor": "factor",
    "original_length": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "attention_factor": "attention_factor",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
_REQUIRED = object()
_NOT_READ = "config.json doesn't describe {title} that can be read:"
_KINDS: dict[str, Any] = {
    **dict.fromkeys(
        """
        vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim qk_head_dim
        intermediate_size moe_intermediate_size num_experts num_local_experts n_routed_experts n_shared_experts
        num_experts_per_tok experts_per_token max_position_embeddings initial_context_length sliding_window
        decoder_sparse_step qk_rope_head_dim qk_nope_head_dim v_head_dim q_lora_rank kv_lora_rank n_group topk_group
        first_k_dense_replace num_nextn_predict_layers num_mtp_layers bos_token_id t5x_step
        """.split(),
        int,
    ),
    **dict.fromkeys("rms_norm_eps rope_theta clip_qkv routed_scaling_factor swiglu_alpha swiglu_limit".split(), float),
    **dict.fromkeys(
        "tie_word_embeddings norm_topk_prob attention_bias use_sliding_window rope_interleave".split(), bool
    ),
    **dict.fromkeys("rope_scaling rope_parameters quantization_config".split(), dict),
    "eos_token_id": int | tuple[int, ...],
    "mlp_only_layers": tuple[int, ...],
    "layer_types": tuple[str, ...],
    "model_type": str,
}


class Described:
    """The settings of a config.json that haven't been taken yet."""

    def __init__(self, fields: Mapping[str, Any], title: str):
        self.title, self._left = title, dict(fields)
        self._problems: list[str] = []
        odd = problems_of_values(fields, _KINDS)
        if not odd and (layers := fields.get("num_hidden_layers") or 0) > MOST_LAYERS:
            odd = [f"num_hidden_layers: found {layers}, expected at most {MOST_LAYERS}"]
        if odd:
            raise CheckpointError(listed(_NOT_READ.format(title=title), odd))

    def take(self, *names: str, default: Any = _REQUIRED) -> Any:
        """The setting, which has one of these names; `default` where it is absent or null."""
        values = [self._left.pop(name, None) for name in names]
        found = [value for value in values if value is not None]
        if any(value != found[0] for value in found):
            self._problems.append(f"{' and '.join(names)} contradict each other: {found}")
        if found:
            return found[0]
        if default is _REQUIRED:
            self._problems.append(f"{names[0]}: missing")
            return 1  # Something to go on with, to the other problems.
        return default

    def expect(self, name: str, *allowed: Any) -> None:
        """Refuses a setting that is there and is none of these."""
        value = self._left.pop(name, None)
        if value is not None and value not in allowed:
            self._problems.append(f"{name}: found {value!r}, supported is {' or '.join(map(repr, allowed))}")

    def same(self, name: str, value: Any, expected: Any) -> None:
        """Refuses a setting that says something else than another one."""
        if value != expected:
            self._problems.append(f"{name}: found {value!r}, but elsewhere {expected!r}")

    def rope(self, default_theta: float, max_length: int) -> Rope:
        """Rotary positions, in either style."""
        theta = self._left.pop("rope_theta", None)
        scaling = self._left.pop("rope_scaling", None) or {}
        settings = {**scaling, **(self._left.pop("rope_parameters", None) or {})}
        theta = settings.pop("rope_theta", None) or theta or default_theta
        kind = settings.pop("rope_type", None) or settings.get("type") or "default"
        settings.pop("type", None)
        if settings.pop("partial_rotary_factor", None) not in (None, 1, 1.0):
            self._problems.append("partial_rotary_factor: not supported")
        if kind not in ("default", "linear", "yarn"):  # Of whatever type.
            self._problems.append(f"rope_type: found {kind!r}, supported is 'default', 'linear' or 'yarn'")
            return Rope()
        taken = {ours: settings.pop(theirs, None) for ours, theirs in _ROPE.items()}
        self._problems += [
            f"rope setting {name} = {reprlib.repr(value)}: not known" for name, value in settings.items()
        ]
        try:
            return _rope(kind, theta, taken, max_length)
        except (TypeError, ValueError) as e:
            self._problems.append(str(e))
            return Rope()

    def common(self, default_theta: float, default_eps: float) -> dict[str, Any]:
        """The fields of `DecoderConfig` that all families call alike."""
        self.expect("hidden_act", "silu")
        self.expect("partial_rotary_factor", 1, 1.0)
        max_length, eos = self.take("max_position_embeddings", default=4096), self.take("eos_token_id", default=())
        return {
            "vocab_size": self.take("vocab_size"),
            "d_model": self.take("hidden_size"),
            "num_layers": self.take("num_hidden_layers"),
            "num_heads": self.take("num_attention_heads"),
            "top_k": self.take("num_experts_per_tok", "experts_per_token"),
            "rope": self.rope(default_theta, max_length),
            "norm_eps": self.take("rms_norm_eps", default=default_eps),
            "tied": self.take("tie_word_embeddings", default=False),
            "max_length": max_length,
            "bos": self.take("bos_token_id", default=None),
            "eos": tuple(eos) if isinstance(eos, list | tuple) else (eos,),
        }

    def heads(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of `GroupedConfig`."""
        return {
            "num_kv_heads": self.take("num_key_value_heads", default=fields["num_heads"]),
            "head_dim": self.take("head_dim", default=fields["d_model"] // max(fields["num_heads"], 1)),
        }

    def build(self, make: type[DecoderConfig], fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> Any:
        """The architecture, if all is understood.

        Raises CheckpointError that lists what is missing, not supported or not known.
        """
        unknown = {n: v for n, v in self._left.items() if n not in HARMLESS and v is not None}
        problems = self._problems + [
            f"{n} = {reprlib.repr(v)}: not known, logits may depend on it" for n, v in unknown.items()
        ]
        if problems:
            raise CheckpointError(listed(_NOT_READ.format(title=self.title), problems))
        try:
            return make.from_dict({**fields, **overrides})
        except (TypeError, ValueError) as e:
            raise CheckpointError(f"config.json doesn't describe {self.title} that can be: {e}") from e


def _rope(kind: str, theta: Any, taken: dict[str, Any], max_length: int) -> Rope:
    """Raises TypeError or ValueError for what can't be."""
    if kind == "default":
        return Rope(float(theta))
    if kind == "linear":
        return Rope(float(theta), kind, float(taken["factor"] or 1))
    taken["original_length"] = taken["original_length"] or max_length
    taken["factor"] = float(taken["factor"] or max_length / max(taken["original_length"], 1))
    return Rope(float(theta), kind, **{name: value for name, value in taken.items() if value is not None})


def described_rope(rope: Rope) -> dict[str, Any]:
    """`rope_parameters`, as transformers 5 has them."""
    if rope.kind == "default":
        return {"rope_type": "default", "rope_theta": rope.theta}
    settings = {theirs: getattr(rope, ours) for ours, theirs in _ROPE.items()}
    if rope.kind == "linear":
        settings = {"factor": rope.factor}
    settings = {name: value for name, value in settings.items() if value is not None}
    return {"rope_type": rope.kind, "rope_theta": rope.theta, **settings}


def describe(config: DecoderConfig, model_type: str, architecture: str, dtype: str) -> dict[str, Any]:
    """config.json's settings that all families call alike."""
    described = {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_experts_per_tok": config.top_k,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": described_rope(config.rope),
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_length,
        "bos_token_id": config.bos,
        "eos_token_id": list(config.eos) if len(config.eos) > 1 else next(iter(config.eos), None),
        "use_cache": True,
    }
    for ours, theirs in (("num_kv_heads", "num_key_value_heads"), ("head_dim", "head_dim")):
        if hasattr(config, ours):
            described[theirs] = getattr(config, ours)
    return described
