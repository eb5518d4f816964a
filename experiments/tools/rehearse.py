"""A rehearsal of compressing and running the published models, from a few experts of their true shapes.

    python experiments/tools/rehearse.py --output=OUT                           # a GPU: 16 experts, all their tokens
    python experiments/tools/rehearse.py --output=OUT --experts=1 --tokens=512  # a small CPU

Every stage is measured on the device that is there, with random weights and activations: reading chunks of T5X's shape,
attention, Hessians, quantization, encoding, experts, writing; and for inference the decoder's stages of one token. What
the whole model would take is projected. OUT gets rehearsal.json, rehearsal.md and rehearsal.png.
"""

import gc
import pathlib
import sys

import jax
import jax.numpy as jnp
from absl import app, flags

from qmoe_jax import files, reports, resources, streaming
from qmoe_jax.compression import planning, rehearsal
from qmoe_jax.models.families import family_of, preset
from qmoe_jax.quantization.methods import METHODS
from qmoe_jax.quantization.settings import QuantizationSettings
from qmoe_jax.reports.figures import plot_rehearsal

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # experiments/
import command_line
import common

# Calibration documents, and minutes on one A6000 (QMoE, section 4.1 and table 7).
PAPER = {"switch_base_128": (10_000, 14.0), "switch_large_128": (10_000, 30.2), "switch_c_2048": (160_000, 16.0 * 60)}
VALIDATION, MAX_LENGTH = 128, 568

OUTPUT = flags.DEFINE_string("output", "out/rehearsal", "Directory for the report and the figure.")
MODELS = flags.DEFINE_list("models", list(PAPER), "Published sizes.")
EXPERTS = flags.DEFINE_integer("experts", None, "Experts that are quantized together: 16, on a CPU 2.", lower_bound=1)
TOKENS = flags.DEFINE_integer(
    "tokens", None, "Most tokens of an expert and of a batch; more are extrapolated. None: no limit.", lower_bound=16
)
METHOD = flags.DEFINE_enum("method", "gptq", list(METHODS), "Quantizer.")
CODEC = flags.DEFINE_string("codec", "gap", "Of the experts.")
GENERATION = flags.DEFINE_bool("generation", True, "Also rehearse inference.")


def assumptions(experts: int, tokens: int, device: str) -> list[str]:
    return [
        f"measured on {device}, with {experts} experts together and at most {tokens:,} tokens of each and of a batch; "
        "more tokens take time in proportion",
        f"every document is as long as may be, {MAX_LENGTH} tokens: 512 in the encoder, 114 in the decoder",
        "tokens are spread evenly over experts, weights and activations are random",
        "the checkpoint is float32, gzip, in chunks as T5X cuts them; its files come from the page cache, so a slower "
        "disk or network has to be put in the place of 'reading', which goes on beside the rest",
        f"experts take {QuantizationSettings(METHOD.value).rounding.needs().bits:g} bits a weight; inference has "
        f"{rehearsal.ZEROS:.1%} zeros (the paper's)",
        "a token of inference computes keys and values of all 512 encoder tokens anew: an upper bound for attention",
        "one device; compiling isn't counted",
    ]


def rehearse(name: str, experts: int, tokens: int, memory: streaming.Settings) -> dict:
    """What is measured and projected for one model."""
    config, quantization = preset(name), QuantizationSettings(METHOD.value)
    calibration, paper_minutes = PAPER.get(name, (10_000, None))
    work = planning.greatest_workload(
        family_of(config).task, calibration if quantization.calibrated else 0, VALIDATION, MAX_LENGTH
    )
    measured = rehearsal.measure(
        config,
        work,
        memory,
        quantization,
        CODEC.value,
        experts=min(experts, config.num_experts),
        most_tokens=tokens,
        say=lambda what: reports.say(f"{name}: {what}"),
    )
    gc.collect()
    plan = planning.plan(
        config,
        work,
        memory._replace(weights_bytes=64 << 30),  # of the host that it would run on
        quantization,
        grids=planning.grids_of(config),
        is_cpu=jax.local_devices()[0].platform == "cpu",
        resident_bytes=resources.rss_bytes(),
        codec=CODEC.value,
    )
    result = {
        "measured_seconds_per_unit": measured,
        "projected_seconds": rehearsal.project(config, work, quantization, measured),
        "paper_minutes_on_an_a6000": paper_minutes,
        "plan": plan,
        "bytes_bfloat16": 2 * sum(planning.sizes(config)[i] for i in (0, 2)),
        "bytes_compressed": plan["write_bytes"],
    }
    if GENERATION.value:
        reports.say(f"{name}: inference")
        few = min(experts, 4)
        token = rehearsal.generation(config, CODEC.value, few, memory.dtype, work.longest)
        result["seconds_per_generated_token"] = token
    return result


def _paper(minutes: float | None) -> str:
    return "-" if minutes is None else resources.duration(60 * minutes)


def main(_):
    device = jax.local_devices()[0]
    is_cpu = device.platform == "cpu"
    experts = EXPERTS.value or (2 if is_cpu else 16)
    tokens = TOKENS.value or 1 << 40
    output = pathlib.Path(OUTPUT.value)
    output.mkdir(parents=True, exist_ok=True)
    memory = streaming.Settings(
        dtype=jnp.float32 if is_cpu else jnp.bfloat16, experts_per_group=16, scratch=str(output)
    )
    limits = assumptions(experts, min(tokens, memory.tokens_per_batch if TOKENS.value is None else tokens), str(device))
    report = {
        "assumptions": limits,
        "environment": common.environment(),
        "method": METHOD.value,
        "codec": CODEC.value,
        "models": {name: rehearse(name, experts, tokens, memory) for name in MODELS.value},
    }
    files.write_json(output / "rehearsal.json", report)
    plot_rehearsal(report["models"], output / "rehearsal.png")
    models = report["models"].values()
    stages = list(next(iter(models))["projected_seconds"])
    rows = [(s, *(resources.duration(m["projected_seconds"][s]) for m in models)) for s in stages]
    rows += [
        ("the paper, on an A6000", *(_paper(m["paper_minutes_on_an_a6000"]) for m in models)),
        ("host memory", *(resources.gigabytes(m["plan"]["peak_host_bytes"]) for m in models)),
        ("device memory", *(resources.gigabytes(m["plan"]["peak_device_bytes"]) for m in models)),
        ("bfloat16", *(resources.gigabytes(m["bytes_bfloat16"]) for m in models)),
        ("compressed", *(resources.gigabytes(m["bytes_compressed"]) for m in models)),
    ]
    if GENERATION.value:
        rows.append(
            ("a generated token", *(f"{1e3 * m['seconds_per_generated_token']['total']:.1f} ms" for m in models))
        )
    table = reports.table(("stage", *MODELS.value), rows)
    text = table + "\n\n" + "\n".join(f"- {line}" for line in limits) + "\n"
    files.write_text(output / "rehearsal.md", text)
    reports.say(text)


if __name__ == "__main__":
    app.run(command_line.without_traceback(main))
