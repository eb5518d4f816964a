"""What each idea beyond the paper's recipe is worth, alone and among all: loss above bfloat16, and stored bits.

    python experiments/studies/ablation.py --config=configs/tiny.py --output=out/ablation

Every row is a compression of --checkpoint with the same documents; --seeds corrupt the calibration documents anew, the
validation documents stay. Where settings were chosen on the first of them, --skip leaves these out. OUT gets
ablation.json and ablation.md.
"""

import pathlib
import sys

import numpy as np
from absl import app, flags

from qmoe_jax import files, reports

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # experiments/
import command_line
import common
from studies.laboratory import Laboratory

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = common.define_config("config", str(ROOT / "configs/tiny.py"), "Data and settings.")
CHECKPOINT = common.define_checkpoint("Native T5X checkpoint.")
OUTPUT = flags.DEFINE_string("output", "out/ablation", "Directory for the table.")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Of the corruption of calibration documents.")
SELECTED = flags.DEFINE_multi_string("row", [], "Name of a row, several times for several; none: all.")
SKIP = flags.DEFINE_integer(
    "skip", 0, "Of the config's validation documents, the first ones, which aren't measured on."
)
TARGET = flags.DEFINE_float("target_bits", 0.7, "Stored bits per weight of the rate-distortion rows.")

ALONE = dict(
    router_weighted=False,
    sequential=False,
    asymmetric=False,
    mask_special_tokens=True,
    min_tokens=0,
    share_power=0.0,
    refits=0,
)
ROWS = {
    "the paper's recipe": dict(method="gptq"),
    "paper + level refit": dict(method="gptq", refits=1),
    "paper + router-weighted H": dict(method="gptq", router_weighted=True),
    "paper + sequential wo": dict(method="gptq", sequential=True),
    "paper + sequential, asymmetric wo": dict(method="gptq", sequential=True, asymmetric=True),
    "paper + shrinkage by 20 tokens": dict(method="gptq", shrinkage=20.0),
    "paper + special tokens in H": dict(method="gptq", mask_special_tokens=False),
    "paper + activation order": dict(method="gptq", activation_order=True),
    "rate-distortion rounding alone": dict(method="rd", activation_order=False, **ALONE),
    "rate-distortion rounding, refits": dict(method="rd", activation_order=False, **ALONE | dict(refits=2)),
    "all": dict(method="rd"),
    "all but refits": dict(method="rd", refits=0),
    "all but router-weighted H": dict(method="rd", router_weighted=False),
    "all but asymmetric wo": dict(method="rd", asymmetric=False),
    "all but sequential, asymmetric wo": dict(method="rd", sequential=False, asymmetric=False),
    "all but special tokens in H": dict(method="rd", mask_special_tokens=True),
    "all but activation order": dict(method="rd", activation_order=False),
    "all but filling up with the layer's tokens": dict(method="rd", min_tokens=0),
    "all + shrinkage by 20 tokens": dict(method="rd", shrinkage=20.0),
    "all but shares": dict(method="rd", share_power=0.0),
    "all, shares to the power 1": dict(method="rd", share_power=1.0),
}


def main(_):
    path = common.checkpoint_path(CHECKPOINT, CONFIG.value)
    output = common.prepare_output(OUTPUT.value, True, path)
    lab = Laboratory(CONFIG.value, path)
    calibrations = [lab.calibration(seed=int(seed)) for seed in SEEDS.value]

    if not 0 <= SKIP.value < len(lab.validation):
        raise ValueError(
            f"--skip={SKIP.value}: expected 0 to {len(lab.validation) - 1}, some documents are to be left."
        )
    if unknown := sorted(set(SELECTED.value) - set(ROWS)):
        raise ValueError(f"--row: found {unknown[0]!r}, expected some of {', '.join(ROWS)}.")
    lab.validation = [*lab.validation][SKIP.value :]

    found = []
    for name, fields in ROWS.items():
        if SELECTED.value and name not in SELECTED.value:
            continue
        if fields["method"] == "rd":
            fields = fields | dict(target_bits=TARGET.value)
        codec = "gap" if fields["method"] == "rd" else "dictionary"
        compressed = [lab.compress(**fields, codec=codec, calibration=c, what=name) for c in calibrations]
        above = [r["loss"] - lab.bfloat16["loss"] for r in compressed]
        seconds = [r["seconds"] for r in compressed]
        found.append(
            dict(
                name=name,
                codec=codec,
                settings=fields,
                above_bfloat16=above,
                mean=float(np.mean(above)),
                spread=float(np.std(above, ddof=1)) if len(above) > 1 else None,
                bits_per_weight=float(np.mean([r["bits_per_weight"] for r in compressed])),
                entropy_per_weight=float(np.mean([r["entropy_per_weight"] for r in compressed])),
                seconds=seconds,
            )
        )
        reports.say(f"{name}: {found[-1]['mean']:.4f} at {found[-1]['bits_per_weight']:.3f} bits")
    table = reports.table(
        ("method", "codec", "bits/weight", "loss above bfloat16", "standard deviation"),
        [
            (r["name"], r["codec"], f"{r['bits_per_weight']:.3f}", f"{r['mean']:.4f}", f"{r['spread'] or 0:.4f}")
            for r in found
        ],
    )
    files.write_json(
        output / "ablation.json",
        dict(
            bfloat16=lab.bfloat16,
            seeds=SEEDS.value,
            rows=found,
            config=common.without_folders(lab.config),
            target_bits=TARGET.value,
            skipped_documents=SKIP.value,
        ),
    )
    files.write_text(output / "ablation.md", table + "\n")
    reports.say(f"\n{table}\n\nbfloat16: {lab.bfloat16['loss']:.4f} nats per token; {len(SEEDS.value)} seeds.")


if __name__ == "__main__":
    app.run(command_line.without_traceback(main))
