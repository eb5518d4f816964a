"""Text files -> documents. What an example of a document is, a family of models says (`qmoe_jax.models`)."""

from typing import Any

from qmoe_jax import moved
from qmoe_jax.data.text import find_files, read_documents

__all__ = ["find_files", "read_documents"]


def __getattr__(name: str) -> Any:
    return moved.look_up(__name__, name)
