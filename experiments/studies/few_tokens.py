"""Experts that few calibration tokens reach: what choosing documents, and tokens of the layer, do for them.

    python experiments/studies/few_tokens.py --output=out/few_tokens

First: of --candidates documents a few are taken, in order or chosen; how many tokens each expert then has, counted by a
pass of the unquantized model. Then: --documents in order calibrate, and experts that have fewer than min_tokens tokens
get those of their layer. Errors are the shares of experts' outputs that are lost, on validation tokens, averaged over
experts that have so many calibration tokens. OUT gets few_tokens.json and few_tokens.md.
"""

import pathlib
import sys

import numpy as np
from absl import app, flags

from qmoe_jax import files, reports
from qmoe_jax.compression import choosing
from qmoe_jax.compression.compress import compress_examples
from qmoe_jax.quantization.settings import QuantizationSettings

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # experiments/
import command_line
import common

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = common.define_config("config", str(ROOT / "configs/tiny.py"), "Data and settings.")
CHECKPOINT = flags.DEFINE_string("checkpoint", str(ROOT / "experiments/tiny_model"), "Uncompressed checkpoint.")
OUTPUT = flags.DEFINE_string("output", "out/few_tokens", "Directory for the tables.")
CANDIDATES = flags.DEFINE_integer("candidates", 400, "Documents that are chosen from.")
TAKEN = flags.DEFINE_list("taken", ["20", "60"], "How many are taken.")
DOCUMENTS = flags.DEFINE_integer("documents", 20, "That calibrate, in order.")
MIN_TOKENS = flags.DEFINE_list("min_tokens", ["0", "64", "128", "256", "512", "1024"], "Each is tried.")

METHODS = {"gptq": dict(method="gptq"), "rd": dict(method="rd", target_bits=1.0)}
FEW = 64


def choices(checkpoint, candidates, memory) -> list[dict]:
    """Tokens that experts have, by how documents are taken."""
    seen = {by: choosing.look(checkpoint, candidates, memory, experts=by == "routing").tokens for by in choosing.BY}
    tokens = {by: np.concatenate(list(of.values()), axis=1) for by, of in seen.items()}
    found = []
    for number in map(int, TAKEN.value):
        taken = {"in order": list(range(number))} | {by: choosing.choose(tokens[by], number) for by in choosing.BY}
        for by, documents in taken.items():
            of_experts = tokens["routing"][documents].sum(0)
            found.append(
                {
                    "documents": number,
                    "taken": by,
                    "tokens": int(of_experts.sum()),
                    "fewest": int(of_experts.min()),
                    "next": int(np.sort(of_experts)[1]),
                    "none": int((of_experts == 0).sum()),
                    f"fewer than {FEW}": int((of_experts < FEW).sum()),
                    "experts": len(of_experts),
                }
            )
    return found


def errors(report: dict) -> dict:
    """What experts lose, by how many tokens they have."""
    layers = report["layers"].values()
    tokens = np.concatenate([layer["tokens_per_expert"] for layer in layers])
    lost = np.array([np.nan if e is None else e for layer in layers for e in layer["output_error_per_expert"]])
    return {
        "loss": report["loss"],
        "bits_per_weight": report["bits_per_weight"],
        f"error below {FEW}": float(np.nanmean(lost[tokens < FEW])),
        f"error from {FEW}": float(np.nanmean(lost[tokens >= FEW])),
        "experts": int((tokens < FEW).sum()),
    }


def main(_):
    output, config = common.prepare_output(OUTPUT.value, True, CHECKPOINT.value), CONFIG.value
    checkpoint, vocabulary = common.open_model(CHECKPOINT.value, config)
    memory = common.memory_settings(config)
    candidates = common.examples(config, "calibration", checkpoint, vocabulary, CANDIDATES.value)
    validation = common.examples(config, "validation", checkpoint, vocabulary)
    chosen = choices(checkpoint, candidates, memory)
    filled = []
    for name, fields in METHODS.items():
        for least in map(int, MIN_TOKENS.value):
            settings = QuantizationSettings(**fields, min_tokens=least)
            calibration = candidates[: DOCUMENTS.value]
            report = compress_examples(checkpoint, vocabulary, calibration, validation, settings, memory, what=name)
            filled.append({"method": name, "min_tokens": least, **errors(report)})
    found = {"choices": chosen, "min_tokens": filled, "config": common.without_folders(config)}
    files.write_json(output / "few_tokens.json", found | {"environment": common.environment()})
    tables = [reports.table(list(rows[0]), [list(row.values()) for row in rows]) for rows in (chosen, filled)]
    files.write_text(output / "few_tokens.md", "\n\n".join(tables) + "\n")
    reports.say("\n\n".join(tables))


if __name__ == "__main__":
    app.run(command_line.without_traceback(main))
