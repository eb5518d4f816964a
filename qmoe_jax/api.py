"""What people call: compress a checkpoint, fine-tune the result; load any layout, compute logits, let it write."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import FlaxError
from jax.sharding import Mesh

from qmoe_jax import codecs, finetuning
from qmoe_jax.checkpoints import Checkpoint, open_checkpoint
from qmoe_jax.codecs.experts import in_codec
from qmoe_jax.compression.choosing import choose_examples
from qmoe_jax.compression.compress import compress_examples
from qmoe_jax.models.expert_parallel import check_mesh, place_param
from qmoe_jax.models.families import family_of
from qmoe_jax.quantization.settings import QuantizationSettings
from qmoe_jax.streaming import Settings


def load(
    path: str | os.PathLike,
    *,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    codec: str | None = None,
    **overrides: Any,
) -> tuple[Any, Any]:
    """The model and its whole parameter tree from a checkpoint of any layout.

    Args:
      path: a compressed checkpoint, or one of any layout that `checkpoints.LAYOUTS` lists: T5X (step directory, its
        parent, or file), MaxText, Hugging Face, a published QMoE model.
      dtype: of activations, float32 or bfloat16. Parameters keep the stored dtype.
      mesh: from `expert_mesh`: every layer's experts are spread over its devices; None: one device.
      codec: that compressed experts have in memory, a name of `codecs.CODECS`; None: as they are stored. 'nibbles'
        takes four bits a weight, and is faster on a CPU where experts have more than a bit.
      **overrides: fields of the architecture that the checkpoint doesn't tell, such as top_k=2; or
        preset='qwen3_30b_a3b', see `open_checkpoint`.

    Returns:
      The Flax model, and its parameters. Experts of a compressed checkpoint are `CompressedExperts`.

    Raises:
      CheckpointError: nothing readable there; says what was found and what was expected.
      ValueError: another dtype, fields that the architecture doesn't have, a codec that is unknown or can't hold the
        experts, or devices that don't divide the experts.
    """
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"dtype {dtype!r}: expected float32 or bfloat16.")
    checkpoint = open_checkpoint(path, **overrides)
    if mesh is not None and not isinstance(mesh, Mesh):
        raise TypeError(f"mesh: found {mesh!r}, expected a jax.sharding.Mesh.")
    if mesh is not None:
        check_mesh(mesh, checkpoint.config.num_experts)

    def place(name, value):
        return place_param(name, in_codec(value, codec), mesh, checkpoint.is_expert(name))

    if codec is not None:
        codecs.get(codec)
    params = checkpoint.load(place)
    return checkpoint.family.model(checkpoint.config, dtype, mesh), params


def forward(model: nn.Module, params: Any, *tokens: Any, **options: Any) -> jax.Array:
    """Logits, float32 [batch, length, vocabulary].

    Args:
      model: from `load`.
      params: from `load`.
      *tokens: int32 [batch, length] each, as the family's own `forward` describes them; by position or by name.
      **options: likewise.

    Raises:
      ValueError: token arrays don't fit each other, or hold ids that the model doesn't have.
    """
    with _params_that_fit(params):
        return family_of(model).forward(model, params, *tokens, **options)


def generate(model: nn.Module, params: Any, tokens: Any, *, max_length: int, **options: Any) -> jax.Array:
    """Tokens that the model writes, int32 [batch, max_length].

    Args:
      model: from `load`.
      params: from `load`; experts may be compressed.
      tokens: int32 [batch, length], the prompt.
      max_length: most tokens written.
      **options: `prefix`, `stop`, `banned`, `temperature`, `top_p`, `key`; see the family's `generate`.

    Raises:
      ValueError: settings or token ids out of range, or no key to sample with.
    """
    with _params_that_fit(params):
        return family_of(model).generate(model, params, tokens, max_length=max_length, **options)


@contextlib.contextmanager
def _params_that_fit(params: Any) -> Iterator[None]:
    """Raises TypeError or ValueError for parameters that aren't the model's, in place of Flax's own errors."""
    if not isinstance(params, Mapping):
        raise TypeError(f"params: found {type(params).__name__}, expected the parameters that `load` gives.")
    try:
        yield
    except FlaxError as e:
        what = str(e).splitlines()[0]
        raise ValueError(f"params: not those of this model ({what})") from e


def compress(
    checkpoint: str | os.PathLike | Checkpoint,
    output: str | os.PathLike,
    *,
    vocabulary: str | os.PathLike,
    calibration: Any,
    validation: Any,
    num_calibration: int = 2_000,
    num_validation: int = 128,
    candidates: int | None = None,
    choose_by: str = "routers",
    target_bits: float | None = None,
    codec: str = "gap",
    memory: Settings | None = None,
    **quantization: Any,
) -> dict[str, Any]:
    """Compresses a model's experts into a new checkpoint, which `load` opens. Interrupted, it goes on when repeated.

    Args:
      checkpoint: path of any uncompressed layout, or an opened one.
      output: directory of the compressed checkpoint.
      vocabulary: the model's vocabulary file.
      calibration, validation: text files: a name, a pattern, or several (see `data.read_documents`).
      num_calibration, num_validation: documents that are taken from them.
      candidates: read so many, of which `num_calibration` are chosen; None: the first ones are taken.
      choose_by: 'routers' or 'routing', see `choosing.choose_examples`.
      target_bits: per expert weight, as stored; rate-distortion quantization then finds what gives them. None: the
        paper's recipe, or what `method` says.
      codec: how experts are stored.
      memory: how the streamed pass uses memory and devices.
      **quantization: other fields of `QuantizationSettings`.

    Returns:
      The report, as JSON values: 'loss' on the validation documents, 'bits_per_weight', 'layers' and so on.

    Raises:
      CheckpointError, DataError, ValueError: something isn't there, is broken, or doesn't fit; in words.

    >>> qmoe_jax.compress("checkpoint_550000", "out", vocabulary="spm.model", target_bits=0.7,
    ...                   calibration="c4-train.0000*.json.gz", validation="c4-validation.json.gz")
    """
    if not isinstance(output, str) and not isinstance(output, os.PathLike):
        raise TypeError(f"output: found {output!r}, expected the path of a directory.")
    if memory is not None and not isinstance(memory, Settings):
        raise TypeError(f"memory: found {memory!r}, expected streaming.Settings.")
    if target_bits is not None:
        quantization = {"method": "rd"} | quantization | {"target_bits": target_bits}
    settings = QuantizationSettings(**quantization)
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    task = opened.family.task
    words = task.vocabulary(vocabulary)
    words.check(opened.config.vocab_size)
    memory, documents = memory or Settings(), None
    if settings.calibrated:
        documents = task.load(calibration, words, candidates or num_calibration)
        if candidates:
            documents = choose_examples(opened, documents, num_calibration, choose_by, memory)
    return compress_examples(
        opened,
        words,
        documents,
        task.load(validation, words, num_validation),
        settings,
        memory,
        codec=codec,
        output=output,
        provenance=opened.provenance,
    )


def finetune(
    compressed: str | os.PathLike | Checkpoint,
    original: str | os.PathLike | Checkpoint,
    output: str | os.PathLike,
    *,
    vocabulary: str | os.PathLike,
    calibration: Any,
    num_calibration: int = 2_000,
    layerwise: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Trains what isn't quantized to predict what the original model predicts; a new compressed checkpoint.

    Norms, routers, attention and the levels of compressed experts; their symbols stay.
    Interrupted, it goes on when repeated.

    Args:
      compressed: a compressed checkpoint, or an opened one.
      original: what it was made from.
      output: directory of the new checkpoint.
      vocabulary: the model's vocabulary file.
      calibration: text files: a name, a pattern, or several (see `data.read_documents`).
      num_calibration: documents that are taken from them; a tenth of them is held out, and says when to stop.
      layerwise: 'original' or 'compressed' trains a layer at a time, towards what the original's layer gives from the
        activations of that model (`finetuning.finetune_layers`): for models that don't fit in memory.
      **settings: fields of `finetuning.Settings`, such as epochs or learning_rate.

    Returns:
      The report, as JSON values: divergence from the original model 'before' and 'after', on documents held out; of
      `layerwise`, relative error by layer.

    Raises:
      CheckpointError, DataError, ValueError: something isn't there, is broken, or doesn't fit; in words.

    >>> qmoe_jax.finetune("out", "checkpoint_550000", "tuned", vocabulary="spm.model",
    ...                   calibration="c4-train.0000*.json.gz")
    """
    if not isinstance(output, str) and not isinstance(output, os.PathLike):
        raise TypeError(f"output: found {output!r}, expected the path of a directory.")
    how = finetuning.Settings(**settings)
    checkpoint, teacher = (c if isinstance(c, Checkpoint) else open_checkpoint(c) for c in (compressed, original))
    for source in (checkpoint, teacher):
        if pathlib.Path(output).resolve() == pathlib.Path(source.path).resolve():
            raise ValueError(f"output: {output} is the checkpoint that is read; write somewhere else.")
    task = checkpoint.family.task
    words = task.vocabulary(vocabulary)
    words.check(checkpoint.config.vocab_size)
    documents = task.load(calibration, words, num_calibration)
    if layerwise is not None:
        what = (checkpoint, teacher, list(documents), how, Settings())
        return finetuning.finetune_layers(*what, output=output, target=layerwise)
    return finetuning.finetune_examples(checkpoint, teacher, documents, how, output=output)
