"""experiments/benchmarks/generation.py on models of kilobytes: what it reports, and what it refuses."""

import dataclasses
import json
import pathlib
import runpy
import sys

import jax
import numpy as np
import pytest
import tiny_model
from absl import app, flags

from qmoe_jax import codecs
from qmoe_jax.models import families

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "experiments/benchmarks/generation.py"

# One layer per stack.
CONFIG = dataclasses.replace(
    tiny_model.CONFIG,
    num_encoder_layers=1,
    num_decoder_layers=1,
    encoder_sparse_layers=(0,),
    decoder_sparse_layers=(0,),
)

app.define_help_flags()  # Otherwise the first script would, and only once.


@pytest.fixture
def run(monkeypatch, capfd):
    """run(*flags) -> (exit code, what was printed), as `python experiments/benchmarks/generation.py ...`."""

    def run_here(*args):
        known = set(flags.FLAGS)
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, args)])
        capfd.readouterr()
        code, message = 0, ""
        # Compiling is what takes time here, so the compiler is asked not to optimise.
        jax.config.update("jax_disable_most_optimizations", True)
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as e:
            code, message = (e.code, "") if isinstance(e.code, int | None) else (1, e.code)
        finally:
            jax.config.update("jax_disable_most_optimizations", False)
            for name in set(flags.FLAGS) - known:
                delattr(flags.FLAGS, name)
        out, err = capfd.readouterr()
        return code or 0, out + err + message

    return run_here


def read(path):
    report = json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(f"{c} in {path}"))
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return report


def sizes():
    """Bytes of the dense experts, and of all parameters, in bfloat16."""
    params = tiny_model.random_params(CONFIG)
    experts = sum(p.size for name, p in params.items() if "/expert/" in name)
    return 2 * experts, 2 * sum(p.size for p in params.values())


def assert_holds(row):
    assert row["tokens_per_second"] == pytest.approx(row["batch"] * 3 / row["seconds"])
    assert row["seconds"] > 0 and row["prompt_seconds"] > 0
    assert row["expert_bytes"] < row["parameter_bytes"]
    assert 1 <= row["experts_met"] <= row["experts_per_layer"]
    assert 0 < row["zeros"] < 1


@pytest.mark.long
def test_a_checkpoint_compressed_and_dense(run, tmp_path):
    checkpoint = tiny_model.write_checkpoint(tmp_path / "model", tiny_model.random_params(CONFIG))
    output = tmp_path / "report.json"
    flags = ("--new_tokens=3", "--prompt_tokens=4", "--rounds=1", "--batches=2", f"--output={output}")
    code, out = run(f"--checkpoint={checkpoint}", "--dtypes=bfloat16", *flags)
    assert code == 0, out
    rows = read(output)["rows"]
    experts, everything = sizes()
    assert [row["experts"] for row in rows] == [*codecs.CODECS, "dense"]
    for row in rows:
        assert_holds(row)
        assert (row["experts_per_layer"], row["dtype"], row["batch"]) == (CONFIG.num_experts, "bfloat16", 2)
        assert row["times_dense"] > 0 and row["times_ideal"] is None
        if row["experts"] == "dense":
            assert (row["expert_bytes"], row["parameter_bytes"]) == (experts, everything)
            assert row["times_dense"] == 1
        else:
            assert row["parameter_bytes"] - row["expert_bytes"] == everything - experts
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows)


@pytest.mark.long
def test_a_random_model_in_three_sizes(run, monkeypatch, tmp_path):
    monkeypatch.setitem(families.PRESETS, "tiny", CONFIG)
    output = tmp_path / "report.json"
    flags = ("--new_tokens=3", "--prompt_tokens=4", "--rounds=1", "--batches=1,2", "--codecs=dictionary")
    code, out = run("--preset=tiny", "--experts=4", "--dtypes=float32", *flags, f"--output={output}")
    assert code == 0, out
    rows = read(output)["rows"]
    found = [(r["experts_per_layer"], r["experts"], r["batch"]) for r in rows]
    kinds = [(1, "dense"), (4, "dictionary"), (4, "dense"), (8, "dictionary")]
    assert found == [(*kind, batch) for kind in kinds for batch in (1, 2)]
    for i, row in enumerate(rows):
        assert_holds(row)
        assert row["zeros"] == pytest.approx(0.885, abs=0.05)
        assert row["times_ideal"] == pytest.approx(row["tokens_per_second"] / rows[i % 2]["tokens_per_second"])
        dense = rows[i % 2 + (0 if i < 2 else 4)]["tokens_per_second"] if i < 6 else None
        assert row["times_dense"] == (dense and pytest.approx(row["tokens_per_second"] / dense))


def test_random_weights_keep_activations_of_order_one():
    script = runpy.run_path(str(SCRIPT), run_name="generation")
    try:
        params = script["random_params"](CONFIG, "dictionary")
        tree = script["prepare"](dict(params), "dense", np.float32)
        assert set(params) == set(tiny_model.random_params(CONFIG))
        x = np.random.default_rng(0).standard_normal((4000, CONFIG.d_ff)).astype(np.float32)
        wo = np.asarray(tree["encoder"]["layers_0"]["mlp"]["expert"]["wo"]["kernel"])  # [experts, in, out]
        assert np.std(x @ wo) == pytest.approx(1, abs=0.3)
    finally:
        for flag in list(flags.FLAGS.flags_by_module_dict().get("generation", [])):
            delattr(flags.FLAGS, flag.name)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--codecs=zip", "'zip', expected among dictionary"),
        ("--dtypes=float64", "'float64', expected among float32"),
        ("--preset=switch_base_129", "switch_base_128"),
        ("--experts=129", "--experts=129: switch_base_128 has 128"),
        ("--checkpoint=nowhere", "nowhere"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(run, flag, message):
    code, out = run(flag)
    assert code == 1 and message in out
