"""What the GPU backends share: `shared.py` whatever the codec, and a file for each codec."""

from types import ModuleType

from qmoe_jax.kernels.compressed_ragged_dot.gpu import check, dictionary, gap
from qmoe_jax.kernels.compressed_ragged_dot.gpu.shared import (
    EXPERT,
    FIRST,
    RANK,
    SIZE,
    START,
    TABLE,
    Config,
    launches,
    multiply,
    vary_together,
    why_not,
    work,
    zeros,
)

__all__ = [
    "CODECS",
    "EXPERT",
    "FIRST",
    "RANK",
    "SIZE",
    "START",
    "TABLE",
    "Config",
    "check",
    "dictionary",
    "gap",
    "launches",
    "multiply",
    "vary_together",
    "why_not",
    "work",
    "zeros",
]

# Each has
#     streams(rhs) -> int32 [experts, 1 + tables]: where each expert's stream starts, and which tables are its own
#     arrays(rhs): the arrays that kernels take
#     heuristic(tokens, shape (experts, out, in), dtype of lhs) -> Config
CODECS: dict[str, ModuleType] = {
    "dictionary": dictionary,
    "gap": gap,
}
