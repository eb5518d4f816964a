"""What parameters are called in PyTorch.

Hugging Face's SwitchTransformers and the published QMoE models share these names. PyTorch's matrices are [out, in]
where kernels are [in, out], and each expert's matrix is a tensor of its own.
"""

from __future__ import annotations

from qmoe_jax.models.names import NUMBER, SAME, TRANSPOSED, Row, Table

# {stack}: encoder or decoder. {layer}: all layers count, from 0. {matrix}: wi, wo; gated: wi_0, wi_1, wo.
_FIELDS = {"stack": "encoder|decoder", "layer": NUMBER, "matrix": "wi|wi_0|wi_1|wo"}
# The embedding comes up to three times.
_ROWS = (
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
TABLE = Table([Row(*row) for row in _ROWS], _FIELDS)
