"""A family is one folder: nothing else knows what its models look like."""

import pathlib
import re

import pytest

import qmoe_jax
from qmoe_jax.models.families import FAMILIES, PRESETS, family_of, preset

ROOT = pathlib.Path(qmoe_jax.__file__).resolve().parent
# What only a Switch Transformer has, or what only its parameters are called.
WORDS = "|".join(
    (
        r"(?<!is_)encoder(?!_decoder)",
        r"\bdecoder/",
        "decoder_(?:norm|input|target)",
        "/mlp/expert/",
        r"\bwi(?:_[01])?\b",
    )
    + (r"\bwo\b", r"\brelu\b", "sentinel", "span.corruption")
)
OTHERS = ("models/decoder/maxtext.py",)  # where other programs' names are the same words
# These import it by its public names; the others make the registry.
KNOWN = {"__init__.py", "moved.py", "models/families.py", "checkpoints/__init__.py"}


def sources():
    files = [p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*.py")] + [
        f"kernels/{p.relative_to(ROOT / 'kernels').as_posix()}" for p in (ROOT / "kernels").rglob("*.py")
    ]
    return sorted(set(files))


@pytest.mark.parametrize("file", [f for f in sources() if not f.startswith("models/switch/")])
def test_only_its_folder_knows_a_switch_transformer(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert not re.findall(WORDS, text) or file in ("moved.py", *OTHERS)
    if file not in KNOWN:
        assert "models.switch" not in text and "models import switch" not in text


@pytest.mark.parametrize("file", [f for f in sources() if f.startswith("models/")])
def test_models_know_no_checkpoint(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert not re.findall(r"qmoe_jax\.(checkpoints|streaming|quantization|compression|reports|api)\b", text)


@pytest.mark.parametrize("name", PRESETS)
def test_published_architectures_belong_to_a_family(name):
    config = preset(name)
    family = family_of(config)
    assert FAMILIES[family.name] is family
    assert family.Config.from_dict(config.to_dict()) == config
    shapes = family.param_shapes(config)
    for layer in config.sparse_layers:
        for matrix in config.expert.matrices:
            name = family.expert_parameter(layer, matrix)
            assert family.expert_of(name) == (layer, matrix) and shapes[name][0] == config.num_experts
    names = [layer.name for layer in family.streamed(config, "float32").layers if layer.expert]
    assert tuple(names) == config.sparse_layers
