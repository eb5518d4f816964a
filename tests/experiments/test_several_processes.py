"""compress.py by several processes: the checkpoint of one, to the byte; also if one of them is killed on the way."""

import json
import runpy
import sys
import time

import distributed
import pytest
from absl import flags
from test_experiments import CONFIG, ROOT, files_below, read_json

from qmoe_jax.quantization import trials

# With so few experts as a process has here.
CODE = """
import runpy, sys
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
def together(arguments, tmp_path):
    """together(output) -> two processes with four devices each."""

    def start(output):
        def command(address, i):
            set_argv = f"import sys; sys.argv = {[str(ROOT / 'experiments/compress.py'), *arguments(output)]!r}\n"
            set_argv += f"sys.argv += ['--coordinator_address={address}', '--num_processes=2', '--process_id={i}']\n"
            return ["-c", set_argv + CODE]

        cache = str(tmp_path / "cache")  # Both runs compile the same.
        return distributed.start(2, command, devices=4, JAX_COMPILATION_CACHE_DIR=cache)

    return start


def bytes_below(output):
    files = [f for f in files_below(output) if f.relative_to(output).parts[0] in PARTS]
    return {str(f.relative_to(output)): f.read_bytes() for f in files}


def results(output):
    report = read_json(output / "report.json")
    for layer in report["layers"].values():  # Sums of which the last bits depend on how experts are grouped.
        del layer["output_error"], layer["output_error_per_expert"]
    return {k: v for k, v in report.items() if k not in ("seconds", "peak_rss_bytes", "plan", "environment")}


def test_two_processes_write_the_checkpoint_of_one_and_it_survives_a_kill(alone, together, tmp_path):
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

    processes = together(tmp_path / "killed")
    progress = tmp_path / "killed" / "progress" / "progress.json"
    deadline = time.monotonic() + 240
    while not (progress.is_file() and json.loads(progress.read_text())["committed"]):
        assert time.monotonic() < deadline and processes[1].poll() is None
        time.sleep(0.02)
    processes[1].kill()
    outputs = distributed.finish(processes, timeout=120)
    assert processes[0].returncode == 1
    assert "error: Another process of this run has ended" in outputs[0] and "run the same command again" in outputs[0]
    assert not (tmp_path / "killed" / "manifest.json").exists()

    alone(tmp_path / "killed")
    assert bytes_below(tmp_path / "killed") == expected
    assert results(tmp_path / "killed") == results(tmp_path / "one")
