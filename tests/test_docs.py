"""What docs/ promises: the reader in formats.md reads what is written; links lead somewhere."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

from qmoe_jax.codecs import gap_codes
from qmoe_jax.codecs.experts import CompressedExperts

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def reader():
    """The functions of the page's Python blocks."""
    page = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "formats.md", "exec"), namespace)
    return namespace


@pytest.mark.parametrize(
    ("codec", "num_levels"),
    [("gap", 2), ("gap", 3), ("gap", 6), ("gap", 9), ("dictionary", 2), ("nibbles", 15)],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("zeros", [0.3, 0.885, 0.995, 1.0])
def test_the_reader_of_the_documentation_reads_every_weight(codec, num_levels, zeros, reader):
    rng = np.random.default_rng(0)
    shape = (2, 37, 41)
    rest = (1 - zeros) / num_levels
    symbols = rng.choice(num_levels + 1, shape, p=[zeros, *[rest] * num_levels]).astype(np.uint8)
    levels = np.sort(rng.standard_normal((2, 37, num_levels)).astype(jnp.bfloat16), axis=-1)
    levels[0, 3] = 0  # a row without any
    stored = CompressedExperts.from_symbols(symbols, levels, codec).stored()
    values = np.concatenate([np.zeros((2, 37, 1)), levels.astype(np.float32)], axis=-1)
    expected = np.take_along_axis(values, symbols.astype(int), axis=-1)
    np.testing.assert_array_equal(reader[f"read_{codec}"](stored, shape), expected)


@pytest.mark.parametrize("classes, shape", [(4, (2, 130, 64)), (2, (1, 70, 96))])
def test_the_reader_of_the_documentation_knows_classes_of_columns(classes, shape, reader):
    rng = np.random.default_rng(0)
    symbols = (rng.integers(1, 3, shape) * (rng.random(shape) > np.linspace(0.4, 0.99, shape[2]))).astype(np.uint8)
    levels = np.tile([-1.0, 2.0], (*shape[:2], 1))
    stored = CompressedExperts.from_symbols(symbols, levels, "gap", classes).stored()
    assert stored["parameters"].shape == (shape[0], classes)
    np.testing.assert_array_equal(reader["read_gap"](stored, shape), np.array([0, -1, 2])[symbols])


def test_the_reader_of_the_documentation_knows_levels_of_a_ladder(reader):
    rng = np.random.default_rng(0)
    scale = np.float32(rng.integers(4, 8, (1, 40, 1)) * 2.0 ** rng.integers(-9, -5, (1, 40, 1)))
    levels = (scale * np.float32([-1, -0.61, -0.2, 0.33, 0.7])).astype(jnp.bfloat16)
    symbols = rng.integers(0, 6, (1, 40, 50)).astype(np.uint8)
    stored = CompressedExperts.from_symbols(symbols, levels, "gap").stored()
    assert stored["level_formats"][0, 4] == 128 + 5
    values = np.concatenate([np.zeros((1, 40, 1)), levels.astype(np.float32)], axis=-1)
    expected = np.take_along_axis(values, symbols.astype(int), axis=-1)
    np.testing.assert_array_equal(reader["read_gap"](stored, symbols.shape), expected)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("unused", [0, 0.5, 0.9])
def test_the_reader_of_the_documentation_knows_rice_codes(sign, unused, reader):
    rng = np.random.default_rng(0)
    levels = np.exp(0.2 * rng.standard_normal((2, 80, 2))) * [-1, sign]
    levels[0, 5] = 1, 2  # so that signs take bits
    levels = np.sort(np.where(rng.random((2, 80, 1)) < unused, 0, levels).astype(jnp.bfloat16), axis=-1)
    symbols = rng.integers(0, 3, (2, 80, 20)).astype(np.uint8)
    stored = CompressedExperts.from_symbols(symbols, levels, "gap").stored()
    assert (stored["level_formats"][:, 3] >= 4).all()
    values = np.concatenate([np.zeros((2, 80, 1)), levels.astype(np.float32)], axis=-1)
    expected = np.take_along_axis(values, symbols.astype(int), axis=-1)
    np.testing.assert_array_equal(reader["read_gap"](stored, symbols.shape), expected)


@pytest.mark.parametrize(("num_levels", "number"), [(4, 0), (4, 97), (5, 40), (5, 152), (9, 255), (14, 61)])
def test_codes_are_those_of_the_documentation(num_levels, number, reader):
    code = gap_codes.codes(num_levels)[number]
    words = [format(w, f"0{n}b")[::-1] for w, n in zip(code.words.tolist(), code.lengths.tolist(), strict=True)]
    assert (code.run, {word: token for token, word in enumerate(words)}) == reader["code"](number, num_levels)


@pytest.mark.parametrize("page", sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/*.md")))
def test_links_and_paths_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert (ROOT / page).parent.joinpath(link).exists(), link
    for path in re.findall(r"`((?:qmoe_jax|kernels|experiments|configs|tests|results)/[\w/.]+\.\w+)`", text):
        assert (ROOT / path).exists(), path
