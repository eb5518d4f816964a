"""Compresses the tiny model in processes that are killed (SIGKILL), each going on where the last one was.

    python tests/killed_runs.py FOLDER KILLS SEED

FOLDER has model/, spm.model, calibration.jsonl and validation.jsonl (`tiny_model.make`). FOLDER/whole gets the
checkpoint and report of a run that nobody kills; FOLDER/chain-0, chain-1, ... those of runs that together were killed
so often, at random events and at random times. An event is a stage's begin or a step of writing: a file made or synced,
a name replaced, a file or folder removed. Prints JSON: events, and the kills of each chain.

Processes are forked from one that has imported everything and started nothing.
"""

import json
import os
import pathlib
import random
import shutil
import signal
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from qmoe_jax import files, resources, streaming
from qmoe_jax.checkpoints import compressed, open_checkpoint
from qmoe_jax.compression import progress
from qmoe_jax.compression.compress import compress_examples
from qmoe_jax.models.switch import Vocabulary, load_examples
from qmoe_jax.quantization import trials
from qmoe_jax.quantization.settings import QuantizationSettings

MEMORY = streaming.Settings(tokens_per_batch=512, tokens_per_expert_call=64, experts_per_group=4, commit_share=1.0)
SETTINGS = QuantizationSettings(method="rd", target_bits=1.0)
NUM_CALIBRATION, NUM_VALIDATION = 20, 7


def run(folder: pathlib.Path, output: pathlib.Path, resume: bool = True) -> dict:
    trials.TRIAL_WEIGHTS = 1
    vocabulary = Vocabulary.load(str(folder / "spm.model"))
    calibration = load_examples(str(folder / "calibration.jsonl"), vocabulary, NUM_CALIBRATION)
    validation = load_examples(str(folder / "validation.jsonl"), vocabulary, NUM_VALIDATION)
    checkpoint = open_checkpoint(str(folder / "model"))
    options = dict(output=str(output), num_shards=2, resume=resume, keep_progress=True)
    report = compress_examples(checkpoint, vocabulary, calibration, validation, SETTINGS, MEMORY, **options)
    report = {k: v for k, v in report.items() if k not in ("seconds", "peak_rss_bytes")}
    files.write_json(output / "report.json", report)
    progress.remove_progress(output)
    return report


def count_events(kill_at: int | None) -> list[int]:
    """Counts events, and kills the process at one of them."""
    count = [0]

    def event():
        count[0] += 1
        if count[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(owner, name):
        function = getattr(owner, name)

        def wrapped(*args, **kwargs):
            event()
            return function(*args, **kwargs)

        setattr(owner, name, wrapped)

    for name in ("fsync", "replace", "pwrite", "posix_fallocate"):
        before(os, name)
    before(shutil, "rmtree")
    before(pathlib.Path, "unlink")
    before(pathlib.Path, "write_text")
    before(compressed, "sha256")
    enter = resources.Stages.__call__

    def stage(self, name):
        event()
        return enter(self, name)

    resources.Stages.__call__ = stage
    return count


def child(folder, output, kill_at=None, kill_after=None) -> int:
    """Runs in a fork; returns its status, negative where it was killed."""
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        with open(folder / "log.txt", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        try:
            jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
            jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
            count = count_events(kill_at)
            run(folder, output)
            (folder / "events").write_text(str(count[0]))
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main(folder: pathlib.Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    if child(folder, folder / "whole"):
        sys.exit((folder / "log.txt").read_text()[-4000:])
    events = int((folder / "events").read_text())
    seconds = None
    chains = []
    while sum(map(len, chains)) < kills:
        output, chain = folder / f"chain-{len(chains)}", []
        chains.append(chain)
        while True:
            # Far enough, often, for another layer to be committed; the very first before anything is.
            how = {"kill_at": rng.randint(1, events // (2 if chain or len(chains) > 1 else 10))}
            if len(chain) % 4 == 3:
                if seconds is None:
                    started = time.monotonic()
                    assert child(folder, folder / "again") == 0  # with everything compiled
                    seconds = time.monotonic() - started
                how = {"kill_after": rng.uniform(0, 0.8 * seconds)}
            status = child(folder, output, **how)
            if status == 0:
                break
            if status != -signal.SIGKILL:
                sys.exit((folder / "log.txt").read_text()[-4000:])
            file = output / "progress" / "progress.json"
            committed = json.loads(file.read_text())["committed"] if file.is_file() else None
            chain.append([*how.values(), 0 if committed is None else len(committed["kept"])])
    print(json.dumps({"events": events, "seconds": seconds, "chains": chains}))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
