"""Command lines, run in the tests' own process, through the scripts' own entry, or as a user would start them."""

import dataclasses
import json
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny_model
from absl import app, flags, logging

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = f"--config={ROOT}/configs/tiny.py"

app.define_help_flags()  # Otherwise the first script would, and only once.


@dataclasses.dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch, capfd):
    """run('compress', *flags) -> Result, as `python experiments/compress.py ...` from the repository's root."""
    monkeypatch.chdir(ROOT)

    def run_here(experiment, *args):
        known, verbosity = set(flags.FLAGS), logging.get_verbosity()
        monkeypatch.setattr(sys, "argv", [f"experiments/{experiment}.py", *map(str, args)])
        capfd.readouterr()
        code, message = 0, ""
        try:
            runpy.run_path(f"experiments/{experiment}.py", run_name="__main__")
        except SystemExit as e:  # Python prints what isn't a number, and exits with 1.
            code, message = (e.code, "") if isinstance(e.code, int | None) else (1, f"{e.code}\n")
        finally:
            logging.set_verbosity(verbosity)
            for name in set(flags.FLAGS) - known:
                delattr(flags.FLAGS, name)
        out, err = capfd.readouterr()
        return Result(code or 0, out, err + message)

    return run_here


def memory_flags(tokens=512):
    settings = {"tokens_per_batch": tokens, "experts_per_group": 4, "commit_share": 1.0}
    return [f"--config.memory.{name}={value}" for name, value in settings.items()]


def read_json(path):
    return json.loads(pathlib.Path(path).read_text(), parse_constant=lambda c: pytest.fail(f"{c} in {path}"))


def files_below(path):
    return [p for p in pathlib.Path(path).rglob("*") if p.is_file()]


def names_in(path):
    """Sorted; without TensorBoard's events, which are there or not."""
    return sorted({p.name for p in pathlib.Path(path).iterdir()} - {"tensorboard"})


def assert_fails(result, *names, code=1):
    """That exit code, and one line that names what is wrong; no traceback."""
    assert result.code == code, result.out + result.err
    assert "Traceback" not in result.err
    (line,) = re.findall(r"^error: (.+(?:\n  .+)*)", result.err.replace("\r", "\n"), re.MULTILINE)
    assert result.err.rstrip().endswith(line)
    assert len(line) < 1500
    for name in names:
        assert str(name) in line, line


REPORT_FIELDS = {
    "loss": lambda v: 0 < v < 20,
    "loss_paper": lambda v: 0 < v < 20,
    "num_documents": lambda v: v == tiny_model.NUM_VALIDATION,
    "num_tokens": lambda v: v > 0,
    "peak_rss_bytes": lambda v: 50e6 < v < 100e9,
    "seconds": lambda v: v["total"] > 0 and all(s >= 0 for s in v.values()),
}
COMPRESS_FIELDS = REPORT_FIELDS | {
    "zeros": lambda v: 0.2 < v < 1,
    "entropy_per_weight": lambda v: 0.5 < v < np.log2(3),
    "bits_per_weight": lambda v: 1 < v < 10,  # In rows of 20 weights the metadata weighs.
    "compression_experts": lambda v: 1.6 < v < 16,
    "compression_model": lambda v: 1 < v < 16,
    "experts_total": lambda v: v == 24,
    "experts_quantized": lambda v: v >= 20,
    "experts_fallback": lambda v: v <= 4,
}


def assert_holds(report, fields):
    for field, sane in fields.items():
        assert sane(report[field]), (field, report[field])


@pytest.fixture(scope="module")
def elsewhere(tiny, tmp_path_factory):
    """The tiny model's compressed checkpoint, made by a user in another directory, and what was printed."""
    directory = tmp_path_factory.mktemp("elsewhere")
    return directory / "out", start(directory, "compress", tiny, "--output=out", f"--checkpoint={tiny.checkpoint}")


def start(directory, experiment, tiny, *args):
    command = [sys.executable, ROOT / f"experiments/{experiment}.py", *tiny.flags(), *memory_flags(), *args]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, env=environment(), timeout=300)


def environment():
    """As a user has it: nothing imports the package from the current directory by chance."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}


@pytest.fixture
def compress(run, tiny, tmp_path):
    """compress(checkpoint=..., output=..., more flags..., data field=value) -> Result."""

    def run_with(*args, checkpoint=None, output=None, **data):
        paths = (f"--checkpoint={checkpoint or tiny.checkpoint}", f"--output={output or tmp_path / 'out'}")
        return run("compress", *paths, *tiny.flags(**data), *memory_flags(), "--config.compare=false", *args)

    return run_with


@pytest.fixture
def damaged(tiny, tmp_path):
    """A copy of the tiny model's step directory, to be damaged."""
    return pathlib.Path(shutil.copytree(tiny.checkpoint, tmp_path / "damaged"))
