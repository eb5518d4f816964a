"""Whatever a pickle or a manifest holds, it is read or refused in words."""

import json
import pickle
import pickletools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmoe_jax.checkpoints import pickles
from qmoe_jax.checkpoints.compressed import schema

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4) | st.tuples(inner, inner)
    ),
    max_leaves=12,
)
OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]


def refuse(*names):
    raise ValueError(f"refused: {names}")


@given(VALUES, st.integers(2, 5))
def test_plain_values_are_read(value, protocol):
    assert pickles.load(pickle.dumps(value, protocol), refuse, refuse) == value


@given(st.lists(st.sampled_from(OPCODES) | st.binary(max_size=4), max_size=30))
def test_any_program_is_read_or_refused(parts):
    try:
        pickles.load(b"\x80\2" + b"".join(parts) + b".", refuse, refuse)
    except (ValueError, TypeError):
        pass


@given(VALUES, st.binary(max_size=3), st.integers(0, 200))
def test_a_damaged_program_is_read_or_refused(value, junk, at):
    program = pickle.dumps(value, 2)
    try:
        pickles.load(program[:at] + junk + program[at + len(junk) :], refuse, refuse)
    except (ValueError, TypeError):
        pass


FIELDS = ("format_version", "family", "model", "quantization", "codec", "provenance", "layers", "dense")


@given(st.dictionaries(st.sampled_from(FIELDS), VALUES))
def test_any_manifest_is_looked_through(manifest):
    manifest = json.loads(json.dumps(manifest))
    problems = schema.problems(manifest)
    assert all(isinstance(p, str) for p in problems)
    for field in ("model", "codec", "layers", "dense"):
        assert any(p.startswith(f"{field}:") or p.startswith(f"{field}.") for p in problems) or field in manifest


@pytest.mark.parametrize("directory", ["/etc", "../x", "a/../../x", "", ".", "a\0b", 7, None])
def test_a_part_lies_below_the_checkpoint(directory):
    part = {"directory": directory, "sha256": "0" * 64}
    assert any(p.startswith("dense.directory: found") for p in schema.problems({"dense": part}))
