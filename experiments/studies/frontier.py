"""Loss against stored bits: rounding, the paper's recipe, and rate-distortion quantization at a sweep of target bits.

    python experiments/studies/frontier.py --config=configs/tiny.py --output=results/frontier
    python experiments/studies/frontier.py --config=configs/tiny_olmoe.py --outside=hqq.json --output=results/frontier

All compress the same checkpoint with the same documents. --outside takes what `studies/outside.py` wrote with the
same config: it is drawn and listed beside them. OUT gets frontier.json, frontier.md and frontier.png.
"""

import json
import math
import pathlib
import sys

import numpy as np
from absl import app, flags

from qmoe_jax import files, reports, streaming
from qmoe_jax.checkpoints.in_memory import InMemoryCheckpoint
from qmoe_jax.quantization.methods import TERNARY
from qmoe_jax.reports.figures import plot_frontier

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # experiments/
import command_line
import common
from studies.laboratory import Laboratory

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = common.define_config("config", str(ROOT / "configs/tiny.py"), "Data and settings.")
CHECKPOINT = common.define_checkpoint("Uncompressed checkpoint.")
OUTPUT = flags.DEFINE_string("output", "out/frontier", "Directory for the report and the figure.")
TARGETS = flags.DEFINE_list(
    "targets", ["0.25", "0.35", "0.5", "0.7", "1.0", "1.5", "2.0", "2.5", "3.0"], "Stored bits per weight."
)
OUTSIDE = flags.DEFINE_list("outside", [], "JSON files of outside tools' points, on the same model and documents.")

PAPER, GAP = "paper's recipe, its codec", "paper's recipe, gap codec"
ROUNDING, OURS = "round to nearest, gap codec", "rate-distortion, gap codec"


def read_outside(paths: list[str], bfloat16: dict) -> list[dict]:
    """Points of outside tools. Raises ValueError if a file is no such, or of another model or other documents."""
    points = []
    for path in paths:
        try:
            report = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
            theirs, own = report["bfloat16"], report["points"]
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"--outside={path}: not written by studies/outside.py ({e!r}).") from e
        for field in ("loss", "num_tokens"):
            if abs(theirs[field] - bfloat16[field]) > 1e-5:
                raise ValueError(
                    f"--outside={path}: {field} of the model in bfloat16 is {theirs[field]}, here {bfloat16[field]}: "
                    "another model, or other documents. Measure it again with this config."
                )
        points += own
    return points


def main(_):
    path = common.checkpoint_path(CHECKPOINT, CONFIG.value)
    output = common.prepare_output(OUTPUT.value, True, path)
    lab = Laboratory(CONFIG.value, path)
    bfloat16 = lab.bfloat16["loss"]
    outside = read_outside(OUTSIDE.value, lab.bfloat16)

    points = []

    def measure(name: str, codec: str, method: str, bits: float = TERNARY, target_bits: float | None = None) -> dict:
        report = lab.compress(method, bits, codec=codec, target_bits=target_bits, what=name)
        point = dict(
            name=name,
            bits="by rate" if method == "rd" else "ternary" if bits == TERNARY else f"{bits:g} bits",
            codec=codec,
            target_bits=target_bits,
            bits_per_weight=report["bits_per_weight"],
            entropy_per_weight=report["entropy_per_weight"],
            zeros=report["zeros"],
            loss=report["loss"],
            above_bfloat16=report["loss"] - bfloat16,
            seconds=report["seconds"],
        )
        points.append(point)
        reports.say(f"{name}: {point['bits_per_weight']:.3f} bits, {point['above_bfloat16']:+.4f} nats")
        return point

    paper = measure(PAPER, "dictionary", "gptq")
    for bits in (TERNARY, 2):
        measure(GAP, "gap", "gptq", bits)
    for bits in (TERNARY, 2):
        measure(ROUNDING, "gap", "rtn", bits)
    ours = [measure(OURS, "gap", "rd", target_bits=float(t)) for t in TARGETS.value]
    report = dict(
        bfloat16=bfloat16,
        without_experts=without_experts(lab),
        points=points + outside,
        comparison=compare(paper, ours),
        config=common.without_folders(lab.config),
    )
    write(report, output)


def compare(paper: dict, ours: list[dict]) -> dict:
    """Ours within the paper's bits, and at its loss."""
    within = [p for p in ours if p["bits_per_weight"] <= paper["bits_per_weight"]]
    best = min(within, key=lambda p: p["above_bfloat16"], default=None)
    bits = bits_at(paper["above_bfloat16"], ours)
    found = dict(
        paper_bits=paper["bits_per_weight"],
        paper_above_bfloat16=paper["above_bfloat16"],
        bits_within_paper_bits=None if best is None else best["bits_per_weight"],
        loss_ratio_within_paper_bits=None if best is None else best["above_bfloat16"] / paper["above_bfloat16"],
        bits_at_paper_loss=bits,
    )
    return found if bits is None else found | dict(bits_ratio_at_paper_loss=bits / paper["bits_per_weight"])


def write(report: dict, output: pathlib.Path) -> None:
    """frontier.json, .md and .png; and says what is in them."""
    table = reports.table(
        ("method", "values", "target", "bits/weight", "entropy", "zeros", "loss", "above bfloat16"),
        [
            (
                p["name"],
                p["bits"],
                "" if p["target_bits"] is None else f"{p['target_bits']:g}",
                f"{p['bits_per_weight']:.3f}",
                *("" if p[field] is None else f"{p[field]:.3f}" for field in ("entropy_per_weight", "zeros")),
                f"{p['loss']:.4f}",
                f"{p['above_bfloat16']:+.4f}",
            )
            for p in report["points"]
        ],
    )
    table += f"\n\nbfloat16: {report['bfloat16']:.4f} nats per token; without experts: {report['without_experts']:.4f}."
    files.write_json(output / "frontier.json", report)
    files.write_text(output / "frontier.md", table + "\n")
    plot_frontier(report, output / "frontier.png")
    reports.say(f"\n{table}")
    found = report["comparison"]
    if found["bits_within_paper_bits"] is not None:
        reports.say(
            f"Within the paper's {found['paper_bits']:.3f} bits, at {found['bits_within_paper_bits']:.3f}: "
            f"{found['loss_ratio_within_paper_bits']:.0%} of its loss above bfloat16."
        )
    if (ratio := found.get("bits_ratio_at_paper_loss")) is not None:
        reports.say(f"At the paper's loss: {ratio:.0%} of its bits (between the two points next to it).")


def without_experts(lab: Laboratory) -> float:
    """Loss of the model whose experts give nothing: what they are worth, and all that a method can lose."""
    params = {name: lab.checkpoint.read(name) for name in lab.checkpoint.specs}
    silent = {name: np.zeros_like(p) if lab.checkpoint.is_expert(name) else p for name, p in params.items()}
    model = InMemoryCheckpoint(lab.checkpoint.config, silent)
    return streaming.run(model, lab.validation, lab.memory, what="without experts").summary()["loss"]


def bits_at(above: float, points: list[dict]) -> float | None:
    """Stored bits at which the loss above bfloat16 is as given, by interpolating its logarithm; None: outside."""
    points = sorted((p for p in points if p["above_bfloat16"] > 0), key=lambda p: -p["bits_per_weight"])
    for right, left in zip(points, points[1:], strict=False):  # from many bits to few
        low, high = math.log(right["above_bfloat16"]), math.log(left["above_bfloat16"])
        if low <= math.log(above) <= high:
            return float(np.interp(math.log(above), [low, high], [right["bits_per_weight"], left["bits_per_weight"]]))
    return None


if __name__ == "__main__":
    app.run(command_line.without_traceback(main))
