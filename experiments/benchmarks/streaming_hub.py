"""Compresses layers of a published size, in Hugging Face's layout, through little memory, with a kill between.

    python experiments/benchmarks/streaming_hub.py --output=OUT

Writes OUT/model, random weights in the layout and with the layer shapes of `--preset`, with as many layers as fit
`--gigabytes` and a small vocabulary, shard by shard. Then three commands, as anybody would give them: compress.py
--plan; compress.py, which gets SIGKILL some seconds after its first commit; and compress.py again, which goes on. Every
read of a tensor is logged, and memory is what the kernel says of the process at its highest. OUT/streaming_hub.json
and .md say what came of it, and what --plan says of `--plans`. Arguments after `--` go to compress.py.
"""

import collections
import dataclasses
import json
import math
import pathlib
import signal
import subprocess
import sys
import time

import jax
import ml_dtypes
import numpy as np
import tokenizers
from absl import app, flags

from qmoe_jax import files, reports, resources
from qmoe_jax.checkpoints import Checkpoint
from qmoe_jax.checkpoints.conversion import Options
from qmoe_jax.checkpoints.huggingface import HuggingFaceWriter
from qmoe_jax.data.text import read_documents
from qmoe_jax.models.families import family_of, preset

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # experiments/
import command_line
import common

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[1]
OUTPUT = flags.DEFINE_string("output", "out/streaming_hub", "Directory for the model, the result and what was found.")
PRESET = flags.DEFINE_string("preset", "qwen3_30b_a3b", "Published model whose layers are taken.")
GIGABYTES = flags.DEFINE_float("gigabytes", 6.0, "Most of bfloat16 weights.")
VOCABULARY = flags.DEFINE_integer("vocabulary", 2048, "Token ids.")
KILL_AFTER = flags.DEFINE_float("kill_after", 5.0, "Seconds between the first commit and the kill.")
PLANS = flags.DEFINE_list("plans", ["deepseek_v3", "kimi_k2"], "Presets of which --plan is told, too.")

SHARD_BYTES = 600_000_000
LOG = "reads.log"
# What --plan is asked of published models: two million tokens, and memory as hosts of that kind have it.
PUBLISHED = {"data.num_calibration": 1024, "data.num_validation": 32, "data.window": 2048, "data.max_length": 2048}
PUBLISHED |= {"model.dtype": "bfloat16", "memory.weights_bytes": 32_000_000_000}
TEXT = EXPERIMENTS / "tiny_model" / "train.jsonl.gz"


class Random(Checkpoint):
    """A model with random weights that are made when they are read, as pieces of the same numbers."""

    def __init__(self, config):
        self.path, self.config, self.provenance = "random", config, {}
        self._pool = np.random.default_rng(0).standard_normal(1 << 24, np.float32)
        self._specs = {
            name: jax.ShapeDtypeStruct(shape, ml_dtypes.bfloat16)
            for name, shape in family_of(config).param_shapes(config).items()
        }

    @property
    def specs(self):
        return self._specs

    def read(self, name, index=()):
        shape = self._specs[name].shape
        if index:  # experts
            shape = (len(range(*index[0].indices(shape[0]))), *shape[1:])
        scale = 1.0 if len(shape) == 1 or "embed" in name else shape[-2] ** -0.5
        of_each = shape[1:] if index else shape
        seed = hash_of(f"{name} {index}")
        pieces = [self._piece(of_each, seed + e) for e in range(shape[0] if index else 1)]
        values = np.stack(pieces) if index else pieces[0]
        return np.ones_like(values) if name.endswith("/scale") else (scale * values).astype(ml_dtypes.bfloat16)

    def _piece(self, shape, seed):
        size = math.prod(shape)
        start = (seed * 7_919_993) % (len(self._pool) - size) if size < len(self._pool) else 0
        return np.resize(self._pool[start : start + size], shape)


def hash_of(text: str) -> int:
    return sum((i + 1) * c for i, c in enumerate(text.encode()))


def write_model(directory: pathlib.Path) -> dict:
    """The checkpoint and its vocabulary; what it is."""
    published = preset(PRESET.value)

    def of_layers(number):
        return dataclasses.replace(published, vocab_size=VOCABULARY.value, num_layers=number, eos=(0,))

    def size(config):
        return 2 * sum(map(math.prod, family_of(config).param_shapes(config).values()))

    config = of_layers(
        max(n for n in range(1, published.num_layers + 1) if size(of_layers(n)) <= GIGABYTES.value * 1e9)
    )
    if not (directory / "config.json").exists():
        directory.mkdir(parents=True)
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=VOCABULARY.value, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
        )
        tokenizer.train_from_iterator(read_documents(TEXT), trainer)
        tokenizer.save(str(directory / "tokenizer.json"))
        writer = HuggingFaceWriter(Random(config), directory, Options(shard_bytes=SHARD_BYTES))
        with writer, reports.progress(len(writer.parts), "writing the model", "shard") as bar:
            for part in writer.parts:
                writer.write(part.name)
                bar.update()
            writer.finish()
    return {"layers": config.num_layers, "published_layers": published.num_layers, "bytes": size(config)}


# --- Runs -------------------------------------------------------------------------------------------------------------


# A command in a process whose reads of tensors are logged line by line: bytes, and which.
LOGGED = """
import runpy, sys
from qmoe_jax.checkpoints import tensor_files

read, file = tensor_files.SafetensorsFile.read, open(sys.argv[1], "a", buffering=1)

def logged(self, name, index=()):
    values = read(self, name, index)
    file.write(f"{values.nbytes} {name} {index}\\n")
    return values

tensor_files.SafetensorsFile.read = logged
sys.argv = sys.argv[2:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def peak_bytes(pid: int) -> int:
    """The most that a process has had in memory so far; 0 when it has ended."""
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = [line.split() for line in status.splitlines() if line.startswith("VmHWM")]
    return 1024 * int(lines[0][1]) if lines else 0


def committed_layers(result: pathlib.Path) -> int:
    try:
        found = json.loads((result / "progress" / "progress.json").read_text())["committed"]
        return len(found["kept"]) if found else 0
    except (OSError, ValueError):
        return 0


def run(output: pathlib.Path, arguments: list[str], kill: bool) -> dict:
    """One command; killed where that is asked for."""
    log, result = output / LOG, output / "result"
    log.unlink(missing_ok=True)
    command = [sys.executable, "-c", LOGGED, str(log), str(EXPERIMENTS / "compress.py"), *arguments]
    started, committed, peak, before = time.perf_counter(), None, 0, committed_layers(result)
    process = subprocess.Popen(command)
    while process.poll() is None:
        peak = max(peak, peak_bytes(process.pid))
        if kill and committed is None and committed_layers(result) > before:
            committed = time.perf_counter()
        if committed is not None and time.perf_counter() - committed > KILL_AFTER.value:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.1)
    code = process.wait()
    if code != (-signal.SIGKILL if kill else 0):
        raise RuntimeError(f"compress.py ended with {code}{', before it was killed' if kill else ''}.")
    reads = [line.split(" ", 1) for line in log.read_text().splitlines()] if log.exists() else []
    experts = [(int(size), what) for size, what in reads if ".experts." in what]
    times = collections.Counter(what for _, what in experts)
    return {
        "seconds": time.perf_counter() - started,
        "killed": kill,
        "layers_committed": committed_layers(result) if kill else None,
        "peak_rss_bytes": peak,
        "bytes_read": sum(int(size) for size, _ in reads),
        "bytes_read_of_experts": sum(size for size, _ in experts),
        "tensors_of_experts_read": len(times),
        "of_these_more_than_once": sum(n > 1 for n in times.values()),
    }


def as_flags(settings: dict) -> list[str]:
    return [f"--config.{name}={value}" for name, value in settings.items()]


def plan(output: pathlib.Path, arguments: list[str]) -> dict:
    command = [sys.executable, str(EXPERIMENTS / "compress.py"), *arguments, "--plan"]
    subprocess.run([*command, f"--plan_json={output / 'plan.json'}"], check=True)
    found = json.loads((output / "plan.json").read_text())
    (output / "plan.json").unlink()
    return found


def main(argv):
    output = pathlib.Path(OUTPUT.value).absolute()
    model = write_model(output / "model")
    data = {"vocabulary": output / "model" / "tokenizer.json", "calibration": TEXT}
    data |= {"validation": TEXT.with_name("validation.jsonl.gz"), "num_calibration": 8, "num_validation": 2}
    settings = {f"data.{k}": v for k, v in data.items()} | {"data.window": 512, "memory.weights_bytes": 1_000_000_000}
    settings |= {"memory.commit_share": 1.0, "compare": False}
    given = [*as_flags(settings), *argv[1:]]
    arguments = [f"--checkpoint={output / 'model'}", f"--output={output / 'result'}", *given]
    planned = plan(output, arguments)
    runs = [run(output, arguments, kill=True), run(output, arguments, kill=False)]
    report = json.loads((output / "result" / "report.json").read_text())
    plans = {name: plan(output, as_flags(PUBLISHED | {"model.preset": name})) for name in PLANS.value}
    found = {
        "preset": PRESET.value,
        "model": model,
        "arguments": argv[1:],
        "plan": planned,
        "runs": runs,
        "report": {k: v for k, v in report.items() if k not in ("layers", "config", "plan", "checkpoint")},
        "plans": plans,
        "environment": common.environment(),
    }
    files.write_json(output / "streaming_hub.json", found)
    table = written(found)
    files.write_text(output / "streaming_hub.md", table + "\n")
    reports.say(table)


def written(found: dict) -> str:
    gigabytes, runs, planned = resources.gigabytes, found["runs"], found["plan"]
    rows = [
        ("layers", f"{found['model']['layers']} of {found['model']['published_layers']}", "", ""),
        ("weights, bfloat16", gigabytes(found["model"]["bytes"]), "", ""),
        ("peak memory", gigabytes(planned["peak_host_bytes"]), *(gigabytes(r["peak_rss_bytes"]) for r in runs)),
        ("experts read", "", *(gigabytes(r["bytes_read_of_experts"]) for r in runs)),
        ("experts' tensors read", "", *(str(r["tensors_of_experts_read"]) for r in runs)),
        ("of these more than once", "", *(str(r["of_these_more_than_once"]) for r in runs)),
        ("everything read", gigabytes(planned["read_bytes"]), *(gigabytes(r["bytes_read"]) for r in runs)),
        ("layers committed", "", str(runs[0]["layers_committed"]), "all"),
        ("seconds", f"{planned['expected_seconds']['total']:.0f}", *(f"{r['seconds']:.0f}" for r in runs)),
    ]
    plans = [
        (
            name,
            gigabytes(p["read_bytes"]),
            gigabytes(p["write_bytes"]),
            gigabytes(p["peak_host_bytes"]),
            gigabytes(sum(p["device_bytes"].values())),
            str(p["layers"]),
        )
        for name, p in found["plans"].items()
    ]
    header = ("preset", "to read", "to write", "host at most", "device at most", "sparse layers")
    first = reports.table((found["preset"], "planned", "until the kill", "resumed"), rows)
    return first + "\n\n" + reports.table(header, plans)


if __name__ == "__main__":
    app.run(command_line.without_traceback(main))
