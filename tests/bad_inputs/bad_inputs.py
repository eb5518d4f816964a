"""Reads bad inputs, each in a process of its own with limits on time and memory; prints JSON lines.

    python tests/bad_inputs/bad_inputs.py FOLDER START:STOP:STEP

Of each case: its number, name and kind, what came of it ('refused', 'read', or what must not be), and the message.
Processes are forked from one that has imported everything and started nothing: no thread of XLA's or TensorStore's.
"""

from __future__ import annotations

import json
import os
import pathlib
import resource
import shutil
import signal
import sys
import tempfile
import traceback

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import bad_bases
import bad_cases
import jax
import numpy as np
import safetensors  # noqa: F401, what readers import late
import tokenizers  # noqa: F401
from absl import logging
from flax import traverse_util

from qmoe_jax.checkpoints import inspection, open_checkpoint
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.data import read_documents
from qmoe_jax.errors import CheckpointError, DataError
from qmoe_jax.models.decoder.vocabulary import Vocabulary as Tokenizer
from qmoe_jax.models.families import param_shapes
from qmoe_jax.models.switch import Vocabulary, load_examples

SECONDS, ADDRESS_SPACE, MOST_RESIDENT = 10, 6 << 30, 1 << 30


def read(kind: str, path: pathlib.Path, folder: pathlib.Path) -> None:
    """All that there is to read of an input."""
    if kind == "text":
        for name in ("text.jsonl", "text.txt", "text.json.gz"):
            assert all(isinstance(text, str) for text in read_documents(path / name))
            load_examples(path / name, Vocabulary.load(folder / "bases" / "vocabulary" / "spm.model"), 3)
    elif kind in ("vocabulary", "tokenizer"):
        words = (Vocabulary if kind == "vocabulary" else Tokenizer).load(path / bad_bases.OTHER[kind])
        words.decode(words.encode("the cat sat on the mat"))
    else:
        checkpoint = open_checkpoint(path)
        check_tree(checkpoint, checkpoint.load())
        inspection.inspect(path)


def check_tree(checkpoint, params) -> None:
    """What is read without an error is a tree of the architecture, of finite numbers."""
    expected, found = param_shapes(checkpoint.config), traverse_util.flatten_dict(params, sep="/")
    assert set(found) == set(expected), sorted(set(found) ^ set(expected))[:3]
    for name, value in found.items():
        shape = value.shape
        if isinstance(value, CompressedExperts):
            shape = (shape[0], shape[2], shape[1])
        else:
            assert jax.numpy.issubdtype(value.dtype, jax.numpy.floating), (name, value.dtype)
            assert np.isfinite(np.asarray(value, np.float32)).all(), name
        assert tuple(shape) == tuple(expected[name]), (name, shape, expected[name])


def tree(path: pathlib.Path) -> list:
    """Names, sizes and times of everything below a folder."""
    found = [(p, os.lstat(p)) for p in sorted(path.rglob("*"))]
    return [(str(p), s.st_size, s.st_mtime_ns) for p, s in found if not os.path.isdir(p)]


def peak_bytes() -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def keep_programs(folder: pathlib.Path) -> None:
    """What one process compiles, the others take: where the run of tests keeps programs, or below `folder`."""
    place = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(folder / "programs"))
    jax.config.update("jax_compilation_cache_dir", place)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def child(kind: str, path: pathlib.Path, folder: pathlib.Path, out: int) -> None:
    """Reads the input, writes what came of it to `out`, and ends."""
    log = os.open(path.parent / "log.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    keep_programs(folder)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(2 * SECONDS)
    before = tree(path)
    os.chdir(path.parent / "here")
    try:
        read(kind, path, folder)
        result = ["read", ""]
    except (CheckpointError, DataError) as e:
        result = ["refused" if str(path) in str(e) else "does not say where", str(e)]
    except BaseException as e:
        result = [f"traceback of {type(e).__name__}", "".join(traceback.format_exception(e))[-3000:]]
    if peak_bytes() > MOST_RESIDENT:
        result[0] = f"takes {peak_bytes() >> 20} MiB"
    if tree(path) != before or os.listdir("."):
        result[0] = "wrote something"
    os.write(out, json.dumps(result).encode()[:60_000])
    os._exit(0)


def try_case(number: int, folder: pathlib.Path) -> dict:
    place = pathlib.Path(tempfile.mkdtemp(prefix=f"{number}-", dir=folder))
    (place / "here").mkdir()

    def copy(kind: str) -> pathlib.Path:
        if not (place / kind).exists():
            shutil.copytree(folder / "bases" / kind, place / kind, copy_function=os.link)
        return place / kind

    name, kind = bad_cases.apply(number, copy)
    read_end, write_end = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            child(kind, place / kind, folder, write_end)
        finally:
            os._exit(9)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        said = pipe.read()
    _, status, used = os.wait4(process, 0)
    if said:
        result, message = json.loads(said)
    else:
        code, log = os.waitstatus_to_exitcode(status), (place / "log.txt")
        result, message = f"ends with {code}", log.read_text(errors="replace")[-3000:] if log.exists() else ""
        if code == -signal.SIGALRM or code in (-signal.SIGXCPU, -signal.SIGKILL):
            result = f"hangs ({signal.Signals(-code).name})"
    shutil.rmtree(place, ignore_errors=True)
    seconds = round(used.ru_utime + used.ru_stime, 2)
    return {"number": number, "name": name, "kind": kind, "result": result, "message": message, "seconds": seconds}


def prepare(folder: pathlib.Path) -> None:
    """Writes the sound inputs, reads each, and leaves the programs that reading them takes."""
    process = os.fork()
    if process == 0:
        status = 9
        try:
            logging.set_verbosity(logging.FATAL)
            keep_programs(folder)
            bad_bases.make(folder / "bases")
            for kind in bad_bases.BASES:
                read(kind, folder / "bases" / kind, folder)
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(status)
    if status := os.waitpid(process, 0)[1]:
        sys.exit(f"the sound inputs can't be read: {status}")


def main(folder: pathlib.Path, numbers: list[int]) -> None:
    if not (folder / "bases").is_dir():
        prepare(folder)
    assert len(os.listdir("/proc/self/task")) == 1, "a thread was started before the forks"
    for number in numbers:
        print(json.dumps(try_case(number, folder)), flush=True)


if __name__ == "__main__":
    logging.set_verbosity(logging.FATAL)
    main(pathlib.Path(sys.argv[1]).resolve(), list(range(*map(int, sys.argv[2].split(":")))))
