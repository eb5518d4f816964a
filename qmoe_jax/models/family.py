"""What a family of models tells the rest of the project; nothing else there knows what a model looks like.

A family is one folder beside this file, and one line in `families.py`. It owns

    Config, PRESETS          the architecture as a frozen dataclass, and published ones by name
    names and shapes         of its parameters, of its experts' among them; what they are called in each layout
    Expert                   one expert's MLP as a value: matrices in order of use, and the activation between them
    layers(...)              the steps of a streamed pass, in which one layer is in memory at a time
    Task                     what an example is and how examples are batched, which tokens calibrate
    model, forward, generate the Flax module, and what people call

    Names                    per layout of checkpoints: what parameters are called there, what is told beside them

Models open no file: parameters have '/'-joined names, and whoever has them reads them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from qmoe_jax.models.names import Shape, Tensors

Example = tuple[np.ndarray, ...]  # token ids, int32, in one or several arrays [length]


# --- Experts ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Expert:
    """The MLP of one expert: y = W_last activation(W_1 x, W_2 x, ...), with biases if it has any.

    All that quantization and the products on experts know of a model. Hashable, so that it can be static under `jit`.

    Attributes:
      matrices: names in order of use; the last maps back to the model's width. Kernels are [in, out].
      activation: of the products with all but the last, arrays [..., d_ff], in that order.
      biases: names of what is added to each product, in the order of `matrices`; empty: nothing is.
    """

    matrices: tuple[str, ...]
    activation: Callable[[Sequence[jax.Array]], jax.Array]
    biases: tuple[str, ...] = ()

    @property
    def inner(self) -> tuple[str, ...]:
        """The matrices that see the expert's input."""
        return self.matrices[:-1]

    @property
    def last(self) -> str:
        """The matrix that maps back."""
        return self.matrices[-1]

    def product(self, matrix: str, x: jax.Array, kernels: Mapping[str, Any], dot: Callable) -> jax.Array:
        """One matrix, and its bias: dot(x, kernel, bias or None) knows which rows are whose."""
        bias = kernels[self.biases[self.matrices.index(matrix)]] if self.biases else None
        return dot(x, kernels[matrix], bias)

    def hidden(self, x: jax.Array, kernels: Mapping[str, Any], dot: Callable) -> jax.Array:
        """What the last matrix gets."""
        return self.activation([self.product(m, x, kernels, dot) for m in self.inner])

    def __call__(self, x: jax.Array, kernels: Mapping[str, Any], dot: Callable) -> jax.Array:
        """The MLP of every expert on its own rows; kernels and biases by name."""
        return self.product(self.last, self.hidden(x, kernels, dot), kernels, dot)


class Routing(NamedTuple):
    """Where tokens go: [tokens, choices], or [batch, length, choices].

    Expert `num_experts`, or a gate of 0: a choice that came to nothing.
    """

    expert: jax.Array  # int32
    gate: jax.Array  # float32, by which the expert's output is multiplied


# --- The streamed pass -----------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """One layer of a streamed pass.

    Attributes:
      name: what the names of its parameters begin with; also what reports call it.
      stream: whose activations it changes, by name; a model has one or several.
      attend: attend(params, shared, x, context, tokens) -> x, h, routing. It gets the layer's parameters, nested, by
        their names below the layer's; those in `shared`, by their whole names; activations x [rows, length, d_model];
        those of the streams in `context`, by name; and the batch's token arrays. A layer with experts leaves these
        out: x is what comes before them, h their input, and `Routing` says which tokens go where. A layer without
        gives None for both.
      context: other streams, which have ended, whose activations it sees.
      shared: prefixes of parameters that it uses beside its own.
      expert: what its experts are; None: it has none.
      choices: of each token.
    """

    name: str
    stream: str
    attend: Callable[..., tuple[jax.Array, jax.Array | None, Routing | None]]
    context: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    expert: Expert | None = None
    choices: int = 0


class Batch(Protocol):
    """Padded examples."""

    @property
    def indices(self) -> np.ndarray:
        """int32 [rows], which example a row holds; -1: none, the row is padding."""
        ...

    @property
    def tokens(self) -> tuple[np.ndarray, ...]:
        """The token arrays, [rows, ...] each, as `Layer.attend` takes them."""
        ...

    def length(self, stream: str) -> int:
        """Padded length of a stream's activations."""
        ...


class Stream(NamedTuple):
    """Activations that go through consecutive layers.

    Attributes:
      name: as layers have it.
      begins: begins(params, example) -> [length, d_model], NumPy: what the first layer gets.
      begins_with: prefixes of the parameters that it takes, nested, by their whole names.
      ends: ends(params, x) -> x, after the last layer; None: nothing is done.
      ends_with: likewise.
    """

    name: str
    begins: Callable[[Mapping[str, Any], Example], np.ndarray]
    begins_with: tuple[str, ...]
    ends: Callable[[Mapping[str, Any], jax.Array], jax.Array] | None = None
    ends_with: tuple[str, ...] = ()


class Streamed(NamedTuple):
    """A model as a streamed pass.

    Attributes:
      streams: in the order in which they run.
      layers: in the order in which they run, so stream by stream.
      losses: losses(params, x, tokens) -> [rows], summed cross-entropy of each row, from the last stream's activations.
      losses_with: prefixes of the parameters that it takes.
      one_process: why several processes can't share the examples; empty: they can.
    """

    streams: tuple[Stream, ...]
    layers: tuple[Layer, ...]
    losses: Callable[[Mapping[str, Any], jax.Array, tuple[jax.Array, ...]], jax.Array]
    losses_with: tuple[str, ...]
    one_process: str = ""


# --- Examples --------------------------------------------------------------------------------------------------------


class Vocabulary(Protocol):
    """What tells text from token ids."""

    def check(self, embedding_rows: int) -> None:
        """Raises DataError unless a model with so many embedding rows can belong to it."""
        ...

    def decode(self, ids: Any) -> str: ...


class Task(Protocol):
    """What an example is, and what of it counts.

    Attributes:
      load: load(paths, vocabulary, num_documents, **options) -> the first usable documents of text files, as a sequence
        of examples. Raises DataError.
    """

    load: Callable[..., Any]

    def vocabulary(self, path: Any) -> Any:
        """Reads a vocabulary file. Raises DataError."""
        ...

    def check(self, examples: Sequence[Example], vocab_size: int) -> None:
        """Raises ValueError that names the first example that the model can't be run on."""
        ...

    def batches(self, examples: Sequence[Example], tokens_per_batch: int) -> Sequence[Batch]:
        """Every example in exactly one row, in batches of a few fixed shapes."""
        ...

    def inputs(self, tokens: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        """What the model's module is called with, of a batch's token arrays.

        Of its logits [rows, length, vocabulary] the first `predicted` of a row are those that predict a token.
        """
        ...

    def lengths(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """By stream, int [examples]: how many vectors of activations an example has there."""
        ...

    def predicted(self, examples: Sequence[Example]) -> np.ndarray:
        """int [examples], how many tokens of each are predicted."""
        ...

    def targets(self, example: Example) -> np.ndarray:
        """int32 [predicted], the tokens that are predicted, in order."""
        ...

    def special(self, examples: Sequence[Example], vocabulary: Any) -> dict[str, np.ndarray]:
        """By stream, bool [all vectors, end to end]: those that the paper leaves out of Hessians (section 3.3)."""
        ...

    def longest(self, max_length: int) -> dict[str, int]:
        """By stream, how many vectors a document of `max_length` tokens has."""
        ...

    def filled(self, rows: int, lengths: Mapping[str, int]) -> tuple[np.ndarray, ...]:
        """Token arrays of a batch without padding, whose streams have these lengths; for rehearsals."""
        ...

    def prompt(self, vocabulary: Any, text: str) -> tuple[np.ndarray, dict[str, Any]]:
        """A text that the model is to go on from, or to fill in.

        Returns:
          Token ids for the family's `generate`, int32 [length], and the options that belong to them, such as `stop`.

        Raises:
          ValueError: it can't be one; in words that begin like 'it is empty', for the name of the prompt before them.
        """
        ...

    def completed(self, vocabulary: Any, tokens: np.ndarray, written: np.ndarray) -> str:
        """The whole text.

        Args:
          vocabulary: of the model.
          tokens: from `prompt`.
          written: int32 [max_length], what `generate` gave.
        """
        ...

    def pieces(self, vocabulary: Any, tokens: np.ndarray, written: Iterable[int]) -> Iterator[str]:
        """The same text in pieces, each as soon as no token to come can change it; the first is of the prompt.

        Args:
          vocabulary: of the model.
          tokens: from `prompt`.
          written: as it comes.
        """
        ...


# --- The family ------------------------------------------------------------------------------------------------------


class Config(Protocol):
    """What every architecture tells; a frozen dataclass with a `to_dict` and a `from_dict`."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def expert(self) -> Expert:
        """What its experts are."""
        ...

    @property
    def sparse_layers(self) -> tuple[str, ...]:
        """Names of the layers that have experts, in the order in which they run."""
        ...

    def to_dict(self) -> dict[str, Any]: ...


class Names(Protocol):
    """A family in a layout of checkpoints: what its parameters are called, and what files tell of its models.

    `described` is what they tell, such as config.json; empty where they tell nothing. Errors don't name the files.
    """

    def parameters(self, shapes: Mapping[str, Shape], described: Mapping[str, Any]) -> dict[str, Tensors]:
        """The parameters that stored tensors make, from the tensors' shapes by name.

        Raises CheckpointError that lists tensors of another model, or experts that are missing.
        """
        ...

    def tensors(self, name: str, config: Any) -> Tensors:
        """What a parameter is written to. Raises KeyError if there is none of that name."""
        ...

    def config(self, shapes: Mapping[str, Shape], described: Mapping[str, Any], **overrides: Any) -> Any:
        """The architecture, from shapes of parameters and what is told beside them.

        Raises CheckpointError that lists what is missing, foreign or of wrong shape, or contradicts each other.
        """
        ...

    def describe(self, config: Any, dtypes: Mapping[str, np.dtype], step: int | None) -> dict[str, Any]:
        """What is to be told beside parameters of these dtypes, by name, after so many training steps.

        Raises CheckpointError that lists all reasons why the layout can't hold the model.
        """
        ...

    def why_left_out(self, config: Any, tensor: str) -> str | None:
        """What a tensor is that no parameter is made of, on purpose; `names.COPY` of what is read; None: not known."""
        ...

    def lost(self, config: Any) -> list[str]:
        """What the layout doesn't tell of a model that it can hold, in words."""
        ...


class Family(Protocol):
    """A family of models: one object, listed in `families.py`.

    Attributes:
      name: kept in manifests.
      title: in messages, such as 'a Switch Transformer'.
      published_as: layout of its published checkpoints.
      Config: class of its architectures.
      PRESETS: published ones, by name.
      told: fields of the config that parameters tell.
      UNTOLD: of those that they don't, what a user may give, by name: what it is, for the help of flags.
      task: what an example is.
      names: by layout of checkpoints, 't5x', 'huggingface' or 'ista': those in which its models can be kept.
      model_types: 'model_type' in the config.json of its models.
      min_tokens: calibration tokens that an expert needs, where settings don't say; 0: any number will do.
      forward: forward(model, params, *tokens, **options) -> logits, float32 [batch, length, vocabulary].
      generate: generate(model, params, tokens, *, max_length, **options) -> what the model writes, int32 [batch,
        max_length].
      written: written(model, params, tokens, *, max_length, **options) -> the same tokens as they come, an iterator of
        int32 [batch]; it may end once all rows have ended.
    """

    name: str
    title: str
    published_as: str
    Config: type
    PRESETS: Mapping[str, Any]
    told: tuple[str, ...]
    UNTOLD: Mapping[str, str]
    task: Task
    names: Mapping[str, Names]
    model_types: tuple[str, ...]
    min_tokens: int
    forward: Callable[..., jax.Array]
    generate: Callable[..., jax.Array]
    written: Callable[..., Iterator[np.ndarray]]

    def summary(self, config: Any) -> list[tuple[str, str]]:
        """What an architecture is, in words: lines of a table, such as ('heads x width', '12 x 64')."""
        ...

    def infer(self, shapes: Mapping[str, Shape], **overrides: Any) -> Any:
        """The architecture that parameters, by '/'-joined name, belong to.

        Raises CheckpointError that lists all that are missing, foreign or of wrong shape.
        """
        ...

    def param_shapes(self, config: Any) -> dict[str, Shape]:
        """Of all parameters, by '/'-joined name; kernels are [in, out], experts' [experts, in, out]."""
        ...

    def expert_parameter(self, layer: str, matrix: str) -> str:
        """Name of the parameter [experts, in, out] that holds a matrix of a layer's experts."""
        ...

    def expert_of(self, name: str) -> tuple[str, str] | None:
        """Layer and matrix of a parameter that holds experts; None: it is another parameter."""
        ...

    def is_small(self, name: str) -> bool:
        """Whether a parameter is a norm or a router, by whose values a model is told from another."""
        ...

    def model(self, config: Any, dtype: DTypeLike, mesh: Mesh | None) -> nn.Module:
        """The Flax module, whose parameters have these names."""
        ...

    def streamed(self, config: Any, dtype: DTypeLike) -> Streamed:
        """The model layer by layer."""
        ...

    def attention_bytes(self, config: Any, longest: Mapping[str, int], tokens_per_batch: int) -> int:
        """What a batch takes on the device in a layer, experts and parameters left out; for plans.

        Args:
          config: the architecture.
          longest: by stream, the longest example.
          tokens_per_batch: as in the settings of a streamed pass.
        """
        ...

    def loss_bytes(self, config: Any, longest: Mapping[str, int]) -> int:
        """What the logits of one example take on the device; for plans."""
        ...
