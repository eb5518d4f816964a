"""Figures of reports: PNG files, and SVG for pages."""

from __future__ import annotations

import io
import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

BLUE, RED = "#4878a8", "#c44e52"
MOST_POINTS_AS_VECTORS = 2_000
LEAST_LOSS = 1e-3  # nats, of a logarithmic axis


def plot_compression(report: Mapping[str, Any], path: str | os.PathLike) -> None:
    """A compression report by layer: what outputs lose, bits and zeros per weight, calibration tokens per expert."""
    fig, axes = _axes(2, 2, figsize=(11, 6.8))
    for ax, (title, draw) in zip(axes.flat, COMPRESSION_PANELS.items(), strict=True):
        draw(ax, report["layers"])
        ax.set_title(title, loc="left")
    fig.suptitle(f"{report['method']}, {report['bits']:g} bits: loss {report['loss']:.4f}, {report['zeros']:.1%} zeros")
    fig.tight_layout()
    fig.savefig(path, dpi=120)


def compression_svgs(report: Mapping[str, Any]) -> dict[str, str]:
    """The same panels by title, each as an <svg> element whose ink is the colour of the text around it."""
    return {title: _svg(title, draw, report["layers"]) for title, draw in COMPRESSION_PANELS.items()}


def _axes(rows: int = 1, columns: int = 1, squeeze: bool = True, **figure) -> tuple[Any, Any]:
    """A figure that no window shows, and its axes. Matplotlib, .7 s to import, is there when something is drawn."""
    from matplotlib.figure import Figure

    fig = Figure(**figure)
    return fig, fig.subplots(rows, columns, squeeze=squeeze)


def _output_error(ax, layers) -> None:
    for i, layer in enumerate(layers.values()):
        errors = np.array(layer["output_error_per_expert"], float)  # None is NaN, which isn't drawn.
        ax.plot(_places(i, errors), errors, ".", color=BLUE, **_points(layers))
    ax.plot([layer["output_error"] for layer in layers.values()], "_", **_mark(layers), label="layer")
    ax.plot([], [], ".", color=BLUE, label="expert")
    ax.set_ylim(bottom=0)
    ax.set_ylabel("lost share of the output")
    _name_layers(ax, layers)


def _bits(ax, layers) -> None:
    x = np.arange(len(layers))
    ax.bar(x, [layer["entropy_per_weight"] for layer in layers.values()], 0.7, label="entropy", color=BLUE)
    stored = [layer["bits_per_weight"] for layer in layers.values()]
    if None not in stored:
        ax.plot(x, stored, "_", **_mark(layers), label="stored")
    ax.set_ylabel("bits per weight")
    _name_layers(ax, layers)


def _zeros(ax, layers) -> None:
    ax.bar(np.arange(len(layers)), [layer["zeros"] for layer in layers.values()], 0.7, color=BLUE)
    ax.set_ylim(0, 1)
    ax.set_ylabel("share of weights")
    _name_layers(ax, layers)


def _tokens(ax, layers) -> None:
    for i, layer in enumerate(layers.values()):
        counts = np.array(layer["tokens_per_expert"])
        fallback = np.isin(np.arange(len(counts)), [int(e) for e in layer["fallback"]])
        places = _places(i, counts)
        ax.plot(places[~fallback], counts[~fallback], ".", color=BLUE, **_points(layers))
        ax.plot(places[fallback], counts[fallback], "x", color=RED, clip_on=False)
    ax.plot([], [], ".", color=BLUE, label="expert")
    ax.plot([], [], "x", color=RED, label="fell back")
    ax.set_yscale("symlog")
    ax.set_ylim(bottom=0)
    ax.set_ylabel("calibration tokens")
    _name_layers(ax, layers)


COMPRESSION_PANELS: dict[str, Callable[[Any, Mapping[str, Any]], None]] = {
    "Relative output error": _output_error,
    "Bits per weight": _bits,
    "Zeros": _zeros,
    "Calibration tokens per expert": _tokens,
}


def _places(layer: int, experts: np.ndarray) -> np.ndarray:
    """Experts side by side, in the width of a bar."""
    return layer + 0.7 * ((np.arange(len(experts)) + 0.5) / len(experts) - 0.5)


def _points(layers) -> dict[str, Any]:
    number = sum(len(layer["tokens_per_expert"]) for layer in layers.values())
    if number > MOST_POINTS_AS_VECTORS:
        return dict(markersize=1, alpha=0.4, rasterized=True)
    return dict(markersize=5, alpha=0.7)


def _mark(layers) -> dict[str, Any]:
    return dict(markersize=min(20, 220 / len(layers)), markeredgewidth=2.5, color=RED)


def _short_names(layers: Sequence[str]) -> list[str]:
    """What tells layers apart: their numbers, and where these aren't enough two letters of what is before them."""
    split = [re.fullmatch(r"(.*?)(\d*)", name) for name in layers]
    parts = [(m[1], m[2]) for m in split if m]
    alone = len({before for before, _ in parts}) == 1
    return [number if alone else before[:2] + number for before, number in parts]


def _name_layers(ax, layers) -> None:
    names = _short_names(list(layers))
    ax.set_xticks(np.arange(len(names)), names, rotation=90 if len(names) > 12 else 0)
    ax.set_xlabel("sparse layer")
    if ax.get_legend_handles_labels()[0]:  # Above the axes, where no point can be.
        ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0.1)


INK = "#010203"  # Stands for the text's colour until the figure is drawn.


def _svg(title: str, draw: Callable[[Any, Mapping[str, Any]], None], layers: Mapping[str, Any]) -> str:
    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = {
        **dict.fromkeys(names, INK),
        "svg.fonttype": "none",  # Text stays text.
        "svg.hashsalt": title,  # Names inside one page don't clash, and are the same every time.
        "font.size": 11,
    }
    import matplotlib

    with matplotlib.rc_context(style):
        fig, ax = _axes(figsize=(6.4, 3.6), layout="constrained")
        draw(ax, layers)
        buffer = io.StringIO()
        unknown = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        fig.savefig(buffer, format="svg", transparent=True, dpi=200, metadata=unknown)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # The page gives the size; what it is called is for screen readers.
    return re.sub(r'^<svg ([^>]*?)width="[^"]*"', rf'<svg \1role="img" aria-label="{title}"', svg, count=1)


def plot_training(history: list[Mapping[str, float]], path: str | os.PathLike) -> None:
    """Training loss by step."""
    fig, ax = _axes(figsize=(7, 4))
    ax.plot([h["step"] for h in history], [h["loss"] for h in history])
    ax.set(xlabel="step", ylabel="training loss (nats per predicted token)")
    fig.savefig(path, dpi=120, bbox_inches="tight")


def plot_losses(reports: Mapping[str, Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Loss by name, as bars above the first report's loss (bfloat16)."""
    base, *others = reports
    losses = [reports[name]["loss"] for name in others]
    fig, ax = _axes(figsize=(7, 3.4))
    bars = ax.barh(others[::-1], [loss - reports[base]["loss"] for loss in losses][::-1], color=BLUE)
    ax.bar_label(bars, [f"{loss:.3f}" for loss in losses[::-1]], padding=3)
    ax.set_xlabel(f"validation loss above {base} ({reports[base]['loss']:.3f} nats per token)")
    ax.margins(x=0.12)
    fig.tight_layout()
    fig.savefig(path, dpi=120)


def plot_frontier(report: Mapping[str, Any], path: str | os.PathLike) -> None:
    """What compression costs against stored bits per weight, of a frontier report; a line for what was swept.

    The cost is on a logarithmic scale; what is less than .001 nats, or a gain, is drawn there.
    """
    fig, ax = _axes(figsize=(7, 4.4))
    for name, marker in zip(dict.fromkeys(p["name"] for p in report["points"]), itertools.cycle("*sDo^vPX")):
        points = sorted((p for p in report["points"] if p["name"] == name), key=lambda p: p["bits_per_weight"])
        x, y = [p["bits_per_weight"] for p in points], [max(p["above_bfloat16"], LEAST_LOSS) for p in points]
        ax.plot(x, y, marker=marker, markersize=13 if marker == "*" else 6, label=name)
    ax.set(
        xlabel="stored bits per expert weight, metadata included",
        ylabel=f"validation loss above bfloat16's {report['bfloat16']:.3f}, nats per token",
        yscale="log",
    )
    ax.set_xlim(left=0)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:.0e}"[0] in "25" else "")
    ax.grid(alpha=0.3, which="both")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=8)
    fig.savefig(path, dpi=130, bbox_inches="tight")


def plot_bars(
    series: Mapping[str, Mapping[str, float]],
    path: str | os.PathLike,
    ylabel: str,
    title: str,
    *,
    logarithmic: bool = False,
) -> None:
    """Groups of bars: height by label, by series; a label that a series lacks leaves a gap."""
    labels = list(dict.fromkeys(label for heights in series.values() for label in heights))
    width = 0.8 / len(series)
    fig, ax = _axes(figsize=(max(6, 1.1 * len(labels) * max(1, len(series) / 2)), 4))
    for i, (name, heights) in enumerate(series.items()):
        x = np.arange(len(labels)) + (i - (len(series) - 1) / 2) * width
        bars = ax.bar(x, [heights.get(label, np.nan) for label in labels], width, label=name)
        ax.bar_label(bars, [f"{heights[label]:.3g}" if label in heights else "" for label in labels], fontsize=7)
    ax.set_xticks(
        np.arange(len(labels)),
        labels,
        rotation=20 if max(map(len, labels)) > 12 else 0,
        ha="right" if max(map(len, labels)) > 12 else "center",
    )
    ax.set(ylabel=ylabel, title=title, yscale="log" if logarithmic else "linear")
    ax.title.set_fontsize(10)
    if len(series) > 1:
        ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=130)


def plot_rehearsal(models: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Projected minutes of each stage of a compression, a panel for each model."""
    fig, axes = _axes(1, len(models), figsize=(1.5 + 3.6 * len(models), 3.4), squeeze=False)
    for ax, (name, model) in zip(axes.flat, models.items(), strict=True):
        minutes = {stage: s / 60 for stage, s in model["projected_seconds"].items()}
        colours = [RED if stage == "total" else BLUE for stage in minutes]
        ax.barh(list(minutes), list(minutes.values()), color=colours)
        ax.invert_yaxis()
        ax.set_xlabel("minutes")
        ax.set_title(name, loc="left")
    fig.tight_layout()
    fig.savefig(path, dpi=120)
