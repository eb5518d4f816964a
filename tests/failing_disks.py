"""Compresses the tiny model on a file system of its own that fails after the first commit, and again when it works.

    unshare --mount python tests/failing_disks.py FOLDER

FOLDER has model/, spm.model, calibration.jsonl and validation.jsonl (`tiny_model.make`); all is done in a tmpfs on /mnt
that only this process sees. Prints JSON: for each failure its message, what the output held then, and whether the run
that went on ended in the bytes of one that nothing happened to.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"

import killed_runs

from qmoe_jax.compression import progress
from qmoe_jax.errors import CheckpointError

MOUNT, NOBODY = pathlib.Path("/mnt"), 65534
OUTPUT = MOUNT / "out"


def mount(options: str) -> None:
    """As root, which it is but for its effective user."""
    user = os.geteuid()
    os.seteuid(0)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(MOUNT)], check=True)
    os.seteuid(user)


def full_disk():
    """Another program takes what is left."""
    with open(MOUNT / "filler", "wb", 0) as f:
        try:
            while True:
                f.write(bytes(4096))
        except OSError:
            pass


def free_disk():
    (MOUNT / "filler").unlink()


def read_only():
    mount("remount,ro")


def writable():
    mount("remount,rw")


def _allow(mode: int) -> None:
    os.seteuid(0)
    for folder in (OUTPUT, OUTPUT / "layers", OUTPUT / "progress"):
        folder.chmod(mode)
    os.seteuid(NOBODY)


def permission_lost():
    _allow(0o555)


def permission_given():
    _allow(0o755)


def clock_set_back():
    """All that is there is from tomorrow, as it looks then."""
    tomorrow = time.time() + 86_400
    for path in [OUTPUT, *OUTPUT.rglob("*")]:
        os.utime(path, (tomorrow, tomorrow))
    raise OSError("stopped, and the clock set back")


FAILURES = {
    "full disk": (full_disk, free_disk),
    "read-only": (read_only, writable),
    "permission": (permission_lost, permission_given),
    "clock": (clock_set_back, lambda: None),
}


def fails(cause) -> str:
    """The message of a run to which that happens after its first commit."""
    commit = progress.Progress.commit

    def then(self, *args):
        commit(self, *args)
        progress.Progress.commit = commit
        cause()

    progress.Progress.commit = then
    try:
        killed_runs.run(MOUNT, OUTPUT)
    except (OSError, CheckpointError) as e:
        return "; ".join([str(e), *e.__notes__])
    return ""


def files() -> dict[str, bytes]:
    return {str(p.relative_to(OUTPUT)): p.read_bytes() for p in sorted(OUTPUT.rglob("*")) if p.is_file()}


def main(folder: pathlib.Path) -> None:
    mount("size=16m,mode=755")
    shutil.copytree(folder, MOUNT, dirs_exist_ok=True)
    for path in (MOUNT, *MOUNT.rglob("*")):
        shutil.chown(path, NOBODY)
    os.seteuid(NOBODY)  # Nothing is forbidden to root.
    killed_runs.run(MOUNT, OUTPUT)
    whole, found = files(), {}
    for name, (cause, cure) in FAILURES.items():
        shutil.rmtree(OUTPUT)
        message = fails(cause)
        held = sorted(p.name for p in OUTPUT.iterdir())
        cure()
        killed_runs.run(MOUNT, OUTPUT)
        found[name] = {"message": message, "held": held, "same": files() == whole}
    print(json.dumps(found))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
