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

from qmoe_jax import streaming
from qmoe_jax.checkpoints import published_chunks
from qmoe_jax.checkpoints.reading import Grid, LayerPlan, plan_layer
from qmoe_jax.models.families import family_of
from qmoe_jax.models.family import Config, Example, Shape, Task
from qmoe_jax.quantization.settings import QuantizationSettings
from qmoe_jax.quantization.statistics import TOKENS_PER_CHUNK
from qmoe_jax.resources import duration, gigabytes

COMPILED = 700 << 20  # programs and their buffers, allocators' slack
# Bytes of a weight, by layout in which a family is published; float8 and MXFP4 count as the bfloat16 that they become.
PUBLISHED_ITEMSIZE = {"t5x": 4, "huggingface": 2}
ROUTING = 4 + 4 + 3 * 8  # bytes of a choice: expert, gate, and rows in the order of experts (int64), one expert's again


class Workload(NamedTuple):
    """The documents that stream through the model; by stream of activations.

    Attributes:
      tokens: of all of them.
      calibration: of those that calibrate.
      longest: of the longest.
      documents: how many they are.
    """

    tokens: dict[str, int]
    calibration: dict[str, int]
    longest: dict[str, int]
    documents: int

    def to_json(self) -> dict[str, int]:
        """By names such as STREAM_tokens."""
        parts = (("tokens", self.tokens), ("calibration", self.calibration), ("length", self.longest))
        return {f"{stream}_{what}": n for what, of in parts for stream, n in of.items()} | {"documents": self.documents}


def workload(task: Task, examples: Sequence[Example], num_calibration: int) -> Workload:
    """Of examples; the first `num_calibration` calibrate."""
    lengths = task.lengths(examples)
    return Workload(
        {stream: int(n.sum()) for stream, n in lengths.items()},
        {stream: int(n[:num_calibration].sum()) for stream, n in lengths.items()},
        {stream: int(n.max()) for stream, n in lengths.items()},
        len(examples),
    )


def greatest_workload(task: Task, num_calibration: int, num_validation: int, max_length: int) -> Workload:
    """If every document were as long as may be."""
    longest, documents = task.longest(max_length), num_calibration + num_validation
    return Workload(
        {stream: n * documents for stream, n in longest.items()},
        {stream: n * num_calibration for stream, n in longest.items()},
        longest,
        documents,
    )


def expert_shapes(config: Config) -> dict[str, Shape]:
    """Of the matrices of a layer's experts, by name: [experts, in, out]."""
    family, layer = family_of(config), config.sparse_layers[0]
    shapes = family.param_shapes(config)
    return {m: shapes[family.expert_parameter(layer, m)] for m in config.expert.matrices}


def grids_of(config: Config) -> dict[str, Grid]:
    """How the layout in which the family is published cuts the experts of a layer, where no checkpoint is at hand."""
    layout = family_of(config).published_as
    chunks, itemsize = published_chunks(layout), PUBLISHED_ITEMSIZE[layout]
    return {m: Grid(shape, chunks(shape), itemsize) for m, shape in expert_shapes(config).items()}


class Sizes(NamedTuple):
    """Weights of a model: of experts' matrices, of a layer's, of everything else."""

    experts: int
    layer: int
    dense: int


def sizes(config: Config) -> Sizes:
    family = family_of(config)
    shapes = family.param_shapes(config)
    experts = sum(math.prod(s) for n, s in shapes.items() if family.expert_of(n))
    return Sizes(experts, experts // len(config.sparse_layers), sum(math.prod(s) for s in shapes.values()) - experts)


# --- Memory ----------------------------------------------------------------------------------------------------------


def activation_bytes(config: Config, work: Workload, itemsize: int) -> int:
    """List buffers at their largest, routing and the documents themselves included.

    A stream has x and h, and beside them those that have ended.
    """
    d, model = config.d_model, family_of(config).streamed(config, np.float32)
    ended, most = 0, 0
    for stream in model.streams:
        tokens = work.tokens[stream.name]
        choices = max((layer.choices for layer in model.layers if layer.stream == stream.name), default=0)
        most = max(most, ended + tokens * (2 * d * itemsize + choices * ROUTING))
        ended += tokens * d * itemsize
    return most + 3 * 4 * sum(work.tokens.values())


def progress_bytes(config: Config, work: Workload, itemsize: int) -> int:
    """Committed activations at most: the new ones beside those they replace, and those of streams that have ended."""
    ended, most = 0, 0
    for stream in family_of(config).streamed(config, np.float32).streams:
        most = max(most, ended + 2 * work.tokens[stream.name])
        ended += work.tokens[stream.name]
    return most * config.d_model * itemsize


def device_steps(
    config: Config, work: Workload, memory: streaming.Settings, quantization: QuantizationSettings
) -> dict[str, int]:
    """Bytes that each step of a layer has on the device, weights of the experts at hand included."""
    family, itemsize = family_of(config), np.dtype(memory.dtype).itemsize
    group = min(memory.experts_per_group, config.num_experts)
    shapes = {m: (out, width) for m, (_, width, out) in expert_shapes(config).items()}
    first, last = config.expert.matrices[0], config.expert.last
    d, f = shapes[last]
    weights = {m: 4 * group * math.prod(shape) for m, shape in shapes.items()}  # float32
    hessians = {m: 4 * group * width**2 for m, (_, width) in shapes.items()}
    kernels = sum(weights.values())
    both = hessians[last] + hessians[first]
    chunk = min(TOKENS_PER_CHUNK, max(16, math.ceil(tokens_per_expert(config, work, quantization))))
    X = 4 * group * chunk * (2 * d + 4 * f)
    needs, most = quantization.rounding.needs(), max(work.tokens.values())

    routed = min(memory.tokens_per_expert_call, most, 4 * group * most)
    attention = family.attention_bytes(config, work.longest, memory.tokens_per_batch)
    steps = {
        "attention": attention + 2 * _dense_layer(config),
        "experts": kernels + kernels // 2 + max(16, routed) * (4 * itemsize * d + 8 * f),
        "loss": family.loss_bytes(config, work.longest),
    }
    if quantization.calibrated:
        steps["hessians"] = kernels + 3 * both + X
    # W transposed, Q and symbols of all matrices, and what the largest of them takes while it is quantized.
    largest = max(needs.hessians * hessians[m] + (1 + needs.weights) * weights[m] for m in shapes)
    steps["quantization"] = int(kernels + (both if quantization.calibrated else 0) + kernels * 5 // 4 + largest)
    steps["encoding"] = kernels + kernels * 5 // 4 + 48 * d * f + 2 * kernels
    return steps


def tokens_per_expert(config: Config, work: Workload, quantization: QuantizationSettings) -> float:
    """Most calibration tokens of an expert."""
    if not quantization.calibrated:
        return 0
    calibration = max(work.calibration.values())
    least = quantization.calibration.min_tokens
    least = family_of(config).min_tokens if least is None else least
    return max(least, min(quantization.calibration.token_cap * calibration / config.num_experts, calibration))


def _dense_layer(config: Config) -> int:
    """Bytes in bfloat16 of the largest layer without its experts."""
    family = family_of(config)
    names = [layer.name for layer in family.streamed(config, np.float32).layers]
    layers = dict.fromkeys(names, 0)
    for name, shape in family.param_shapes(config).items():
        layer = next(
            (n for n in (name[: i + 1].rstrip("/") for i, c in enumerate(name) if c == "/") if n in layers), None
        )
        if layer is not None and not family.expert_of(name):
            layers[layer] += 2 * math.prod(shape)
    return max(layers.values())


# --- The plan --------------------------------------------------------------------------------------------------------


def plan(
    config: Config,
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
    needs = quantization.rounding.needs()
    bits = needs.bits
    activations = activation_bytes(config, work, itemsize)
    stored_itemsize = max(g.itemsize for g in grids.values())
    embedding = 2 * config.vocab_size * config.d_model
    host = {
        "runtime": resident_bytes + COMPILED,
        "experts read": layer.memory_bytes,
        "other weights": 2 * embedding + 2 * _dense_layer(config),
        "activations": 0 if memory.activations else activations,
        "a compressed layer": 0 if codec is None else int(3 * size.layer * needs.most_bits / 8),
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
        "documents": work.to_json(),
        "host_bytes": host,
        "peak_host_bytes": sum(host.values()),
        "device_bytes": device,
        "device_steps_bytes": steps,
        "peak_device_bytes": sum(device.values()),
        "device_is_host": is_cpu,
    }


def rows(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A plan as lines of a table."""
    tokens = " and ".join(f"{n:,}" for name, n in plan["documents"].items() if name.endswith("_tokens"))
    found = [
        ("documents", f"{plan['documents']['documents']}, {tokens} tokens"),
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
