"""Runs that are killed, run out of space or are given something else go on to the same bytes, or are refused."""

import dataclasses
import errno
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import killed_runs
import numpy as np
import pytest
import tiny_model

from qmoe_jax.checkpoints import CheckpointError, open_checkpoint
from qmoe_jax.compression import progress
from qmoe_jax.compression.compress import compress_examples
from qmoe_jax.compression.progress import OtherRunError
from qmoe_jax.models.switch import Vocabulary, load_examples
from qmoe_jax.quantization import trials
from qmoe_jax.quantization.settings import QuantizationSettings
from qmoe_jax.streaming import OwnRows

TESTS = pathlib.Path(__file__).resolve().parents[1]
LAYERS = len(tiny_model.CONFIG.sparse_layers)


def assert_same_files(found, expected):
    """All files of two folders, to the byte."""
    names = [sorted(p.relative_to(d).as_posix() for p in d.rglob("*") if p.is_file()) for d in (found, expected)]
    assert names[0] == names[1]
    for name in names[0]:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


# --- Killed ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(request, tmp_path_factory):
    """What `killed_runs.py` makes: its folder, and the kills of each chain."""
    folder = tmp_path_factory.mktemp("killed")
    tiny_model.make(folder)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [sys.executable, str(TESTS / "killed_runs.py"), str(folder), str(request.config.getoption("kills")), "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, json.loads(done.stdout.splitlines()[-1])["chains"]


def test_killed_runs_end_in_the_same_bytes(killed, request):
    folder, chains = killed
    assert sum(map(len, chains)) >= request.config.getoption("kills")
    committed = {last for chain in chains for *_, last in chain}
    assert len(committed) > 2  # before the first commit, say, and after the last
    for i in range(len(chains)):
        assert_same_files(folder / f"chain-{i}", folder / "whole")
    assert not (folder / "whole" / "progress").exists()


# Two processes with four devices each, too: experiments/test_several_processes.py.
@pytest.mark.long
def test_eight_devices_write_the_bytes_of_one(killed, tmp_path, monkeypatch):
    """This process has eight, and takes all experts at once."""
    folder, _ = killed
    monkeypatch.setattr(killed_runs, "MEMORY", killed_runs.MEMORY._replace(experts_per_group=8))
    monkeypatch.setattr(trials, "TRIAL_WEIGHTS", 1)
    assert len(jax.local_devices()) == 8
    killed_runs.run(folder, tmp_path / "eight")
    assert_same_files(tmp_path / "eight" / "layers", folder / "whole" / "layers")


# --- Failed ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def arguments(tiny):
    vocabulary = Vocabulary.load(tiny.vocabulary)
    calibration = load_examples(tiny.calibration, vocabulary, tiny_model.NUM_CALIBRATION)
    validation = load_examples(tiny.validation, vocabulary, tiny_model.NUM_VALIDATION)
    settings = QuantizationSettings()
    return {
        "checkpoint": open_checkpoint(tiny.checkpoint),
        "vocabulary": vocabulary,
        "calibration": calibration,
        "validation": validation,
        "quantization": settings,
        "memory": killed_runs.MEMORY,
    }


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """(directory, report) of a run that nothing happens to."""
    output = tmp_path_factory.mktemp("whole") / "out"
    return output, compress_examples(**arguments, output=str(output))


class Stop(Exception):
    pass


def interrupt(arguments, output, commits, **changes):
    """Runs until so many layers are committed."""
    done = []
    commit = progress.Progress.commit

    def counted(self, *args):
        commit(self, *args)
        done.append(None)
        if len(done) == commits:
            raise Stop

    with pytest.MonkeyPatch.context() as m:
        m.setattr(progress.Progress, "commit", counted)
        with pytest.raises(Stop):
            compress_examples(**arguments | changes, output=str(output))


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


def without_times(report):
    return {k: v for k, v in report.items() if k not in ("seconds", "peak_rss_bytes")}


@pytest.mark.parametrize("step", ["shard", "activations", "progress", "dense", "manifest"])
def test_a_full_disk_keeps_what_is_committed(step, arguments, whole, tmp_path, monkeypatch):
    output = tmp_path / "out"
    interrupt(arguments, output, commits=1)
    folder = output / "progress"
    with monkeypatch.context() as m:
        if step == "activations":
            m.setattr(progress.os, "posix_fallocate", no_space)
        elif step == "progress":
            m.setattr(progress, "write_json", no_space)
        elif step == "manifest":
            m.setattr("qmoe_jax.checkpoints.compressed.writer.write_json", no_space)
        else:
            free = {"shard": 0, "dense": 20_000}[step]  # A shard takes less, everything else more.
            m.setattr("qmoe_jax.checkpoints.compressed.parts.shutil.disk_usage", lambda _: _Free(free))
        with pytest.raises((OSError, CheckpointError), match="No space") as raised:
            compress_examples(**arguments, output=str(output))
    committed = LAYERS if step in ("dense", "manifest") else 1
    (note,) = raised.value.__notes__
    assert f"{committed} of {LAYERS} sparse layers are committed; run the same command" in note
    state = json.loads((folder / "progress.json").read_text())["committed"]
    files = [f["file"] for f in state["arrays"].values()]
    assert sorted(p.name for p in folder.iterdir()) == sorted(["progress.json", *files])
    assert len(list((output / "layers").iterdir())) == committed == len(state["kept"])
    with pytest.raises(CheckpointError, match="unfinished.* Give the same command again"):
        open_checkpoint(output)
    report = compress_examples(**arguments, output=str(output))
    assert_same_files(output, whole[0])
    assert without_times(report) == without_times(whole[1])


@dataclasses.dataclass
class _Free:
    free: int


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"[" * 10**5, b'{"fingerprint": {"a": 1}, "committed": {}}', b'"sha', 0.5],
    ids=["empty", "list", "deep", "no checksum", "text", "changed"],
)
def test_a_progress_that_no_run_wrote_is_refused(content, tmp_path):
    progress.Progress(tmp_path / "out", {"a": 1})
    file = tmp_path / "out" / "progress" / "progress.json"
    found = file.read_bytes()
    file.write_bytes(found.replace(b'"a": 1', b'"a": 2') if content == 0.5 else content)
    with pytest.raises(progress.OtherRunError, match="progress.json.* Give --overwrite to start anew"):
        progress.Progress(tmp_path / "out", {"a": 1})
    progress.Progress(tmp_path / "out", {"a": 1}, resume=False)


def test_activations_lie_in_one_file_in_the_order_of_tokens(arguments, tmp_path):
    output = tmp_path / "out"
    interrupt(arguments, output, commits=LAYERS)
    files = json.loads((output / "progress" / "progress.json").read_text())["committed"]["arrays"]
    pairs = [*arguments["calibration"].pairs, *arguments["validation"].pairs]
    tokens = {"x": sum(len(d) - 1 for _, d in pairs), "encoder": sum(len(e) for e, _ in pairs)}
    for name, rows in tokens.items():
        assert files[name]["shape"] == [rows, tiny_model.CONFIG.d_model] and files[name]["dtype"] == "float32"
        size = (output / "progress" / files[name]["file"]).stat().st_size
        assert size == 4 * rows * tiny_model.CONFIG.d_model


def test_rows_are_written_and_read_by_whoever_has_them(tmp_path):
    everything = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    owner = np.random.default_rng(1).integers(0, 3, 100)
    for i in (2, 0, 1):
        own = np.flatnonzero(owner == i)
        progress.write_rows(tmp_path / "x", OwnRows(everything[own], own, 100))
    np.testing.assert_array_equal(np.fromfile(tmp_path / "x", np.float32).reshape(100, 3), everything)
    progress.write_rows(tmp_path / "whole", OwnRows(everything, None, 100))
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "x").read_bytes()
    for rows in (None, np.array([0, 1, 7, 8, 9, 99])):
        found = np.zeros_like(everything if rows is None else everything[rows])
        progress.read_rows(tmp_path / "x", OwnRows(found, rows, 100))
        np.testing.assert_array_equal(found, everything if rows is None else everything[rows])
    with pytest.raises(OSError, match="ends within row 98"):
        progress.read_rows(tmp_path / "x", OwnRows(np.zeros((7, 3), np.float32), np.arange(98, 105), 105))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checksums_of_parts_add_up_to_that_of_the_whole(dtype):
    import ml_dtypes

    values = np.random.default_rng(0).normal(size=(100, 3)).astype(getattr(ml_dtypes, dtype, dtype))
    whole = progress.checksum(OwnRows(values, None, 100))
    owner = np.random.default_rng(1).integers(0, 3, 100)
    rows = [np.flatnonzero(owner == i) for i in range(3)]
    assert sum(progress.checksum(OwnRows(values[r], r, 100)) for r in rows) % 2**64 == whole
    for change in (values[::-1], np.where(np.arange(3) == 1, -values, values).astype(values.dtype), 0 * values):
        assert progress.checksum(OwnRows(change, None, 100)) != whole


def test_layers_since_the_last_commit_are_done_again(arguments, whole, tmp_path):
    output, due = tmp_path / "out", iter([True, False])

    def asked(*_):
        found = next(due, None)
        if found is None:
            raise Stop
        return found

    with pytest.MonkeyPatch.context() as m:
        m.setattr(progress.Progress, "due", asked)
        m.setattr("qmoe_jax.checkpoints.compressed.CompressedWriter._remove", lambda _: None)  # as if killed
        with pytest.raises(Stop):
            compress_examples(**arguments, output=str(output))
    state = json.loads((output / "progress" / "progress.json").read_text())["committed"]
    assert len(state["kept"]) == 1 and len(list((output / "layers").iterdir())) == 3
    report = compress_examples(**arguments, output=str(output))
    assert_same_files(output, whole[0])
    assert without_times(report) == without_times(whole[1])


def test_commits_take_their_share_of_the_time(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "EXPECTED", 400)  # bytes a second
    found = progress.Progress(tmp_path / "a", {}, share=0.1)
    arrays = {"x": OwnRows(np.zeros((100, 1), np.float32), None, 100)}
    now[0] += 9.9
    assert not found.due(arrays)
    now[0] += 0.2
    assert found.due(arrays)
    write = progress.write_rows

    def slow(*args):
        now[0] += 3
        write(*args)

    monkeypatch.setattr(progress, "write_rows", slow)
    found.commit({}, arrays)
    now[0] += 29
    assert not found.due(arrays)
    now[0] += 2
    assert found.due(arrays)
    assert progress.Progress(tmp_path / "b", {}, share=1.0).due(arrays)
    assert not progress.Progress(tmp_path / "c", {}, share=0.0).due(arrays)


@pytest.mark.parametrize("failing", [1, 2], ids=["before it counts", "after it counts"])
def test_a_commit_that_is_interrupted_leaves_the_files_that_count(failing, tmp_path, monkeypatch):
    arrays = {"x": OwnRows(np.arange(6, dtype=np.float32).reshape(3, 2), None, 3)}
    found = progress.Progress(tmp_path, {})
    found.commit({}, arrays)
    synced = []

    def sync(_):
        synced.append(None)
        if len(synced) == failing:
            raise KeyboardInterrupt

    monkeypatch.setattr(progress, "sync", sync)
    with pytest.raises(KeyboardInterrupt):
        found.commit({}, arrays)
    again = progress.Progress(tmp_path, {})
    assert again.committed["number"] == failing
    read = OwnRows(np.zeros((3, 2), np.float32), None, 3)
    again.fill("x", read)
    np.testing.assert_array_equal(read.values, arrays["x"].values)


# --- Something else --------------------------------------------------------------------------------------------------


def fewer(examples):
    return dataclasses.replace(examples, pairs=examples.pairs[:-1])


def other_checkpoint(tmp_path, name):
    params = tiny_model.random_params()
    params[name] = params[name] + 1
    return open_checkpoint(tiny_model.write_checkpoint(tmp_path / "other", params))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("encoder/encoder_norm/scale", "checkpoint (contents differ)"),
        ("decoder/layers_1/mlp/router/router_weights/w/kernel", "checkpoint (contents differ)"),
        ("calibration", "calibration documents (contents differ)"),
        ("validation", "validation documents (contents differ)"),
        ("damping", "quantization.damping (it began with 0.1, and this is 0.2)"),
        ("codec", "codec (it began with gap, and this is dictionary)"),
        ("num_shards", "num_shards (it began with None, and this is 2)"),
        ("tokens_per_batch", "memory.tokens_per_batch (it began with 512, and this is 256)"),
        ("version", "version of qmoe_jax (it began with "),
    ],
)
def test_another_run_is_refused(change, named, started, arguments, tmp_path, monkeypatch):
    if "/" in change:
        changes = {"checkpoint": other_checkpoint(tmp_path, change)}
    elif change in ("calibration", "validation"):
        changes = {change: fewer(arguments[change])}
    elif change == "damping":
        changes = {"quantization": QuantizationSettings(damping=0.2)}
    elif change == "tokens_per_batch":
        changes = {"memory": arguments["memory"]._replace(tokens_per_batch=256)}
    else:
        changes = {"codec": {"codec": "dictionary"}, "num_shards": {"num_shards": 2}, "version": {}}[change]
    if change == "version":
        monkeypatch.setattr(progress, "__version__", "0.0.0")
    before = {p: p.stat().st_mtime_ns for p in started.rglob("*")}
    with pytest.raises(OtherRunError, match=f"unfinished compression of something else: {re.escape(named)}"):
        compress_examples(**arguments | changes, output=str(started))
    assert {p: p.stat().st_mtime_ns for p in started.rglob("*")} == before


def fine_tuned(directory, layer):
    """The tiny model with other experts in one layer, all else the same, where the old one was."""
    params = tiny_model.random_params()
    names = [f"{layer}/mlp/expert/{matrix}/kernel" for matrix in ("wi", "wo")]
    tiny_model.write_checkpoint(directory, params | {n: params[n] * 1.01 for n in names})
    return directory


def replace(old, new):
    shutil.rmtree(old)
    shutil.copytree(new, old)


def test_weights_that_were_replaced_are_refused(arguments, tmp_path):
    """The same names, shapes, norms and routers: only samples of the weights tell."""
    first, *_, last = tiny_model.CONFIG.sparse_layers
    model, kept = tmp_path / "model", tmp_path / "kept"
    tiny_model.write_checkpoint(model)
    shutil.copytree(model, kept)
    changes = {"checkpoint": open_checkpoint(model)}
    interrupt(arguments, tmp_path / "out", commits=1, **changes)

    replace(model, fine_tuned(tmp_path / "tuned", first))
    with pytest.raises(OtherRunError, match=rf"of other weights.*{first}/mlp/expert/w[io]/kernel and 1 more"):
        compress_examples(**arguments | {"checkpoint": open_checkpoint(model)}, output=str(tmp_path / "out"))
    # A layer that isn't committed yet may be mended; nothing was read of it that counts.
    replace(model, fine_tuned(tmp_path / "mended", last))
    compress_examples(**arguments | {"checkpoint": open_checkpoint(model)}, output=str(tmp_path / "out"))
    compress_examples(**arguments | {"checkpoint": open_checkpoint(model)}, output=str(tmp_path / "whole"))
    assert_same_files(tmp_path / "out", tmp_path / "whole")


def test_weights_that_are_replaced_meanwhile_are_not_committed(arguments, tmp_path, monkeypatch):
    model, first = tmp_path / "model", tiny_model.CONFIG.sparse_layers[0]
    tiny_model.write_checkpoint(model)
    tuned, commit = fine_tuned(tmp_path / "tuned", first), progress.Progress.due

    def replaced(self, arrays):
        if not (model / "replaced").exists():
            replace(model, tuned)
            (model / "replaced").touch()
        return commit(self, arrays)

    monkeypatch.setattr(progress.Progress, "due", replaced)
    changed = rf"weights were replaced while the run read them: {first}/mlp/expert/w[io]/kernel"
    with pytest.raises(CheckpointError, match=changed):
        compress_examples(**arguments | {"checkpoint": open_checkpoint(model)}, output=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.fixture(scope="module")
def started(arguments, tmp_path_factory):
    output = tmp_path_factory.mktemp("started") / "out"
    interrupt(arguments, output, commits=1)
    return output


def test_committed_files_that_changed_are_refused(arguments, tmp_path):
    output = tmp_path / "out"
    interrupt(arguments, output, commits=1)
    file = next(p for p in sorted((output / "layers").rglob("*")) if p.is_file())
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="changed since it was written"):
        compress_examples(**arguments, output=str(output))
    file.write_bytes(content)
    (activations,) = (output / "progress").glob("x-*")
    os.truncate(activations, 100)
    with pytest.raises(OtherRunError, match="not whole"):
        compress_examples(**arguments, output=str(output))


def test_committed_activations_that_changed_are_refused(arguments, tmp_path):
    output = tmp_path / "out"
    interrupt(arguments, output, commits=1)
    (activations,) = (output / "progress").glob("x-*")
    content = activations.read_bytes()
    for changed in (bytes(len(content)), content[:-4] + b"\0\0\0\1", content[4:] + content[:4]):
        activations.write_bytes(changed)
        with pytest.raises(OtherRunError, match="has changed since it was committed"):
            compress_examples(**arguments, output=str(output))


def test_overwrite_starts_anew(arguments, whole, tmp_path):
    output = tmp_path / "out"
    interrupt(arguments, output, commits=1, quantization=QuantizationSettings(damping=0.2))
    compress_examples(**arguments, output=str(output), resume=False)
    assert_same_files(output, whole[0])


def test_groups_and_folders_of_memory_may_change(arguments, whole, tmp_path):
    output = tmp_path / "out"
    interrupt(arguments, output, commits=2)
    memory = arguments["memory"]._replace(experts_per_group=8, activations=str(tmp_path / "activations"))
    compress_examples(**arguments | {"memory": memory}, output=str(output))
    assert_same_files(output, whole[0])
