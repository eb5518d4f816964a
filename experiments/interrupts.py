"""Ctrl-C and SIGTERM end a command line in one line. Each script imports this before anything else.

While modules are imported, which takes seconds, some of them would swallow a KeyboardInterrupt: there a signal ends the
process at once. From `raise_them` on it is an exception, so that what is half-written is removed and what is committed
is told.
"""

import os
import signal
import sys

MESSAGES = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Terminated(KeyboardInterrupt):
    """SIGTERM: as batch systems and containers stop a job."""


def exit_code(error: KeyboardInterrupt) -> int:
    """128 and the signal's number, as shells have it."""
    return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)


def message(error: KeyboardInterrupt) -> str:
    return MESSAGES[signal.Signals(exit_code(error) - 128)]


def raise_them() -> None:
    """From here on SIGINT raises KeyboardInterrupt, and SIGTERM Terminated."""
    _handle(_raise)


def _raise(number, frame):
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _end(number, frame):
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"error: {MESSAGES[number]}\n".encode())
    os._exit(128 + number)


def _handle(handler) -> None:
    for number in MESSAGES:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as with nohup
            signal.signal(number, handler)


if "jax" not in sys.modules:  # Otherwise it is within a process that has begun its work, as tests are.
    _handle(_end)
