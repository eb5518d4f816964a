"""The example runs as it says, and what it prints hangs together."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(directory, *args):
    command = [sys.executable, ROOT / "experiments/example.py", *args]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, env=os.environ, timeout=300)


@pytest.mark.long
def test_one_layer_compressed_and_run_beside_the_original(tmp_path):
    finished = run(tmp_path)
    assert finished.returncode == 0, finished.stderr
    out = finished.stdout
    table = re.findall(r"^\| (w[io]) +\| +(\d+) x (\d+) x (\d+) \| +(\d+) \| +([\d.]+) \| +([\d.]+) \|$", out, re.M)
    assert [row[:4] for row in table] == [("wi", "8", "384", "128"), ("wo", "8", "128", "384")]
    for *_, size, bits, zeros in table:
        assert float(bits) == pytest.approx(8 * int(size) / (8 * 384 * 128), abs=1e-4)
        assert 0.8 < float(bits) < 1.5 and 0.6 < float(zeros) < 0.95
    rows = re.findall(r"^  ([-+.]{64})$", out, re.M)
    assert len(rows) == 4 and all(set(row) == set(".-+") for row in rows)
    (lost,) = re.findall(r"that is lost: (.+)$", out, re.M)
    assert len(lost.split()) == 8 and all(0 < float(e.rstrip("%")) < 30 for e in lost.split())
    dense, compressed = (float(re.search(rf"{name}: ([\d.]+) nats", out)[1]) for name in ("dense", "compressed"))
    assert 2.5 < dense < 4 and 0 < abs(compressed - dense) < 0.05
    assert not list(tmp_path.iterdir())


def test_a_layer_that_there_is_not(tmp_path):
    finished = run(tmp_path, "--layer=encoder/layers_7")
    assert finished.returncode == 1
    assert "--layer: found 'encoder/layers_7', expected one of encoder/layers_0," in finished.stderr
    assert "Traceback" not in finished.stderr
