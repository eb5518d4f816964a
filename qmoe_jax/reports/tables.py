"""Tables that a person reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown, columns aligned; floats with four decimals, None as a dash."""

    def show(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    cells = [list(header), *([show(v) for v in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row):
        first, *rest = (c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join([":" + "-" * (widths[0] + 1), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


COMPRESSION_HEADER = ("experts", "loss", "loss_paper", "zeros", "entropy", "bits/weight", "experts x", "model x", "MB")


def compression_row(name: str, report: Mapping[str, Any]) -> list[Any]:
    """A row under `COMPRESSION_HEADER`: the paper's tables 3, 4 and 6 side by side. Sizes are against bfloat16."""
    fields = ("loss", "loss_paper", "zeros", "entropy_per_weight", "bits_per_weight")
    rates = (report.get(f"compression_{part}") for part in ("experts", "model"))
    size = report.get("bytes_model")
    return [
        name,
        *(report.get(field) for field in fields),
        *(None if rate is None else f"{rate:.2f}x" for rate in rates),
        None if size is None else f"{size / 1e6:.2f}",
    ]


def method_title(report: Mapping[str, Any]) -> str:
    """Such as 'GPTQ, 1.5 bits'."""
    return f"{report.get('title', report['method'])}, {report['bits']:g} bits"


def super_experts(found: Sequence[Mapping[str, Any]]) -> str:
    """Such as 'LAYER expert 68: 1234 (310 times the median)'."""

    def said(of: Mapping[str, Any]) -> str:
        times = "" if of["times_median"] is None else f" ({of['times_median']:.0f} times the median)"
        return f"{of['layer']} expert {of['expert']}: {of['peak']:.4g}{times}"

    return "; ".join(map(said, found))


def comparison_rows(report: Mapping[str, Any]) -> list[list[Any]]:
    """Rows under `COMPRESSION_HEADER`: the report's baselines, where it has them, and what it is of."""
    baselines = report.get("baselines", {})
    rows = []
    if "bfloat16" in baselines:
        bfloat16 = baselines["bfloat16"] | {"bytes_model": report["bytes_bfloat16"]}
        rows.append(compression_row("bfloat16", bfloat16))
    if "rtn" in baselines:
        rows.append(compression_row(method_title(baselines["rtn"]), baselines["rtn"]))
    return [*rows, compression_row(method_title(report), report)]
