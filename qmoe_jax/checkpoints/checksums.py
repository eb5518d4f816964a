"""SHA256SUMS beside a checkpoint, as `sha256sum` writes and reads it: for layouts that have no checksums of their own.

zarr and safetensors have none: a flipped bit loads as another weight. Files of torch.save and compressed checkpoints
have their own, which readers check.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

from qmoe_jax.checkpoints.checkpoint import Checkpoint
from qmoe_jax.checkpoints.conversion import CHECKSUMS, read_sums, sha256
from qmoe_jax.errors import CheckpointError
from qmoe_jax.files import check_regular, write_text


def folder_of(checkpoint: Checkpoint) -> pathlib.Path:
    """The folder of a local checkpoint. Raises CheckpointError for one that is elsewhere."""
    path = pathlib.Path(checkpoint.path)
    if not path.exists():
        raise CheckpointError(f"{checkpoint.path} isn't local: its checksums can't be written or read.")
    return path if path.is_dir() else path.parent


def write_or_verify(checkpoint: Checkpoint) -> dict[str, Any]:
    """Reads all files of a checkpoint. Writes their SHA-256 beside them, or compares them with those that are there.

    Returns:
      'file', 'written' (whether it was; otherwise they were compared), 'files' (how many), and 'problems': files that
      have changed, are missing, or aren't listed.

    Raises:
      CheckpointError: it isn't local, or a file can't be read.
    """
    folder = folder_of(checkpoint)
    file = folder / CHECKSUMS
    there = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = pathlib.Path(parent, name)
            if path != file:
                check_regular(path)
                there[path.relative_to(folder).as_posix()] = path
    if odd := [name for name in there if any(c in name for c in "\\\n\r")]:
        raise CheckpointError(f"{folder}: a file is called {odd[0]!r}, which {CHECKSUMS} can't list.")
    if not file.exists():
        lines = [f"{sha256(path)}  {name}\n" for name, path in sorted(there.items())]
        write_text(file, "".join(lines))
        return {"file": str(file), "written": True, "files": len(lines), "problems": []}
    sums = read_sums(file)
    if not sums:
        raise CheckpointError(f"{file} lists no checksums: remove it, and they are written anew.")
    problems = [f"missing: {name}" for name in sums if name not in there]
    problems += [f"changed: {name}" for name, path in there.items() if name in sums and sha256(path) != sums[name]]
    problems += [f"not listed: {name}" for name in sorted(there) if name not in sums]
    return {"file": str(file), "written": False, "files": len(sums), "problems": problems}


def noted(checkpoint: Checkpoint) -> dict[str, str]:
    """What is to be known of a checkpoint's checksums where it is made into another: their own SHA-256; {} for none."""
    path = pathlib.Path(checkpoint.path)
    file = (path if path.is_dir() else path.parent) / CHECKSUMS
    return {"sha256_of_checksums": sha256(file)} if file.is_file() else {}
