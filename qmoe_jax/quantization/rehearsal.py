"""Every stage of a compression, and of inference, measured on a few experts of the true shape and projected to a model.

A stage's seconds are per unit: per expert, per token, per byte. What the whole takes is their sum over a workload
(`planning.Workload`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util

from qmoe_jax import reporting
from qmoe_jax.checkpoints import Checkpoint, CompressedWriter, NativeCheckpoint, open_t5x, param_shapes, reading
from qmoe_jax.checkpoints.base import is_expert_kernel
from qmoe_jax.checkpoints.t5x import ArrayWriter, index_file, placeholder, t5x_chunks
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.config import ModelConfig
from qmoe_jax.models import streaming
from qmoe_jax.models.moe import expert_mlp, grouped
from qmoe_jax.models.switch import DecoderLayer, EncoderLayer
from qmoe_jax.quantization.pipeline import QuantizationSettings, Quantizer
from qmoe_jax.quantization.planning import Workload, sizes, stored_bits

ZEROS = 0.886  # share of zeros in the paper's ternary c2048, for what depends on the code's length
BFLOAT16 = ml_dtypes.bfloat16


def seconds(run: Callable[[], Any], repeats: int = 3) -> float:
    """The shortest time of a call after a first one, which compiles: other work on the machine only adds."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return min(times)


def random_kernels(config: ModelConfig, experts: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Matrices of a few experts, bfloat16 [experts, in, out]."""
    rng = np.random.default_rng(seed)
    shapes = {
        m: (config.d_model, config.d_ff) if m != "wo" else (config.d_ff, config.d_model) for m in config.expert_matrices
    }
    return {
        m: (rng.standard_normal((experts, *s), np.float32) * s[0] ** -0.5).astype(BFLOAT16) for m, s in shapes.items()
    }


def quantize_group(
    config: ModelConfig,
    quantization: QuantizationSettings,
    codec: str | None,
    kernels: Mapping[str, np.ndarray],
    tokens: int,
    dtype: Any,
) -> dict[str, float]:
    """Seconds of each stage of quantizing a group of experts of which each has `tokens` calibration tokens.

    The second of two groups: the first one compiles. With a target rate, the search for it isn't counted.
    """
    experts = len(kernels["wo"])
    inputs = np.random.default_rng(1).standard_normal((experts * tokens, config.d_model), np.float32).astype(dtype)
    rows = [np.arange(e * tokens, (e + 1) * tokens) for e in range(experts)]
    gates = [np.full(tokens, 0.5, np.float32)] * experts
    if quantization.method == "rd":
        quantization = dataclasses.replace(quantization, target_bits=None, lagrangian=1e-4)
    all_of = {"encoder": np.ones(len(inputs), bool)}
    none_of = {"encoder": np.zeros(len(inputs), bool)}
    stages = reporting.Stages()
    # More experts than there are, so that no token is over the cap; the layer is never finished.
    hook = Quantizer(
        dataclasses.replace(quantization, token_cap=4.0), all_of, none_of, 3 * experts, codec, None, stages
    )
    for start in (0, experts):
        stages.seconds.clear()
        group = streaming.ExpertGroup(
            "encoder/layers_0", "encoder", start, start + experts, dict(kernels), inputs, rows, gates
        )
        jax.block_until_ready(hook(group))
    return dict(stages.seconds)


def run_experts(config: ModelConfig, kernels: Mapping[str, np.ndarray], tokens: int, dtype: Any) -> float:
    """Seconds for `tokens` tokens of each expert through the experts, from the host and back."""
    experts = len(kernels["wo"])
    h = np.random.default_rng(2).standard_normal((experts * tokens, config.d_model), np.float32).astype(dtype)
    sizes_ = jnp.full(experts, tokens, jnp.int32)
    matrices = jax.device_put([kernels[m] for m in config.expert_matrices])
    step = jax.jit(lambda h, matrices, sizes_: expert_mlp(h, matrices, grouped(sizes_)))
    return seconds(lambda: np.asarray(step(np.take(h, np.arange(len(h)), axis=0), matrices, sizes_)))


def _layer_params(config: ModelConfig, layer: str) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    flat = {
        name.removeprefix(f"{layer}/"): (rng.standard_normal(shape, np.float32) * shape[0] ** -0.5).astype(BFLOAT16)
        for name, shape in param_shapes(config).items()
        if name.startswith(f"{layer}/") and not is_expert_kernel(name)
    }
    return jax.device_put(traverse_util.unflatten_dict(flat, sep="/"))


def attention(
    config: ModelConfig, stack: str, layer: int, rows: int, lengths: tuple[int, int], dtype: Any, repeats: int = 3
) -> float:
    """Seconds of a layer without its experts on a batch of `rows` documents of (encoder, decoder) `lengths`."""
    sparse = layer in (config.encoder_sparse_layers if stack == "encoder" else config.decoder_sparse_layers)
    params = _layer_params(config, f"{stack}/layers_{layer}")
    rng = np.random.default_rng(4)

    def batch(length):
        return rng.standard_normal((rows, length, config.d_model), np.float32).astype(dtype)

    tokens = [np.ones((rows, n), np.int32) for n in lengths]
    shared = None
    if not config.relpos_per_layer:
        n = lengths[stack == "decoder"]
        shared = jnp.zeros((1, config.num_heads, n, n), dtype)
    if stack == "encoder":
        module, x = EncoderLayer(config, sparse, False, dtype), batch(lengths[0])
        return seconds(lambda: streaming._encoder_layer(module, params, x, tokens[0], shared), repeats)
    decoder, x, memory = DecoderLayer(config, sparse, True, dtype), batch(lengths[1]), batch(lengths[0])
    fed = (tokens[0], tokens[1], tokens[1])
    return seconds(lambda: streaming._decoder_layer(decoder, params, x, memory, fed, shared), repeats)


def read_chunks(config: ModelConfig, most_bytes: int, scratch: str | None) -> float:
    """Seconds per stored byte of reading float32 chunks of T5X's shape, gzip, from the page cache at best."""
    full = (config.num_experts, config.d_model, config.d_ff)
    chunk = t5x_chunks(full)
    count = max(1, min(full[2] // chunk[2], most_bytes // (4 * int(np.prod(chunk)))))
    shape = (chunk[0], chunk[1], count * chunk[2])
    name = "encoder/layers_0/mlp/expert/wi/kernel"
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        entry = placeholder(name, shape, chunk, "float32", "gzip")
        writer = ArrayWriter(pathlib.Path(directory), name, entry)
        rng = np.random.default_rng(5)
        for region in reading.regions(shape, chunk, 0, shape[0]):
            writer.write(region, rng.standard_normal(chunk, np.float32))
        (pathlib.Path(directory) / "checkpoint").write_bytes(index_file({name: entry}, 0))
        source = open_t5x(directory).experts(name)
        how = reading.Reading(BFLOAT16)

        def run():
            for _ in reading.stream([("layer", lambda: {"wi": source})], shape[0], how, range(shape[0])):
                pass

        return seconds(run, 1) / (4 * int(np.prod(shape)))


def read_experts(
    checkpoint: Checkpoint, layer: str, experts: int, memory: streaming.Settings
) -> tuple[dict[str, np.ndarray], float]:
    """A layer's first experts, and seconds per stored byte of reading what holds them."""
    how = memory._replace(round_weights=True).reading
    size = checkpoint.config.d_model * checkpoint.config.d_ff * len(checkpoint.config.expert_matrices)
    read = experts
    if isinstance(checkpoint, NativeCheckpoint):
        grids = {m: s.grid for m, s in checkpoint.sources(layer).items()}
        read = reading.plan_layer(grids, experts, how.dtype, how.limit).block
        size *= max(g.itemsize for g in grids.values())
    started = time.perf_counter()
    with contextlib.closing(checkpoint.stream([layer], experts, how, range(read))) as stream:
        _, _, _, kernels = next(stream)
        taken = time.perf_counter() - started
    return {m: np.array(k[:experts]) for m, k in kernels.items()}, taken / (size * read)


def write_group(config: ModelConfig, experts: Mapping[str, CompressedExperts], scratch: str | None) -> float:
    """Seconds per byte of writing compressed experts."""
    few = dataclasses.replace(config, num_experts=experts["wo"].shape[0])
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        writer = CompressedWriter(directory, few, {}, "gap", {})
        layers = itertools.count()
        taken = seconds(lambda: writer.write_layer(f"encoder/layers_{next(layers)}", experts), 1)
    return taken / sum(e.nbytes for e in experts.values())


def trits(config: ModelConfig, experts: int, codec: str) -> dict[str, CompressedExperts]:
    """Compressed experts of true shape whose symbols are independent, with the paper's share of zeros."""
    rng = np.random.default_rng(6)
    made = {}
    for m in config.expert_matrices:
        out, columns = (config.d_model, config.d_ff) if m == "wo" else (config.d_ff, config.d_model)
        symbols = rng.choice(3, (experts, out, columns), p=[ZEROS, (1 - ZEROS) / 2, (1 - ZEROS) / 2]).astype(np.uint8)
        levels = np.tile(np.array([-0.05, 0.05], np.float32), (experts, out, 1))
        made[m] = CompressedExperts.from_symbols(symbols, levels, codec)
    return made


def decode(config: ModelConfig, experts: Mapping[str, CompressedExperts], dtype: Any) -> float:
    """Seconds of one token through one compressed expert, another one each time."""
    matrices = [experts[m] for m in config.expert_matrices]
    count = matrices[0].shape[0]
    step = jax.jit(lambda h, e, matrices: expert_mlp(h, matrices, grouped((jnp.arange(count) == e).astype(jnp.int32))))
    h = jnp.ones((1, config.d_model), dtype)

    def run():
        return [step(h, e, matrices) for e in range(count)]

    return seconds(run) / count


# --- Projection ------------------------------------------------------------------------------------------------------


def project(
    config: ModelConfig,
    work: Workload,
    quantization: QuantizationSettings,
    measured: Mapping[str, float],
    *,
    groups_ahead: bool = True,
    stored_itemsize: int = 4,
) -> dict[str, float]:
    """Seconds of each stage of a whole compression.

    Args:
      config: the model.
      work: documents.
      quantization: tells bits and the cap on tokens.
      measured: seconds per unit: 'reading' and 'writing' per byte, 'quantization' and 'encoding' per expert,
        'hessians' per calibration token, 'experts' per token, 'attention encoder' and 'attention decoder' per token of
        that stack and layer.
      groups_ahead: reading is overlapped, so that 'total' has only what it takes longer than the rest.
      stored_itemsize: bytes of a stored weight.
    """
    size = sizes(config)
    layers = {"encoder": config.encoder_sparse_layers, "decoder": config.decoder_sparse_layers}
    depth = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    tokens = {"encoder": work.encoder_tokens, "decoder": work.decoder_tokens}
    calibration = {"encoder": work.encoder_calibration, "decoder": work.decoder_calibration}
    experts = config.num_experts * len(config.sparse_layers)
    routed = sum(len(layers[s]) * tokens[s] for s in layers) * config.top_k
    in_hessians = sum(len(layers[s]) * calibration[s] for s in layers) * config.top_k
    found = {
        "reading": measured["reading"] * stored_itemsize * (size.experts + size.dense),
        "attention": sum(measured[f"attention {s}"] * depth[s] * tokens[s] for s in depth),
        "hessians": measured["hessians"] * in_hessians,
        "quantization": measured["quantization"] * experts,
        "encoding": measured["encoding"] * experts,
        "experts": measured["experts"] * routed,
        "writing": measured["writing"] * size.experts * stored_bits(quantization) / 8,
    }
    computing = sum(s for name, s in found.items() if name != "reading")
    found["total"] = max(computing, found["reading"]) if groups_ahead else computing + found["reading"]
    return found


def measure(
    config: ModelConfig,
    work: Workload,
    memory: streaming.Settings,
    quantization: QuantizationSettings,
    codec: str | None,
    *,
    experts: int,
    most_tokens: int,
    kernels: Mapping[str, np.ndarray] | None = None,
    reading_seconds: float | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:
    """Seconds per unit, as `project` takes them.

    Args:
      config: the model.
      work: documents: how many tokens an expert would get, how long a batch is.
      memory, quantization, codec: how.
      experts: how many are measured, together.
      most_tokens: of each expert, and of a batch; more are extrapolated, in proportion.
      kernels: bfloat16 [experts, in, out]; None: random ones.
      reading_seconds: per byte, where it has been measured.
      say: told what comes next.
    """
    dtype, scratch = memory.dtype, memory.scratch
    kernels = random_kernels(config, experts) if kernels is None else kernels
    found = {}
    if reading_seconds is None:
        say("reading")
        reading_seconds = read_chunks(config, 1 << 27, scratch)
    found["reading"] = reading_seconds
    say("attention")
    lengths = (work.encoder_length, work.decoder_length)
    rows = max(1, min(memory.tokens_per_batch, most_tokens) // sum(lengths))
    for stack, length in zip(("encoder", "decoder"), lengths, strict=True):
        layers: dict[bool, int | None] = {True: None, False: None}
        sparse = config.encoder_sparse_layers if stack == "encoder" else config.decoder_sparse_layers
        depth = config.num_encoder_layers if stack == "encoder" else config.num_decoder_layers
        for i in range(depth):
            layers[i in sparse] = i
        times = {k: attention(config, stack, i, rows, lengths, dtype) for k, i in layers.items() if i is not None}
        share = len(sparse) / depth
        mean = share * times.get(True, 0.0) + (1 - share) * times.get(False, 0.0)
        found[f"attention {stack}"] = mean / (rows * length)
    say("Hessians, quantization, encoding")
    own = max(1, round(work.encoder_calibration * config.top_k / config.num_experts))
    tokens = min(own, most_tokens)
    stages = quantize_group(config, quantization, codec, kernels, tokens, dtype)
    found["hessians"] = stages.get("hessians", 0.0) / (experts * tokens)
    found["quantization"] = stages["quantization"] / experts
    # Encoding is counted within the quantizer's own time where that calls it.
    found["encoding"] = (stages["encoding"] + stages.get("output error", 0.0)) / experts
    say("experts")
    found["experts"] = run_experts(config, kernels, tokens, dtype) / (experts * tokens)
    found["writing"] = 0.0
    if codec is not None:
        say("writing")
        found["writing"] = write_group(config, trits(config, experts, codec), scratch)
    return found


def generation(config: ModelConfig, codec: str, experts: int, dtype: Any, encoder_length: int) -> dict[str, float]:
    """Seconds by stage of one more token of one document: the whole decoder, experts compressed."""
    layers = range(config.num_decoder_layers)
    kinds = {i in config.decoder_sparse_layers: i for i in layers}  # whether sparse: the last such layer
    one = {sparse: attention(config, "decoder", i, 1, (encoder_length, 1), dtype) for sparse, i in kinds.items()}
    y = jnp.ones((1, config.d_model), jnp.bfloat16)
    logits = jnp.ones((config.d_model, config.vocab_size), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    sparse = len(config.decoder_sparse_layers)
    found = {
        "attention, dense": sum(one[i in config.decoder_sparse_layers] for i in layers),
        "experts": sparse * config.top_k * decode(config, trits(config, experts, codec), dtype),
        "logits": seconds(lambda: product(y, logits)),
    }
    return found | {"total": sum(found.values())}
