"""What people get to read: progress and tables here; figures, the page and TensorBoard events in files of their own."""

from qmoe_jax.reports.tables import (
    COMPRESSION_HEADER,
    comparison_rows,
    compression_row,
    method_title,
    super_experts,
    table,
)
from qmoe_jax.reports.terminal import progress, say

__all__ = [
    "COMPRESSION_HEADER",
    "comparison_rows",
    "compression_row",
    "method_title",
    "progress",
    "say",
    "super_experts",
    "table",
]
