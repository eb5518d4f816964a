"""Studies that the paper leaves open: each takes a `Laboratory` and gives a `Result`. Run by reproduce.py --study."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import common
from qmoe_jax.checkpoints import open_checkpoint
from qmoe_jax.codecs import dictionary, gap
from qmoe_jax.codecs.experts import CompressedExperts, convert
from qmoe_jax.kernels import compressed_ragged_dot
from qmoe_jax.kernels.compressed_ragged_dot import arg_specs
from qmoe_jax.quantization.account import entropy
from studies.laboratory import Laboratory, Result
from studies.methods import methods


def entropy_limit(lab: Laboratory, **_) -> Result:
    """Stored bits against the empirical entropy, per layer and codec; and what other dictionaries would take."""
    rows, bars, data = [], {"entropy": {}, "gap": {}, "dictionary": {}}, {"matrices": {}}
    trits = np.zeros((0, 0), np.uint8)
    for name, experts in lab.experts("gptq").items():
        symbols = np.asarray(experts.symbols())
        other = convert(experts, "dictionary")
        found = {
            "entropy": float(np.mean([entropy(s) for s in symbols])),
            "gap": 8 * experts.nbytes / symbols.size,
            "gap, code alone": 32 * len(experts.data["words"]) / symbols.size,
            "dictionary": 8 * other.nbytes / symbols.size,
            "dictionary, code alone": 16 * len(other.data["codewords"]) / symbols.size,
        }
        data["matrices"][name] = found
        for kind in bars:
            bars[kind][name.replace("coder/layers_", "")] = found[kind]
        rows.append((name, *(f"{b:.4f}" for b in found.values())))
        flat = symbols.reshape(-1, symbols.shape[-1])
        if flat.shape[1] >= trits.shape[1]:
            trits = flat if flat.shape[1] > trits.shape[1] else np.concatenate([trits, flat])
    zeros = float((trits == 0).mean())
    limit = entropy(trits)
    data["dictionaries"] = []
    for bits in (8, 10, 12, 14, 16):
        for most in (7, 14, 28) if bits == 16 else (14,):
            for p0 in (dictionary.ZEROS, zeros):
                codewords = dictionary.count_codewords(trits, 1 << bits, most, p0)
                stored = bits * float(codewords.sum()) / trits.size
                data["dictionaries"].append(dict(bits=bits, max_pairs=most, zeros=p0, bits_per_weight=stored))
                name = f"dictionary of 2^{bits}, up to {most} pairs, made for P(0) = {p0:.3f}"
                rows.append((name, f"{limit:.4f}", None, None, None, f"{stored:.4f}"))
    header = ("matrix", "entropy", "gap", "gap, code alone", "dictionary", "dictionary, code alone")
    return Result(
        title="Bits a weight: entropy of the symbols, and what codecs take",
        header=header,
        rows=rows,
        data=data,
        bars=bars,
        ylabel="bits per weight",
        notes=[
            f"Other dictionaries are counted on all rows of {trits.shape[1]} weights, without metadata; "
            f"{zeros:.3f} of those weights are zero.",
        ],
    )


def calibration(lab: Laboratory, datasets: Sequence[str], **_) -> Result:
    """Loss above bfloat16 by amount of calibration, by its text, and by the seed of its corruption."""
    methods = ("gptq", "rd")
    base = lab.bfloat16["loss"]
    rows, bars, data = [], {m: {} for m in methods}, []

    def measure(kind: str, name: str, **documents) -> None:
        own = base if "validation" not in documents else lab.loss(documents["validation"])
        reports = {m: lab.compress(m, **documents) for m in methods}
        losses = {m: report["loss"] - own for m, report in reports.items()}
        stored = {m: report["bits_per_weight"] for m, report in reports.items()}
        equal = None
        if losses["rd"] > losses["gptq"]:
            equal = lab.compress("rd", target_bits=stored["gptq"], **documents)["loss"] - own
        rows.append((kind, name, *losses.values(), *(f"{bits:.3f}" for bits in stored.values()), equal))
        data.append(dict(kind=kind, name=name, **losses, bits_per_weight=stored, at_equal_bits=equal))
        for m, loss in losses.items():
            bars[m][name] = loss

    amounts = [n for n in (16, 64, 256, 1024, 4096, 16384) if n < lab.num_calibration()]
    for n in [*amounts, lab.num_calibration()]:
        measure("amount", f"{n} documents", calibration=lab.calibration(n / lab.num_calibration()))
    for seed in (1, 2):
        measure("seed", f"seed {seed}", calibration=lab.calibration(seed=seed))
    texts = lab.datasets(datasets, number=lab.num_calibration())
    del texts["validation"]
    for name, documents in texts.items():
        half = len(documents) // 2
        first, second = (type(documents)(p, len(p), 0, 0) for p in (documents.pairs[:half], documents.pairs[half:]))
        measure("text", f"own text, tried on {name}", validation=second)
        measure("text", f"{name}, tried on own text", calibration=first)
        measure("text", f"{name}, tried on {name}", calibration=first, validation=second)
    return Result(
        title="Loss above bfloat16 by calibration documents",
        header=(
            "varied",
            "calibration",
            "QMoE",
            "rate-distortion",
            "QMoE's bits",
            "rate-distortion's",
            "rate-distortion at QMoE's bits",
        ),
        rows=rows,
        data=data,
        bars={"QMoE": bars["gptq"], "rate-distortion": bars["rd"]},
        ylabel="loss above bfloat16",
        notes=[
            "'Own text' is the calibration text of the config; half of another text calibrates, half validates.",
            "The last column: where rate-distortion loses more than QMoE, which stores more.",
        ],
    )


def experts(lab: Laboratory, models: Sequence[str], **_) -> Result:
    """Rates, loss and time by number of experts, of models trained alike (--model=NAME=DIR, several)."""
    rows, data = [], []
    checkpoints = {"carried" if not lab.config.model.preset else lab.config.model.preset: lab.checkpoint}
    if models:
        named = [m.partition("=") for m in models]
        if not all(path for _, _, path in named):
            raise ValueError(f"--model={', '.join(models)}: expected NAME=DIR.")
        checkpoints = {name: open_checkpoint(path, **common.untold(lab.config)) for name, _, path in named}
    for name, checkpoint in checkpoints.items():
        lab.vocabulary.check(checkpoint.config.vocab_size)
        base = lab.compress("rtn", checkpoint=checkpoint, codec="dictionary")
        lab.checkpoint, previous = checkpoint, lab.checkpoint
        bfloat16 = lab.loss(lab.validation)
        lab.checkpoint = previous
        for method, codec in (("gptq", "dictionary"), ("rd", "gap")):
            report = lab.compress(method, checkpoint=checkpoint, codec=codec)
            entry = dict(
                model=name,
                experts=checkpoint.config.num_experts,
                method=method,
                loss=report["loss"],
                bfloat16=bfloat16,
                rounded=base["loss"],
                bits_per_weight=report["bits_per_weight"],
                zeros=report["zeros"],
                fallback=report["experts_fallback"],
                seconds=report["seconds"]["total"],
            )
            data.append(entry)
            rows.append(
                (
                    f"{entry['experts']} experts ({name}), {method}",
                    bfloat16,
                    report["loss"] - bfloat16,
                    base["loss"] - bfloat16,
                    f"{entry['bits_per_weight']:.3f}",
                    f"{entry['zeros']:.3f}",
                    entry["fallback"],
                    f"{entry['seconds']:.1f}",
                )
            )
    bars = {m: {str(d["experts"]): d["loss"] - d["bfloat16"] for d in data if d["method"] == m} for m in ("gptq", "rd")}
    return Result(
        title="Compression by number of experts",
        header=(
            "experts",
            "bfloat16",
            "above it",
            "rounded: above it",
            "bits a weight",
            "zeros",
            "fallbacks",
            "seconds",
        ),
        rows=rows,
        data=data,
        bars={"QMoE": bars["gptq"], "rate-distortion": bars["rd"]},
        ylabel="loss above bfloat16",
        notes=[
            "Models that were given differ from the one below in the number of experts, and in what follows from it."
        ]
        if models
        else [],
    )


def kernels(lab: Laboratory, **_) -> Result:
    """Weights per second of a one-token product against the density of the symbols, by codec, and the gap code's m."""
    out, width = arg_specs.SHAPES[0]
    count, rounds = (8, 2) if lab.small else (64, 60)
    levels = np.tile(np.array([-0.1, 0.1]), (count, out, 1)).astype(jnp.bfloat16)

    def draw(zeros: float) -> np.ndarray:
        p = (zeros, (1 - zeros) / 2, (1 - zeros) / 2)
        return np.random.default_rng(0).choice(3, (count, out, width), p=p).astype(np.uint8)

    cases: list[tuple[float, CompressedExperts]] = []
    for zeros in (0.5, 0.7, 0.8, 0.885, 0.94, 0.98):
        symbols = draw(zeros)
        cases += [(zeros, CompressedExperts.from_symbols(symbols, levels, codec)) for codec in ("gap", "dictionary")]
    chosen = len(cases)
    symbols = draw(dictionary.ZEROS)
    for m in (2, 4, 8, 16, 32):
        stored = gap.pack(gap.encode_experts(symbols, 2, [m]), levels, symbols.shape)
        cases.append((dictionary.ZEROS, CompressedExperts.from_stored(stored, "gap", symbols.shape)))

    rows, bars, data = [], {"gap": {}, "dictionary": {}}, []
    seconds = seconds_per_product([rhs for _, rhs in cases], rounds)
    for i, ((zeros, rhs), took) in enumerate(zip(cases, seconds, strict=True)):
        m = int(np.bincount(np.asarray(rhs.data["parameters"])).argmax()) if rhs.codec == "gap" else None
        rate, bits = out * width / took, 8 * rhs.nbytes / symbols.size
        data.append(dict(zeros=zeros, codec=rhs.codec, m=m, weights_per_second=rate, bits=bits))
        rows.append((f"{zeros:g}", rhs.codec, m, f"{rate / 1e9:.2f}", f"{bits:.3f}"))
        if i < chosen:
            bars[rhs.codec][f"{zeros:g}"] = rate / 1e9
    return Result(
        title=f"Weights per second of one token's product, base wo {out} x {width}",
        header=("P(0)", "codec", "m", "1e9 weights/s", "bits a weight"),
        rows=rows,
        data=data,
        bars=bars,
        ylabel="10^9 weights per second",
        notes=[
            f"A different expert of {count} on every call; the fastest of {rounds} rounds; default implementation.",
            "First the m that takes least bits, for each P(0); then others.",
        ],
    )


def seconds_per_product(cases: Sequence[CompressedExperts], rounds: int) -> list[float]:
    """Of one token with one expert, each expert once: the fastest of some rounds through all cases."""

    @jax.jit
    def all_experts(rhs, x):
        def step(total, expert):
            sizes = (jnp.arange(rhs.shape[0]) == expert).astype(jnp.int32)
            return total + compressed_ragged_dot(x, rhs, sizes).sum(), None

        return jax.lax.scan(step, 0.0, jnp.arange(rhs.shape[0]))[0]

    best = [float("inf")] * len(cases)
    for _ in range(1 + rounds):  # The first one compiles.
        for i, rhs in enumerate(cases):
            x = jnp.asarray(np.random.default_rng(1).standard_normal((1, rhs.shape[2])), jnp.float32)
            started = time.perf_counter()
            jax.block_until_ready(all_experts(rhs, x))
            best[i] = min(best[i], (time.perf_counter() - started) / rhs.shape[0])
    return best


STUDIES: dict[str, Callable[..., Result]] = {
    "entropy_limit": entropy_limit,
    "calibration": calibration,
    "experts": experts,
    "kernels": kernels,
    "methods": methods,
}
