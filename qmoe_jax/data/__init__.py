"""Text to batches: files -> documents -> token ids -> corrupted examples -> padded arrays."""

from qmoe_jax.data.batches import Batch, make_batches, training_batches
from qmoe_jax.data.errors import DataError
from qmoe_jax.data.examples import Examples, load_examples
from qmoe_jax.data.span_corruption import corrupt
from qmoe_jax.data.text import read_documents
from qmoe_jax.data.vocabulary import EOS, PAD, Vocabulary

__all__ = [
    "EOS",
    "PAD",
    "Batch",
    "DataError",
    "Examples",
    "Vocabulary",
    "corrupt",
    "load_examples",
    "make_batches",
    "read_documents",
    "training_batches",
]
