"""What a run tells its user: progress with time left, tables, JSON, seconds per stage."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm


def progress(total: int, what: str, unit: str = "batch", *, shown: bool = True) -> tqdm:
    """A progress bar with the time left on standard error."""
    return tqdm(
        total=total, desc=what, unit=unit, dynamic_ncols=True, smoothing=0.05, file=sys.stderr, disable=not shown
    )


def say(text: str) -> None:
    """Prints a line without breaking a progress bar."""
    tqdm.write(text, file=sys.stdout)


class Stages:
    """Adds up the seconds spent in named stages."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def report(self) -> dict[str, float]:
        """Seconds by stage, rounded, with the total since this object was made."""
        total = time.perf_counter() - self._started
        return {name: round(s, 3) for name, s in (*self.seconds.items(), ("total", total))}


def peak_rss_bytes() -> int:
    """The most memory this process has had resident so far."""
    with contextlib.suppress(OSError):  # Linux, where getrusage counts what the parent had when it forked.
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int:
    """The memory this process has resident now; its peak where the system doesn't tell."""
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_rss_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON such that the file is there whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 such that the file is there whole or not at all; directories are made."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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


METHOD_TITLES = {"gptq": "GPTQ", "rtn": "round to nearest", "rd": "rate-distortion GPTQ"}


def method_title(report: Mapping[str, Any]) -> str:
    """Such as 'GPTQ, 1.5 bits'."""
    return f"{METHOD_TITLES[report['method']]}, {report['bits']:g} bits"


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
