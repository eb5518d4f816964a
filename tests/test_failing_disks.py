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
WALL_CLOCK = r"\btime\.time\(|\bdatetime\b|st_mtime|st_ctime|getmtime|\btime\.(?:local|gm)time\(|\bstrftime\("


# Mounts that only the process sees, and permissions that count for root too.
ALONE = ["unshare", "--mount", "setpriv", "--bounding-set=-dac_override,-dac_read_search"]


@pytest.fixture
def disk(tmp_path):
    """Skips where no file system can be mounted."""
    (tmp_path / "try").write_bytes(bytes(1 << 20))
    script = f"mke2fs -q -F -t ext4 {tmp_path}/try && mount -o loop {tmp_path}/try /mnt && umount /mnt"
    if not all(map(shutil.which, ("unshare", "setpriv", "mke2fs"))) or os.geteuid() != 0:
        pytest.skip("mounting a file system needs root, unshare, setpriv and mke2fs")
    if subprocess.run([*ALONE, "sh", "-c", script], capture_output=True).returncode:
        pytest.skip("a file can't be mounted as a disk here")


@pytest.mark.long
@pytest.mark.usefixtures("disk")
def test_disks_that_fail_keep_what_is_committed_and_the_run_goes_on(tmp_path):
    tiny_model.make(tmp_path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [*ALONE, sys.executable, str(TESTS / "failing_disks.py"), str(tmp_path)]
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
