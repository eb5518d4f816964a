"""A forward pass over all documents at once, one layer in memory at a time: `forward.run` is the loop."""

from qmoe_jax.streaming.buffers import ListBuffer, OwnRows, Rows
from qmoe_jax.streaming.documents import Documents
from qmoe_jax.streaming.experts import ExpertGroup
from qmoe_jax.streaming.forward import Commits, Pass, Quantizer, run
from qmoe_jax.streaming.losses import DocumentLosses
from qmoe_jax.streaming.settings import Settings

__all__ = [
    "Commits",
    "DocumentLosses",
    "Documents",
    "ExpertGroup",
    "ListBuffer",
    "OwnRows",
    "Pass",
    "Quantizer",
    "Rows",
    "Settings",
    "run",
]
