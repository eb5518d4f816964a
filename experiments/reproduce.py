"""The paper's tables and Figure 5, one command each, beside the paper's own numbers; and studies that it leaves open.

    python experiments/reproduce.py --table=4                  # on the carried model
    python experiments/reproduce.py --table=4 --config=configs/paper/base128.py --checkpoint=DIR \
      --config.data.vocabulary=SPM --config.data.calibration=FILES --config.data.validation=FILES
    python experiments/reproduce.py --figure=5
    python experiments/reproduce.py --study=entropy_limit

Tables: 1 expert groups, 2 special-token masking, 3 natural sparsity, 4 losses, 5 other data sets, 6 rates and sizes,
7 time against calibration. Studies: entropy_limit, calibration, experts, kernels (see studies/open_questions.py) and
methods (see studies/methods.py).
OUT gets NAME.json, NAME.md and NAME.png.
"""

import interrupts  # noqa: F401, before all that takes time

# isort: split

import pathlib
import subprocess
import sys

from absl import app, flags

import command_line
import common
from qmoe_jax import reports
from studies import open_questions
from studies.laboratory import Laboratory, Result

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = common.define_config("config", str(ROOT / "configs/tiny.py"), "Data and settings.")
CHECKPOINT = common.define_checkpoint("Native T5X checkpoint.")
OUTPUT = flags.DEFINE_string("output", "out/reproduce", "Directory for JSON, Markdown and PNG.")
TABLE = flags.DEFINE_enum("table", None, [str(i) for i in range(1, 8)], "Table of the paper.")
FIGURE = flags.DEFINE_enum("figure", None, ["5"], "Figure of the paper.")
STUDY = flags.DEFINE_enum("study", None, sorted(open_questions.STUDIES), "Study that the paper leaves open.")
DATASETS = flags.DEFINE_multi_string(
    "dataset", [], "NAME=FILES of another kind of text, for table 5 and the study 'calibration'; may be repeated."
)
CHECKPOINTS = flags.DEFINE_multi_string(
    "model", [], "NAME=DIR of another model, for the study 'experts'; may be repeated."
)
SMALL = flags.DEFINE_bool("small", False, "Few documents and short benchmarks, to try it.")

BITS = {"2-bit": 2, "ternary": 1.5}
# The paper's columns, by preset.
MODELS = {"switch_base_128": "base128", "switch_large_128": "large128", "switch_c_2048": "c2048"}
HALF, DEFAULT, DOUBLE = 0.5, 1.0, 2.0


def paper_columns(lab: Laboratory) -> list[str]:
    """The paper's models to compare with: the one that this is, or else all."""
    preset = lab.config.model.preset
    return [MODELS[preset]] if preset in MODELS else list(MODELS.values())


def paper_header(lab: Laboratory) -> list[str]:
    return [f"paper, {model}" for model in paper_columns(lab)]


def paper(lab: Laboratory, numbers: dict, key, decimals: int = 2) -> list:
    """The paper's cells of a row."""
    return [as_printed(numbers.get(model, {}).get(key), decimals) for model in paper_columns(lab)]


def as_printed(number: float | None, decimals: int = 2) -> str | None:
    """With the paper's decimals, not ours."""
    return None if number is None else f"{number:.{decimals}f}"


def seconds(report: dict) -> float:
    return report["seconds"].get("hessians", 0.0) + report["seconds"].get("quantization", 0.0)


# --- Tables ----------------------------------------------------------------------------------------------------------


def table_1(lab: Laboratory) -> Result:
    published = {1: 174.1, 4: 54.4, 16: 28.8}
    rows, data = [], {}
    for group, theirs in published.items():
        memory = lab.memory._replace(experts_per_group=group)
        for _ in range(2):  # The first one compiles.
            report = lab.compress("gptq", memory=memory, codec=None, what=f"groups of {group}")
        data[group] = seconds(report)
        rows.append((f"groups of {group}", f"{data[group]:.2f}", as_printed(theirs, 1)))
    return Result(
        title="Table 1: seconds for Hessians and GPTQ, by experts that are quantized together",
        header=("experts", "seconds", "paper, s (one layer of base128, 10K documents)"),
        rows=rows,
        data=data,
        bars={"seconds": {str(k): v for k, v in data.items()}},
        ylabel="seconds",
        notes=["Ours: all sparse layers, compiled before. Groups larger than a layer's experts are one group."],
    )


def table_2(lab: Laboratory) -> Result:
    published = {
        "base128": {("no", "2-bit"): 1.86, ("no", "ternary"): 2.16, ("yes", "2-bit"): 1.76, ("yes", "ternary"): 1.99}
    }
    rows, bars = [], {}
    for masked in (False, True):
        name = "yes" if masked else "no"
        for precision, bits in BITS.items():
            loss = lab.compress("gptq", bits, mask_special_tokens=masked)["loss"]
            bars.setdefault(f"masked: {name}", {})[precision] = loss - lab.bfloat16["loss"]
            rows.append(
                (f"{precision}, special tokens masked: {name}", loss, *paper(lab, published, (name, precision)))
            )
    rows.insert(0, ("bfloat16", lab.bfloat16["loss"], *[None] * len(paper_columns(lab))))
    return Result(
        title="Table 2: special tokens left out of the Hessians, or not",
        header=("experts", "loss", *paper_header(lab)),
        rows=rows,
        data=bars,
        bars=bars,
        ylabel="loss above bfloat16",
    )


def table_3(lab: Laboratory) -> Result:
    published = {
        "base128": {"2-bit": 72.2, "ternary": 85.7},
        "large128": {"2-bit": 73.1, "ternary": 86.4},
        "c2048": {"2-bit": 76.5, "ternary": 88.6},
    }
    rows, bars, data = [], {}, {}
    for precision, bits in BITS.items():
        zeros = 100 * lab.zeros_of_matrices("gptq", bits)
        data[precision] = dict(mean=zeros.mean(), std=zeros.std(), least=zeros.min(), most=zeros.max())
        bars[precision] = {"ours": zeros.mean(), **{m: published[m][precision] for m in paper_columns(lab)}}
        spread = f"{zeros.mean():.1f} ± {zeros.std():.1f}"
        rows.append(
            (precision, spread, f"{zeros.min():.1f} to {zeros.max():.1f}", *paper(lab, published, precision, 1))
        )
    return Result(
        title="Table 3: zeros among the experts' weights, per cent",
        header=("precision", "mean ± std over matrices", "range", *paper_header(lab)),
        rows=rows,
        data=data,
        bars=bars,
        ylabel="zeros, per cent",
    )


def table_4(lab: Laboratory) -> Result:
    published = {
        "base128": dict(zip(TABLE_4_ROWS, (1.73, 2.27, 1.78, 1.76, 1.76, 4.54, 2.11, 1.99, 1.93), strict=True)),
        "large128": dict(zip(TABLE_4_ROWS, (1.55, 1.96, 1.54, 1.56, 1.57, 2.79, 1.70, 1.69, 1.64), strict=True)),
        "c2048": dict(zip(TABLE_4_ROWS, (1.18, 1.33, 1.22, 1.20, 1.21, 2.15, 1.27, 1.26, 1.26), strict=True)),
    }
    losses, bits_per_weight = {("bfloat16", "", 0): lab.bfloat16["loss"]}, {}
    for precision, bits in BITS.items():
        losses["round to nearest", precision, 0] = lab.compress("rtn", bits)["loss"]
        for times in (HALF, DEFAULT, DOUBLE):
            losses["QMoE", precision, times] = lab.compress("gptq", bits, calibration=lab.calibration(times))["loss"]
    report = lab.compress("rd", codec="gap")
    losses["rate-distortion", "ternary", DEFAULT] = report["loss"]
    bits_per_weight["rate-distortion", "ternary", DEFAULT] = report["bits_per_weight"]
    rows, bars = [], {}
    for key, loss in losses.items():
        method, precision, times = key
        name = " ".join(filter(None, (method, f"{times:g}x" if times else "", precision)))
        rows.append((name, loss, *paper(lab, published, key)))
        if precision:
            bars.setdefault(precision, {})[f"{method} {times:g}x" if times else method] = loss - lab.bfloat16["loss"]
    return Result(
        title="Table 4: validation loss, nats per predicted token",
        header=("experts", "loss", *paper_header(lab)),
        rows=rows,
        data=[dict(method=m, precision=p, calibration=t, loss=loss) for (m, p, t), loss in losses.items()],
        bars=bars,
        ylabel="loss above bfloat16",
        notes=[
            f"1x calibration is {lab.num_calibration(DEFAULT)} documents; the paper's 10 000 (base128, large128), "
            "160 000 (c2048).",
            f"Rate-distortion is this project's own method, stored in {report['bits_per_weight']:.3f} bits a weight.",
        ],
    )


TABLE_4_ROWS = [
    ("bfloat16", "", 0),
    ("round to nearest", "2-bit", 0),
    *(("QMoE", "2-bit", times) for times in (HALF, DEFAULT, DOUBLE)),
    ("round to nearest", "ternary", 0),
    *(("QMoE", "ternary", times) for times in (HALF, DEFAULT, DOUBLE)),
]


def table_5(lab: Laboratory) -> Result:
    names = ("arxiv", "github", "stackexchange", "wikipedia")
    published = {
        "bfloat16": dict(zip(names, (1.31, 0.99, 1.15, 1.20), strict=True)),
        "2-bit": dict(zip(names, (1.34, 1.05, 1.17, 1.24), strict=True)),
        "ternary": dict(zip(names, (1.42, 1.13, 1.22, 1.32), strict=True)),
    }
    rows, data = [], {}
    for dataset, validation in lab.datasets(DATASETS.value).items():
        data[dataset] = {"bfloat16": lab.loss(validation)}
        for precision, bits in BITS.items():
            data[dataset][precision] = lab.compress("gptq", bits, validation=validation)["loss"]
        data[dataset]["rate-distortion"] = lab.compress("rd", codec="gap", validation=validation)["loss"]
    kinds = ("bfloat16", "2-bit", "ternary", "rate-distortion")
    rows = [(f"ours: {dataset}", *(losses[kind] for kind in kinds)) for dataset, losses in data.items()]
    rows += [
        (f"paper, c2048: {name}", *(as_printed(published.get(kind, {}).get(name)) for kind in kinds)) for name in names
    ]
    return Result(
        title="Table 5: loss on other data than C4, calibrated as always",
        header=("validation text", "bfloat16", "QMoE 2-bit", "QMoE ternary", "rate-distortion"),
        rows=rows,
        data=data,
        bars={k: {d: losses[k] - losses["bfloat16"] for d, losses in data.items()} for k in kinds[1:]},
        ylabel="loss above bfloat16",
        notes=["Give other texts by --dataset=NAME=FILES."],
    )


def table_6(lab: Laboratory) -> Result:
    published = {
        "base128": (17.06, 11.76, 14.9e9, 1.27e9),
        "large128": (18.34, 13.32, 52.7e9, 3.96e9),
        "c2048": (20.07, 19.81, 3142e9, 158.6e9),
    }
    found = {
        "ours: QMoE, its dictionary": lab.compress("gptq", codec="dictionary"),
        "ours: QMoE, gap code": lab.compress("gptq", codec="gap"),
        "ours: rate-distortion, gap code": lab.compress("rd", codec="gap"),
    }
    rows, bars = [], {"experts": {}, "model": {}}
    for name, r in found.items():
        bits = r["bits_per_weight"]
        rows.append(
            (
                name,
                f"{bits:.3f}",
                f"{r['compression_experts']:.2f}x",
                f"{r['compression_model']:.2f}x",
                show_bytes(r["bytes_bfloat16"]),
                show_bytes(r["bytes_model"]),
            )
        )
        bars["experts"][name], bars["model"][name] = r["compression_experts"], r["compression_model"]
    for model in paper_columns(lab):
        experts, whole, dense, compressed = published[model]
        rows.append(
            (
                f"paper: {model}",
                f"{16 / experts:.3f}",
                f"{experts}x",
                f"{whole}x",
                show_bytes(dense),
                show_bytes(compressed),
            )
        )
        bars["experts"][f"paper: {model}"], bars["model"][f"paper: {model}"] = experts, whole
    return Result(
        title="Table 6: compression against bfloat16",
        header=("model", "bits a weight", "experts only", "whole model", "bfloat16", "compressed"),
        rows=rows,
        data={
            name: {k: v for k, v in r.items() if k.startswith(("bytes", "bits", "compression", "entropy", "zeros"))}
            for name, r in found.items()
        },
        bars=bars,
        ylabel="times smaller than bfloat16",
        notes=["Narrow matrices pay more for what is stored per row: see the study entropy_limit."],
    )


def table_7(lab: Laboratory) -> Result:
    published = {
        "base128": {HALF: 8.4, DEFAULT: 14.0, DOUBLE: 21.6},
        "large128": {HALF: 22.0, DEFAULT: 30.2, DOUBLE: 45.2},
        "c2048": {HALF: 13.3 * 60, DEFAULT: 16.0 * 60, DOUBLE: 20.8 * 60},
    }
    rows, data = [], {}
    for times in (HALF, DEFAULT, DOUBLE):
        for _ in range(2):  # The first one compiles.
            report = lab.compress("gptq", codec="dictionary", calibration=lab.calibration(times))
        data[times] = report["seconds"]
        rows.append(
            (
                f"{times:g}x: {lab.num_calibration(times)} documents",
                f"{report['seconds']['total'] / 60:.2f}",
                *paper(lab, published, times, 1),
            )
        )
    return Result(
        title="Table 7: minutes of a compression, by calibration documents",
        header=("calibration", "minutes", *paper_header(lab)),
        rows=rows,
        data=data,
        bars={"minutes": {f"{t:g}x": s["total"] / 60 for t, s in data.items()}},
        ylabel="minutes",
        notes=["The second of two runs: programs are compiled. The validation documents' pass is included."],
    )


def show_bytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


TABLES = {"1": table_1, "2": table_2, "3": table_3, "4": table_4, "5": table_5, "6": table_6, "7": table_7}


# --- Figure 5 --------------------------------------------------------------------------------------------------------


def figure_5(output: pathlib.Path) -> None:
    """Kernels (left) and generation (right): benchmarks/kernels.py and generation.py, one after the other."""
    kernels = [f"--output={output}/figure_5_kernels.json"]
    generation = [f"--output={output}/figure_5_generation.json"]
    if MODELS.get(CONFIG.value.model.preset):
        generation.append(f"--preset={CONFIG.value.model.preset}")
    else:
        generation.append(f"--checkpoint={common.checkpoint_path(CHECKPOINT, CONFIG.value)}")
    if SMALL.value:
        kernels += ["--shapes=base wo,base wi", "--loads=1x1", "--rounds=2", "--dense_megabytes=32"]
        generation += ["--new_tokens=8", "--rounds=1", "--batches=1", "--dtypes=float32"]
    for script, arguments in (("benchmarks/kernels", kernels), ("benchmarks/generation", generation)):
        reports.say(f"\n{script}.py {' '.join(arguments)}")
        subprocess.run([sys.executable, str(ROOT / f"experiments/{script}.py"), *arguments], check=True)
    reports.say(
        "\nThe paper, on an A6000: compressed matrix-vector products up to 35 % faster than bfloat16's; generation of "
        f"128 tokens less than 5 % slower than an idealised bfloat16.\n{output}: figure_5_kernels and "
        "figure_5_generation, .json and .png each"
    )


def main(_):
    asked = [flag for flag in (TABLE, FIGURE, STUDY) if flag.value is not None]
    if len(asked) != 1:
        known = "|".join(sorted(open_questions.STUDIES))
        raise ValueError(f"Give one of --table=1 to 7, --figure=5, --study={known}.")
    path = common.checkpoint_path(CHECKPOINT, CONFIG.value)
    output = common.prepare_output(OUTPUT.value, True, path)
    output.mkdir(parents=True, exist_ok=True)
    if FIGURE.value:
        figure_5(output)
        return
    lab = Laboratory(CONFIG.value, path, small=SMALL.value)
    if TABLE.value:
        name, result = f"table_{TABLE.value}", TABLES[TABLE.value](lab)
    else:
        named = {"datasets": DATASETS.value, "models": CHECKPOINTS.value}
        name, result = STUDY.value, open_questions.STUDIES[STUDY.value](lab, **named)
    reports.say("\n" + result.write(output, name, lab))
    reports.say(f"\n{output}: {name}.json, {name}.md, {name}.png")


if __name__ == "__main__":
    app.run(command_line.without_traceback(main))
