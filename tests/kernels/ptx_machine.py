"""CUDA kernels without a GPU: nvcc's PTX on ptx_machine.cc, its host code on cuda_runtime.cc, under JAX on a CPU.

    machine = build(folder, sources, {"QmoeGapCuda": "qmoe_gap_cuda"})
    cuda.multiply(...)                   # as it stands; what it does wrong is an error that JAX raises
    machine.counts()                     # launches, instructions, ...

Without a handler, `machine.launch` runs a kernel of PTX text.
"""

import ctypes
import pathlib
import shutil
import subprocess
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import pytest
from ptx_program import Program, programs

HERE = pathlib.Path(__file__).parent
ORDERS = {"forwards": 0, "backwards": 1, "shuffled": 2}
COUNTS = ("launches", "threads", "instructions", "barriers", "global_bytes", "shared_accesses")
CALLS = ("attributes", "allocations", "loads", "synchronizations", "copies", "memsets")


class Machine:
    """A library with the machine in it; see ptx_machine.h for what it checks."""

    def __init__(self, library: pathlib.Path):
        self.path, self.library = library, ctypes.CDLL(str(library))
        self.library.PtxNames.restype = self.library.PtxLaunch.restype = ctypes.c_char_p
        self.operations = {name: i for i, name in enumerate(self.library.PtxNames().decode().split())}
        self.kernels: dict[str, Program] = {}
        self.ptx: list[str] = []  # of the sources

    def load(self, ptx: str) -> None:
        for program in programs(ptx, self.operations):
            self.kernels[program.name] = program
            arrays = [np.ascontiguousarray(a) for a in (program.code, program.slots, program.parameters)]
            sized = [x for a in arrays for x in (ctypes.c_void_p(a.ctypes.data), ctypes.c_int64(len(a)))]
            rest = map(ctypes.c_int64, (program.shared, program.local, program.most_threads))
            self.library.PtxLoad(program.name.encode(), *sized, *rest)

    def order(self, name: str, seed: int = 0) -> None:
        """Of threads between barriers, and of blocks; `shuffled` interrupts threads at any instruction."""
        self.library.PtxOrder(ORDERS[name], ctypes.c_uint32(seed))

    def clear(self) -> None:
        self.library.PtxClear()

    def counts(self) -> dict[str, int]:
        out = (ctypes.c_int64 * len(COUNTS))()
        self.library.PtxCounts(out)
        return dict(zip(COUNTS, out, strict=True))

    def launched(self) -> set[str]:
        """Names of kernels that have run."""
        self.library.PtxLaunches.restype = ctypes.c_int64
        return {name for name in self.kernels if self.library.PtxLaunches(name.encode())}

    def calls(self) -> dict[str, int]:
        """Calls of the runtime, other than launches, since the last time."""
        out = (ctypes.c_int64 * len(CALLS))()
        self.library.RuntimeCalls(out)
        self.library.RuntimeClear()
        return dict(zip(CALLS, out, strict=True))

    def launch(self, kernel: str, grid: int, block: int, shared: int, *arguments: np.ndarray | int) -> str:
        """Runs a kernel whose parameters are pointers (arrays; those that are writable may be written) and int32.

        What went wrong, or "".
        """
        self.clear()
        values = []
        for i, argument in enumerate(arguments):
            if isinstance(argument, np.ndarray):
                address = (i + 1 << 40) + 128
                self.library.PtxBuffer(
                    f"argument {i}".encode(),
                    *map(ctypes.c_uint64, (address, argument.nbytes)),
                    ctypes.c_void_p(argument.ctypes.data),
                    ctypes.c_bool(argument.flags.writeable),
                )
                values.append(ctypes.c_uint64(address))
            else:
                values.append(ctypes.c_int32(argument))
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        dims = [(ctypes.c_uint32 * 3)(n, 1, 1) for n in (grid, block)]
        return self.library.PtxLaunch(kernel.encode(), *dims, ctypes.c_uint64(shared), pointers).decode()


def compiler() -> str:
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("running PTX on the CPU needs g++ or clang++")
    return found


def build(
    folder: pathlib.Path,
    nvcc: str | None = None,
    sources: Sequence[pathlib.Path] = (),
    handlers: Mapping[str, str | None] = {},
) -> Machine:
    """Compiles the machine and, if there are sources, these: kernels to PTX, host code to objects linked with it.

    Args:
      folder: for what is built.
      handlers: from the name of a function that XLA calls to that of the custom call, registered for the CPU unless it
        is None.
    """
    include = f"-I{jax.ffi.include_dir()}"
    objects, texts = [], []
    for source in sources:
        keep = folder / source.stem
        keep.mkdir()
        # One run, so that kernels have the same names in both.
        flags = "-O3", "-std=c++17", "-w", "-gencode=arch=compute_80,code=compute_80", "-Xcompiler=-fPIC", "--keep"
        command = [nvcc, *flags, "--keep-dir", keep, "-c", include, source, "-o", keep / "host.o"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        objects.append(keep / "host.o")
        texts.append((keep / f"{source.stem}.ptx").read_text())
    own = [HERE / "ptx_machine.cc"]
    if sources:
        own += [HERE / "cuda_runtime.cc", "-DHANDLERS=" + " ".join(f"X({name})" for name in handlers)]
    library = folder / "machine.so"
    flags = "-O1", "-std=c++17", "-fPIC", "-shared", "-w", "-Wl,-z,defs"
    done = subprocess.run([compiler(), *flags, include, *own, *objects, "-o", library], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    machine = Machine(library)
    machine.ptx = texts
    for text in texts:
        machine.load(text)
    jax.devices()  # the backend first: a library that does not fit it is an error here
    for name, target in handlers.items():
        if target is None:
            continue
        function = getattr(machine.library, f"OnCpu_{name}")
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(function), platform="cpu")
    return machine
