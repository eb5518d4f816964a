"""Set-up shared by all tests: eight virtual CPU devices, fixtures."""

import atexit
import os
import pathlib
import shutil
import tarfile
import tempfile

# Programs that one process of a test run has compiled, the others, and those that tests start, take as they are.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="qmoe_jax-programs-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest
import tiny_model

jax.config.update("jax_num_cpu_devices", 8)

FIXTURES = pathlib.Path(__file__).resolve().parents[2] / "shared" / "fixtures"


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=3, help="how many runs the test of killed runs kills")


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps():
    """Compiled programs take memory maps. Linux gives a process 65 530, and XLA crashes when they are used up."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 15_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def fixture_path(tmp_path_factory):
    """fixture_path(name) -> path of a fixture; `name.tar.gz` is unpacked once per session.

    Fixtures were written by independent implementations and lie beside the project, not in it.
    """
    unpacked = {}

    def get(name: str) -> pathlib.Path:
        path = FIXTURES / name
        if path.exists():
            return path
        archive = FIXTURES / f"{name}.tar.gz"
        if not archive.exists():
            pytest.skip(f"fixture {name} is not here (looked in ../shared/fixtures beside the checkout)")
        if name not in unpacked:
            target = tmp_path_factory.mktemp(name)
            with tarfile.open(archive) as tar:
                tar.extractall(target, filter="data")
            unpacked[name] = target / name
        return unpacked[name]

    return get


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny model with random weights, its vocabulary and text."""
    return tiny_model.make(tmp_path_factory.mktemp("tiny"))
