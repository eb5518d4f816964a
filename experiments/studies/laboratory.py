"""What reproduce.py, the studies and benchmarks share: a model with its documents, and the files of a result."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

import common
from qmoe_jax import files, reports, streaming
from qmoe_jax.checkpoints import Checkpoint, open_checkpoint
from qmoe_jax.codecs.experts import CompressedExperts, concatenate
from qmoe_jax.compression.compress import compress_examples
from qmoe_jax.models.switch import Examples, load_examples
from qmoe_jax.quantization.methods import TERNARY
from qmoe_jax.quantization.settings import QuantizationSettings
from qmoe_jax.reports.figures import plot_bars, plot_frontier

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = dict(num_calibration=60, num_validation=40)


class Laboratory:
    """A model and its documents.

    Args:
      config: data and settings (`common.default_config`).
      path: a native checkpoint.
      small: few documents, to try it.
    """

    def __init__(self, config: config_dict.ConfigDict, path: str, small: bool = False):
        self.config, self.small = config, small
        if small:
            for field, number in SMALL.items():
                config.data[field] = min(config.data[field], number)
        self.checkpoint, self.vocabulary = common.open_model(path, config)
        self.memory = common.memory_settings(config)
        self.validation = common.examples(config, "validation", self.checkpoint, self.vocabulary)

    # --- Documents ---------------------------------------------------------------------------------------------------

    def num_calibration(self, times: float = 1.0) -> int:
        return round(times * self.config.data.num_calibration)

    @functools.cached_property
    def _calibration(self) -> Examples:
        return self.calibration(1.0)

    def calibration(self, times: float = 1.0, seed: int | None = None) -> Examples:
        """So many times the configured number of calibration documents; the first ones, whatever `times`."""
        config = self.config.copy_and_resolve_references()
        config.data.num_calibration = self.num_calibration(times)
        config.data.seed = config.data.seed if seed is None else seed
        return common.examples(config, "calibration", self.checkpoint, self.vocabulary)

    def read(self, paths: str | Sequence[str], number: int) -> Examples:
        """Documents of other files."""
        data = self.config.data
        return load_examples(
            paths,
            self.vocabulary,
            number,
            max_length=data.max_length,
            seed=data.seed,
            append_eos=data.append_eos,
            window=data.window,
        )

    def datasets(self, given: Sequence[str], number: int | None = None) -> dict[str, Examples]:
        """Documents by name, as many as validation documents or `number`; with none given, kinds of text found here."""
        number = number or len(self.validation)
        found = {"validation": self.validation}
        for item in given:
            name, equals, paths = item.partition("=")
            if not equals:
                raise ValueError(f"--dataset={item}: expected NAME=FILES.")
            found[name] = self.read(paths, number)
        if given:
            return found
        with tempfile.TemporaryDirectory() as directory:
            for name, texts in own_texts().items():
                file = pathlib.Path(directory) / f"{name}.jsonl"
                file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
                found[name] = self.read(os.fspath(file), min(number, int(0.9 * len(texts))))  # A few may be too long.
        return found

    # --- Measurements ------------------------------------------------------------------------------------------------

    def measure(self, documents: Examples) -> dict[str, Any]:
        """Loss of the model with weights in bfloat16, and what it was measured on."""
        rounded = self.memory._replace(round_weights=True)
        return streaming.run(self.checkpoint, documents, rounded, what="bfloat16").summary()

    def loss(self, documents: Examples) -> float:
        return self.measure(documents)["loss"]

    @functools.cached_property
    def bfloat16(self) -> dict[str, Any]:
        return self.measure(self.validation)

    def compress(
        self,
        method: str,
        bits: float = TERNARY,
        *,
        calibration: Examples | None = None,
        validation: Examples | None = None,
        codec: str | None = "gap",
        memory: streaming.Settings | None = None,
        output: str | None = None,
        checkpoint: Checkpoint | None = None,
        what: str | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        """The report of a compression; other settings are those of the method."""
        quantization = QuantizationSettings(method, bits=bits, **settings)
        return compress_examples(
            checkpoint or self.checkpoint,
            self.vocabulary,
            calibration or (self._calibration if quantization.calibrated else None),
            validation or self.validation,
            quantization,
            memory or self.memory,
            codec=codec,
            output=output,
            what=what or f"{method}, {bits:g} bits",
        )

    def experts(self, method: str, bits: float = TERNARY) -> dict[str, CompressedExperts]:
        """All experts' matrices [experts, out, in] by 'layer/matrix', in the codec 'gap'."""
        with tempfile.TemporaryDirectory() as directory:
            output = os.path.join(directory, "compressed")
            self.compress(method, bits, output=output)
            compressed = open_checkpoint(output)
            found: dict[str, CompressedExperts] = {}
            for layer in compressed.config.sparse_layers:
                groups = [matrices for _, _, matrices in compressed.experts(layer)]
                found |= {f"{layer}/{name}": concatenate([g[name] for g in groups]) for name in groups[0]}
        return found

    def zeros_of_matrices(self, method: str, bits: float) -> np.ndarray:
        """Share of zeros of every expert's every matrix."""
        return np.concatenate([(e.symbols() == 0).mean((1, 2)) for e in self.experts(method, bits).values()])

    # --- What differs ------------------------------------------------------------------------------------------------

    def differences(self) -> list[str]:
        """How this differs from the paper's experiments, in sentences."""
        c, data = self.checkpoint.config, self.config.data
        weights = sum(int(np.prod(s.shape)) for s in self.checkpoint.specs.values())
        kind = jax.devices()[0].device_kind
        text = pathlib.Path(str(data.validation)).name
        lines = []
        if not self.config.model.preset:
            lines.append(
                f"Model: {weights / 1e6:.1f} M parameters, d_model {c.d_model}, {c.num_experts} experts in each of "
                f"{len(c.sparse_layers)} layers; the paper's have 7.4 to 1571 B parameters, 128 or 2048 experts."
            )
        if "c4" not in text:
            lines.append(
                f"Data: {text}, {len(self.validation)} validation documents; the paper's are 128 documents of C4."
            )
        lines.append(f"Hardware: {kind} ({os.cpu_count()} cores); the paper's is one A6000.")
        return lines


def own_texts() -> dict[str, list[str]]:
    """Paragraphs of this project's own files, by kind of text."""
    kinds = {"Python code": "qmoe_jax/**/*.py", "C++ code": "kernels/**/csrc/**/*", "licence": "LICENSE"}
    found = {}
    for name, pattern in kinds.items():
        texts = [p.read_text(encoding="utf-8") for p in sorted(ROOT.glob(pattern)) if p.is_file()]
        paragraphs = [q for text in texts for q in text.split("\n\n") if len(q.split()) >= 20]
        found[name] = [q for q in paragraphs if len(q) < 1200]
    return {name: texts for name, texts in found.items() if texts}


@dataclasses.dataclass
class Result:
    """A table, and a figure of bars.

    Attributes:
      title: what it is.
      header: of the table.
      rows: of the table.
      data: the same and more, as JSON values.
      bars: height by label, by series.
      ylabel: of the bars.
      notes: what a reader should know.
      points: in place of bars, of losses against bits; see `figures.plot_frontier`.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    data: Any
    bars: Mapping[str, Mapping[str, float]]
    ylabel: str
    notes: Sequence[str] = ()
    logarithmic: bool = False
    points: Mapping[str, Any] | None = None

    def write(self, directory: pathlib.Path, name: str, lab: Laboratory) -> str:
        """Writes NAME.json, NAME.md and NAME.png; returns the Markdown."""
        notes = [*self.notes, *lab.differences()]
        markdown = f"**{self.title}**\n\n{reports.table(self.header, self.rows)}\n\n" + "\n".join(
            f"- {n}" for n in notes
        )
        report = dict(
            title=self.title,
            header=list(self.header),
            rows=[list(row) for row in self.rows],
            data=self.data,
            notes=notes,
            config=common.without_folders(lab.config),
        )
        files.write_json(directory / f"{name}.json", _plain(report))
        files.write_text(directory / f"{name}.md", markdown + "\n")
        figure = directory / f"{name}.png"
        if self.points is not None:
            plot_frontier(self.points, figure)
        else:
            plot_bars(self.bars, figure, self.ylabel, self.title, logarithmic=self.logarithmic)
        return markdown


def _plain(value: Any) -> Any:
    """NumPy's numbers as JSON's."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value
