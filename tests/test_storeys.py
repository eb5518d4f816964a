"""No import runs upwards, and none in a circle."""

import ast
import graphlib
import pathlib

import pytest

import qmoe_jax

ROOT = pathlib.Path(qmoe_jax.__file__).resolve().parent
# From the ground up; what stands in one line may import each other, without circles.
STOREYS = (
    ("version", "errors", "moved"),
    ("files", "resources", "scratch", "processes", "lock", "codecs", "data", "reports"),
    ("kernels",),
    ("models",),
    ("checkpoints",),
    ("streaming",),
    ("quantization",),
    ("compression",),
    ("finetuning",),
    ("api",),
    ("__init__",),
)


def _module(file: pathlib.Path, *folders: str) -> str:
    return ".".join(("qmoe_jax", *folders, *file.with_suffix("").parts)).removesuffix(".__init__")


KERNELS = ROOT / "kernels"  # a link, which rglob doesn't follow
FILES = {_module(p.relative_to(ROOT)): p for p in ROOT.rglob("*.py")}
FILES |= {_module(p.relative_to(KERNELS), "kernels"): p for p in KERNELS.rglob("*.py")}


def imported(module: str) -> set[str]:
    """Modules of the package that a module imports when it is imported."""
    found = set()
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    for node in tree.body:  # Not those within functions, nor for types alone.
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            while name.startswith("qmoe_jax") and name not in FILES:
                name = name.rpartition(".")[0]
            if name.startswith("qmoe_jax"):
                found.add(name)
    return found - {module}


def storey(module: str) -> int:
    part = module.split(".")[1] if "." in module else "__init__"
    return next(i for i, parts in enumerate(STOREYS) if part in parts)


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_run_downwards(module):
    for other in imported(module):
        assert other != "qmoe_jax", "the package's face is for others"
        assert storey(other) <= storey(module), f"{module} imports {other}"


def test_there_is_no_circle():
    # A package stands for what its __init__ imports, unless one of its own modules asks for it.
    graph = {m: {o for o in imported(m) if not m.startswith(f"{o}.")} for m in FILES if m != "qmoe_jax"}
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("folder", ["qmoe_jax", "kernels", "experiments", "configs", "tests"])
def test_no_file_is_long(folder):
    files = sorted((ROOT.parent / folder).rglob("*.py"))
    long = [p for p in files if len(p.read_text(encoding="utf-8").splitlines()) > 500]
    assert files and not long
