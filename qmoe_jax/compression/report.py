"""What a compression reports: loss, sizes, every expert accounted for; JSON values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qmoe_jax import resources
from qmoe_jax.checkpoints import Checkpoint
from qmoe_jax.quantization.account import LayerAccount
from qmoe_jax.quantization.settings import QuantizationSettings
from qmoe_jax.quantization.super_experts import super_experts
from qmoe_jax.streaming import DocumentLosses


def compression_report(
    losses: DocumentLosses,
    accounts: Mapping[str, LayerAccount],
    checkpoint: Checkpoint,
    quantization: QuantizationSettings,
    codec: str | None,
    num_calibration: int,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Of one compression.

    Args:
      losses: of the validation examples.
      accounts: by layer.
      checkpoint: what was compressed.
      quantization, codec: how.
      num_calibration: examples that calibrated.
      seconds: by stage.
    """
    dense_weights = sum(math.prod(s.shape) for n, s in checkpoint.specs.items() if not checkpoint.is_expert(n))
    return {
        **losses.summary(),
        "method": quantization.method,
        "title": quantization.rounding.title,
        "bits": quantization.rounding.bits,
        "target_bits": quantization.rounding.target_bits,
        "codec": codec,
        "num_calibration_documents": num_calibration,
        **_sizes(accounts, dense_weights),
        "left_out": checkpoint.provenance.get("left_out", {}),
        "experts_total": sum(len(a.tokens) for a in accounts.values()),
        "experts_quantized": sum(len(a.tokens) - len(a.fallback) for a in accounts.values()),
        "experts_fallback": sum(len(a.fallback) for a in accounts.values()),
        "min_tokens": quantization.calibration.min_tokens,
        "experts_starved": sum(len(a.starved) for a in accounts.values()),
        "super_experts": super_experts({layer: a.peaks for layer, a in accounts.items()}),
        "layers": {layer: _layer(account) for layer, account in accounts.items()},
        "seconds": dict(seconds),
        "peak_rss_bytes": resources.peak_rss_bytes(),
    }


def _layer(account: LayerAccount) -> dict[str, Any]:
    a = account
    return {
        "zeros": a.zeros,
        "entropy_per_weight": a.entropy,
        "bits_per_weight": None if a.stored_bytes is None else 8 * a.stored_bytes / a.weights,
        "tokens_per_expert": list(a.tokens.values()),
        "fallback": {str(e): why for e, why in a.fallback.items()},
        "overloaded": {str(e): n for e, n in a.overloaded.items()},
        "starved": {str(e): n for e, n in a.starved.items()},
        "peak_per_expert": list(a.peaks.values()) or None,
        "output_error": a.output_error.total(),
        "output_error_per_expert": a.output_error.relative(),
    }


def _sizes(accounts: Mapping[str, LayerAccount], dense_weights: int) -> dict[str, Any]:
    """Rates against bfloat16; everything that isn't experts counts as bfloat16 on both sides."""
    weights = sum(a.weights for a in accounts.values())
    stored = [a.stored_bytes for a in accounts.values() if a.stored_bytes is not None]
    expert_bytes = sum(stored) if len(stored) == len(accounts) else None
    sizes: dict[str, Any] = {
        "zeros": sum(a.zeros * a.weights for a in accounts.values()) / weights,
        "entropy_per_weight": sum(a.entropy * a.weights for a in accounts.values()) / weights,
        "expert_weights": weights,
        "bytes_bfloat16": 2 * (weights + dense_weights),
        "bytes_experts": expert_bytes,
        "bytes_model": None,
        "bits_per_weight": None,
        "compression_experts": None,
        "compression_model": None,
    }
    if expert_bytes is not None:
        model_bytes = expert_bytes + 2 * dense_weights
        sizes |= {
            "bytes_model": model_bytes,
            "bits_per_weight": 8 * expert_bytes / weights,
            "compression_experts": 2 * weights / expert_bytes,
            "compression_model": sizes["bytes_bfloat16"] / model_bytes,
        }
    return sizes
