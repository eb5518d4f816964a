"""Figures of reports, as PNG files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot_compression(report: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Bits per weight and calibration tokens per expert, by layer, of a compression report."""
    layers = report["layers"]
    names = [name.replace("coder/layers_", "") for name in layers]  # en0, de0
    x = np.arange(len(names))
    fig, (bits, tokens) = plt.subplots(1, 2, figsize=(11, 3.6))

    bits.bar(x, [layer["entropy_per_weight"] for layer in layers.values()], 0.7, label="entropy", color="#4878a8")
    stored = [layer["bits_per_weight"] for layer in layers.values()]
    if None not in stored:
        bits.plot(x, stored, "_", markersize=14, markeredgewidth=2.5, color="#c44e52", label="stored")
    bits.set(
        ylabel="bits per weight", title=f"{report['method']}, {report['bits']:g} bits: {report['zeros']:.1%} zeros"
    )
    bits.legend()

    for i, layer in enumerate(layers.values()):
        counts = np.array(layer["tokens_per_expert"])
        fallback = np.isin(np.arange(len(counts)), [int(e) for e in layer["fallback"]])
        tokens.plot(np.full((~fallback).sum(), i), counts[~fallback], ".", color="#4878a8", alpha=0.6)
        tokens.plot(np.full(fallback.sum(), i), counts[fallback], "x", color="#c44e52")
    tokens.set(ylabel="calibration tokens", title="tokens per expert (x: rounded to nearest)", yscale="symlog")
    for ax in (bits, tokens):
        ax.set_xticks(x, names, rotation=90 if len(names) > 12 else 0)
        ax.set_xlabel("sparse layer")
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def plot_training(history: list[Mapping[str, float]], path: str | os.PathLike) -> None:
    """Training loss by step."""
    fig, ax = plt.subplots(figsize=(7, 4))
    ax.plot([h["step"] for h in history], [h["loss"] for h in history])
    ax.set(xlabel="step", ylabel="training loss (nats per predicted token)")
    fig.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(fig)


def plot_losses(reports: Mapping[str, Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Loss by name, as bars above the first report's loss (bfloat16)."""
    base, *others = reports
    losses = [reports[name]["loss"] for name in others]
    fig, ax = plt.subplots(figsize=(7, 3.4))
    bars = ax.barh(others[::-1], [loss - reports[base]["loss"] for loss in losses][::-1], color="#4878a8")
    ax.bar_label(bars, [f"{loss:.3f}" for loss in losses[::-1]], padding=3)
    ax.set_xlabel(f"validation loss above {base} ({reports[base]['loss']:.3f} nats per token)")
    ax.margins(x=0.12)
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def plot_frontier(report: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Loss against stored bits per weight of a frontier report, a line for what was swept; bfloat16 is a level."""
    fig, ax = plt.subplots(figsize=(7, 4.4))
    for name, marker in zip(dict.fromkeys(p["name"] for p in report["points"]), "*sDo", strict=False):
        points = [p for p in report["points"] if p["name"] == name]
        x, y = ([p[key] for p in points] for key in ("bits_per_weight", "loss"))
        ax.plot(x, y, marker=marker, markersize=13 if marker == "*" else 6, label=name)
    ax.axhline(report["bfloat16"], color="black", linewidth=0.8, linestyle="--", label="bfloat16 (16 bits)")
    ax.set(xlabel="stored bits per expert weight, metadata included", ylabel="validation loss, nats per token")
    ax.set_xlim(left=0)
    ax.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=130)
    plt.close(fig)
