"""A thousand bad inputs over every reader: each is refused in words that name the file, or read, and nothing else.

No signal, no hang, no traceback, no gigabytes, nothing written; what is read is a tree of the architecture, finite.
`bad_cases` says what is done to them, `bad_inputs` how they are tried.
"""

import json
import os
import pathlib
import subprocess
import sys

import bad_cases
import pytest

if not pathlib.Path("/proc/self/status").exists():
    pytest.skip("limits on memory, and threads before a fork, are read off Linux's /proc", allow_module_level=True)

SCRIPT = pathlib.Path(__file__).with_name("bad_inputs.py")
ALL, RANDOM = 1_000, 24  # cases there are, and those of the drawn ones that come with the known faults


def tried(folder, cases: str) -> list[dict]:
    run = subprocess.run(
        [sys.executable, SCRIPT, folder, cases],
        capture_output=True,
        text=True,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # no threads before the forks
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def check(results: list[dict]) -> None:
    bad = [r for r in results if r["result"] not in ("refused", "read")]
    assert not bad, "\n\n".join(f"case {r['number']}, {r['name']}: {r['result']}\n{r['message']}" for r in bad[:5])
    assert sum(r["result"] == "refused" for r in results) > 0.7 * len(results)


def test_known_faults_and_some_more(tmp_path):
    results = tried(tmp_path, f"0:{len(bad_cases.NAMED) + RANDOM}")
    assert len(results) == len(bad_cases.NAMED) + RANDOM
    check(results)
    # Damage that only Orbax's notes have, which nothing needs, is no damage.
    read = {r["name"] for r in results[: len(bad_cases.NAMED)] if r["result"] == "read"}
    assert read <= {name for name in bad_cases.NAMED if name.startswith("_METADATA")}


@pytest.mark.long
def test_a_thousand(tmp_path):
    results = tried(tmp_path, f"0:{ALL}")
    assert len(results) == ALL
    assert len({r["kind"] for r in results}) == len(bad_cases.KINDS)
    check(results)
