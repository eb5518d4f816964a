"""Hugging Face's SwitchTransformers: config.json and safetensors files, or files of torch.save (.bin).

Experts' matrices are tensors of their own, [out, in]; `names` says what is called what. Which layers are sparse is read
off the names: Hugging Face's rule (layer i is sparse iff i % step == 1) differs from T5X's for steps above 2.
"""

from __future__ import annotations

import functools
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np

from qmoe_jax.checkpoints.base import Checkpoint, check_group_size
from qmoe_jax.checkpoints.conversion import ExpertReader, Options, Part, Plan, expert_dtype, replacing
from qmoe_jax.checkpoints.torch_files import TorchFile
from qmoe_jax.errors import CheckpointError, listed
from qmoe_jax.files import write_json
from qmoe_jax.models.switch.config import ModelConfig
from qmoe_jax.models.switch.names import Tensors, from_pytorch, t5x_shape, to_pytorch
from qmoe_jax.models.switch.parameters import RELPOS_BUCKETS, infer_config, param_shapes

CONFIG = "config.json"
MODEL_TYPE = "switch_transformers"
INDEX = "model.safetensors.index.json"
EMBEDDINGS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # shared.weight, once more each
# Where tensors may be, the first that is there: an index of several files, or one file.
_TENSORS = (INDEX, "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
_DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
# Hugging Face counts an expert's tokens per sequence, T5X by groups and a factor: here no token is dropped.
NO_TOKEN_IS_DROPPED = 1_000_000


def is_huggingface(path: str | os.PathLike) -> bool:
    """Whether `path` is a directory with Hugging Face's files in it."""
    path = pathlib.Path(path)
    return (path / CONFIG).is_file() and any((path / name).is_file() for name in _TENSORS)


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError if the file holds anything else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise CheckpointError(f"{file} is missing; copy the checkpoint again.") from e
    except ValueError as e:
        raise CheckpointError(f"{file} is not JSON ({e}): damaged, copy it again.") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds {str(value)[:40]!r}, expected a JSON object.")
    return value


# --- Reading ---------------------------------------------------------------------------------------------------------


class TensorFile(Protocol):
    """A file with tensors, of which nothing but names and shapes is read before `read`.

    Attributes:
      specs: shape and dtype by name.
    """

    specs: Mapping[str, jax.ShapeDtypeStruct]

    def read(self, name: str) -> np.ndarray: ...


class SafetensorsFile:
    """See `TensorFile`."""

    def __init__(self, path: pathlib.Path):
        import safetensors  # Here, so that everything else runs without it.

        self.path, self._damaged = path, (OSError, safetensors.SafetensorError)
        try:
            self._file = safetensors.safe_open(path, "numpy")
            slices = {name: self._file.get_slice(name) for name in self._file.keys()}
            kinds = {name: s.get_dtype() for name, s in slices.items()}
            shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
        except self._damaged as e:
            raise CheckpointError(f"{path}: not a safetensors file, or damaged ({e}): copy it again.") from e
        if odd := [f"{name}: {kind}" for name, kind in kinds.items() if kind not in _DTYPES]:
            raise CheckpointError(listed(f"{path}: tensors must be {', '.join(_DTYPES)}.", odd))
        self.specs = {name: jax.ShapeDtypeStruct(shape, _DTYPES[kinds[name]]) for name, shape in shapes.items()}

    def read(self, name: str) -> np.ndarray:
        try:
            return self._file.get_tensor(name)
        except self._damaged as e:
            raise CheckpointError(f"{self.path}: cannot read tensor {name!r} ({e}): copy it again.") from e


class BinFile:
    """See `TensorFile`; a file of torch.save."""

    def __init__(self, path: pathlib.Path):
        self._file = TorchFile(path)
        self._tensors = self._file.tensors()
        odd = [f"{name}: {t.dtype}" for name, t in self._tensors.items() if t.dtype not in _DTYPES.values()]
        if odd:
            raise CheckpointError(listed(f"{path}: tensors must be floating-point.", odd))
        self.specs = {name: jax.ShapeDtypeStruct(t.shape, t.dtype) for name, t in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        return self._file.read(self._tensors[name])


def _open_files(path: pathlib.Path) -> dict[str, TensorFile]:
    """Every tensor's name, and the file it is in."""
    source = next((path / name for name in _TENSORS if (path / name).is_file()), None)
    if source is None:
        raise CheckpointError(f"{path}: no tensors: expected one of {', '.join(_TENSORS)}.")
    if source.name.endswith(".json"):
        weight_map = read_json(source).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{source}: no 'weight_map' of names and files: damaged, copy it again.")
        files = sorted(set(weight_map.values()))
        if outside := [f for f in files if pathlib.PurePath(f).name != f]:
            raise CheckpointError(f"{source}: the file {outside[0]!r} doesn't lie beside it, as expected.")
        if missing := [f for f in files if not (path / f).is_file()]:
            raise CheckpointError(listed(f"{path}: files of {source.name} are missing:", missing))
    else:
        files, weight_map = [source.name], None
    opened: dict[str, Any] = {
        f: SafetensorsFile(path / f) if f.endswith(".safetensors") else BinFile(path / f) for f in files
    }
    if weight_map is None:
        weight_map = {name: source.name for name in opened[source.name].specs}
    if missing := [f"{n} in {f}" for n, f in weight_map.items() if n not in opened[f].specs]:
        raise CheckpointError(listed(f"{path}: tensors of {source.name} are missing from their files:", missing))
    return {name: opened[file] for name, file in weight_map.items()}


class HuggingFaceCheckpoint(Checkpoint):
    """See `Checkpoint`; experts' kernels are arrays [experts, in, out], stacked when they are read.

    Args:
      path: the directory.
      **overrides: fields of `ModelConfig` to change.

    Raises:
      CheckpointError: a file is missing or damaged, or asks for code to be run; tensors are missing, foreign, of wrong
        shape, or don't fit config.json.
    """

    def __init__(self, path: str | os.PathLike, **overrides: Any):
        path = pathlib.Path(path)
        self.path = str(path)
        described = check_model_type(path / CONFIG, read_json(path / CONFIG))
        self._files = _open_files(path)
        shapes = {name: file.specs[name].shape for name, file in self._files.items()}
        # The large published models, all untied, have it under this name, whatever config.json says.
        tied = described.get("tie_word_embeddings", True) and "decoder.lm_head.weight" not in shapes
        self._tensors, shapes = t5x_parameters(path, shapes, tied)
        self.config = infer_config(shapes, **overrides)
        check_described(path / CONFIG, described, self.config)
        self.specs = {}
        for name, tensors in self._tensors.items():
            dtypes = {self._files[n].specs[n].dtype for n in tensors.names}
            # float32 holds both 16-bit formats.
            dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
            self.specs[name] = jax.ShapeDtypeStruct(shapes[name], dtype)
        self.provenance = {"checkpoint": self.path, "layout": "huggingface", "step": described.get("t5x_step")}

    def read(self, name: str, index: tuple = ()) -> np.ndarray:
        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: no parameter {name!r}; it has {len(self.specs)} others.")
        tensors, index = self._tensors[name], index if isinstance(index, tuple) else (index,)
        if not tensors.stacked:
            return self._matrix(tensors.names[0], tensors.transposed)[index]
        which = range(len(tensors.names))[index[0] if index else slice(None)]
        if isinstance(which, int):
            return self._matrix(tensors.names[which], tensors.transposed)[index[1:]]
        experts = np.empty((len(which), *self.specs[name].shape[1:]), self.specs[name].dtype)
        for i, expert in enumerate(which):
            experts[i] = self._matrix(tensors.names[expert], tensors.transposed)
        return experts[(slice(None), *index[1:])]

    def _matrix(self, name: str, transposed: bool) -> np.ndarray:
        value = self._files[name].read(name)
        return value.T if transposed else value

    def experts(self, layer: str, group_size: int | None = None) -> Iterator[tuple[int, int, dict[str, Any]]]:
        for start, stop in expert_groups(self.config.num_experts, group_size):
            names = {m: f"{layer}/mlp/expert/{m}/kernel" for m in self.config.expert_matrices}
            yield start, stop, {m: self.read(name, (slice(start, stop),)) for m, name in names.items()}


def expert_groups(num_experts: int, group_size: int | None) -> Iterator[tuple[int, int]]:
    """Consecutive experts, `group_size` at a time (None: all). Raises ValueError for a size below one."""
    size = num_experts if group_size is None else group_size
    check_group_size(size)
    for start in range(0, num_experts, size):
        yield start, min(start + size, num_experts)


def check_model_type(file: pathlib.Path, described: dict[str, Any]) -> dict[str, Any]:
    """The same config.json; raises CheckpointError if it is another model's."""
    if described.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"{file}: model_type {described.get('model_type')!r}, expected {MODEL_TYPE!r}.")
    return described


def t5x_parameters(
    path: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], tied: bool
) -> tuple[dict[str, Tensors], dict[str, tuple[int, ...]]]:
    """T5X's parameters of PyTorch tensors: the tensors that make each, and its shape.

    Raises CheckpointError for tensors that aren't of this model, and for experts that are missing.
    """
    try:
        tensors, foreign = from_pytorch(shapes)
        if tied:
            tensors.pop("decoder/logits_dense/kernel", None)  # The embedding again.
        elif "decoder/logits_dense/kernel" not in tensors:
            raise CheckpointError("lm_head.weight is missing, though config.json has tie_word_embeddings false.")
        found = {name: t5x_shape(t, shapes) for name, t in tensors.items()}
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from e
    if foreign:
        raise CheckpointError(listed(f"{path}: {len(foreign)} tensors are not of a {MODEL_TYPE} model:", foreign))
    return tensors, found


def check_described(file: pathlib.Path, described: Mapping[str, Any], config: ModelConfig) -> None:
    """Raises CheckpointError, listing all differences, where config.json describes another model than the tensors."""
    sizes = hugging_face_sizes(config)
    # Published models are known with other numbers of layers in config.json than in their tensors.
    sizes = {k: v for k, v in sizes.items() if k not in ("num_layers", "num_decoder_layers")}
    problems = [f"{k}: {described[k]}, but the tensors say {v}" for k, v in sizes.items() if described.get(k, v) != v]
    if described.get("relative_attention_max_distance", 128) != 128:
        problems.append(
            f"relative_attention_max_distance: {described['relative_attention_max_distance']}, expected 128"
        )
    if problems:
        raise CheckpointError(listed(f"{file} doesn't fit the tensors beside it:", problems))


# --- Writing ---------------------------------------------------------------------------------------------------------


def hugging_face_sizes(config: ModelConfig) -> dict[str, Any]:
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


def why_not_held(config: ModelConfig) -> list[str]:
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


def what_is_lost(config: ModelConfig) -> list[str]:
    """What SwitchTransformers doesn't know of a model that it can compute."""
    lost = ["T5X's capacity factor: Hugging Face counts tokens per sequence; written so that none is dropped"]
    if config.relpos_per_layer:
        lost.append(
            "position biases of all layers but the first: they are written, and read again by this project, but "
            "transformers uses the first layer's for all, with other results"
        )
    return lost


def hugging_face_config(config: ModelConfig, dtype: str, step: int | None = None) -> dict[str, Any]:
    """config.json. Raises CheckpointError, listing all reasons, for a model that SwitchTransformers can't compute."""
    if problems := why_not_held(config):
        raise CheckpointError(listed("Hugging Face's SwitchTransformers can't hold this model:", problems))
    steps = {
        stack: sparse_step(getattr(config, f"num_{stack}_layers"), getattr(config, f"{stack}_sparse_layers"))
        for stack in ("encoder", "decoder")
    }
    return {
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        **hugging_face_sizes(config),
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
        "torch_dtype": dtype,
        **({} if step is None else {"t5x_step": step}),
    }


def plan(checkpoint: Checkpoint, output: pathlib.Path, options: Options) -> Plan:
    """How `checkpoint` becomes safetensors files, an index and config.json in `output`; see `conversion`."""
    embedding = options.dtype_of(checkpoint.specs["token_embedder/embedding"].dtype)
    config = hugging_face_config(checkpoint.config, embedding.name, checkpoint.provenance.get("step"))
    reader = ExpertReader(checkpoint)

    def dense(name):
        tensors = to_pytorch(name, checkpoint.config.num_experts)
        value = checkpoint.read(name)
        value = (value.T if tensors.transposed else value).astype(options.dtype_of(value.dtype))
        # Where logits aren't tied, transformers doesn't tie the stacks' embeddings either.
        copies = EMBEDDINGS if name == "token_embedder/embedding" and not checkpoint.config.tied else ()
        return {n: value for n in (*tensors.names, *copies)}

    def experts(layer, start, stop):
        values: dict[str, np.ndarray] = {}
        for matrix, kernels in reader.read(layer, start, stop).items():
            names = to_pytorch(f"{layer}/mlp/expert/{matrix}/kernel", checkpoint.config.num_experts).names[start:stop]
            values |= {n: k.T.astype(options.dtype_of(k.dtype)) for n, k in zip(names, kernels, strict=True)}
        return values

    # --- Units: what is read at once, and its bytes; then files of several units -------------------------------------
    units = [
        (math.prod(spec.shape) * options.dtype_of(spec.dtype).itemsize, functools.partial(dense, name))
        for name, spec in checkpoint.specs.items()
        if not checkpoint.is_expert(name)
    ]
    shapes = param_shapes(checkpoint.config)
    for layer in checkpoint.config.sparse_layers:
        names = [f"{layer}/mlp/expert/{matrix}/kernel" for matrix in checkpoint.config.expert_matrices]
        expert = sum(math.prod(shapes[n][1:]) * options.dtype_of(expert_dtype(checkpoint, n)).itemsize for n in names)
        for start, stop in expert_groups(checkpoint.config.num_experts, max(1, options.shard_bytes // expert)):
            units.append(((stop - start) * expert, functools.partial(experts, layer, start, stop)))
    files: list[list] = [[]]
    for unit in units:
        if files[-1] and sum(size for size, _ in files[-1]) + unit[0] > options.shard_bytes:
            files.append([])
        files[-1].append(unit)
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    names = ["model.safetensors"] if len(files) == 1 else names

    def write(name, units):
        from safetensors.numpy import save_file

        tensors = {n: np.ascontiguousarray(v) for _, read in units for n, v in read().items()}
        with replacing(output / name) as temporary:
            save_file(tensors, temporary, {"format": "pt"})
        return [output / name]

    def finish():
        written = []
        if len(names) > 1:
            specs = {name: SafetensorsFile(output / name).specs for name in names}
            total = sum(math.prod(s.shape) * s.dtype.itemsize for file in specs.values() for s in file.values())
            weight_map = {tensor: name for name, file in specs.items() for tensor in file}
            write_json(output / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
            written.append(output / INDEX)
        write_json(output / CONFIG, config)
        return [*written, output / CONFIG]

    parts = [
        Part(name, sum(size for size, _ in units), functools.partial(write, name, units))
        for name, units in zip(names, files, strict=True)
    ]
    return Plan(parts, finish, what_is_lost(checkpoint.config))
