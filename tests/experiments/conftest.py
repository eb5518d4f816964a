"""Scripts of experiments/ run in the tests' own process, where `common` is found as it is beside them."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "experiments"))

from as_users import compress, damaged, elsewhere, run  # noqa: F401, fixtures
