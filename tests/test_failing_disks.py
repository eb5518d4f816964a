"""A disk that fills up, becomes read-only or forbids writing in the middle of a run: on a real file system."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import tiny_model

TESTS = pathlib.Path(__file__).resolve().parent
SEEN = ("qmoe_jax", "kernels", "experiments")  # what runs
WALL_CLOCK = r"\btime\.time\(|\bdatetime\b|st_mtime|st_ctime|getmtime|\btime\.(local|gm)time\(|\bstrftime\("


def may_mount() -> bool:
    if not shutil.which("unshare") or os.geteuid() != 0:
        return False
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="mounting a file system of one's own needs root and `unshare --mount`")
def test_disks_that_fail_keep_what_is_committed_and_the_run_goes_on(tmp_path):
    tiny_model.make(tmp_path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "XLA_FLAGS": ""}
    command = ["unshare", "--mount", sys.executable, str(TESTS / "failing_disks.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    messages = {
        "full disk": "No space",
        "read-only": "Read-only file system",
        "permission": "Permission denied",
        "clock": "the clock set back",
    }
    assert found.keys() == messages.keys()
    for name, message in messages.items():
        assert message in found[name]["message"], found
        assert "1 of 3 sparse layers are committed; run the same command to go on" in found[name]["message"], found
        assert {"layers", "progress"} <= set(found[name]["held"]) and "manifest.json" not in found[name]["held"], found
        assert found[name]["same"], name


def test_nothing_depends_on_the_time_of_day():
    """So a clock that is set back changes nothing. A lock tells when its run began, for people."""
    found = {
        str(file.relative_to(TESTS.parent)): re.findall(WALL_CLOCK, file.read_text(encoding="utf-8"))
        for folder in SEEN
        for file in (TESTS.parent / folder).rglob("*.py")
    }
    assert {name: calls for name, calls in found.items() if calls} == {"qmoe_jax/lock.py": ["strftime("]}
