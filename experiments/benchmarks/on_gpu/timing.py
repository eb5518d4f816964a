"""timing.cu, from Python: microseconds by CUDA events around replays of a graph. Needs nvcc and a GPU."""

from __future__ import annotations

import ctypes
import pathlib
import sysconfig
from collections.abc import Callable

import jax
import numpy as np

SOURCE = pathlib.Path(__file__).with_name("timing.cu")
REPLAYS = 31


class Timing:
    """The library's functions. Errors are RuntimeError, with CUDA's text; times are the median of `REPLAYS` replays."""

    def __init__(self, library: ctypes.CDLL, platform: str = "CUDA", function: str = "QmoeTimed"):
        self.library, self.platform, self.function = library, platform, getattr(library, function)
        for name in ("TimingFailure", "TimeEmpty", "TimeCopy", "TimeGemm"):
            getattr(self.library, name).restype = ctypes.c_char_p
        self.times = np.zeros(REPLAYS, np.float32)
        self.registered: set[str] = set()

    def empty_kernel(self, blocks: int) -> float:
        """Microseconds of a kernel of so many blocks that depends on the one before it, and does nothing else."""
        return self._median(self.library.TimeEmpty(blocks, 500, REPLAYS, self._out()))

    def copy(self, nbytes: int) -> float:
        """Bytes a second, read and written, of a copy on the device."""
        return 2 * nbytes / self._median(self.library.TimeCopy(ctypes.c_size_t(nbytes), REPLAYS, self._out())) * 1e6

    def cublas(self, tokens: int, out: int, width: int, active: int, matrices: int, by_rows: bool) -> float:
        """Microseconds of a bfloat16 product with dense matrices, as timing.cu says; each call meets other ones."""
        sizes = map(ctypes.c_int64, (tokens, out, width, active, matrices))
        path = str(cublas_library()).encode()
        return self._median(self.library.TimeGemm(path, *sizes, ctypes.c_int(by_rows), REPLAYS, self._out()))

    def custom_call(self, target: str, handler, calls: int, run: Callable[[], object]) -> float:
        """Microseconds of one custom call.

        Args:
          target: what XLA calls it. This process must not have registered it, and not use it otherwise.
          handler: the function that XLA would call: of a library that ctypes has loaded. Its last argument is
            group_sizes, int32 [experts].
          calls: different ones, after each other.
          run: executes a program with one such call, whose group sizes are int32 [calls * experts], and waits for it.
        """
        self._set(handler, calls)
        if target not in self.registered:
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(self.function), platform=self.platform)
            self.registered.add(target)
        run()
        return self._median(self.library.TimingFailure())

    def _set(self, handler, calls):
        self.library.TimingSet(ctypes.cast(handler, ctypes.c_void_p), calls, REPLAYS, self._out())

    def _out(self):
        self.times[:] = np.nan
        return ctypes.c_void_p(self.times.ctypes.data)

    def _median(self, failure: bytes) -> float:
        if failure:
            raise RuntimeError(failure.decode(errors="replace"))
        return float(np.median(self.times))


def cublas_library() -> pathlib.Path | str:
    """That of the wheels which bring JAX's, or whatever the linker finds."""
    site = pathlib.Path(sysconfig.get_paths()["purelib"], "nvidia")
    found = sorted(p for p in site.glob("**/libcublas.so.*"))
    return found[-1] if found else "libcublas.so"
