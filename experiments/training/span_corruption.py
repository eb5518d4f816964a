"""Switch Transformers, by span corruption of documents; a native T5X checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import config_dict

from qmoe_jax.checkpoints.t5x import write_t5x
from qmoe_jax.data import read_documents
from qmoe_jax.models.switch import EOS, Vocabulary, training_batches
from qmoe_jax.models.switch.config import ModelConfig
from qmoe_jax.models.switch.model import SwitchTransformer
from training import Losses, Router, router_losses


class SpanCorruption:
    """See the package."""

    def __init__(self, config: config_dict.ConfigDict):
        self._settings, self._vocabulary = config.train, Vocabulary.load(config.data.vocabulary)
        documents = self._vocabulary.encode_batch(list(read_documents(config.data.train)))
        self._documents = [np.array([*ids, EOS], np.int32) for ids in documents if ids]
        self.tokens = sum(map(len, self._documents))
        self.model = SwitchTransformer(ModelConfig.from_dict({**config.model, "vocab_size": self._vocabulary.size}))

    def init(self, key: jax.Array) -> Any:
        example = jnp.ones((1, 8), jnp.int32)
        return jax.jit(self.model.init)(key, example, example)["params"]

    def batches(self, rng: np.random.RandomState) -> Iterator[tuple[np.ndarray, ...]]:
        """(encoder inputs, decoder inputs, decoder targets), int32 [rows, length] each, padded with 0."""
        batches = training_batches(self._documents, self._vocabulary, self._settings.tokens_per_batch, rng)
        return (batch[1:] for batch in batches)

    def losses(self, params: Any, batch: tuple[jax.Array, ...]) -> Losses:
        model, (encoder_input, _, targets) = self.model, batch
        logits, state = model.apply(
            {"params": params}, *batch, capacity_factor=self._settings.capacity_factor, mutable=["intermediates"]
        )
        real = {"encoder": encoder_input > 0, "decoder": targets > 0}
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        experts_choose = {"encoder": model.config.experts_choose is not None, "decoder": False}
        routers = [
            Router(layer["mlp"]["router_logits"][0], real[stack], experts_choose[stack])
            for stack in real
            for layer in state["intermediates"][stack].values()
            if "mlp" in layer
        ]
        loss = jnp.mean(cross_entropy, where=real["decoder"])
        return Losses(loss, *router_losses(routers, model.config.top_k))

    def save(self, workdir: str | os.PathLike, params: Any, step: int) -> None:
        write_t5x(workdir, params, step=step, dtype="bfloat16", overwrite=True)
