"""Experts over the devices of a mesh: device i of N holds experts i * E/N to (i + 1) * E/N - 1 of every layer.

Every device has its share of the tokens, too. A row goes to its expert's device, through the expert, and back, by two
all-to-alls. These have a fixed size, `slots` rows from each device to each other, so there may be more rows than slots:
then another round follows. The number of rounds is agreed on first, so no row is dropped, whatever the router does:
slots for twice the rows of even routing are one round nearly always, and if all tokens want one device, N/2 rounds of
the same memory. (Slots for the worst case would be one round always, but of N times the rows.)

A device sees the rows of an expert in the order of all tokens, as one device alone would.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qmoe_jax.codecs.experts import CompressedExperts, split

AXIS = "expert"
LEAST_SLOTS = 64  # Up to so many rows cost hardly more than one.


def expert_mesh(devices: int, among: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the first `devices` devices, of all processes or of those given, with the axis 'expert'.

    Raises ValueError if there are fewer.
    """
    found = jax.devices() if among is None else among
    if not 1 <= devices <= len(found):
        raise ValueError(
            f"Experts were to be placed on {devices} devices; there are {len(found)} ({found[0].platform})."
        )
    return Mesh(np.array(found[:devices]), (AXIS,), axis_types=(AxisType.Auto,))


def check_mesh(mesh: Mesh, experts: int) -> None:
    """Raises ValueError unless the devices of the mesh divide the experts."""
    devices = mesh.shape[AXIS]
    if experts % devices:
        raise ValueError(
            f"{experts} experts on {devices} devices: expected a number of devices that divides the experts."
        )


def part_of_mesh(mesh: Mesh, experts: int) -> Mesh:
    """As many devices of the mesh as divide a group of experts."""
    return expert_mesh(math.gcd(mesh.shape[AXIS], experts), mesh.devices.reshape(-1).tolist())


# --- tokens ---------------------------------------------------------------------------------------------------------


def exchange(function: Callable, rows: jax.Array, expert: jax.Array, kernels: Any, mesh: Mesh) -> jax.Array:
    """`function` of every row on the device that has its expert. For use inside `jit`.

    Args:
      function: function(rows, expert, kernels) with a device's own kernels, of `experts` / devices experts that it
        counts from 0. Returns an array like `rows`; rows of expert `experts` / devices are no one's, and ignored.
      rows: [n, width].
      expert: int32 [n], each row's expert.
      kernels: a tree of arrays [experts, ...], or `ShardedExperts`.
      mesh: with the axis 'expert'.

    Returns:
      [n, width].
    """
    devices, (n, _) = mesh.shape[AXIS], rows.shape
    own = jax.tree.leaves(kernels, is_leaf=_is_sharded)[0].shape[0] // devices
    local = -(-n // devices)
    slots = min(local, max(LEAST_SLOTS, 2 * -(-local // devices)))

    def on_each_device(rows, expert, kernels):  # [local, width], [local]
        order = jnp.argsort(expert, stable=True)
        rows, expert = rows[order], expert[order]
        device = expert // own  # Rising; `devices` and above for padding.
        rank = jnp.arange(local) - jnp.searchsorted(device, device)  # Of the rows for the same device.
        most = jnp.max(jnp.where(device < devices, rank, -1)) + 1
        rounds = 1 if slots == local else jax.lax.pmax(-(-most // slots), AXIS)
        kernels = jax.tree.map(lambda k: k.of_this_device() if _is_sharded(k) else k, kernels, is_leaf=_is_sharded)

        def send(x):  # [devices * slots, ...]; slots for device 0 first, slots from device 0 first.
            return jax.lax.all_to_all(x, AXIS, 0, 0, tiled=True)

        def one_round(r, rows):
            now = (device < devices) & (rank // slots == r)
            slot = jnp.where(now, device * slots + rank % slots, devices * slots)
            outgoing = jnp.zeros((devices * slots, rows.shape[1]), rows.dtype).at[slot].set(rows, mode="drop")
            whose = jnp.full(devices * slots, own, jnp.int32).at[slot].set(expert % own, mode="drop")
            results = send(function(send(outgoing), send(whose), kernels))
            return jnp.where(now[:, None], results.at[slot].get(mode="fill", fill_value=0), rows)

        results = jax.lax.fori_loop(0, rounds, one_round, rows)
        return jnp.zeros_like(results).at[order].set(results, unique_indices=True)

    padding = devices * local - n
    rows = jnp.pad(rows, ((0, padding), (0, 0)))
    expert = jnp.pad(expert, (0, padding), constant_values=devices * own)
    run = jax.shard_map(on_each_device, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS))
    return run(rows, expert, kernels)[:n]


def batch_sharding(mesh: Mesh, batch: int) -> NamedSharding:
    """Rows of a batch over the mesh's devices; all of them on each where that doesn't come out even."""
    return NamedSharding(mesh, P(AXIS) if batch % mesh.shape[AXIS] == 0 else P())


def place_batch(arrays: Any, mesh: Mesh | None) -> Any:
    """A tree of arrays [batch, ...] over the devices of the mesh; unchanged without one."""
    return arrays if mesh is None else jax.tree.map(lambda a: jax.device_put(a, batch_sharding(mesh, len(a))), arrays)


def shard_batch(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """x [batch, ...], over the devices of the mesh if there is one: inside `jit`, what is computed from it follows."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, batch_sharding(mesh, x.shape[0]))


# --- kernels --------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ShardedExperts:
    """One matrix [out, in] of all experts of a layer, a part on each device of a mesh.

    Attributes:
      parts: what each device holds: its arrays have a leading axis of devices, its shape is that of one part. Streams
        of different lengths are padded to the longest.
    """

    parts: CompressedExperts

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, out, in), of all devices together."""
        each, rows, columns = self.parts.shape
        return self.parts.levels.shape[0] * each, rows, columns

    def of_this_device(self) -> CompressedExperts:
        """Inside `shard_map`: this device's part."""
        return jax.tree.map(lambda a: a[0], self.parts)


def _is_sharded(kernel: Any) -> bool:
    return isinstance(kernel, ShardedExperts)


def place_experts(kernel: Any, mesh: Mesh | None) -> Any:
    """A kernel with its experts over the devices of a mesh: an array [experts, ...], or `ShardedExperts`.

    Args:
      kernel: [experts, in, out], or `CompressedExperts`; the same on every process.
      mesh: with the axis 'expert'; None: on one device.

    Raises ValueError where the devices don't divide the experts.
    """
    if mesh is None:
        return jax.device_put(kernel)
    check_mesh(mesh, kernel.shape[0])
    if not isinstance(kernel, CompressedExperts):
        kernel = np.asarray(kernel)
        return jax.make_array_from_callback(kernel.shape, NamedSharding(mesh, P(AXIS)), lambda index: kernel[index])
    parts = split(kernel, mesh.shape[AXIS])
    bound = max(part.bound for part in parts)
    parts = [dataclasses.replace(part, bound=bound) for part in parts]
    return ShardedExperts(jax.tree.map(lambda *arrays: _a_part_each(arrays, mesh), *parts))


def _a_part_each(arrays: Sequence[Any], mesh: Mesh) -> jax.Array:
    """[devices, longest, ...] with arrays[i] [n_i, ...], and zeros, on device i."""
    shape = (len(arrays), max(map(len, arrays)), *arrays[0].shape[1:])

    def part(index):
        padded = np.zeros(shape[1:], arrays[0].dtype)
        array = np.asarray(arrays[index[0].start or 0])
        padded[: len(array)] = array
        return padded[None]

    return jax.make_array_from_callback(shape, NamedSharding(mesh, P(AXIS)), part)


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays on every device of the mesh; None: on one device."""
    if mesh is None:
        return jax.device_put(tree)
    sharding = NamedSharding(mesh, P())
    return jax.tree.map(lambda a: jax.make_array_from_callback(a.shape, sharding, lambda index: a[index]), tree)


def place_param(name: str, value: Any, mesh: Mesh | None, is_expert: bool) -> Any:
    """A parameter: experts over the devices of the mesh, anything else on each of them.

    Raises ValueError, naming it, where the devices don't divide the experts.
    """
    try:
        return place_experts(value, mesh) if is_expert else replicate(value, mesh)
    except ValueError as e:
        raise ValueError(f"{name}: {e}") from e
