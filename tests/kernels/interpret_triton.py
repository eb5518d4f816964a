"""Runs the Triton kernels in Triton's interpreter, in a process of its own: `python interpret_triton.py results.npz`.

The interpreter wants tensors of torch; `Tensor` has as much of one as it looks at.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # decides what @triton.jit does

import functools

import jax
import jax.numpy as jnp
import numpy as np
import triton.language as tl
from gpu_cases import CASES, RUNS, WAYS, example
from triton.runtime.interpreter import InterpreterBuilder

from qmoe_jax.kernels.compressed_ragged_dot import gpu
from qmoe_jax.kernels.compressed_ragged_dot.triton import dictionary, gap, shared

MODULES = {"dictionary": dictionary, "gap": gap}


class Tensor:
    """A NumPy array, written in place. bfloat16 is what Triton takes the bits in uint16 for."""

    def __init__(self, array):
        self.dtype = tl.bfloat16 if array.dtype == jnp.bfloat16 else getattr(tl, array.dtype.name)
        self.array = array.view(np.uint16) if array.dtype == jnp.bfloat16 else array
        self.shape = self.array.shape

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def new_empty(self, *_, **__):
        return self

    def copy_(self, other):
        assert other.array is self.array

    def set_(self, *_):
        pass

    def storage_offset(self):
        return 0

    def size(self):
        return self.shape

    def stride(self):
        return tuple(bytes // self.array.itemsize for bytes in self.array.strides)


def dot(builder, a, b, accumulator, *options):
    """The interpreter's product, which takes the bits of bfloat16 for integers, with its operands in float32."""
    a, b = (builder.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return create_dot(builder, a, b, accumulator, *options)


create_dot = InterpreterBuilder.create_dot
InterpreterBuilder.create_dot = dot


def launch(kernel, *inputs, out_shape, grid, input_output_aliases=None, num_warps, num_stages, **constants):
    """Takes what `jax_triton.triton_call` takes."""

    def run(*inputs):
        inputs = [np.array(array) for array in inputs]
        out = np.full(out_shape.shape, np.nan, out_shape.dtype)  # whoever reads what was not written sees it
        for i in input_output_aliases or {}:
            out = inputs[i]
        kernel[grid](*map(Tensor, inputs), Tensor(out), **constants)
        return out

    return jax.pure_callback(run, out_shape, *inputs)


def main(path):
    results = {}
    for codec, name, way, dtype in RUNS:
        tokens, group_sizes, out, width, zeros = CASES[name]
        lhs, rhs, _ = example(tokens, 3, out, width, zeros, codec=codec)
        kernels = MODULES[rhs.codec]
        functions = kernels.multiply_few, kernels.decode, shared.multiply_dense
        launches = {f.__name__: functools.partial(f, launch) for f in functions}
        sizes, config = jnp.array(group_sizes), WAYS[way]
        found = gpu.multiply(jnp.asarray(lhs, dtype), rhs, sizes, config, codec=gpu.CODECS[rhs.codec], **launches)
        results[f"{codec}/{name}/{way}/{dtype}"] = np.asarray(found, np.float32)
    np.savez(path, **results)


if __name__ == "__main__":
    main(sys.argv[1])
