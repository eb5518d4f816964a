"""Runs code in several processes of `jax.distributed`, on CPU."""

import os
import pathlib
import socket
import subprocess
import sys

TESTS = pathlib.Path(__file__).resolve().parent


def free_address() -> str:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return f"localhost:{s.getsockname()[1]}"


def environment(devices: int, **more: str) -> dict[str, str]:
    path = [TESTS.parent, TESTS, TESTS / "models"]
    return {
        **os.environ,
        "PYTHONPATH": ":".join(map(str, path)),
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_PLATFORMS": "cpu",
        **more,
    }


def start(count: int, arguments, devices: int = 2, **more: str) -> list[subprocess.Popen]:
    """Starts `python arguments(address, i)` for each process; `more` is added to its environment."""
    address = free_address()
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments(address, i))],
            env=environment(devices, **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]


def finish(processes: list[subprocess.Popen], timeout: float = 300) -> list[str]:
    """What they printed, when all have ended."""
    try:
        return [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def run(count: int, code: str, *arguments, devices: int = 2) -> None:
    """Runs code in every process; it finds `index` and `arguments`."""
    begin = "import sys, jax; index, arguments = int(sys.argv[2]), sys.argv[3:];"
    begin += f"jax.distributed.initialize(sys.argv[1], {count}, index)\n"
    processes = start(count, lambda address, i: ["-c", begin + code, address, i, *arguments], devices)
    outputs = finish(processes)
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
