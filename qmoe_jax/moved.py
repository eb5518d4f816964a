"""Old names of this package, which work for one more release and say where they went.

To be deleted, with the line that installs it in `__init__.py`, in the release after 0.2.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Sequence
from typing import Any

# Old module: where its names are now, searched in this order.
MODULES: dict[str, tuple[str, ...]] = {
    # For users' own configs: there while a script of experiments/ runs.
    "qmoe_jax.experiment": ("common", "command_line", "qmoe_jax.resources"),
    "qmoe_jax.config": ("qmoe_jax.models.switch.config", "qmoe_jax.models.families"),
    "qmoe_jax.reporting": ("qmoe_jax.reports", "qmoe_jax.files", "qmoe_jax.resources"),
    "qmoe_jax.figures": ("qmoe_jax.reports.figures",),
    "qmoe_jax.html_report": ("qmoe_jax.reports.html",),
    "qmoe_jax.events": ("qmoe_jax.reports.events",),
    "qmoe_jax.models.streaming": ("qmoe_jax.streaming",),
    "qmoe_jax.models.layers": ("qmoe_jax.models.switch.layers",),
    "qmoe_jax.models.moe": ("qmoe_jax.models.switch.routing", "qmoe_jax.models.experts"),
    "qmoe_jax.models.decoding": ("qmoe_jax.models.switch.decoding",),
    "qmoe_jax.checkpoints.architecture": ("qmoe_jax.models.switch.parameters", "qmoe_jax.models.families"),
    "qmoe_jax.checkpoints.base": ("qmoe_jax.checkpoints.checkpoint",),
    "qmoe_jax.checkpoints.compressed_target": ("qmoe_jax.checkpoints.compressed.target",),
    "qmoe_jax.checkpoints.errors": ("qmoe_jax.errors",),
    "qmoe_jax.checkpoints.names": ("qmoe_jax.models.switch.names",),
    "qmoe_jax.checkpoints.native": ("qmoe_jax.checkpoints.t5x.checkpoint",),
    "qmoe_jax.checkpoints.t5x_files": ("qmoe_jax.checkpoints.t5x.files", "qmoe_jax.checkpoints.retry"),
    "qmoe_jax.checkpoints.t5x_index": ("qmoe_jax.checkpoints.t5x.index",),
    "qmoe_jax.checkpoints.t5x_target": ("qmoe_jax.checkpoints.t5x.target",),
    "qmoe_jax.data": ("qmoe_jax.models.switch", "qmoe_jax.errors"),
    "qmoe_jax.data.batches": ("qmoe_jax.models.switch.batches",),
    "qmoe_jax.data.errors": ("qmoe_jax.errors",),
    "qmoe_jax.data.examples": ("qmoe_jax.models.switch.examples",),
    "qmoe_jax.data.span_corruption": ("qmoe_jax.models.switch.span_corruption",),
    "qmoe_jax.data.vocabulary": ("qmoe_jax.models.switch.vocabulary",),
    "qmoe_jax.quantization.planning": ("qmoe_jax.compression.planning",),
    "qmoe_jax.quantization.progress": ("qmoe_jax.compression.progress",),
    "qmoe_jax.quantization.rehearsal": ("qmoe_jax.compression.rehearsal",),
    "qmoe_jax.quantization.pipeline": (
        "qmoe_jax.quantization.settings",
        "qmoe_jax.quantization.methods",
        "qmoe_jax.quantization.quantizer",
        "qmoe_jax.quantization.account",
        "qmoe_jax.quantization.sharding",
        "qmoe_jax.quantization.trials",
    ),
}
# Old names whose new one is called otherwise.
RENAMED = {
    ("qmoe_jax.quantization.pipeline", "compress"): ("qmoe_jax.compression.compress", "compress_examples"),
    ("qmoe_jax.checkpoints.base", "is_expert_kernel"): ("qmoe_jax.models.switch.parameters", "expert_of"),
    ("qmoe_jax.checkpoints.names", "Tensors"): ("qmoe_jax.models.names", "Tensors"),
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes modules of `MODULES` that look their names up where they are now."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_loader(name, self) if name in MODULES else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return types.ModuleType(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        name = module.__name__
        module.__dict__["__getattr__"] = lambda attribute: look_up(name, attribute)


def look_up(module: str, name: str) -> Any:
    """A name of an old module, with a warning. Raises AttributeError if it never had it."""
    places: Sequence[tuple[str, str]] = [(place, name) for place in MODULES[module]]
    if (module, name) in RENAMED:
        places = [RENAMED[module, name]]
    for place, new in places:
        found = getattr(importlib.import_module(place), new, None)
        if found is not None:
            warn(f"{module}.{name}", f"{place}.{new}")
            return found
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def warn(old: str, new: str) -> None:
    """Says where something went."""
    warnings.warn(f"{old} is now {new}; the old name goes in the next release.", DeprecationWarning, stacklevel=3)


def install() -> None:
    """Lets the old names be imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
