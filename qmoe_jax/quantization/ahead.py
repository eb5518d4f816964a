"""Programs that are sure to be needed, compiled by a thread while documents are on their way to the first experts.

Compiling a method takes seconds and one core. JAX keeps what the thread compiles: a call with arrays of the same shape
and sharding finds it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import jax.numpy as jnp

from qmoe_jax.quantization.asymmetric import match_outputs
from qmoe_jax.quantization.settings import QuantizationSettings
from qmoe_jax.quantization.sharding import expert_sharding

Shape = tuple[int, int, int]

_compiled: dict[tuple[Any, Shape], Future] = {}  # or being compiled, by what is called and W's shape


@contextlib.contextmanager
def compiling(quantizations: Iterable[QuantizationSettings], shapes: Sequence[Shape]) -> Iterator[None]:
    """While it lasts, programs are compiled one after the other; what has not begun when it ends is left.

    Args:
      quantizations: their settings, in the order in which they come.
      shapes: of the matrices W of a group, [experts, out, in], in the order in which they are quantized.
    """
    programs = dict(program for settings in quantizations for program in _programs(settings, shapes))
    wanted = {key: make for key, make in programs.items() if key not in _compiled}
    with ThreadPoolExecutor(1, "compiling") as thread:
        own = {key: thread.submit(make) for key, make in wanted.items()}
        _compiled.update(own)
        try:
            yield
        finally:
            for key, program in own.items():
                if program.cancel():
                    _compiled.pop(key, None)


def ready(function: Any, shape: Shape) -> None:
    """Waits for a program that is being compiled, or else is about to be."""
    if (program := _compiled.get((function, shape))) is not None:
        wait([program])  # If it failed, the call itself will tell.


def _programs(settings: QuantizationSettings, shapes: Sequence[Shape]) -> Iterator[tuple[tuple[Any, Shape], Callable]]:
    method = settings.rounding
    for shape in dict.fromkeys(shapes):
        W, H = _like(shape), _like((shape[0], shape[2], shape[2]))
        if settings.calibration.asymmetric and shape == shapes[-1]:
            yield (match_outputs, shape), functools.partial(_compile_match, settings, W, H)
        if (compile_method := getattr(method, "compile", None)) is not None:
            yield (method, shape), functools.partial(compile_method, W, H)


def _compile_match(settings: QuantizationSettings, W: jax.ShapeDtypeStruct, H: jax.ShapeDtypeStruct) -> None:
    how = settings.calibration
    match_outputs.lower(W, H, W, damping=how.damping, block_size=how.block_size).compile()


def _like(shape: Shape) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=expert_sharding(shape[0]))
