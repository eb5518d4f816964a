"""Compresses the tiny model on a file system of its own that fails after the first commit, and again when it works.

    unshare --mount setpriv --bounding-set=-dac_override,-dac_read_search python tests/failing_disks.py FOLDER

FOLDER has model/, spm.model, calibration.jsonl and validation.jsonl (`tiny_model.make`). The file system is ext4 in a
file, mounted on /mnt, which only this process sees. It is root, so as to mount, but may not write where permissions
forbid it. Prints JSON: for each failure its message, what the output held then, and whether the run that went on ended
in the bytes of one that nothing happened to.
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

MOUNT = pathlib.Path("/mnt")
OUTPUT = MOUNT / "out"


def run_command(*command) -> None:
    subprocess.run(list(map(str, command)), check=True, capture_output=True)


def mount(image: pathlib.Path) -> None:
    run_command("mount", "-o", "loop", image, MOUNT)


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
    """As the system does where a disk has errors; what isn't on disk by then is lost."""
    run_command("mount", "-o", "remount,abort", MOUNT)


def permission_lost():
    for folder in (OUTPUT, OUTPUT / "layers", OUTPUT / "progress"):
        folder.chmod(0o555)


def permission_given():
    for folder in (OUTPUT, OUTPUT / "layers", OUTPUT / "progress"):
        folder.chmod(0o755)


def clock_set_back():
    """All that is there is from tomorrow, as it looks then."""
    tomorrow = time.time() + 86_400
    for path in [OUTPUT, *OUTPUT.rglob("*")]:
        os.utime(path, (tomorrow, tomorrow))
    raise OSError("stopped, and the clock set back")


def fails(folder: pathlib.Path, cause) -> str:
    """The message of a run to which that happens after its first commit."""
    commit = progress.Progress.commit

    def then(self, *args):
        commit(self, *args)
        progress.Progress.commit = commit
        cause()

    progress.Progress.commit = then
    try:
        killed_runs.run(folder, OUTPUT)
    except (OSError, CheckpointError) as e:
        return "; ".join([str(e), *getattr(e, "__notes__", ["no note"])])
    return ""


def files() -> dict[str, bytes]:
    return {str(p.relative_to(OUTPUT)): p.read_bytes() for p in sorted(OUTPUT.rglob("*")) if p.is_file()}


def main(folder: pathlib.Path) -> None:
    image = folder / "disk"
    with image.open("wb") as f:
        f.truncate(16 << 20)
    run_command("mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", image)
    mount(image)

    def mount_again():
        run_command("umount", MOUNT)
        mount(image)

    failures = {
        "full disk": (full_disk, free_disk),
        "read-only": (read_only, mount_again),
        "permission": (permission_lost, permission_given),
        "clock": (clock_set_back, lambda: None),
    }
    killed_runs.run(folder, OUTPUT)
    whole, found = files(), {}
    for name, (cause, cure) in failures.items():
        shutil.rmtree(OUTPUT)
        message = fails(folder, cause)
        held = sorted(p.name for p in OUTPUT.iterdir())
        cure()
        killed_runs.run(folder, OUTPUT)
        found[name] = {"message": message, "held": held, "same": files() == whole}
    run_command("umount", MOUNT)
    print(json.dumps(found))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
