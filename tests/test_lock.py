"""Two runs on one output: the second is refused, by name; a process that has ended holds nothing."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from qmoe_jax.lock import LOCK, InUseError, locked

HOLD = """
import sys, time
from qmoe_jax.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `tmp_path`/out."""
    root = pathlib.Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_another_process_is_refused_and_told_who_has_it(holder, tmp_path):
    with pytest.raises(InUseError, match=rf"out is being written by process {holder.pid} on \S+, which began 20"):
        with locked(tmp_path / "out"):
            pass
    assert (tmp_path / "out" / LOCK).exists()  # of the one who has it


def test_a_process_that_was_killed_holds_nothing(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path / "out"):
        assert str(os.getpid()) in (tmp_path / "out" / LOCK).read_text()
    assert list((tmp_path / "out").iterdir()) == []


def test_it_leaves_nothing_and_may_be_taken_again_by_its_own_process(tmp_path):
    with locked(tmp_path / "a/b"), locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a/b" / LOCK).exists()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"):
        (tmp_path / "out/file").touch()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["file"]
    with locked(tmp_path / "not there", create=False):
        assert not (tmp_path / "not there").exists()
