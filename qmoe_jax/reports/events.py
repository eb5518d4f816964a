"""TensorBoard events of runs, by tensorboardX, which needs no TensorFlow (the extra `tensorboard`)."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from qmoe_jax import reports


class Write(Protocol):
    """Notes scalars by name, None left out, at a step."""

    def __call__(self, step: int, scalars: Mapping[str, float | None]) -> None: ...


@contextlib.contextmanager
def events(directory: str | os.PathLike) -> Iterator[Write]:
    """An events file in the directory, in place of those of an earlier run; whole when the context ends.

    Without tensorboardX nothing is written, and a line on standard output says so.
    """
    directory = pathlib.Path(directory)
    for earlier in directory.glob("events.out.tfevents.*"):
        earlier.unlink()
    if importlib.util.find_spec("tensorboardX") is None:
        reports.say("No TensorBoard events are written: pip install 'qmoe_jax[tensorboard]' would.")
        yield lambda step, scalars: None
        return
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(directory)) as writer:

        def write(step: int, scalars: Mapping[str, float | None]) -> None:
            for name, value in scalars.items():
                if value is not None:
                    writer.add_scalar(name, value, step)

        yield write


LAYER_SCALARS = ("output_error", "bits_per_weight", "entropy_per_weight", "zeros")
MODEL_SCALARS = ("loss", "loss_paper", "bits_per_weight", "compression_experts", "compression_model", "zeros")


def write_compression(report: Mapping[str, Any], directory: str | os.PathLike) -> None:
    """A compression report: `layer/...` with the sparse layers as steps, in order; `model/...`."""
    with events(directory) as write:
        for step, layer in enumerate(report["layers"].values()):
            scalars = {name: layer[name] for name in LAYER_SCALARS}
            scalars |= {"fewest_tokens": min(layer["tokens_per_expert"]), "fell_back": len(layer["fallback"])}
            write(step, {f"layer/{name}": value for name, value in scalars.items()})
        write(0, {f"model/{name}": report[name] for name in MODEL_SCALARS})
        for name, baseline in report.get("baselines", {}).items():
            write(0, {f"model/loss_of_{name}": baseline["loss"]})
