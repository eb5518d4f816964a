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
# Where each importable package lies in the repository.
FOLDERS = {"qmoe_jax": ROOT / "qmoe_jax", "qmoe_jax.kernels": ROOT / "kernels"}


def package_files() -> dict[str, list[pathlib.Path]]:
    """Python files of each package, by its importable name."""
    found: dict[str, list[pathlib.Path]] = {}
    for name, folder in FOLDERS.items():
        for file in folder.rglob("*.py"):
            package = ".".join([name, *file.parent.relative_to(folder).parts])
            found.setdefault(package, []).append(file)
    return found


@pytest.fixture(scope="module")
def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_setup_cfg_lists_the_packages_that_there_are(setup_cfg):
    listed = setup_cfg["options"]["packages"].split()
    assert len(set(listed)) == len(listed)
    assert sorted(listed) == sorted(package_files())
    for package, files in package_files().items():
        assert "__init__.py" in {file.name for file in files}, f"{package} lacks __init__.py"


def test_the_version_is_said_once_and_alike(setup_cfg):
    assert setup_cfg["metadata"]["version"] == qmoe_jax.__version__


def test_the_kernels_folder_is_imported_as_a_subpackage():
    assert pathlib.Path(qmoe_jax.kernels.__file__).resolve() == ROOT / "kernels" / "__init__.py"


def test_nothing_of_the_checkout_is_importable_by_its_folders_name(tmp_path):
    """transformers, for one, takes a top-level 'kernels' for the distribution of that name."""
    code = "import importlib.util, qmoe_jax; print([importlib.util.find_spec(n) for n in ('kernels', 'experiments')])"
    finished = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(ROOT) not in finished.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """(sdist, wheel), the latter made from the former, as an index would have them; without the C++ part."""
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
    (source / "qmoe_jax" / "kernels").unlink(missing_ok=True)  # Where someone linked it for an editor.
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
    return sdist, wheel


def test_an_sdist_holds_what_a_build_needs_and_the_licence(distributions):
    sdist, _ = distributions
    with tarfile.open(sdist) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    expected = {str(f.relative_to(ROOT)) for files in package_files().values() for f in files}
    expected |= {str(f.relative_to(ROOT)) for f in (ROOT / "kernels/compressed_ragged_dot/csrc").iterdir()}
    expected |= {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "setup.cfg", "setup.py", "qmoe_jax/py.typed"}
    assert expected <= names
    folders = {name.partition("/")[0] for name in names if "/" in name}
    assert folders == {"kernels", "qmoe_jax", "qmoe_jax.egg-info"}


def test_a_wheel_holds_the_package_and_nothing_beside_it(distributions):
    _, wheel = distributions
    names = zipfile.ZipFile(wheel).namelist()
    dist_info = f"qmoe_jax-{qmoe_jax.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"qmoe_jax", dist_info}
    code = [name for name in names if not name.startswith(dist_info)]
    expected = {"/".join([*package.split("."), f.name]) for package, files in package_files().items() for f in files}
    assert set(code) >= expected | {"qmoe_jax/py.typed"}
    assert "qmoe_jax/kernels/__init__.py" in code
    assert any(name.endswith("LICENSE") for name in names)


def test_the_wheel_imports_without_the_checkout(tmp_path):
    """As installed: the packages laid out as the wheel has them, the checkout out of sight."""
    for package, files in package_files().items():
        folder = tmp_path.joinpath(*package.split("."))
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copy(file, folder)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import qmoe_jax, qmoe_jax.kernels, qmoe_jax.experiment; "
        "print(qmoe_jax.__file__, qmoe_jax.kernels.__file__); assert 'kernels' not in sys.modules"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={"JAX_PLATFORMS": "cpu"}
    )
    assert finished.returncode == 0, finished.stderr
    assert all(path.startswith(str(tmp_path)) for path in finished.stdout.split())
