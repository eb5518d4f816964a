"""Every stage of a compression, and of inference, measured on a few experts of the true shape and projected to a model.

A stage's seconds are per unit: per expert, per token, per byte. What the whole takes is their sum over a workload
(`planning.Workload`).
"""

from __future__ import annotations

import contextlib
import itertools
import math
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

from qmoe_jax import resources, streaming
from qmoe_jax.checkpoints import Checkpoint, open_t5x, reading
from qmoe_jax.checkpoints.compressed.parts import save, sha256
from qmoe_jax.checkpoints.t5x import ArrayWriter, index_file, placeholder, t5x_chunks
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.compression.planning import Workload, expert_shapes, sizes
from qmoe_jax.models.experts import grouped
from qmoe_jax.models.families import family_of
from qmoe_jax.models.family import Config, Layer
from qmoe_jax.quantization.quantizer import Quantizer
from qmoe_jax.quantization.settings import QuantizationSettings
from qmoe_jax.streaming.experts import ExpertGroup

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


def random_kernels(config: Config, experts: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Matrices of a few experts, bfloat16 [experts, in, out]."""
    rng = np.random.default_rng(seed)
    return {
        m: (rng.standard_normal((experts, *shape), np.float32) * shape[0] ** -0.5).astype(BFLOAT16)
        for m, (_, *shape) in expert_shapes(config).items()
    }


def quantize_group(
    config: Config,
    quantization: QuantizationSettings,
    codec: str | None,
    kernels: Mapping[str, np.ndarray],
    tokens: int,
    dtype: Any,
) -> dict[str, float]:
    """Seconds of each stage of quantizing a group of experts of which each has `tokens` calibration tokens.

    The second of two groups: the first one compiles. With a target rate, the search for it isn't counted.
    """
    experts = len(kernels[config.expert.last])
    inputs = np.random.default_rng(1).standard_normal((experts * tokens, config.d_model), np.float32).astype(dtype)
    rows = [np.arange(e * tokens, (e + 1) * tokens) for e in range(experts)]
    gates = [np.full(tokens, 0.5, np.float32)] * experts
    if quantization.rounding.target_bits is not None:
        quantization = quantization.replace(target_bits=None, lagrangian=1e-4)
    all_of, none_of = {"": np.ones(len(inputs), bool)}, {"": np.zeros(len(inputs), bool)}
    stages = resources.Stages()
    # More experts than there are, so that no token is over the cap; the layer is never finished.
    quantizer = Quantizer(quantization.replace(token_cap=4.0), all_of, none_of, 3 * experts, codec, None, stages)
    for start in (0, experts):
        stages.seconds.clear()
        stop = start + experts
        group = ExpertGroup("layer", "", config.expert, start, stop, dict(kernels), inputs, rows, gates)
        jax.block_until_ready(quantizer(group))
    return dict(stages.seconds)


def run_experts(config: Config, kernels: Mapping[str, np.ndarray], tokens: int, dtype: Any) -> float:
    """Seconds for `tokens` tokens of each expert through the experts, from the host and back."""
    experts = len(kernels[config.expert.last])
    h = np.random.default_rng(2).standard_normal((experts * tokens, config.d_model), np.float32).astype(dtype)
    sizes_ = jnp.full(experts, tokens, jnp.int32)
    matrices = jax.device_put(dict(kernels))
    step = jax.jit(lambda h, matrices, sizes_: config.expert(h, matrices, grouped(sizes_)))
    return seconds(lambda: np.asarray(step(np.take(h, np.arange(len(h)), axis=0), matrices, sizes_)))


def _random_params(config: Config, prefix: str) -> dict[str, Any]:
    """Of all parameters below a prefix but experts, nested, by their names there."""
    rng, family = np.random.default_rng(3), family_of(config)
    flat = {
        name.removeprefix(prefix): (rng.standard_normal(shape, np.float32) * shape[0] ** -0.5).astype(BFLOAT16)
        for name, shape in family.param_shapes(config).items()
        if name.startswith(prefix) and not family.expert_of(name)
    }
    return jax.device_put(traverse_util.unflatten_dict(flat, sep="/"))


def attention(
    config: Config, layer: Layer, rows: int, lengths: Mapping[str, int], dtype: Any, repeats: int = 3
) -> float:
    """Seconds of a layer without its experts on a batch of `rows` documents of these lengths, by stream."""
    rng = np.random.default_rng(4)

    def batch(stream):
        return rng.standard_normal((rows, lengths[stream], config.d_model), np.float32).astype(dtype)

    shared: dict[str, Any] = {}
    for prefix in layer.shared:
        flat = traverse_util.flatten_dict(_random_params(config, prefix), sep="/")
        shared |= {prefix + name: value for name, value in flat.items()}
    inputs = (
        _random_params(config, f"{layer.name}/"),
        traverse_util.unflatten_dict(shared, sep="/"),
        batch(layer.stream),
        {stream: batch(stream) for stream in layer.context},
        family_of(config).task.filled(rows, lengths),
    )
    return seconds(lambda: layer.attend(*inputs), repeats)


def read_chunks(config: Config, most_bytes: int, scratch: str | None) -> float:
    """Seconds per stored byte of reading float32 chunks of T5X's shape, gzip, from the page cache at best."""
    name, full = "matrix", expert_shapes(config)[config.expert.matrices[0]]
    chunk = t5x_chunks(full)
    count = max(1, min(full[2] // chunk[2], most_bytes // (4 * int(np.prod(chunk)))))
    shape = (chunk[0], chunk[1], count * chunk[2])
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        entry = placeholder(name, shape, chunk, "float32", "gzip")
        writer = ArrayWriter(pathlib.Path(directory), name, entry)
        rng = np.random.default_rng(5)
        for region in reading.regions(shape, chunk, 0, shape[0]):
            writer.write(region, rng.standard_normal(chunk, np.float32))
        (pathlib.Path(directory) / "checkpoint").write_bytes(index_file({name: entry}, 0))
        source = open_t5x(directory).source(name)
        how = reading.Reading(BFLOAT16)

        def run():
            for _ in reading.stream([("layer", lambda: {name: source})], shape[0], how, range(shape[0])):
                pass

        return seconds(run, 1) / (4 * int(np.prod(shape)))


def read_experts(
    checkpoint: Checkpoint, layer: str, experts: int, memory: streaming.Settings
) -> tuple[dict[str, np.ndarray], float]:
    """A layer's first experts, and seconds per stored byte of reading what holds them."""
    how = memory._replace(round_weights=True).reading
    grids = checkpoint.grids(layer)
    read = reading.plan_layer(grids, experts, how.dtype, how.limit).block
    size = sum(math.prod(g.shape[1:]) * g.itemsize for g in grids.values())
    started = time.perf_counter()
    with contextlib.closing(checkpoint.stream([layer], experts, how, range(read))) as stream:
        _, _, _, kernels = next(stream)
        taken = time.perf_counter() - started
    return {m: np.array(k[:experts]) for m, k in kernels.items()}, taken / (size * read)


def write_group(experts: Mapping[str, CompressedExperts], scratch: str | None) -> float:
    """Seconds per byte of writing compressed experts as a checkpoint has them."""
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        parts = (pathlib.Path(directory) / str(i) for i in itertools.count())

        def write():
            part = next(parts)
            save(part, {m: e.stored() for m, e in experts.items()})
            sha256(part)

        taken = seconds(write, 1)
    return taken / sum(e.nbytes for e in experts.values())


def trits(config: Config, experts: int, codec: str) -> dict[str, CompressedExperts]:
    """Compressed experts of true shape whose symbols are independent, with the paper's share of zeros."""
    rng = np.random.default_rng(6)
    made = {}
    for m, (_, columns, out) in expert_shapes(config).items():
        symbols = rng.choice(3, (experts, out, columns), p=[ZEROS, (1 - ZEROS) / 2, (1 - ZEROS) / 2]).astype(np.uint8)
        levels = np.tile(np.array([-0.05, 0.05], np.float32), (experts, out, 1))
        made[m] = CompressedExperts.from_symbols(symbols, levels, codec)
    return made


def decode(config: Config, experts: Mapping[str, CompressedExperts], dtype: Any) -> float:
    """Seconds of one token through one compressed expert, another one each time."""
    matrices, count = dict(experts), experts[config.expert.last].shape[0]
    alone = lambda e: grouped((jnp.arange(count) == e).astype(jnp.int32))
    step = jax.jit(lambda h, e, matrices: config.expert(h, matrices, alone(e)))
    h = jnp.ones((1, config.d_model), dtype)

    def run():
        return [step(h, e, matrices) for e in range(count)]

    return seconds(run) / count


# --- Projection ------------------------------------------------------------------------------------------------------


def project(
    config: Config,
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
        'hessians' per calibration token, 'experts' per token, 'attention STREAM' per token of a stream and
        layer.
      groups_ahead: reading is overlapped, so that 'total' has only what it takes longer than the rest.
      stored_itemsize: bytes of a stored weight.
    """
    size, model = sizes(config), family_of(config).streamed(config, np.float32)
    experts = config.num_experts * len(config.sparse_layers)
    chosen = [(layer.stream, layer.choices) for layer in model.layers if layer.expert]
    found = {
        "reading": measured["reading"] * stored_itemsize * (size.experts + size.dense),
        "attention": sum(measured[f"attention {layer.stream}"] * work.tokens[layer.stream] for layer in model.layers),
        "hessians": measured["hessians"] * sum(work.calibration[stream] * n for stream, n in chosen),
        "quantization": measured["quantization"] * experts,
        "encoding": measured["encoding"] * experts,
        "experts": measured["experts"] * sum(work.tokens[stream] * n for stream, n in chosen),
        "writing": measured["writing"] * size.experts * quantization.rounding.needs().bits / 8,
    }
    computing = sum(s for name, s in found.items() if name != "reading")
    found["total"] = max(computing, found["reading"]) if groups_ahead else computing + found["reading"]
    return found


def measure(
    config: Config,
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
    rows = max(1, min(memory.tokens_per_batch, most_tokens) // sum(work.longest.values()))
    model = family_of(config).streamed(config, dtype)
    for stream, length in work.longest.items():
        # Layers with and without experts, the last of each kind, as many as there are of them.
        own = [layer for layer in model.layers if layer.stream == stream]
        kinds = {layer.expert is not None: layer for layer in own}
        times = {sparse: attention(config, layer, rows, work.longest, dtype) for sparse, layer in kinds.items()}
        found[f"attention {stream}"] = sum(times[layer.expert is not None] for layer in own) / (
            len(own) * rows * length
        )
    say("Hessians, quantization, encoding")
    first = next(layer for layer in model.layers if layer.expert)
    own_tokens = max(1, round(work.calibration[first.stream] * first.choices / config.num_experts))
    tokens = min(own_tokens, most_tokens)
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
        found["writing"] = write_group(trits(config, experts, codec), scratch)
    return found


def generation(config: Config, codec: str, experts: int, dtype: Any, longest: Mapping[str, int]) -> dict[str, float]:
    """Seconds by stage of one more token of one document: all layers of the last stream, experts compressed."""
    model = family_of(config).streamed(config, dtype)
    last = model.streams[-1].name
    layers = [layer for layer in model.layers if layer.stream == last]
    kinds = {layer.expert is not None: layer for layer in layers}  # the last such layer
    lengths = dict(longest) | {last: 1}
    one = {sparse: attention(config, layer, 1, lengths, dtype) for sparse, layer in kinds.items()}
    y = jnp.ones((1, config.d_model), jnp.bfloat16)
    logits = jnp.ones((config.d_model, config.vocab_size), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    found = {
        "attention, dense": sum(one[layer.expert is not None] for layer in layers),
        "experts": sum(layer.choices for layer in layers) * decode(config, trits(config, experts, codec), dtype),
        "logits": seconds(lambda: product(y, logits)),
    }
    return found | {"total": sum(found.values())}
