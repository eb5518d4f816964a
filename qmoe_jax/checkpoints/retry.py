"""Reads that fail for now are tried again; reads that fail for good are named."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorstore as ts

from qmoe_jax.errors import CheckpointError

# TensorStore's message begins with the code of its error.
_TRANSIENT = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "RESOURCE_EXHAUSTED", "INTERNAL", "UNKNOWN"}
_DAMAGED = {"DATA_LOSS", "FAILED_PRECONDITION", "INVALID_ARGUMENT", "OUT_OF_RANGE"}


class Patience(NamedTuple):
    """How often a read is tried, and how long it is waited for.

    Attributes:
      attempts: tries of a read that fails as a busy server or a lost connection does.
      damaged_attempts: tries of one whose data are too short or corrupt; a second answer may be whole.
      first_delay: seconds before the second try; each later pause is twice as long as the one before.
      stalled: seconds after which a read that hasn't answered counts as failed.
    """

    attempts: int = 8
    damaged_attempts: int = 3
    first_delay: float = 0.25
    stalled: float = 300.0


PATIENT = Patience()


class Stopped(Exception):
    """The reader was closed while it read."""


def result(
    start: Callable[[], ts.Future],
    what: str,
    *,
    first: ts.Future | None = None,
    patience: Patience = PATIENT,
    stop: threading.Event | None = None,
) -> Any:
    """The result of a read, tried again with exponential back-off.

    Args:
      start: starts the read.
      what: checkpoint, parameter and file, for messages.
      first: the first try, where it was started before.
      patience: how often, how long.
      stop: ends the pauses.

    Raises:
      CheckpointError: it failed too often, or for good: something is missing, truncated or corrupt.
      Stopped: `stop` was set during a pause.
    """
    stop = stop or threading.Event()
    began = time.monotonic()
    future = first
    tries = 0
    while True:
        tries += 1
        try:
            # A pending result is asked for in slices, so that a closed reader needn't wait for a stalled store.
            return _wait(future or start(), patience.stalled, stop)
        except TimeoutError:
            why, most = f"no answer within {patience.stalled:g} s", patience.attempts
        except ValueError as e:
            why = reason(e)
            code = (re.match(r"([A-Z_]+): ", str(e)) or ["", ""])[1]
            full = "No space left" in why
            most = 1 if full else patience.attempts if code in _TRANSIENT else patience.damaged_attempts
            if full:
                raise CheckpointError(f"{what}: {why}. Make room, then run the same command again.") from e
            if code not in _TRANSIENT and (code not in _DAMAGED or tries >= most):
                raise CheckpointError(
                    f"{what}: {why}. A file that is missing, truncated or corrupt has to be copied again."
                ) from e
        if tries >= most:
            raise CheckpointError(
                f"{what}: {why}; tried {tries} times in {time.monotonic() - began:.0f} s. Check the disk or the "
                "network, then run the same command again."
            )
        future = None
        if stop.wait(patience.first_delay * 2 ** (tries - 1)):
            raise Stopped


def _wait(future: ts.Future, seconds: float, stop: threading.Event) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        try:
            return future.result(timeout=max(0.0, min(left, 1.0)))
        except TimeoutError:
            if stop.is_set():
                raise Stopped from None
            if left <= 0:
                future.cancel()
                raise


def reason(error: Exception) -> str:
    """TensorStore's message, without the spec that it appends."""
    return re.split(r" \[(?:tensorstore_spec|source locations|os_error_code)=", str(error))[0].rstrip(".")
