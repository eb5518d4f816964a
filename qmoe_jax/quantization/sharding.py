"""How a group of experts lies on the local devices."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def expert_sharding(experts: int) -> NamedSharding:
    """Experts over local devices, as many on each and at least two: a mesh with the axis 'expert'.

    XLA computes an expert alone differently, to the bit, than several.
    """
    devices = jax.local_devices()
    count = max(n for n in range(1, len(devices) + 1) if experts % n == 0 and (n == 1 or experts // n > 1))
    return NamedSharding(Mesh(np.array(devices[:count]), ("expert",)), PartitionSpec("expert"))
