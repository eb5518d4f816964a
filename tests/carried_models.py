"""What the tests of the two carried models measure of them."""

import numpy as np
from watch import watched

from qmoe_jax import streaming
from qmoe_jax.compression.compress import compress_examples
from qmoe_jax.quantization.settings import QuantizationSettings


def loss(checkpoint, examples, look=lambda group: group.kernels):
    """Nats per predicted token; `look` sees each group of experts and returns the kernels that are used."""
    return watched(checkpoint, examples, streaming.Settings(), look).summary()["loss"]


def loss_without_experts(checkpoint, examples):
    return loss(checkpoint, examples, lambda group: {m: np.zeros_like(k) for m, k in group.kernels.items()})


def unused_experts(checkpoint, examples):
    """(layer, expert) of those that no token goes to."""
    unused = []

    def look(group):
        unused.extend((group.layer, e) for e, tokens in enumerate(group.tokens, group.start) if len(tokens) == 0)
        return group.kernels

    loss(checkpoint, examples, look)
    return unused


def entropy_of_tokens(tokens):
    """Of their own frequencies, in nats: the best loss that sees no context."""
    counts = np.bincount(tokens)
    p = counts[counts > 0] / counts.sum()
    return -np.sum(p * np.log(p))


def loss_quantized(method, checkpoint, vocabulary, calibration, validation):
    """With ternary experts, as the paper has them."""
    settings = QuantizationSettings(method=method)
    return compress_examples(
        checkpoint, vocabulary, calibration, validation, settings, streaming.Settings(), codec=None
    )["loss"]
