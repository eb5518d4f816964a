"""One command on a GPU: is it correct, how fast is it, how long would the paper's models take?

    python experiments/benchmarks/gpu.py --output=results/NAME      # 25 minutes on an H100; `make gpu`
    python experiments/benchmarks/gpu.py --output=OUT --dry_run     # what of it a CPU can run, on tiny shapes

    stage       seconds   needs              what it does
    check       150       nvcc               versions, build, bandwidth; each implementation and codec against float64
    tests       270       pytest             the kernels' tests; compute-sanitizer, where there is one
    kernels     440       nvcc               six shapes, six loads, cold weights, against cuBLAS bfloat16
    variants    110       nvcc               other ways to cut a product; ncu's counters, where there is one
    layers      290                          c2048 with 2048 resident experts; derivatives; base128-shaped generation
    rehearsal   240                          hours that compressing base128, large128, c2048 would take; Hessians

No network, and no compiler but nvcc (of the wheels of jax[cuda13], CUDA_HOME or the PATH). Every stage is a process of
its own, ends after its seconds, and writes STAGE.json after every row: what breaks or is cut off takes nothing else
with it. At the end there are tables, in summary.md too.
"""

import os
import pathlib
import subprocess
import sys
import time

from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # experiments/
import command_line
from benchmarks.on_gpu import table
from qmoe_jax import files, reports

SECONDS = {"check": 150, "tests": 270, "kernels": 440, "variants": 110, "layers": 290, "rehearsal": 240}
GRACE = 20  # seconds beyond its own for a stage to end by itself

OUTPUT = flags.DEFINE_string("output", None, "Directory for the reports.", required=True)
STAGES = flags.DEFINE_list("stages", list(SECONDS), "Those to run, comma-separated; others keep the reports they have.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Tiny shapes, and whatever implementations run here: for a CPU.")
TESTS = flags.DEFINE_list("tests", ["tests/kernels"], "Files or folders of the stage 'tests'.")
STAGE = flags.DEFINE_string("stage", None, "Runs one stage in this process: what the command does for each.")


def run_stage(name: str, output: pathlib.Path) -> None:
    """Runs one stage here."""
    from benchmarks.on_gpu import check, kernels, layers, products, variants
    from benchmarks.on_gpu.report import Stage

    sizes = products.TINY if DRY_RUN.value else products.FULL
    stage = Stage(output / f"{name}.json", SECONDS[name])
    match name:
        case "check":
            check.check(stage, sizes)
        case "tests":
            check.tests(stage, TESTS.value)
        case "kernels":
            kernels.kernels(stage, sizes)
        case "variants":
            variants.variants(stage, sizes)
        case "layers":
            layers.layers(stage, sizes, DRY_RUN.value)
        case "rehearsal":
            layers.rehearse(stage, DRY_RUN.value)


def start_stage(name: str, output: pathlib.Path) -> str:
    """Runs one stage in a process of its own: how it ended."""
    command = [sys.executable, os.path.abspath(__file__), f"--stage={name}", f"--output={output}"]
    command += [f"--dry_run={DRY_RUN.value}", f"--tests={','.join(TESTS.value)}"]
    # Memory is for cuBLAS and for the scripts that a stage starts, too.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with open(output / f"{name}.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            code = process.wait(SECONDS[name] + GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return "cut off"
    return "done" if code == 0 else f"ended with exit code {code}, see {name}.log"


def main(_):
    output = pathlib.Path(OUTPUT.value)
    for name in [*STAGES.value, *([STAGE.value] if STAGE.value else [])]:
        if name not in SECONDS:
            raise ValueError(f"--stages: found {name!r}, expected among {', '.join(SECONDS)}.")
    if STAGE.value:
        run_stage(STAGE.value, output)
        return
    output.mkdir(parents=True, exist_ok=True)
    for name in STAGES.value:
        (output / f"{name}.json").unlink(missing_ok=True)
    for name in STAGES.value:
        started = time.monotonic()
        reports.say(f"{name}: at most {SECONDS[name] + GRACE} s")
        reports.say(f"{name}: {start_stage(name, output)}, {time.monotonic() - started:.0f} s")
    text = table.summary(output, list(SECONDS))
    files.write_text(output / "summary.md", text)
    reports.say("\n" + text)


if __name__ == "__main__":
    app.run(command_line.without_traceback(main))
