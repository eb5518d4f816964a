"""Samples of weights: another model's differ, the same model's don't, and little is read for them."""

import numpy as np
import pytest
import tiny_model

from qmoe_jax.checkpoints import TARGETS, NativeCheckpoint, conversion, open_checkpoint
from qmoe_jax.checkpoints.samples import changed, digest, of_layers, samples

FIRST, *_, LAST = tiny_model.CONFIG.sparse_layers
EXPERTS = {f"{layer}/mlp/expert/{m}/kernel" for layer in tiny_model.CONFIG.sparse_layers for m in ("wi", "wo")}


def t5x(folder, params):
    return open_checkpoint(tiny_model.write_checkpoint(folder, params))


def one_expert_a_chunk(folder, params):
    """As `convert` writes large models: the first chunk has one expert only."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr("qmoe_jax.checkpoints.t5x.target.CHUNK_BYTES", 1)
        source = t5x(folder / "source", params)
        conversion.run(TARGETS["t5x"](source, folder / "out", conversion.Options()), folder / "out", "")
    found = open_checkpoint(folder / "out")
    assert found.sources(FIRST)["wi"].grid.chunks[0] == 1
    return found


def huggingface(folder, params):
    source = t5x(folder / "source", params)
    conversion.run(TARGETS["huggingface"](source, folder / "out", conversion.Options()), folder / "out", "")
    return open_checkpoint(folder / "out")


@pytest.mark.parametrize("write", [t5x, one_expert_a_chunk, huggingface])
def test_other_weights_have_other_samples(write, tmp_path):
    params = tiny_model.random_params()
    before = samples(write(tmp_path / "before", params))
    assert set(before) == set(params) and None not in before.values()
    assert samples(write(tmp_path / "again", params)) == before
    tuned = params | {name: params[name] + np.float32(1e-3) for name in EXPERTS}
    after = samples(write(tmp_path / "tuned", tuned))
    assert set(changed(before, after)) == EXPERTS and digest(after) != digest(before)
    for expert in (0, 4, 7):  # of 8: the first, the middle, the last
        one = dict(params)
        one[f"{LAST}/mlp/expert/wi/kernel"] = params[f"{LAST}/mlp/expert/wi/kernel"].copy()
        one[f"{LAST}/mlp/expert/wi/kernel"][expert] += 1
        assert changed(before, samples(write(tmp_path / f"{expert}", one))) == [f"{LAST}/mlp/expert/wi/kernel"]


def test_few_bytes_are_read_of_chunks_and_at_any_place_of_the_model(tmp_path, monkeypatch):
    checkpoint = one_expert_a_chunk(tmp_path, tiny_model.random_params())
    expected = samples(checkpoint)
    monkeypatch.setattr(NativeCheckpoint, "read", lambda *_: pytest.fail("a parameter was read"))
    assert samples(open_checkpoint(tmp_path / "out")) == expected
    assert samples(open_checkpoint(f"file://{tmp_path}/out")) == expected  # as from gs://


def test_of_layers_leaves_other_layers_experts_out(tmp_path):
    checkpoint = t5x(tmp_path, tiny_model.random_params())
    found = samples(checkpoint)
    assert set(found) - set(of_layers(found, checkpoint, [FIRST])) == {n for n in EXPERTS if not n.startswith(FIRST)}
    assert of_layers(found, checkpoint, tiny_model.CONFIG.sparse_layers) == found


def test_what_cannot_be_read_is_none(tmp_path):
    checkpoint = t5x(tmp_path, tiny_model.random_params())
    before = samples(checkpoint)
    name = f"{FIRST}/mlp/expert/wi/kernel"
    (chunk,) = tmp_path.rglob(f"target.{name.replace('/', '.')}/0.0.0")
    chunk.unlink()
    assert {n: s for n, s in samples(checkpoint).items() if s != before[n]} == {name: None}
