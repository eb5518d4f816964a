"""compress.py by several processes: the checkpoint of one, to the byte; also if one of them is killed on the way.

What each of them is told where they don't fit together, or one ends, in all cases: test_together.py.
"""

import json
import re
import runpy
import signal
import sys
import time

import distributed
import pytest
from absl import flags
from as_users import CONFIG, ROOT, files_below, read_json

from qmoe_jax.quantization import trials

# With so few experts as a process has here.
CODE = """
import os, runpy, sys
sys.path.insert(0, os.path.dirname(sys.argv[0]))
from qmoe_jax.quantization import trials
trials.TRIAL_WEIGHTS, trials.TRIAL_EXPERTS = 1, 2
runpy.run_path(sys.argv[0], run_name="__main__")
"""
PARTS = ("manifest.json", "layers", "dense")


@pytest.fixture
def arguments(tiny):
    """arguments(output) -> those of compress.py."""
    settings = {
        "memory.tokens_per_batch": 256,
        "memory.experts_per_group": 2,
        "codec.num_shards": 3,  # The second process has two of them, so more groups than the first.
        "memory.commit_share": 1.0,
        "compare": "false",
        "quantization.method": "rd",
        "quantization.target_bits": 1.4,
    }
    fields = [f"--config.{name}={value}" for name, value in settings.items()]
    return lambda output: [CONFIG, *tiny.flags(), *fields, f"--checkpoint={tiny.checkpoint}", f"--output={output}"]


@pytest.fixture
def alone(arguments, monkeypatch):
    """alone(output): compress.py in this process."""

    def run(output):
        known = set(flags.FLAGS)
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(trials, "TRIAL_WEIGHTS", 1)
        monkeypatch.setattr(trials, "TRIAL_EXPERTS", 2)
        monkeypatch.setattr(sys, "argv", ["experiments/compress.py", *map(str, arguments(output))])
        try:
            runpy.run_path("experiments/compress.py", run_name="__main__")
        except SystemExit as e:
            assert not e.code
        finally:
            for name in set(flags.FLAGS) - known:
                delattr(flags.FLAGS, name)

    return run


@pytest.fixture
def together(arguments):
    """together(output, flags of the first, flags of the second) -> two processes with four devices each."""

    def start(output, *own):
        def command(address, i):
            own_flags = list(own[i]) if own else []
            argv = [str(ROOT / "experiments/compress.py"), *map(str, arguments(output)), *own_flags]
            argv += [f"--coordinator_address={address}", "--num_processes=2", f"--process_id={i}"]
            return ["-c", f"import sys; sys.argv = {argv!r}\n" + CODE]

        return distributed.start(2, command, devices=4)

    return start


def bytes_below(output):
    files = [f for f in files_below(output) if f.relative_to(output).parts[0] in PARTS]
    return {str(f.relative_to(output)): f.read_bytes() for f in files}


def results(output):
    report = read_json(output / "report.json")
    for layer in report["layers"].values():  # Sums of which the last bits depend on how experts are grouped.
        del layer["output_error"], layer["output_error_per_expert"]
    return {k: v for k, v in report.items() if k not in ("seconds", "peak_rss_bytes", "plan", "environment")}


def until_committed(output, processes):
    progress, deadline = output / "progress" / "progress.json", time.monotonic() + 240
    while not (progress.is_file() and json.loads(progress.read_text())["committed"]):
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.02)


def lines(output):
    """The one line of an error; no pages of native frames beside it."""
    (line,) = re.findall(r"^process \d: error: .*", output, re.MULTILINE)
    assert "Traceback" not in output and "@ " not in output and "Fatal" not in output
    return line


@pytest.mark.long
def test_all_that_differs_is_named_by_each_process_before_any_work(together, tmp_path):
    other = {
        "config.quantization.damping": 0.2,
        "config.quantization.method": "gptq",
        "config.data.seed": 1,
        "config.data.num_validation": 5,
        "config.codec.num_shards": 2,
        "config.codec.name": "dictionary",
        "config.memory.tokens_per_batch": 512,
        "config.model.dtype": "bfloat16",
        "config.model.top_k": 2,
        "config.save": "false",
        "config.compare": "true",
    }
    processes = together(tmp_path / "out", [], [f"--{name}={value}" for name, value in other.items()])
    for process, output in zip(processes, distributed.finish(processes, timeout=120), strict=True):
        assert process.returncode == 1
        for name, value in other.items():
            found = {"true": True, "false": False}.get(value, value)
            assert re.search(rf"\b{name}: process 0 has [^,;]+, process 1 has {found}\b", lines(output)), name
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_process_that_is_stopped_is_given_up_after_the_stated_time_and_ends_when_it_wakes(together, tmp_path):
    flags_ = ["--silence_timeout=4"]
    processes = together(tmp_path / "out", flags_, flags_)
    until_committed(tmp_path / "out", processes)
    processes[1].send_signal(signal.SIGSTOP)
    first = processes[0].communicate(timeout=120)[0]
    assert processes[0].returncode == 1 and re.search(r"process 1 \(.*\) has been silent for 4 s", lines(first))
    processes[1].send_signal(signal.SIGCONT)
    second = processes[1].communicate(timeout=120)[0]
    assert processes[1].returncode == 1
    assert re.search(r"process 0 \(.*\) (gave this one up, as it was silent for 4 s|has ended)", lines(second))


def test_two_processes_write_the_checkpoint_of_one(alone, together, tmp_path):
    alone(tmp_path / "one")
    expected = bytes_below(tmp_path / "one")
    assert len([name for name in expected if name.endswith("2-of-3/_METADATA")]) == 3

    processes = together(tmp_path / "two")
    outputs = distributed.finish(processes)
    assert [p.returncode for p in processes] == [0, 0], outputs
    assert bytes_below(tmp_path / "two") == expected
    assert results(tmp_path / "two") == results(tmp_path / "one")
    assert results(tmp_path / "one")["experts_quantized"] > 12
    assert "compressed checkpoint" in outputs[0] and "compressed checkpoint" not in outputs[1]


@pytest.mark.long
def test_a_checkpoint_of_two_processes_survives_a_kill(alone, together, tmp_path):
    alone(tmp_path / "one")
    # The first one, on whom JAX's start in the other depends.
    processes = together(tmp_path / "killed")
    until_committed(tmp_path / "killed", processes)
    processes[0].kill()
    outputs = distributed.finish(processes, timeout=120)
    assert processes[1].returncode == 1
    assert re.search(r"ended, or can't be reached: process 0 \(pid \d+ on .*the same command again", lines(outputs[1]))
    assert not (tmp_path / "killed" / "manifest.json").exists()

    alone(tmp_path / "killed")
    assert bytes_below(tmp_path / "killed") == bytes_below(tmp_path / "one")
    assert results(tmp_path / "killed") == results(tmp_path / "one")
