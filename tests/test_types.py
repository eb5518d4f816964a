"""Public functions say their types, and mypy finds no fault with them."""

import ast
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Launches and kernels, whose arguments `gpu.multiply` describes once for all.
BACKENDS = ("pallas",)


def public_functions(body, prefix=""):
    """(name, definition) of functions and methods that don't begin with an underscore, __init__ included."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef) and (node.name == "__init__" or not node.name.startswith("_")):
            yield prefix + node.name, node


def lacking(function: ast.FunctionDef, is_method: bool) -> list[str]:
    args = function.args
    named = [*args.posonlyargs, *args.args][is_method and not _is_static(function) :]
    named += [*args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]
    found = [a.arg for a in named if a.annotation is None]
    return found if function.returns or function.name in ("__init__", "setup") else [*found, "return"]


def _is_static(function: ast.FunctionDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in function.decorator_list)


def test_public_functions_are_typed():
    untyped = {}
    for folder in ("qmoe_jax", "kernels"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            if file.parent.name in BACKENDS and file.name != "__init__.py":
                continue
            for name, function in public_functions(ast.parse(file.read_text(encoding="utf-8")).body):
                if missing := lacking(function, "." in name):
                    untyped[f"{file.relative_to(ROOT)}:{function.lineno} {name}"] = missing
    assert not untyped, "\n".join(f"{where}: {', '.join(names)}" for where, names in untyped.items())


def test_mypy_finds_no_fault(tmp_path):
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    cache = f"--cache-dir={os.environ.get('MYPY_CACHE_DIR') or tmp_path / 'cache'}"
    command = [sys.executable, "-m", "mypy", "--package=qmoe_jax", cache]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
