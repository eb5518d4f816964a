"""The C++ part; everything else stands in setup.cfg.

Headers come from jaxlib, pinned in pyproject.toml to the oldest supported: a library built with older headers runs
with newer jaxlib, not the other way round. Without a compiler the install succeeds and the kernels run as XLA.
"""

import glob
import importlib.util
import pathlib

from setuptools import Extension, setup

# Through the link qmoe_jax/kernels, which is a folder in an sdist.
CPU = "qmoe_jax/kernels/compressed_ragged_dot/cpu"


def cpu_kernels() -> list[Extension]:
    jaxlib = importlib.util.find_spec("jaxlib")  # Only its folder is wanted: importing it takes long.
    if jaxlib is None:
        print("jaxlib is not installed: building without the C++ kernels.")
        return []
    return [
        Extension(
            f"{CPU.replace('/', '.')}._cpu",
            sources=sorted(glob.glob(f"{CPU}/csrc/**/*.cc", recursive=True)),
            depends=sorted(glob.glob(f"{CPU}/csrc/**/*.h", recursive=True)),
            include_dirs=[str(pathlib.Path(jaxlib.submodule_search_locations[0]) / "include")],
            language="c++",
            optional=True,
            # No -march: the instruction set is chosen at run time. The FFI headers are not free of warnings.
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-w", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ]


setup(ext_modules=cpu_kernels())
