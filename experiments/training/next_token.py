"""Decoder-only mixtures of any family, to predict the next token in windows of text; a Hugging Face checkpoint."""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from ml_collections import config_dict

from qmoe_jax.checkpoints.in_memory import write_huggingface
from qmoe_jax.data import read_documents
from qmoe_jax.models.families import FAMILIES, family_of
from training import Losses, Router, router_losses


class NextToken:
    """See the package. `config.family` says of which family the model is."""

    def __init__(self, config: config_dict.ConfigDict):
        self._settings, family = config.train, FAMILIES[config.family]
        vocabulary = family.task.vocabulary(config.data.vocabulary)
        if vocabulary.eos is None:
            raise ValueError(f"{vocabulary.path}: no tokenizer_config.json beside it tells an eos_token to end texts.")
        documents = vocabulary.encode_batch(list(read_documents(config.data.train)))
        self._documents = [np.array([*ids, vocabulary.eos], np.int32) for ids in documents if ids]
        self._vocabulary = vocabulary
        self.tokens = sum(map(len, self._documents))
        told = {"vocab_size": vocabulary.size, "bos": vocabulary.bos, "eos": (vocabulary.eos,)}
        self.config = family.Config.from_dict({**config.model, **told})
        self.model = family.model(self.config, jnp.float32, None)

    def init(self, key: jax.Array) -> Any:
        """Matrices as these models' own are drawn, with one deviation; norms are ones, biases zeros."""
        flat = {}
        for i, (name, shape) in enumerate(family_of(self.config).param_shapes(self.config).items()):
            draw = lambda key, shape: self._settings.initial_deviation * jax.random.normal(key, shape)
            matrix = jnp.ones if name.endswith("/scale") else jnp.zeros
            flat[name] = draw(jax.random.fold_in(key, i), shape) if len(shape) > 1 else matrix(shape)
        return traverse_util.unflatten_dict(flat, sep="/")

    def batches(self, rng: np.random.RandomState) -> Iterator[tuple[np.ndarray]]:
        """Windows int32 [rows, window], cut from the documents, joined in another order in each epoch."""
        window = self._settings.window
        rows = max(1, self._settings.tokens_per_batch // window)
        size = rows * window
        if self.tokens < size:
            raise ValueError(f"config.data.train has {self.tokens} tokens, a batch needs {size}: give more text.")
        return self._batches(rng, rows, window)

    def _batches(self, rng, rows: int, window: int) -> Iterator[tuple[np.ndarray]]:
        size = rows * window
        while True:
            order = rng.permutation(len(self._documents))
            joined = np.concatenate([self._documents[i] for i in order])
            for start in range(0, len(joined) - size + 1, size):
                yield (joined[start : start + size].reshape(rows, window),)

    def losses(self, params: Any, batch: tuple[jax.Array]) -> Losses:
        (tokens,) = batch
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        logits, state = self.model.apply({"params": params}, inputs, mutable=["intermediates"])
        layers = state["intermediates"]["model"].values()
        real = jnp.ones(inputs.shape, bool)
        routers = [Router(layer["mlp"]["router"]["logits"][0], real) for layer in layers if "mlp" in layer]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
        return Losses(loss, *router_losses(routers, self.config.top_k))

    def save(self, workdir: str | os.PathLike, params: Any, step: int) -> None:
        """config.json, model.safetensors, tokenizer.json and tokenizer_config.json."""
        write_huggingface(workdir, self.config, params, dtype="bfloat16")
        vocabulary = pathlib.Path(self._vocabulary.path)
        for name in (vocabulary.name, "tokenizer_config.json"):
            source, copy = vocabulary.with_name(name), pathlib.Path(workdir) / name
            if source.resolve() != copy.resolve():
                shutil.copyfile(source, copy)
