"""Kernels know codecs and nothing else of the package; codecs know no kernels."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def imports(folder: pathlib.Path) -> dict[str, set[str]]:
    """What each file under a folder imports of qmoe_jax, by full name."""
    found = {}
    for file in sorted(folder.rglob("*.py")):
        names = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
        found[str(file.relative_to(ROOT))] = {name for name in names if name.split(".")[0] == "qmoe_jax"}
    return found


@pytest.mark.parametrize(
    "folder, allowed", [("kernels", ("qmoe_jax.codecs", "qmoe_jax.kernels")), ("qmoe_jax/codecs", ("qmoe_jax.codecs",))]
)
def test_only_what_lies_below_is_imported(folder, allowed):
    found = imports(ROOT / folder)
    assert any(found.values())
    above = {file: {name for name in names if not name.startswith(allowed)} for file, names in found.items()}
    assert not {file: names for file, names in above.items() if names}
