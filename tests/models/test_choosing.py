"""Documents chosen for all experts' sake, experts with few tokens, and super experts, on a small decoder."""

import dataclasses
import functools
import json

import hugging_face
import numpy as np
import pytest
from flax import traverse_util
from random_decoders import CONFIGS, random_params
from watch import watched

from qmoe_jax import streaming
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.compression import choosing
from qmoe_jax.compression.compress import compress_examples
from qmoe_jax.quantization.account import LayerAccount
from qmoe_jax.quantization.output_error import OutputError
from qmoe_jax.quantization.settings import QuantizationSettings
from qmoe_jax.quantization.super_experts import super_experts

CONFIG = dataclasses.replace(CONFIGS["olmoe"], num_layers=2)  # of 8 experts, top-3
MEMORY = streaming.Settings(experts_per_group=4)
LAYER, SUPER = "model/layers_1", 5


def texts(number, seed=5, ids=CONFIG.vocab_size):
    """Documents of so many token ids each, as documents are of few subjects."""
    rng = np.random.RandomState(seed)
    subjects = [rng.choice(CONFIG.vocab_size, ids, replace=False) for _ in range(number)]
    return [(rng.choice(subject, rng.randint(6, 14)).astype(np.int32),) for subject in subjects]


def checkpoint(**scaled):
    """With an expert's last matrix, by layer/expert, multiplied."""
    params = traverse_util.flatten_dict(random_params(CONFIG), sep="/")
    for where, factor in scaled.items():
        layer, _, e = where.rpartition("/")
        name = f"{layer}/mlp/experts/down_proj/kernel"
        params[name] = params[name].at[int(e)].multiply(factor)
    return hugging_face.InMemory(CONFIG, traverse_util.unflatten_dict(params, sep="/"))


# --- Documents --------------------------------------------------------------------------------------------------------


def test_greedy_takes_what_raises_the_objective_most():
    rng = np.random.RandomState(0)
    tokens = rng.poisson(0.4, (40, 12)) * rng.randint(1, 5, (40, 1)) + (np.arange(12) == 3)
    covered, expected = np.zeros(12), []
    for _ in range(15):
        gains = np.sum(1 / (1 + covered) - 1 / (1 + covered + tokens), axis=1) / tokens.sum(1)
        gains[expected] = -1
        expected.append(int(gains.argmax()))
        covered += tokens[expected[-1]]
    assert choosing.choose(tokens, 15) == sorted(expected)
    assert choosing.choose(tokens, 40) == list(range(40))


def test_an_expert_that_only_one_document_reaches_gets_it():
    tokens = np.array([[5, 5, 0]] * 6 + [[5, 5, 1]] + [[5, 5, 0]] * 6)
    assert 6 in choosing.choose(tokens, 1)


def test_looking_counts_what_routers_choose_and_the_largest_outputs():
    source, documents = checkpoint(), texts(9)
    ends, expected, peaks = np.cumsum([len(t) - 1 for (t,) in documents]), {}, {}

    def count(group):
        for e, rows in zip(range(group.start, group.stop), group.tokens, strict=True):
            for row in rows:
                key = group.layer, int(np.searchsorted(ends, row, side="right")), e
                expected[key] = expected.get(key, 0) + 1
            gate, up, down = (np.asarray(group.kernels[m][e - group.start], np.float64) for m in group.expert.matrices)
            X = np.asarray(group.inputs[rows], np.float64)
            hidden = X @ gate / (1 + np.exp(-(X @ gate))) * (X @ up)
            peaks[group.layer, e] = np.abs(hidden @ down).max(initial=0)
        return group.kernels

    watched(source, documents, MEMORY._replace(round_weights=True), count)
    seen = choosing.look(source, documents, MEMORY)
    found = {(layer, *map(int, at)): int(n[tuple(at)]) for layer, n in seen.tokens.items() for at in np.argwhere(n)}
    assert found == expected
    for (layer, e), peak in peaks.items():
        assert seen.peaks[layer][e] == pytest.approx(peak, rel=1e-4)
    # Routers of the first layer choose the same without experts.
    without = choosing.look(source, documents, MEMORY, experts=False)
    np.testing.assert_array_equal(without.tokens["model/layers_0"], seen.tokens["model/layers_0"])
    assert all(n.sum() == 3 * ends[-1] for n in without.tokens.values())


def test_chosen_documents_reach_experts_that_the_first_ones_do_not():
    source, documents = checkpoint(), texts(60, ids=1)
    tokens = np.concatenate(list(choosing.look(source, documents, MEMORY).tokens.values()), axis=1)
    where = {id(d): i for i, d in enumerate(documents)}
    without = {"in order": np.sum(tokens[:3].sum(0) == 0)}
    for by in choosing.BY:
        chosen = [where[id(d)] for d in choosing.choose_examples(source, documents, 3, by, MEMORY)]
        assert chosen == sorted(set(chosen)) and len(chosen) == 3
        without[by] = np.sum(tokens[chosen].sum(0) == 0)
    assert without["in order"] > without["routers"] >= without["routing"], without
    with pytest.raises(ValueError, match="candidates: found 60, expected at least the 61"):
        choosing.choose_examples(source, documents, 61, "routing", MEMORY)
    with pytest.raises(ValueError, match="choose_by: found 'x', expected one of routers, routing"):
        choosing.choose_examples(source, documents, 6, "x", MEMORY)


# --- Few tokens -------------------------------------------------------------------------------------------------------


def test_experts_with_few_tokens_are_named_and_none_is_left_out():
    """As many tokens as the family wants, 512, no expert has here; of one token most have none at all."""
    calibration = [(np.array([3, 7], np.int32),)]
    compress = functools.partial(compress_examples, checkpoint(), None, calibration, texts(2), memory=MEMORY)
    report = compress(quantization=QuantizationSettings())
    assert (report["min_tokens"], report["experts_starved"]) == (512, 16)
    without = []
    for layer in report["layers"].values():
        assert layer["starved"] == {str(e): n for e, n in enumerate(layer["tokens_per_expert"])}
        without += [e for e, n in layer["starved"].items() if n == 0]
        assert all("a sample of the layer's stood for them" in why for why in layer["fallback"].values())
    assert len(without) == report["experts_fallback"] == 10
    report = compress(quantization=QuantizationSettings(min_tokens=0))
    assert report["experts_starved"] == 0
    assert {why for layer in report["layers"].values() for why in layer["fallback"].values()} == {
        "no calibration tokens"
    }


# --- Super experts ----------------------------------------------------------------------------------------------------


def test_the_papers_rule():
    peaks = {"a": dict(enumerate(np.linspace(1, 2, 300))), "b": {0: 500.0, 1: 49.0, 2: 60.0, 3: 1.5}}
    found = super_experts(peaks)
    assert [(f["layer"], f["expert"], f["peak"]) for f in found] == [("b", 0, 500.0), ("b", 2, 60.0)]
    assert found[0]["times_median"] == pytest.approx(500 / 1.5, rel=0.01)
    assert super_experts({}) == super_experts({"a": {}}) == []


def test_a_super_expert_is_found_in_the_pass_that_quantizes_and_kept_at_a_higher_rate(monkeypatch):
    source = checkpoint(**{f"{LAYER}/{SUPER}": 6.0})
    settings = QuantizationSettings(method="rd", lagrangian=5.0)
    compress = functools.partial(
        compress_examples, source, None, texts(20), texts(6, seed=6), memory=MEMORY, codec="gap"
    )
    stored = {}

    def keep(name):
        made = CompressedExperts.from_symbols

        def spy(symbols, levels, *how):
            stored.setdefault(name, []).append((np.array(symbols), np.array(levels)))
            return made(symbols, levels, *how)

        monkeypatch.setattr("qmoe_jax.quantization.account.CompressedExperts.from_symbols", spy)

    keep("as others")
    plain = compress(quantization=settings)
    monkeypatch.undo()
    keep("more")
    report = compress(quantization=settings.replace(super_weight=1000.0))
    for of in (plain, report):
        first, *_ = of["super_experts"]
        assert (first["layer"], first["expert"]) == (LAYER, SUPER) and first["times_median"] > 3
        assert max(of["layers"][LAYER]["peak_per_expert"]) == first["peak"]
    # Nothing else differs: it is in the last layer.
    more = 0
    for number, (before, after) in enumerate(zip(stored["as others"], stored["more"], strict=True)):
        layer, group = divmod(number // 3, 2)
        for e in range(4):
            same = all(np.array_equal(a[e], b[e]) for a, b in zip(before, after, strict=True))
            if (f"model/layers_{layer}", 4 * group + e) == (LAYER, SUPER):
                assert np.count_nonzero(after[0][e]) > np.count_nonzero(before[0][e])
                more += 1
            else:
                assert same
    assert more == 3
    error = [of["layers"][LAYER]["output_error_per_expert"][SUPER] for of in (plain, report)]
    assert error[1] < 0.7 * error[0]


def test_accounts_go_through_json():
    error = OutputError(np.zeros(2), np.ones(2))
    account = LayerAccount({0: 1, 1: 5}, {0: "x"}, {}, {0: 1}, {0: 0.1, 1: 2.5}, 0.5, 1.0, 10, None, error)
    again = LayerAccount.from_json(json.loads(json.dumps(account.to_json())))
    assert again._replace(output_error=error) == account


def test_settings_of_the_switch():
    with pytest.raises(ValueError, match="super_weight: found 0.0"):
        QuantizationSettings(method="rd", super_weight=0.0)
    with pytest.raises(ValueError, match="super_weight.*only method 'rd'"):
        QuantizationSettings(super_weight=2.0)
    with pytest.raises(ValueError, match="min_tokens: found -1"):
        QuantizationSettings(min_tokens=-1)
