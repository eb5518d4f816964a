"""How a command line starts and ends: processes that join, memory and compiled programs, errors in one line."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
from absl import flags, logging

import interrupts
import together
from qmoe_jax import resources
from qmoe_jax.processes import Processes, ProcessLost

flags.disclaim_key_flags()  # What is defined here is listed by --help of the experiment that asks for it.

GRACE = 10.0  # seconds for the main thread to say itself that another process is lost, and what is committed
LOST = (
    "Another process of this run has ended, or can't be reached: {}; its own message says why. What was committed is "
    "kept: run the same command again, with as many processes as you like."
)
_companions: together.Companions | None = None


def define_process_flags() -> None:
    """The flags of `start_processes`."""
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "host:port of the first of several processes, the same for all of them; 'auto': the cluster tells this, and "
        "the other two (Slurm, Open MPI, Kubernetes, Cloud TPU).",
    )
    flags.DEFINE_integer("num_processes", None, "How many processes there are.")
    flags.DEFINE_integer("process_id", None, "Which one this is, from 0 on.")
    flags.DEFINE_float("start_timeout", together.PATIENCE, "Seconds in which all processes have to come.")
    flags.DEFINE_float(
        "silence_timeout", together.SILENCE, "Seconds without a sign of life after which a process is given up."
    )


def start_processes() -> Processes:
    """Joins the other processes of the run, if the flags tell of any. Only the first one prints what it does.

    Call it before anything else that uses a device.

    Raises ValueError or OSError where the processes don't find each other, or don't fit together; see `together`. Those
    of a cluster ('auto') are as JAX finds them.
    """
    global _companions
    values: dict[str, Any] = {
        name: flags.FLAGS[name].value for name in ("coordinator_address", "num_processes", "process_id")
    }
    if values["coordinator_address"] != "auto" and len({v is None for v in values.values()}) > 1:
        lacking = ", ".join(f"--{name}" for name, value in values.items() if value is None)
        raise ValueError(f"{lacking}: not given. Several processes need all three of --{', --'.join(values)}.")
    if values["coordinator_address"] is not None:
        jax.config.update("jax_enable_preemption_service", False)  # It would take SIGTERM for itself.
    if values["coordinator_address"] == "auto":
        jax.distributed.initialize()
    elif values["coordinator_address"] is not None:
        silence = flags.FLAGS["silence_timeout"].value
        _companions = together.meet(*values.values(), patience=flags.FLAGS["start_timeout"].value)
        if values["process_id"]:
            values["coordinator_address"] = together.relay(values["coordinator_address"])
        # JAX's own limit is further, as it ends in an abort.
        jax.distributed.initialize(**values, heartbeat_timeout_seconds=int(10 * silence + 100))
        _companions.watch(_lost, silence)
    processes = Processes()
    if not processes.first:
        sys.stdout = open(os.devnull, "w")
    return processes


def _lost(what: str) -> None:
    """Ends this process where the main thread isn't told by JAX, or can't be while it computes."""
    time.sleep(GRACE)
    print(file=sys.stderr)  # A progress bar may stand there.
    _leave(_line(LOST.format(what), None))


def _leave(message: str, code: int = 1) -> None:
    """Ends this process: one of several at once, as leaving in order would wait for the others, who wait for it."""
    together = jax.distributed.is_initialized()
    print(f"process {jax.process_index()}: {message}" if together else message, file=sys.stderr, flush=True)
    if together:
        os._exit(code)
    sys.exit(code)


def _line(message: str, error: BaseException | None) -> str:
    """With what was noted on the way: what is committed."""
    if isinstance(error, ProcessLost) and _companions and (lost := _companions.what_was_lost(2)):
        message = LOST.format(lost)
    notes = getattr(error, "__notes__", [])
    return "; ".join([f"error: {message.rstrip('.') if notes else message}", *notes])


def _keep_programs() -> None:
    """The next run takes the programs that this one compiles, from the user's cache (XDG_CACHE_HOME or ~/.cache).

    JAX's own variables go before: JAX_COMPILATION_CACHE_DIR for another place, JAX_ENABLE_COMPILATION_CACHE=false.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    with contextlib.suppress(OSError):  # Where there is no such folder, each run compiles for itself.
        processor = pathlib.Path("/proc/cpuinfo").read_text().partition("\nflags")[2].partition("\n")[0]
        kind = hashlib.sha256(processor.encode()).hexdigest()[:8]
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache", "qmoe_jax")
        programs = cache / f"programs_{kind}"  # A home may be shared by hosts whose processors differ.
        programs.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(programs))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _compile_quickly() -> None:
    """XLA for CPUs with the older of its two ways to emit fusions: compiles in two thirds of the time, runs as fast.

    XLA ends a process that gives it a flag which it doesn't know: jax 0.11 has this one no more.
    """
    if jax.__version_info__[:2] == (0, 10):
        os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {os.environ.get('XLA_FLAGS', '')}"


def without_traceback(main: Callable[[Any], None]) -> Callable[[Any], None]:
    """Turns what a user can mend (bad input, no space, no permission), Ctrl-C and SIGTERM into one line.

    Exit code 1, 130 and 143. The line goes to standard error, with what is committed. With --verbosity=1 the traceback
    is shown instead.
    """

    def run(argv):
        interrupts.raise_them()
        resources.keep_one_heap()
        _keep_programs()
        _compile_quickly()
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.FATAL)  # Orbax logs at length what it does, and traces of what it raises.
        try:
            main(argv)
            if _companions is not None:
                Processes().wait()  # None leaves while another one may still need it.
                _companions.farewell()
        except (ValueError, OSError) as e:
            if logging.get_verbosity() >= logging.DEBUG:
                raise
            _leave(_line(str(e), e))
        except KeyboardInterrupt as e:
            _leave(_line(interrupts.message(e), e), interrupts.exit_code(e))
        except Exception as e:
            if isinstance(e, MemoryError) or "RESOURCE_EXHAUSTED" in str(e):
                _leave(_line(f"out of memory ({(str(e) or 'no room for an array').splitlines()[0]})", e))
            if jax.distributed.is_initialized():
                _leave(traceback.format_exc())
            raise

    return run
