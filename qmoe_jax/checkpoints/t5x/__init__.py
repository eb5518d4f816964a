"""Native T5X checkpoints: read chunk by chunk, and written."""

from qmoe_jax.checkpoints.t5x.checkpoint import LAYOUT, NativeCheckpoint
from qmoe_jax.checkpoints.t5x.store import T5XStore, is_t5x, open_t5x
from qmoe_jax.checkpoints.t5x.writing import ArrayWriter, index_file, placeholder, t5x_chunks, write_t5x

__all__ = [
    "LAYOUT",
    "ArrayWriter",
    "NativeCheckpoint",
    "T5XStore",
    "index_file",
    "is_t5x",
    "open_t5x",
    "placeholder",
    "t5x_chunks",
    "write_t5x",
]
