"""What a compression will read, write and hold in memory, from shapes alone.

Bytes are counted part by part; the peak is what lies in memory throughout plus the largest of the steps that follow
each other. Factors that no shape tells (temporaries of a compiled step) were taken from XLA's own accounts and are
tested against them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qmoe_jax.checkpoints.architecture import param_shapes
from qmoe_jax.checkpoints.base import is_expert_kernel
from qmoe_jax.checkpoints.reading import Grid, LayerPlan, plan_layer
from qmoe_jax.checkpoints.t5x import t5x_chunks
from qmoe_jax.config import ModelConfig
from qmoe_jax.models import streaming
from qmoe_jax.quantization.pipeline import TERNARY, QuantizationSettings

# Temporaries of the quantizers in units of their Hessians and of their weights, both float32 (XLA's memory analysis).
TEMPORARIES = {"gptq": (2.2, 2.7), "rd": (2.2, 12.5), "rtn": (0.0, 3.0)}
TOKENS_PER_CHUNK = 512  # of each expert, when its Hessian is made
COMPILED = 700 << 20  # programs and their buffers, allocators' slack
# Bits per weight, where no target is given: what the paper and this project's models came to, metadata included.
USUAL_BITS = {TERNARY: 0.8, 2: 1.6}
MOST_BITS = {TERNARY: 1.7, 2: 2.2}  # of a layer in memory before it is written
SPANS = (15, 100, 3)  # percent of noise, and mean length of a span


class Workload(NamedTuple):
    """The documents that stream through the model.

    Attributes:
      encoder_tokens, decoder_tokens: of all of them.
      encoder_calibration, decoder_calibration: of those that calibrate.
      encoder_length, decoder_length: of the longest.
      documents: how many they are.
    """

    encoder_tokens: int
    decoder_tokens: int
    encoder_calibration: int
    decoder_calibration: int
    encoder_length: int
    decoder_length: int
    documents: int


def workload(pairs: Sequence[tuple[np.ndarray, np.ndarray]], num_calibration: int) -> Workload:
    """Of corrupted documents (encoder [Le], decoder [Ld + 1]); the first `num_calibration` calibrate."""
    encoder, decoder = [len(e) for e, _ in pairs], [len(d) - 1 for _, d in pairs]
    return Workload(
        sum(encoder),
        sum(decoder),
        sum(encoder[:num_calibration]),
        sum(decoder[:num_calibration]),
        max(encoder),
        max(decoder),
        len(pairs),
    )


def greatest_workload(num_calibration: int, num_validation: int, max_length: int) -> Workload:
    """If every document were as long as may be: 568 tokens are 512 for the encoder and 114 for the decoder."""
    noise = round(max_length * SPANS[0] / SPANS[1])
    spans = max(1, round(noise / SPANS[2]))
    encoder, decoder = max_length - noise + spans + 1, noise + spans + 1
    documents = num_calibration + num_validation
    return Workload(
        encoder * documents, decoder * documents, encoder * num_calibration, decoder * num_calibration,
        encoder, decoder, documents,
    )  # fmt: skip


def grids_of(config: ModelConfig, itemsize: int = 4) -> dict[str, Grid]:
    """How T5X would have cut the experts of a layer, where there is no checkpoint to ask."""
    shapes = param_shapes(config)
    layer = config.sparse_layers[0]
    matrices = {m: shapes[f"{layer}/mlp/expert/{m}/kernel"] for m in config.expert_matrices}
    return {m: Grid(shape, t5x_chunks(shape), itemsize) for m, shape in matrices.items()}


class Sizes(NamedTuple):
    """Weights of a model: of experts' matrices, of a layer's, of everything else."""

    experts: int
    layer: int
    dense: int


def sizes(config: ModelConfig) -> Sizes:
    shapes = param_shapes(config)
    experts = sum(math.prod(s) for n, s in shapes.items() if is_expert_kernel(n))
    return Sizes(experts, experts // len(config.sparse_layers), sum(math.prod(s) for n, s in shapes.items()) - experts)


def stored_bits(quantization: QuantizationSettings) -> float:
    """Bits per weight to expect of experts as stored."""
    return quantization.target_bits or USUAL_BITS[quantization.bits]


# --- Memory ----------------------------------------------------------------------------------------------------------


def activation_bytes(config: ModelConfig, work: Workload, itemsize: int) -> int:
    """List buffers at their largest, routing and the documents themselves included.

    The encoder has x and h; the decoder its own two and the encoder's output.
    """
    d = config.d_model
    # Expert and gate of each choice, tokens in the order of their experts (int64), and one expert's again.
    routing = 4 + 4 + 3 * 8
    choices = config.top_k if config.experts_choose is None else config.num_experts
    encoder = work.encoder_tokens * (2 * d * itemsize + choices * routing)
    decoder = work.encoder_tokens * d * itemsize + work.decoder_tokens * (2 * d * itemsize + config.top_k * routing)
    documents = 3 * 4 * (work.encoder_tokens + work.decoder_tokens)
    return max(encoder, decoder) + documents


def progress_bytes(config: ModelConfig, work: Workload, itemsize: int) -> int:
    """Committed activations at most: the new ones beside those they replace, and the encoder's output."""
    encoder, decoder = work.encoder_tokens, work.decoder_tokens
    return max(2 * encoder, encoder + 2 * decoder) * config.d_model * itemsize


def device_steps(
    config: ModelConfig, work: Workload, memory: streaming.Settings, quantization: QuantizationSettings
) -> dict[str, int]:
    """Bytes that each step of a layer has on the device, weights of the experts at hand included."""
    d, f, itemsize = config.d_model, config.d_ff, np.dtype(memory.dtype).itemsize
    group = min(memory.experts_per_group, config.num_experts)
    shapes = {m: (f, d) if m != "wo" else (d, f) for m in config.expert_matrices}  # [out, in]
    weights = {m: 4 * group * d * f for m in shapes}  # float32
    hessians = {m: 4 * group * shapes[m][1] ** 2 for m in shapes}
    kernels = sum(weights.values())
    both = hessians["wo"] + hessians[config.expert_matrices[0]]
    chunk = min(TOKENS_PER_CHUNK, max(16, math.ceil(tokens_per_expert(config, work, quantization))))
    X = 4 * group * chunk * (2 * d + 4 * f)
    of_H, of_W = TEMPORARIES[quantization.method]

    heads = config.num_heads
    longest = work.encoder_length + work.decoder_length
    rows = max(1, memory.tokens_per_batch // longest)
    scores = rows * heads * max(work.encoder_length**2, work.decoder_length * longest)
    wide = 4 * heads * config.head_dim + 6 * d + 2 * f
    routed = min(memory.tokens_per_expert_call, work.encoder_tokens, 4 * group * work.encoder_tokens)
    steps = {
        "attention": 4 * (3 * scores + max(memory.tokens_per_batch, longest) * wide) + 2 * _dense_layer(config),
        "experts": kernels + kernels // 2 + max(16, routed) * (4 * itemsize * d + 8 * f),
        "loss": 4 * config.vocab_size * (3 * work.decoder_length + (0 if config.tied else d)),
    }
    if quantization.calibrated:
        steps["hessians"] = kernels + 3 * both + X
    # W transposed, Q and symbols of all matrices, and what the largest of them takes while it is quantized.
    largest = max(of_H * hessians[m] + (1 + of_W) * weights[m] for m in shapes)
    steps["quantization"] = int(kernels + (both if quantization.calibrated else 0) + kernels * 5 // 4 + largest)
    steps["encoding"] = kernels + kernels * 5 // 4 + 48 * d * f + 2 * kernels
    return steps


def tokens_per_expert(config: ModelConfig, work: Workload, quantization: QuantizationSettings) -> float:
    """Most calibration tokens of an expert."""
    cap = quantization.token_cap * work.encoder_calibration / config.num_experts
    return min(cap, work.encoder_calibration) if quantization.calibrated else 0


def _dense_layer(config: ModelConfig) -> int:
    """Bytes in bfloat16 of the largest layer without its experts."""
    layers: dict[str, int] = {}
    for name, shape in param_shapes(config).items():
        if not is_expert_kernel(name) and "/layers_" in name:
            layer = "/".join(name.split("/")[:2])
            layers[layer] = layers.get(layer, 0) + 2 * math.prod(shape)
    return max(layers.values())


# --- The plan --------------------------------------------------------------------------------------------------------


def plan(
    config: ModelConfig,
    work: Workload,
    memory: streaming.Settings,
    quantization: QuantizationSettings,
    *,
    grids: Mapping[str, Grid],
    is_cpu: bool,
    resident_bytes: int,
    codec: str | None = "gap",
) -> dict[str, Any]:
    """What a compression reads, writes and holds, as JSON values.

    Args:
      config: the model.
      work: documents.
      memory, quantization: how.
      grids: of the matrices of a sparse layer, as they are stored.
      is_cpu: the device's memory is the host's.
      resident_bytes: of the process as it is.
      codec: None: experts aren't stored.

    Raises:
      ValueError: `weights_bytes` is too small.
    """
    reading = memory._replace(round_weights=True).reading
    layer: LayerPlan = plan_layer(grids, memory.experts_per_group, reading.dtype, reading.limit)
    size, layers = sizes(config), len(config.sparse_layers)
    itemsize = np.dtype(memory.dtype).itemsize
    steps = device_steps(config, work, memory, quantization)
    bits = stored_bits(quantization)
    activations = activation_bytes(config, work, itemsize)
    stored_itemsize = max(g.itemsize for g in grids.values())
    embedding = 2 * config.vocab_size * config.d_model
    host = {
        "runtime": resident_bytes + COMPILED,
        "experts read": layer.memory_bytes,
        "other weights": 2 * embedding + 2 * _dense_layer(config),
        "activations": 0 if memory.activations else activations,
        "a compressed layer": 0 if codec is None else int(3 * size.layer * MOST_BITS[quantization.bits] / 8),
    }
    device = {"other weights": embedding + _dense_layer(config), "largest step": max(steps.values())}
    if is_cpu:
        host["largest step"] = device["largest step"]
    chunks = sum(g.number_of_chunks() for g in grids.values())
    return {
        "read_bytes": stored_itemsize * (size.experts + size.dense),
        "write_bytes": int(size.experts * bits / 8 + 2 * size.dense) if codec is not None else 0,
        "assumed_bits_per_weight": bits,
        "layers": layers,
        "chunks_per_layer": chunks,
        "reads_of_a_chunk": max(g.layers for g in grids.values()),
        "experts_per_block": layer.block,
        "blocks_per_layer": -(-config.num_experts // layer.block),
        "groups_per_layer": -(-config.num_experts // layer.group),
        "spilled": layer.spilled,
        "scratch_bytes": layer.scratch_bytes,
        "activation_file_bytes": activations if memory.activations else 0,
        "progress_file_bytes": 0 if codec is None else progress_bytes(config, work, itemsize),
        "weights_limit_bytes": reading.limit,
        "documents": work._asdict(),
        "host_bytes": host,
        "peak_host_bytes": sum(host.values()),
        "device_bytes": device,
        "device_steps_bytes": steps,
        "peak_device_bytes": sum(device.values()),
        "device_is_host": is_cpu,
    }


def gigabytes(number: float) -> str:
    """In units of 1e9 bytes, with three digits."""
    return f"{number / 1e9:.3g} GB" if number < 1e12 else f"{number / 1e12:.3g} TB"


def duration(seconds: float) -> str:
    """In seconds, minutes or hours."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def rows(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A plan as lines of a table."""
    work = plan["documents"]
    found = [
        ("documents", f"{work['documents']}, {work['encoder_tokens']:,} and {work['decoder_tokens']:,} tokens"),
        ("to read", gigabytes(plan["read_bytes"])),
        ("to write", f"{gigabytes(plan['write_bytes'])} at {plan['assumed_bits_per_weight']:g} bits a weight"),
        ("sparse layers", str(plan["layers"])),
        ("chunk files a layer", f"{plan['chunks_per_layer']}, each read {_times(plan['reads_of_a_chunk'])}"),
        ("experts read together", f"{plan['experts_per_block']} ({plan['blocks_per_layer']} blocks a layer)"),
        ("groups a layer", str(plan["groups_per_layer"])),
        ("scratch files", gigabytes(plan["scratch_bytes"]) if plan["spilled"] else "none"),
    ]
    if plan["progress_file_bytes"]:
        found.append(("progress files", gigabytes(plan["progress_file_bytes"])))
    if plan["activation_file_bytes"]:
        found.append(("activation files", gigabytes(plan["activation_file_bytes"])))
    found += [(f"host: {part}", gigabytes(n)) for part, n in plan["host_bytes"].items()]
    found.append(("host: peak", gigabytes(plan["peak_host_bytes"])))
    if not plan["device_is_host"]:
        found += [(f"device: {part}", gigabytes(n)) for part, n in plan["device_bytes"].items()]
        found.append(("device: peak", gigabytes(plan["peak_device_bytes"])))
    found += [(f"expected: {stage}", duration(s)) for stage, s in plan.get("expected_seconds", {}).items()]
    return found


def _times(n: int) -> str:
    return "once" if n == 1 else f"{n} times: it spans so many layers (scanned model)"
