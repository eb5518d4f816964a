"""Compiles products for an H100 that isn't there: prints JSON, what the program of each consists of.

    python tests/kernels/compile_for_h100.py BACKEND TOKENS [TOKENS ...]

Needs jax-cuda13-pjrt (XLA's compiler for GPUs; it can lie in a folder on PYTHONPATH).
"""

import collections
import json
import os
import re
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"

import jax
import jax.numpy as jnp
from gpu_cases import abstract_arguments
from jax.experimental import topologies

from qmoe_jax.kernels.compressed_ragged_dot import cuda, pallas

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3350000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 80000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100"
"""
SHAPE = (2048, 2080, 6144)
NO_KERNELS = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant")


def main(backend, *tokens):
    jax.devices()
    # XLA asks whether there is such a function, and calls none: any will do.
    from jaxlib.cpu import _lapack

    some = next(iter(_lapack.registrations().values()))
    jax.ffi.register_ffi_target(cuda.gap.TARGET, some, platform="CUDA")
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    multiply = {"cuda": cuda.multiply, "pallas": pallas.multiply}[backend]
    found = {}
    for n in tokens:
        arguments = abstract_arguments(int(n), SHAPE, jnp.bfloat16, "gap")
        arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments)
        text = jax.jit(multiply).lower(*arguments).compile().as_text()
        entry = text[text.index("ENTRY") :]
        operations = re.findall(r"^ .*? = \S+ ([\w-]+)\(", entry, re.MULTILINE)
        found[n] = collections.Counter(o for o in operations if o not in NO_KERNELS)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
