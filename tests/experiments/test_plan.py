"""compress.py --plan, what a run says of its memory, and checkpoints with random weights."""

import json
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
from as_users import CONFIG, assert_fails, environment

import common
from qmoe_jax import streaming
from qmoe_jax.checkpoints import open_checkpoint
from qmoe_jax.models.switch.parameters import param_shapes

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = [
    *("--preset=switch_c_2048", "--set=vocab_size=256", "--set=d_model=48", "--set=d_ff=64", "--set=num_heads=2"),
    *("--set=head_dim=8", "--set=num_experts=16", "--set=num_encoder_layers=2", "--set=num_decoder_layers=1"),
    *("--set=encoder_sparse_layers=0,1", "--set=decoder_sparse_layers=0", "--chunks=8,16,32"),
]


def test_plan_of_a_published_model_needs_neither_weights_nor_data(run, tmp_path):
    result = run("compress", f"--config={ROOT}/configs/paper/c2048.py", "--plan", f"--plan_json={tmp_path}/p.json")
    assert result.code == 0, result.err
    for line in ("6.29 TB", "3840, each read once", "host: peak"):
        assert line in result.out
    plan = json.loads((tmp_path / "p.json").read_text())
    assert plan["read_bytes"] == pytest.approx(6.28e12, rel=0.01)
    assert "expected_seconds" not in plan


def test_a_config_by_the_old_name_of_what_experiments_share(run, tmp_path):
    config = tmp_path / "mine.py"
    config.write_text("""
from qmoe_jax import experiment

def get_config():
    config = experiment.default_config()
    config.model.preset = "switch_base_8"
    return config
""")
    with pytest.warns(DeprecationWarning, match="qmoe_jax.experiment.default_config is now common.default_config"):
        result = run("compress", f"--config={config}", "--plan")
    assert result.code == 0, result.err
    assert "host: peak" in result.out


def test_plan_of_a_checkpoint_tells_the_time(run, tiny, tmp_path):
    output = tmp_path / "out"
    data = [*tiny.flags(), f"--checkpoint={tiny.checkpoint}", f"--output={output}"]
    result = run("compress", CONFIG, *data, "--plan", f"--plan_json={tmp_path}/p.json")
    assert result.code == 0, result.err
    plan = json.loads((tmp_path / "p.json").read_text())
    assert plan["expected_seconds"]["total"] > 0 and "expected: quantization" in result.out
    assert not output.exists()


def test_a_bound_that_nothing_fits_into_is_refused_before_anything_is_read(run, tiny, tmp_path):
    data = [*tiny.flags(), f"--checkpoint={tiny.checkpoint}", f"--output={tmp_path}/out"]
    result = run("compress", CONFIG, *data, "--config.memory.weights_bytes=100")
    assert_fails(result, "weights_bytes: found 100", "experts_per_group")


def test_a_disk_without_room_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    memory = streaming.Settings(scratch=str(tmp_path / "not" / "yet"), activations=str(tmp_path))
    plan = {"scratch_bytes": 3e9, "activation_file_bytes": 4e9, "write_bytes": 1e9, "progress_file_bytes": 2e9}
    monkeypatch.setattr(common.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free))
    free = 9e9
    with pytest.raises(ValueError, match=rf"{tmp_path} has 9 GB free, 10 GB .*--output \(3 GB\), .*scratch \(3 GB\)"):
        common.check_room(plan, memory, tmp_path / "out")
    common.check_room(plan | {"scratch_bytes": 0}, memory, tmp_path / "out")
    free = 10e9
    common.check_room(plan, memory, tmp_path / "out")
    # What an interrupted run has written needs no room again.
    (tmp_path / "out" / "layers").mkdir(parents=True)
    (tmp_path / "out" / "layers" / "shard").write_bytes(bytes(2_000_000))
    free = 9_998_500_000
    common.check_room(plan, memory, tmp_path / "out")


def test_a_synthetic_checkpoint_streams_within_its_plan(run, tiny, tmp_path):
    result = run("tools/make_checkpoint", f"--output={tmp_path}/model", *MODEL)
    assert result.code == 0, result.err
    checkpoint = open_checkpoint(tmp_path / "model")
    assert checkpoint.config.num_experts == 16
    assert {n: s.shape for n, s in checkpoint.specs.items()} == param_shapes(checkpoint.config)
    source = checkpoint.sources("encoder/layers_1")["wo"]
    assert source.grid.chunks == (8, 32, 16)
    wi = checkpoint.read("encoder/layers_1/mlp/expert/wi/kernel")
    assert wi.std() == pytest.approx(48**-0.5, rel=0.02) and abs(wi.mean()) < 0.01
    assert len(np.unique(wi)) > 0.99 * wi.size
    assert (checkpoint.read("decoder/decoder_norm/scale") == 1).all()

    # As a user runs it: what XLA and the reader really had in memory.
    command = [sys.executable, "experiments/compress.py", *tiny.flags(), f"--checkpoint={tmp_path}/model"]
    options = [f"--output={tmp_path}/out", "--config.compare=false", "--config.memory.experts_per_group=4"]
    # Room for two groups of four and a few chunks, not for two blocks of eight.
    bound = "--config.memory.weights_bytes=160000"
    env = environment() | {"PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        [*command, *options, bound], cwd=ROOT, capture_output=True, text=True, env=env, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    plan = json.loads((tmp_path / "out" / "report.json").read_text())["plan"]
    assert plan["spilled"] and plan["host_bytes"]["experts read"] <= 160_000
    assert plan["measured_peak_host_bytes"] <= 1.1 * plan["peak_host_bytes"]
    assert "planned" in finished.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]  # No scratch files are left.


def test_synthetic_checkpoints_refuse_what_they_dont_know(run, tmp_path):
    assert_fails(run("tools/make_checkpoint", f"--output={tmp_path}", "--set=depth=3"), "depth", "num_experts")
    assert_fails(run("tools/make_checkpoint", f"--output={tmp_path}", "--preset=switch_base_9"), "switch_base_8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_rehearsal_of_a_published_size(run, tmp_path):
    options = ("--models=switch_base_8", "--experts=1", "--tokens=16", "--method=rtn", "--nogeneration")
    result = run("tools/rehearse", f"--output={tmp_path}/out", *options)
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "out" / "rehearsal.json").read_text())
    model = report["models"]["switch_base_8"]
    assert model["projected_seconds"]["total"] > 0 and model["plan"]["peak_host_bytes"] > 0
    assert "the paper, on an A6000" in (tmp_path / "out" / "rehearsal.md").read_text()
    assert all(line in result.out for line in report["assumptions"])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["rehearsal.json", "rehearsal.md", "rehearsal.png"]
    assert (tmp_path / "out" / "rehearsal.png").read_bytes().startswith(b"\x89PNG")
