"""A stage's report: written after every row, so that a run that is cut off keeps what it had."""

from __future__ import annotations

import pathlib
import time
from typing import Any

from qmoe_jax import files, reports


class Stage:
    """What a stage found, in `path`: {"state": "running" or "complete", "seconds": ..., "left_out": [...], name: rows}.

    Args:
      path: JSON file.
      seconds: how long the stage may take.
    """

    def __init__(self, path: pathlib.Path, seconds: float):
        self.path, self.started, self.limit = path, time.monotonic(), seconds
        self.found: dict[str, Any] = {"state": "running", "seconds": 0.0, "left_out": []}
        self.write()

    def left(self) -> float:
        """Seconds."""
        return self.limit - (time.monotonic() - self.started)

    def add(self, kind: str, row: dict[str, Any]) -> None:
        self.found.setdefault(kind, []).append(row)
        self.write()
        reports.say(
            f"{kind}: " + ", ".join(f"{name} {_short(value)}" for name, value in row.items() if value is not None)
        )

    def put(self, kind: str, value: Any) -> None:
        self.found[kind] = value
        self.write()
        reports.say(f"{kind}: {value}")

    def attempt(self, kind: str, what: dict[str, Any], measure, least: float = 0.0) -> None:
        """Adds the row that `measure()` returns to `what`, or its error: a stage goes on. `least`: seconds it takes."""
        if self.left() < least:
            self.found["left_out"].append({"kind": kind, **what})
            self.write()
            return
        try:
            self.add(kind, {**what, **measure()})
        except Exception as error:  # whatever a first run on a device brings up
            self.add(kind, {**what, "error": f"{type(error).__name__}: {str(error).strip()[:2000]}"})

    def complete(self) -> None:
        self.found["state"] = "complete"
        self.write()

    def write(self) -> None:
        self.found["seconds"] = time.monotonic() - self.started
        files.write_json(self.path, self.found)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).splitlines()[0][:160] if str(value) else "''"
