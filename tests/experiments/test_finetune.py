"""finetune.py, as a user runs it: a checkpoint and a report; again, it is finished; what is refused."""

import pytest
from as_users import CONFIG, assert_fails, memory_flags, read_json

import qmoe_jax


@pytest.mark.long
def test_finetune_from_the_command_line(run, compress, tiny, tmp_path):
    assert compress("--config.quantization.method=rtn").code == 0
    paths = [CONFIG, f"--checkpoint={tmp_path / 'out'}", f"--original={tiny.checkpoint}"]
    flags = [*paths, *tiny.flags(), *memory_flags(), "--config.finetune.epochs=2", f"--dataset=other={tiny.validation}"]
    output = f"--output={tmp_path / 'tuned'}"
    done = run("finetune", *flags, output)
    assert done.code == 0, done.err
    report = read_json(tmp_path / "tuned/report.json")
    assert report["texts"].keys() == {"validation", "other"} and report["after"] <= report["before"]
    assert qmoe_jax.open_checkpoint(tmp_path / "tuned").provenance["finetuned"]
    assert "finished already" in run("finetune", *flags, output).out
    other = run("finetune", *flags, output, "--config.finetune.learning_rate=1e-4")
    assert_fails(other, "not empty", "--overwrite")
    assert_fails(run("finetune", *flags, output, "--config.finetune.parts=experts"), "config.finetune.parts", "levels")
    layers = [*flags, f"--output={tmp_path / 'layers'}"]
    done = run("finetune", *layers, "--config.finetune.layerwise=original")
    assert done.code == 0, done.err
    report = read_json(tmp_path / "layers/report.json")
    assert report["layers"] and report["texts"].keys() == {"validation", "other"}
    (how,) = qmoe_jax.open_checkpoint(tmp_path / "layers").provenance["finetuned"]
    assert how["settings"]["layerwise"] == "original"
    assert_fails(run("finetune", *layers, "--config.finetune.layerwise=compressed"), "not empty", "--overwrite")
    assert_fails(run("finetune", *layers, "--config.finetune.layerwise=x"), "config.finetune.layerwise", "original")
    assert_fails(run("finetune", *flags, f"--output={tmp_path / 'out'}", "--overwrite"), "overlap")
