"""What is installed: everything under qmoe_jax, and nothing beside it."""

import configparser
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

import qmoe_jax
import qmoe_jax.kernels

ROOT = pathlib.Path(__file__).resolve().parents[1]


def package_files() -> dict[str, set[str]]:
    """Python files of each package, as paths in the checkout, by its importable name."""
    found = {}
    for folder, _, names in os.walk(ROOT / "qmoe_jax", followlinks=True):
        folder = pathlib.Path(folder).relative_to(ROOT)
        if files := {f"{folder.as_posix()}/{name}" for name in names if name.endswith(".py")}:
            found[".".join(folder.parts)] = files
    return found


def kernel_sources(suffix: str = "") -> set[str]:
    """C++ and CUDA files of the kernels, as paths through the link."""
    files = (ROOT / "kernels").glob(f"**/csrc/**/*{suffix}")
    return {f"qmoe_jax/{file.relative_to(ROOT).as_posix()}" for file in files if file.is_file()}


@pytest.fixture(scope="module")
def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_setuptools_finds_the_packages_that_there_are(setup_cfg):
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")
    assert setup_cfg["options"]["packages"] == "find:"
    include = setup_cfg["options.packages.find"]["include"].split()
    code = f"import setuptools; print(*setuptools.find_packages(include={include}))"
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert sorted(finished.stdout.split()) == sorted(package_files())


def test_the_version_is_said_once_and_alike(setup_cfg):
    assert setup_cfg["metadata"]["version"] == "attr: qmoe_jax.version.__version__"


def test_the_kernels_folder_is_imported_as_a_subpackage():
    assert os.readlink(ROOT / "qmoe_jax" / "kernels") == os.path.join("..", "kernels")
    assert pathlib.Path(qmoe_jax.kernels.__file__).resolve() == ROOT / "kernels" / "__init__.py"


def test_nothing_of_the_checkout_is_importable_by_its_folders_name(tmp_path):
    """transformers, for one, takes a top-level 'kernels' for the distribution of that name."""
    code = "import importlib.util, qmoe_jax; print([importlib.util.find_spec(n) for n in ('kernels', 'experiments')])"
    finished = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(ROOT) not in finished.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """(checkout, sdist, wheel), each made from the one before, as an index would have them; without the C++ part."""
    if importlib.util.find_spec("setuptools") is None or importlib.util.find_spec("pip") is None:
        pytest.skip("building a wheel without a network needs pip and setuptools")
    directory = tmp_path_factory.mktemp("distributions")
    # A copy, as setuptools builds inside the tree.
    source = directory / "source"
    source.mkdir()
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("qmoe_jax", "kernels", "experiments", "configs", "tests", "results"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, source / name, ignore=ignored, symlinks=True)
    no_compiler = os.environ | {"CC": "false", "CXX": "false"}  # The C++ part is optional, and slow to build.

    def run(*command, cwd=None):
        command = [sys.executable, *command]
        finished = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=no_compiler)
        assert finished.returncode == 0, finished.stderr

    run("-c", f"from setuptools import build_meta; build_meta.build_sdist({str(directory)!r})", cwd=source)
    (sdist,) = directory.glob("*.tar.gz")
    pip = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q")
    run(*pip, "-w", directory, sdist)
    (wheel,) = directory.glob("*.whl")
    return source, sdist, wheel


def test_an_sdist_holds_what_a_build_needs_and_the_licence(distributions):
    _, sdist, _ = distributions
    with tarfile.open(sdist) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    expected = kernel_sources().union(*package_files().values())
    expected |= {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "setup.cfg", "setup.py", "qmoe_jax/py.typed"}
    assert expected <= names
    folders = {name.partition("/")[0] for name in names if "/" in name}
    assert folders == {"qmoe_jax", "qmoe_jax.egg-info"}


def test_a_wheel_holds_the_package_and_nothing_beside_it(distributions):
    *_, wheel = distributions
    names = zipfile.ZipFile(wheel).namelist()
    dist_info = f"qmoe_jax-{qmoe_jax.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"qmoe_jax", dist_info}
    code = {name for name in names if not name.startswith(dist_info)}
    assert code == {"qmoe_jax/py.typed"}.union(kernel_sources(".cu"), kernel_sources(".cuh"), *package_files().values())
    assert "qmoe_jax/kernels/__init__.py" in code
    assert any(name.endswith("LICENSE") for name in names)


PRODUCT = """
import sys, warnings
import numpy as np
import qmoe_jax
rhs = qmoe_jax.CompressedExperts.from_symbols(np.ones((1, 2, 3), np.uint8), np.tile([-1.0, 1.0], (1, 2, 1)))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = qmoe_jax.kernels.compressed_ragged_dot(np.ones((1, 3), np.float32), rhs, np.array([1], np.int32))
assert (np.asarray(found) == -3).all(), found
assert "kernels" not in sys.modules
print(*(w.message for w in caught))
print(qmoe_jax.__file__, qmoe_jax.kernels.__file__, sep="\\n")
"""


@pytest.mark.parametrize("inside", [False, True], ids=["elsewhere", "in the checkout's root"])
def test_an_installed_wheel_leaves_both_importable(distributions, tmp_path, inside):
    """Elsewhere what is installed, in the checkout's root what lies there: each works without the C++ library."""
    checkout, _, wheel = distributions
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(tmp_path / "site")}
    folder = checkout if inside else tmp_path
    finished = subprocess.run(
        [sys.executable, "-c", PRODUCT], cwd=folder, capture_output=True, text=True, env=environment
    )
    assert finished.returncode == 0, finished.stderr
    warned, package, kernels = finished.stdout.splitlines()
    assert "its library was not built; install qmoe_jax where there is a C++17 compiler" in warned
    expected = (checkout if inside else tmp_path / "site") / "qmoe_jax"
    assert [pathlib.Path(package), pathlib.Path(kernels)] == [
        expected / "__init__.py",
        expected / "kernels/__init__.py",
    ]
