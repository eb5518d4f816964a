"""What a run tells its user while it goes on."""

from __future__ import annotations

import sys

from tqdm import tqdm


def progress(total: int, what: str, unit: str = "batch", *, shown: bool = True) -> tqdm:
    """A progress bar with the time left on standard error."""
    return tqdm(
        total=total, desc=what, unit=unit, dynamic_ncols=True, smoothing=0.05, file=sys.stderr, disable=not shown
    )


def say(text: str) -> None:
    """Prints a line without breaking a progress bar."""
    tqdm.write(text, file=sys.stdout)
