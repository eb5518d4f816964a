"""TensorBoard events, read back record by record."""

import json
import struct

import pytest

from qmoe_jax import events


def read(directory):
    """{name: [(step, value)]} of the one events file in the directory."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    (file,) = directory.iterdir()
    content, found = file.read_bytes(), {}
    while content:  # TFRecord: length, its checksum, the event, its checksum.
        (length,) = struct.unpack("<Q", content[:8])
        event = event_pb2.Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def layer(error, tokens, fallback):
    rates = {"bits_per_weight": None, "entropy_per_weight": 0.5, "zeros": 0.875}
    return rates | {"output_error": error, "tokens_per_expert": tokens, "fallback": fallback}


REPORT = {
    "layers": {"encoder/layers_1": layer(0.25, [3, 9], {}), "decoder/layers_1": layer(0.5, [4, 0], {"1": "why"})},
    "loss": 2.5,
    "loss_paper": 2.75,
    "zeros": 0.875,
    "bits_per_weight": None,
    "compression_experts": None,
    "compression_model": None,
    "baselines": {"bfloat16": {"loss": 2.25}},
}


def test_a_compression_is_read_back(tmp_path):
    for _ in range(2):  # The second takes the first one's place.
        events.write_compression(json.loads(json.dumps(REPORT)), tmp_path)
        assert read(tmp_path) == {
            "layer/output_error": [(0, 0.25), (1, 0.5)],
            "layer/entropy_per_weight": [(0, 0.5), (1, 0.5)],
            "layer/zeros": [(0, 0.875), (1, 0.875)],
            "layer/fewest_tokens": [(0, 3), (1, 0)],
            "layer/fell_back": [(0, 0), (1, 1)],
            "model/loss": [(0, 2.5)],
            "model/loss_paper": [(0, 2.75)],
            "model/zeros": [(0, 0.875)],
            "model/loss_of_bfloat16": [(0, 2.25)],
        }


def test_what_was_written_before_an_error_can_be_read(tmp_path):
    with pytest.raises(KeyError), events.events(tmp_path) as write:
        write(7, {"loss": 1.5, "balance": None})
        raise KeyError
    assert read(tmp_path) == {"loss": [(7, 1.5)]}


def test_without_tensorboardx_a_line_says_so(tmp_path, monkeypatch, capsys):
    find_spec = events.importlib.util.find_spec
    monkeypatch.setattr(
        events.importlib.util, "find_spec", lambda name: None if name == "tensorboardX" else find_spec(name)
    )
    events.write_compression(REPORT, tmp_path / "events")
    assert not (tmp_path / "events").exists()
    (line,) = capsys.readouterr().out.splitlines()
    assert "qmoe_jax[tensorboard]" in line
