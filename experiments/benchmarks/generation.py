"""Tokens per second of generation: a model with compressed experts against the same model with dense ones.

    python experiments/benchmarks/generation.py --output=results/generation_base128.json
    python experiments/benchmarks/generation.py --checkpoint=DIR --output=results/generation_mini.json

Without a checkpoint the model has the shape of --preset, random ternary experts with the paper's share of zeros, and is
measured three times, as all its experts do not fit into memory when they are dense:

    with all experts                compressed
    with --experts per layer        compressed and dense: like for like
    with one expert per layer       dense: the paper's ideal (Figure 5, right), in which a layer's experts share one
                                    matrix. For one row at a time its products are those of the full model.

A native checkpoint's experts are rounded to nearest; dense experts are always the compressed ones, dequantized.
Decoding is cached and greedy; nothing stops it, so every row writes --new_tokens. Prompts are random. Parameters other
than the experts have the activations' dtype in all models. Only one model is in memory at a time. The fastest round
counts, as other load on the machine only ever adds time.
"""

import ctypes
import dataclasses
import functools
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from absl import app, flags
from flax import traverse_util

import qmoe_jax
from qmoe_jax import codecs, files, reports, resources
from qmoe_jax.checkpoints import Checkpoint, open_checkpoint
from qmoe_jax.codecs.experts import CompressedExperts, concatenate
from qmoe_jax.kernels.compressed_ragged_dot import api, arg_specs
from qmoe_jax.models.families import preset
from qmoe_jax.models.switch import ModelConfig
from qmoe_jax.models.switch.parameters import expert_of, param_shapes
from qmoe_jax.quantization.gptq import round_to_nearest

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # experiments/
import command_line
import common

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "T5X or compressed checkpoint, instead of random weights.")
PRESET = flags.DEFINE_string("preset", "switch_base_128", "Shape of the model with random weights.")
EXPERTS = flags.DEFINE_integer(
    "experts", 32, "Experts per layer of the smaller random model; the default takes 12 GB when dense.", lower_bound=1
)
CODECS = flags.DEFINE_list("codecs", list(codecs.CODECS), "Names of codecs, comma-separated.")
DTYPES = flags.DEFINE_list("dtypes", list(common.DTYPES), "Of activations, and of all parameters but the experts.")
BATCHES = flags.DEFINE_list("batches", ["1", "8"], "Rows that are written at once, comma-separated.")
PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 32, "Encoder tokens of each row.", lower_bound=1)
NEW_TOKENS = flags.DEFINE_integer("new_tokens", 64, "Tokens that each row writes.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds; the fastest counts.", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "JSON file for the report, and a bar chart beside it with suffix .png.")

DENSE = "dense"

# Different experts of a matrix of random models.
ENCODED = 8


class Model(NamedTuple):
    """A model to measure.

    Attributes:
      name: for the report.
      config: architecture.
      params: from the name of a codec to all parameters by '/'-joined name, experts as `CompressedExperts`.
      kinds: what its experts are, one after the other: names of codecs, or DENSE.
    """

    name: str
    config: ModelConfig
    params: Callable[[str], dict[str, Any]]
    kinds: tuple[str, ...]


# --- Parameters ------------------------------------------------------------------------------------------------------


def random_params(config: ModelConfig, codec: str) -> dict[str, Any]:
    """Parameters of a random model, scaled such that activations stay of order one."""
    rng = np.random.default_rng(0)
    zeros = arg_specs.PROBABILITIES[0]
    params = {}
    for i, (name, shape) in enumerate(param_shapes(config).items()):
        if expert_of(name):
            experts, width, out = shape
            high = ((1 - zeros) * width) ** -0.5
            levels = np.broadcast_to(np.float32([-high, high]), (experts, out, 2))
            # A few are encoded, and are there many times: each is read where it lies, so that no cache holds them all.
            own = min(experts, ENCODED)
            symbols = arg_specs.random_trits(own, out, width, seed=i)
            some = CompressedExperts.from_symbols(symbols, levels[:own], codec)
            copies, rest = divmod(experts, own)
            params[name] = concatenate([some] * copies + ([some.take(0, rest)] if rest else []))
        elif name.endswith("scale"):
            # Random signs: logits with the tied embedding would otherwise favour the token that was just read, and
            # greedy decoding would repeat it, and so its experts, for ever.
            params[name] = rng.choice(np.float32([-1, 1]), shape)
        else:
            scale = 3.0 if name == "token_embedder/embedding" else shape[-2] ** -0.5
            if name.endswith("query/kernel"):
                scale *= config.head_dim**-0.5
            params[name] = np.float32(scale) * rng.standard_normal(shape, np.float32)
    return params


def checkpoint_params(checkpoint: Checkpoint, codec: str) -> dict[str, Any]:
    """Parameters of a checkpoint, its experts in `codec`; native ones are rounded to nearest."""
    params = traverse_util.flatten_dict(checkpoint.params(), sep="/")
    for layer in checkpoint.config.sparse_layers:
        ((_, _, kernels),) = checkpoint.experts(layer)
        for matrix, kernel in kernels.items():
            if not isinstance(kernel, CompressedExperts):
                W = jnp.asarray(kernel, jnp.float32).swapaxes(1, 2)  # [experts, out, in]
                rounded = round_to_nearest(W, bits=1.5)
                kernel = CompressedExperts.from_symbols(np.asarray(rounded.symbols), rounded.levels, codec)
            elif kernel.codec != codec:
                kernel = CompressedExperts.from_symbols(np.asarray(kernel.symbols()), kernel.levels, codec)
            params[f"{layer}/mlp/expert/{matrix}/kernel"] = kernel
    return params


def prepare(params: dict[str, Any], kind: str, dtype) -> dict[str, Any]:
    """The model's tree on the device: experts compressed or DENSE, everything else, and dense experts, in `dtype`.

    Takes what it has converted out of `params`.
    """
    flat = {}
    for name in list(params):
        value = params.pop(name)
        if not isinstance(value, CompressedExperts):
            flat[name] = jnp.asarray(value, dtype)
        elif kind == DENSE:
            flat[name] = value.to_dense().swapaxes(1, 2).astype(dtype)  # [experts, in, out]
        else:
            flat[name] = jax.device_put(value)
    return jax.block_until_ready(traverse_util.unflatten_dict(flat, sep="/"))


def nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def expert_bytes(params: dict[str, Any]) -> int:
    flat = traverse_util.flatten_dict(params, sep="/")
    return nbytes([value for name, value in flat.items() if expert_of(name)])


def zeros(params: dict[str, Any]) -> float:
    """Share of zeros among the weights of the experts in the first sparse layer."""
    experts = next(value for value in params.values() if isinstance(value, CompressedExperts))
    return float(np.mean(np.asarray(experts.symbols()) == 0))


def rss_bytes() -> int | None:
    """Memory that this process has resident now, JAX itself included; None where this isn't Linux with glibc."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # What was freed before, encoding the experts, does not count.
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    except (OSError, AttributeError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


# --- Measurement -----------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 3))
def _read_prompt(model, params, prompts, length):
    return model.apply({"params": params}, prompts, length, method="init_cache")


@functools.partial(jax.jit, static_argnums=0)
def _routes(model, params, prompts, written):
    """Whether all logits are finite, and the decoder's experts int32 [sparse layers, batch, length, top_k]."""
    inputs = jnp.pad(written[:, :-1], ((0, 0), (1, 0)))
    logits, sown = model.apply({"params": params}, prompts, inputs, mutable="intermediates")
    layers = sown["intermediates"]["decoder"]
    routes = [layers[f"layers_{i}"]["mlp"]["expert_index"][0] for i in model.config.decoder_sparse_layers]
    return jnp.isfinite(logits).all(), jnp.stack(routes)


def experts_met(model, params, prompts, written) -> float:
    """Different experts that decoding `written` meets, mean over the decoder's sparse layers.

    Raises ValueError if logits are not finite: then what was measured is not generation.
    """
    finite, routes = _routes(model, params, prompts, written)
    if not finite:
        raise ValueError("The model's logits are not finite. Is the checkpoint broken? Weights should be scaled down.")
    return float(np.mean([len(np.unique(layer)) for layer in np.asarray(routes)]))


def fastest(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the fastest round, after one for compilation, and the result."""
    seconds = []
    for _ in range(1 + ROUNDS.value):
        started = time.perf_counter()
        result = jax.block_until_ready(function())
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:]), result


def measure(model: Model, kind: str, dtype: str) -> Iterator[dict[str, Any]]:
    """A row of the report for each batch size."""
    c, length = model.config, NEW_TOKENS.value
    source = model.params(CODECS.value[0] if kind == DENSE else kind)
    share = zeros(source)
    params = prepare(source, kind, common.DTYPES[dtype])
    transformer = qmoe_jax.SwitchTransformer(c, common.DTYPES[dtype])
    for batch in map(int, BATCHES.value):
        rng = np.random.default_rng(1)
        prompts = rng.integers(2, c.vocab_size, (batch, PROMPT_TOKENS.value)).astype(np.int32)
        generate = functools.partial(qmoe_jax.generate, transformer, params, prompts, max_length=length, stop=())
        seconds, written = fastest(generate)
        resident = rss_bytes()
        if np.any(np.asarray(written) == 0):
            raise RuntimeError("A row ended early; its tokens would be counted without having been written.")
        prompt_seconds, _ = fastest(functools.partial(_read_prompt, transformer, params, prompts, length))
        yield dict(
            model=model.name,
            experts_per_layer=c.num_experts,
            experts=kind,
            dtype=dtype,
            batch=batch,
            tokens_per_second=batch * length / seconds,
            seconds=seconds,
            prompt_seconds=prompt_seconds,
            milliseconds_per_step=(seconds - prompt_seconds) / length * 1e3,
            expert_bytes=expert_bytes(params),
            parameter_bytes=nbytes(params),
            rss_bytes=resident,
            zeros=share,
            experts_met=experts_met(transformer, params, prompts, written),
        )


def models() -> list[Model]:
    compressed = tuple(CODECS.value)
    if CHECKPOINT.value:
        checkpoint = open_checkpoint(CHECKPOINT.value)
        name = pathlib.Path(CHECKPOINT.value).name
        return [
            Model(name, checkpoint.config, functools.partial(checkpoint_params, checkpoint), (*compressed, DENSE)),
        ]
    full = preset(PRESET.value)
    if EXPERTS.value > full.num_experts:
        raise ValueError(f"--experts={EXPERTS.value}: {PRESET.value} has {full.num_experts} per layer; give fewer.")

    def random(experts, kinds):
        config = dataclasses.replace(full, num_experts=experts, top_k=min(full.top_k, experts))
        return Model(PRESET.value, config, functools.partial(random_params, config), kinds)

    return [
        random(1, (DENSE,)),
        random(EXPERTS.value, (*compressed, DENSE)),
        random(full.num_experts, compressed),
    ]


# --- Report ----------------------------------------------------------------------------------------------------------


def add_speeds(rows: list[dict[str, Any]]) -> None:
    """Adds how many times as fast each row is as a dense model in the same dtype and batch, None where there is none.

    `times_dense`: with the same number of experts; `times_ideal`: with one expert per layer.
    """

    def reference(row, experts):
        found = [
            r["tokens_per_second"]
            for r in rows
            if r["experts"] == DENSE
            and (r["experts_per_layer"], r["dtype"], r["batch"]) == (experts, row["dtype"], row["batch"])
        ]
        return row["tokens_per_second"] / found[0] if found else None

    for row in rows:
        row["times_dense"] = reference(row, row["experts_per_layer"])
        row["times_ideal"] = reference(row, 1)


HEADER = (
    "model",
    "experts",
    "dtype",
    "batch",
    "tokens/s",
    "x dense",
    "x ideal",
    "ms/step",
    "prompt ms",
    "expert MB",
    "all MB",
    "RSS MB",
    "met",
)


def cells(row: dict[str, Any]) -> list[Any]:
    ratio = lambda value: None if value is None else f"{value:.2f}"
    megabytes = lambda value: None if value is None else f"{value / 1e6:.0f}"
    return [
        f"{row['model']}, {row['experts_per_layer']}",
        row["experts"],
        row["dtype"],
        row["batch"],
        f"{row['tokens_per_second']:.1f}",
        ratio(row["times_dense"]),
        ratio(row["times_ideal"]),
        f"{row['milliseconds_per_step']:.1f}",
        f"{row['prompt_seconds'] * 1e3:.0f}",
        *(megabytes(row[field]) for field in ("expert_bytes", "parameter_bytes", "rss_bytes")),
        f"{row['experts_met']:.0f}",
    ]


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Bars as in the paper's Figure 5 (right): speed end to end, relative to a dense model; a panel per batch size."""
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    variants = list(dict.fromkeys((row["experts"], row["dtype"]) for row in rows))
    sizes = list(dict.fromkeys((row["model"], row["experts_per_layer"]) for row in rows))
    baseline = "one dense expert per layer" if any(s == 1 for _, s in sizes) else "dense"
    dtype = variants[0][1]
    fig, axes = plt.subplots(1, len(batches), figsize=(3 + 4.5 * len(batches), 3.8), squeeze=False, sharey=True)
    for ax, batch in zip(axes[0], batches, strict=True):
        least = min(s for _, s in sizes)
        (reference,) = (
            r["tokens_per_second"]
            for r in rows
            if (r["batch"], r["experts"], r["dtype"], r["experts_per_layer"]) == (batch, DENSE, dtype, least)
        )
        for i, variant in enumerate(sorted(variants)):
            found = {
                (r["model"], r["experts_per_layer"]): r["tokens_per_second"] / reference
                for r in rows
                if r["batch"] == batch and (r["experts"], r["dtype"]) == variant
            }
            x = np.arange(len(sizes)) + (i - (len(variants) - 1) / 2) * 0.8 / len(variants)
            ax.bar(x, [found.get(s, 0) for s in sizes], 0.8 / len(variants), label=" ".join(variant))
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set_xticks(range(len(sizes)), [f"{name}\n{experts} per layer" for name, experts in sizes])
        ax.set_title(f"batch {batch}")
    axes[0][0].set_ylabel(f"tokens per second\n({baseline}, {dtype} = 1)")
    axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(_):
    for flag, known in ((CODECS, codecs.CODECS), (DTYPES, common.DTYPES)):
        for name in flag.value:
            if name not in known:
                raise ValueError(f"--{flag.name}: found {name!r}, expected among {', '.join(known)}.")
    rows = []
    chosen = models()
    total = sum(len(m.kinds) for m in chosen) * len(DTYPES.value) * len(BATCHES.value)
    with reports.progress(total, "measuring", "row") as bar:
        for model in chosen:
            for kind in model.kinds:
                for dtype in DTYPES.value:
                    for row in measure(model, kind, dtype):
                        rows.append(row)
                        bar.update()
                    jax.clear_caches()  # Compiled programs may hold copies of parameters.
    add_speeds(rows)
    reports.say(
        f"{NEW_TOKENS.value} tokens a row after a prompt of {PROMPT_TOKENS.value}; zeros among the experts' weights: "
        f"{rows[-1]['zeros']:.1%}. 'x dense': against the same model dense; 'x ideal': against one dense expert per "
        "layer; 'met': different experts per layer that decoding used.\n"
    )
    reports.say(reports.table(HEADER, [cells(row) for row in rows]))
    if OUTPUT.value:
        report = dict(
            device=jax.devices()[0].device_kind,
            cores=len(os.sched_getaffinity(0)),
            jax=jax.__version__,
            products=api.used(),
            checkpoint=CHECKPOINT.value and pathlib.Path(CHECKPOINT.value).name,
            preset=None if CHECKPOINT.value else PRESET.value,
            prompt_tokens=PROMPT_TOKENS.value,
            new_tokens=NEW_TOKENS.value,
            rounds=ROUNDS.value,
            peak_rss_bytes=resources.peak_rss_bytes(),
            rows=rows,
        )
        files.write_json(OUTPUT.value, report)
        plot(rows, pathlib.Path(OUTPUT.value).with_suffix(".png"))


if __name__ == "__main__":
    app.run(command_line.without_traceback(main))
