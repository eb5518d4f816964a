"""Compression of a whole model, against the paper's recipe followed step by step in float64 NumPy."""

import collections
import dataclasses

import jax
import numpy as np
import pytest
import tiny_model
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from models import numpy_switch
from models.random_models import padded
from tiny_model import NUM_CALIBRATION, NUM_VALIDATION, bfloat16, random_params

import qmoe_jax
from qmoe_jax import streaming
from qmoe_jax.checkpoints import TARGETS, CheckpointError, conversion, open_checkpoint
from qmoe_jax.codecs import dictionary
from qmoe_jax.compression.compress import compress_examples
from qmoe_jax.models.switch import Examples, Vocabulary, load_examples
from qmoe_jax.quantization import gptq, output_error, quantizer
from qmoe_jax.quantization.gptq import round_to_nearest
from qmoe_jax.quantization.settings import QuantizationSettings

MEMORY = streaming.Settings(tokens_per_batch=512, tokens_per_expert_call=64, experts_per_group=4, commit_share=1.0)
TOP_2 = dataclasses.replace(tiny_model.CONFIG, top_k=2)
GATED = dataclasses.replace(tiny_model.CONFIG, gated=True, tied=False)
STARVED = "encoder/layers_1"  # where expert 3 of `starved_params` gets no tokens


@dataclasses.dataclass
class Documents:
    vocabulary: Vocabulary
    calibration: Examples
    validation: Examples

    @property
    def pairs(self):
        return [*self.calibration.pairs, *self.validation.pairs]


@pytest.fixture(scope="module")
def documents(tiny):
    vocabulary = Vocabulary.load(tiny.vocabulary)
    return Documents(
        vocabulary,
        load_examples(tiny.calibration, vocabulary, NUM_CALIBRATION),
        load_examples(tiny.validation, vocabulary, NUM_VALIDATION),
    )


def run(checkpoint, documents, settings=None, memory=MEMORY, output=None, **kwargs):
    settings = settings or QuantizationSettings()
    return compress_examples(
        checkpoint,
        documents.vocabulary,
        documents.calibration,
        documents.validation,
        settings,
        memory,
        output=None if output is None else str(output),
        **kwargs,
    )


def stored(path, layer):
    """The compressed matrices of a layer."""
    ((_, _, experts),) = open_checkpoint(path).experts(layer)
    return experts


def starved_params():
    """Expert 3 of one layer has router logit 0, and of experts 0 and 1 one has a larger one, whatever the token."""
    params = random_params()
    router = params[f"{STARVED}/mlp/router/router_weights/w/kernel"]
    router[:, 1] = -router[:, 0]
    router[:, 3] = 0
    return params


# --- The recipe in NumPy ---------------------------------------------------------------------------------------------


def layer_inputs(config, params, compressed, pairs, monkeypatch):
    """What arrives at each sparse layer when all earlier ones are quantized, and the losses at the end.

    Returns ({layer: (h [tokens, d_model], chosen [tokens, top_k], p [tokens, experts])}, losses [documents]); tokens
    lie in document order.
    """
    params = dict(params)
    for layer in config.sparse_layers:
        for matrix, experts in stored(compressed, layer).items():
            params[f"{layer}/mlp/expert/{matrix}/kernel"] = np.asarray(experts.to_dense()).swapaxes(1, 2)
    layers = iter(config.sparse_layers)
    encoder, decoder, targets = padded(pairs)
    real = {"encoder": encoder > 0, "decoder": targets > 0}
    found = {}
    moe = numpy_switch.moe

    def spy(x, params, *args):
        layer = next(layers)
        h = x[real[layer.partition("/")[0]]]
        p = numpy_switch.softmax(h @ params["router"]["router_weights"]["w"]["kernel"])
        found[layer] = h, np.argsort(-p, axis=-1, kind="stable")[:, : config.top_k], p
        return moe(x, params, *args)

    monkeypatch.setattr(numpy_switch, "moe", spy)
    nested = traverse_util.unflatten_dict(params, sep="/")
    _, logits = numpy_switch.forward(nested, config, encoder, decoder, targets)
    return found, numpy_switch.cross_entropy(logits, targets)


def calibrates(stack, documents, mask_special=True):
    """bool [tokens], in document order: tokens of calibration documents that aren't special (section 3.3)."""
    first_sentinel = documents.vocabulary.size - 100
    flags = []
    for i, (encoder, decoder) in enumerate(documents.pairs):
        # In the decoder the token before a sentinel is special: it predicts one.
        tokens = encoder if stack == "encoder" else decoder[1:]
        flags += [i < NUM_CALIBRATION and not (mask_special and t >= first_sentinel) for t in tokens.tolist()]
    return np.array(flags)


def is_validation(stack, documents):
    """bool [tokens], in document order."""
    lengths = [len(e) if stack == "encoder" else len(d) - 1 for e, d in documents.pairs]
    return np.repeat(np.arange(len(lengths)) >= NUM_CALIBRATION, lengths)


def hidden_units(expert, x):
    """Matrices [out, in] by name, x [tokens, in] -> [tokens, d_ff]."""
    u, *up = (x @ W.T for matrix, W in expert.items() if matrix != "wo")
    if not up:
        return np.maximum(u, 0)
    return 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3))) * up[0]


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (tiny_model.CONFIG, QuantizationSettings()),
        (TOP_2, QuantizationSettings(token_cap=0.75, damping=0.02)),
        (GATED, QuantizationSettings(mask_special_tokens=False)),
        # One thing at a time.
        pytest.param(tiny_model.CONFIG, QuantizationSettings(mask_special_tokens=False), marks=pytest.mark.long),
        pytest.param(tiny_model.CONFIG, QuantizationSettings(token_cap=0.5, damping=0.02), marks=pytest.mark.long),
        pytest.param(TOP_2, QuantizationSettings(token_cap=1.5), marks=pytest.mark.long),
        pytest.param(GATED, QuantizationSettings(), marks=pytest.mark.long),
    ],
    ids=[
        "default",
        "top-2, few tokens per expert",
        "gated, special tokens calibrate too",
        "special tokens calibrate too",
        "few tokens per expert",
        "top-2",
        "gated",
    ],
)
def test_every_layer_is_gptq_under_its_experts_own_calibration_tokens(
    config, settings, documents, tmp_path, monkeypatch
):
    monkeypatch.setattr(output_error, "TOKENS_PER_EXPERT", 1_000)  # All.
    params = random_params(config)
    top_k = {"top_k": config.top_k}
    checkpoint = open_checkpoint(tiny_model.write_checkpoint(tmp_path / "model", params), **top_k)
    report = run(checkpoint, documents, settings, output=tmp_path / "out")
    params = {name: bfloat16(value).astype(np.float64) for name, value in params.items()}
    inputs, losses = layer_inputs(config, params, tmp_path / "out", documents.pairs, monkeypatch)

    differing, total, smaller = 0, 0, collections.Counter()
    for layer in config.sparse_layers:
        h, chosen, p = inputs[layer]
        calibrating = calibrates(layer.partition("/")[0], documents, settings.mask_special_tokens)
        validating = is_validation(layer.partition("/")[0], documents)
        error_and_signal = np.zeros(2)
        cap = int(np.ceil(settings.token_cap * calibrating.sum() / config.num_experts))
        kernels = {m: params[f"{layer}/mlp/expert/{m}/kernel"] for m in config.expert_matrices}
        experts = stored(tmp_path / "out", layer)
        for e in range(config.num_experts):
            tokens = np.flatnonzero((chosen == e).any(1) & calibrating)[:cap]
            assert report["layers"][layer]["tokens_per_expert"][e] == len(tokens)
            original = {m: kernel[e].T for m, kernel in kernels.items()}
            X = {"wi": h[tokens], "wo": hidden_units(original, h[tokens])}
            for matrix, kernel in kernels.items():
                x = X["wo" if matrix == "wo" else "wi"]
                W = kernel[e].T.astype(np.float32)[None]
                H = (2 / len(tokens) * x.T @ x).astype(np.float32)[None]
                expected = gptq(W, H, bits=settings.bits, block_size=settings.block_size, damping=settings.damping).Q[0]
                found = np.asarray(experts[matrix].expert(e))
                differing += (found != np.asarray(expected)).sum()
                total += found.size
                rounded = np.asarray(round_to_nearest(W, bits=settings.bits).Q[0])
                errors = [np.square(x @ (W[0] - Q).T).sum() for Q in (found, rounded)]
                smaller[errors[0] < errors[1]] += 1
            measured = (chosen == e).any(1) & validating
            quantized = {m: np.asarray(experts[m].expert(e), np.float64) for m in kernels}
            y, approximate = (hidden_units(W, h[measured]) @ W["wo"].T for W in (original, quantized))
            sums = [np.sum((p[measured, e, None] * v) ** 2) for v in (y - approximate, y)]
            relative = report["layers"][layer]["output_error_per_expert"][e]
            assert relative == (pytest.approx(sums[0] / sums[1], rel=1e-4) if measured.any() else None)
            error_and_signal += sums
        relative = error_and_signal[0] / error_and_signal[1]
        assert report["layers"][layer]["output_error"] == pytest.approx(relative, rel=1e-4)
    assert differing <= 0.002 * total  # Where float32 rounds a tie the other way.
    # That is what GPTQ is for; with a handful of tokens, whose Hessian is mostly dampening, it may miss.
    assert smaller[True] > 0.9 * smaller.total()

    # Validation documents went through the same quantized experts.
    losses = losses[NUM_CALIBRATION:]
    tokens = np.array([len(d) - 1 for _, d in documents.validation.pairs])
    assert report["loss"] == pytest.approx(losses.sum() / tokens.sum(), abs=2e-5)
    weight = tokens + 1
    assert report["loss_paper"] == pytest.approx((weight * losses / tokens).sum() / weight.sum(), abs=2e-5)
    assert (report["num_documents"], report["num_tokens"]) == (NUM_VALIDATION, tokens.sum())


# --- Accounts --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compressed(tiny, documents, tmp_path_factory):
    """(report, directory) of the tiny model."""
    output = tmp_path_factory.mktemp("compressed") / "out"
    return run(open_checkpoint(tiny.checkpoint), documents, output=output, codec="dictionary"), output


def test_an_expert_without_tokens_falls_back_to_rounding_and_is_named(documents, tmp_path):
    params = starved_params()
    checkpoint = open_checkpoint(tiny_model.write_checkpoint(tmp_path / "model", params))
    report = run(checkpoint, documents, output=tmp_path / "out")
    assert report["experts_total"] == 24
    assert report["experts_fallback"] == 1
    assert report["experts_quantized"] == 23
    assert report["layers"][STARVED]["fallback"] == {"3": "no calibration tokens"}
    assert report["layers"][STARVED]["tokens_per_expert"][3] == 0
    for matrix, experts in stored(tmp_path / "out", STARVED).items():
        W = bfloat16(params[f"{STARVED}/mlp/expert/{matrix}/kernel"][3]).T  # [out, in]
        low, high = W.min(1, keepdims=True), W.max(1, keepdims=True)
        rounded = np.where(high / 2 < W, high, np.where(low / 2 > W, low, 0))
        np.testing.assert_array_equal(experts.expert(3), rounded)


def test_an_expert_whose_hidden_units_are_all_silent_is_reported_as_such(documents, tmp_path):
    params = random_params()
    name = "encoder/layers_0/mlp/expert/wi/kernel"
    params[name][2] = 0
    report = run(open_checkpoint(tiny_model.write_checkpoint(tmp_path / "model", params)), documents)
    assert report["layers"]["encoder/layers_0"]["tokens_per_expert"][2] > 0
    (reason,) = report["layers"]["encoder/layers_0"]["fallback"].values()
    assert "Hessian of wo is zero" in reason
    assert report["experts_fallback"] == 1


class Incomplete:
    """A checkpoint that loses experts of its second sparse layer."""

    def __init__(self, checkpoint, groups):
        self.checkpoint, self.groups = checkpoint, groups

    def __getattr__(self, name):
        return getattr(self.checkpoint, name)

    def stream(self, layers, *args):
        for layer in layers:
            if layer != "encoder/layers_1":
                yield from self.checkpoint.stream([layer], *args)
                continue
            ((_, _, kernels),) = self.checkpoint.experts(layer)
            for start, stop in self.groups:
                yield layer, start, stop, {m: k[start:stop] for m, k in kernels.items()}


@pytest.mark.parametrize(
    "groups",
    [[(4, 8)], [(0, 4), (5, 8)], [(0, 4)], [(0, 4), (3, 8)], [(4, 8), (0, 4)], []],
    ids=["first", "middle", "last", "some twice", "out of order", "all"],
)
def test_experts_that_are_skipped_are_an_error(groups, tiny, documents, tmp_path):
    checkpoint = Incomplete(open_checkpoint(tiny.checkpoint), groups)
    with pytest.raises(RuntimeError, match="encoder/layers_1"):
        run(checkpoint, documents, output=tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["layers", "progress"]  # of the layer before


def test_sizes_and_rates_count_every_stored_byte(tiny, compressed):
    report, output = compressed
    checkpoint = open_checkpoint(tiny.checkpoint)
    stored_bytes, weights, zeros, entropies = 0, 0, 0, []
    for layer in checkpoint.config.sparse_layers:
        for experts in stored(output, layer).values():
            trits = np.asarray(experts.symbols())
            for e in trits:
                p = np.array([(e == s).mean() for s in range(3)])
                entropies.append(-(p * np.log2(p)).sum())
                # Two bytes a codeword, an offset per row and one more of four bytes; two bfloat16 levels per row.
                codewords, offsets = dictionary.encode(e)
                stored_bytes += 2 * len(codewords) + 4 * len(offsets) + 2 * 2 * len(e)
            weights += trits.size
            zeros += (trits == 0).sum()
    dense = sum(np.prod(spec.shape) for name, spec in checkpoint.specs.items() if "/expert/" not in name)
    assert report["bits_per_weight"] == pytest.approx(8 * stored_bytes / weights)
    assert report["compression_experts"] == pytest.approx(16 * weights / (8 * stored_bytes))
    assert report["compression_model"] == pytest.approx((2 * weights + 2 * dense) / (stored_bytes + 2 * dense))
    assert report["zeros"] == pytest.approx(zeros / weights)
    assert report["entropy_per_weight"] == pytest.approx(np.mean(entropies))


def test_the_report_is_of_the_checkpoint_that_was_written(tiny, documents, compressed):
    report, output = compressed
    losses = streaming.run(open_checkpoint(output), documents.validation.pairs, MEMORY).summary()
    assert losses["loss"] == pytest.approx(report["loss"], abs=1e-6)
    assert losses["loss_paper"] == pytest.approx(report["loss_paper"], abs=1e-6)
    original = open_checkpoint(tiny.checkpoint)
    assert original.specs["encoder/encoder_norm/scale"].dtype == np.float32
    for name in open_checkpoint(output).specs:
        np.testing.assert_array_equal(
            open_checkpoint(output).read(name).astype(np.float32), bfloat16(original.read(name)), name
        )


@pytest.mark.parametrize("config", [TOP_2, GATED], ids=["top-2", "gated"])
def test_other_architectures_evaluate_as_reported(config, documents, tmp_path):
    path = tiny_model.write_checkpoint(tmp_path / "model", random_params(config), dtype="bfloat16")
    report = run(open_checkpoint(path, top_k=config.top_k), documents, output=tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.config == dataclasses.replace(config, min_expert_capacity=checkpoint.config.min_expert_capacity)
    loss = streaming.run(checkpoint, documents.validation.pairs, MEMORY).summary()["loss"]
    assert loss == pytest.approx(report["loss"], abs=1e-6)
    assert report["experts_total"] == 24


def test_where_experts_choose_it_evaluates_as_reported_in_the_same_batches(documents, tmp_path):
    """And the compressed model computes what its dequantized weights do, and writes the same text."""
    untold = {"top_k": 2, "experts_choose": 1.0}
    path = tiny_model.write_checkpoint(tmp_path / "model", random_params(GATED), dtype="bfloat16")
    report = run(open_checkpoint(path, **untold), documents, output=tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert (checkpoint.config.top_k, checkpoint.config.experts_choose) == (2, 1.0)
    losses = streaming.run(checkpoint, documents.pairs, MEMORY)
    losses = streaming.DocumentLosses(*(a[NUM_CALIBRATION:] for a in losses))
    assert losses.summary()["loss"] == pytest.approx(report["loss"], abs=1e-6)
    assert report["experts_total"] == 24
    # Of each batch every expert takes as many tokens, some of them padding or special ones.
    tokens = report["layers"]["encoder/layers_0"]["tokens_per_expert"]
    assert 0 < min(tokens) and max(tokens) < calibrates("encoder", documents).sum()

    dense = tmp_path / "dense"
    conversion.run(TARGETS["t5x"](checkpoint, dense, conversion.Options("float32")), dense, "")
    encoder, decoder, _ = padded(documents.validation.pairs)
    models = [qmoe_jax.load(tmp_path / "out"), qmoe_jax.load(dense, **untold)]
    logits = [qmoe_jax.forward(*loaded, encoder, decoder) for loaded in models]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-4)
    texts = [qmoe_jax.generate(*loaded, encoder[:2], max_length=5) for loaded in models]
    np.testing.assert_array_equal(*texts)


@pytest.mark.parametrize(
    ("name", "untold", "method"),
    [
        ("switch_base_scan_tiny", {}, "rtn"),
        ("switch_xxl_tiny", {}, "gptq"),
        pytest.param("switch_base_scan_tiny", {}, "gptq", marks=pytest.mark.long),
        pytest.param("tokens_choose_tiny", {"top_k": 2}, "gptq", marks=pytest.mark.long),
    ],
    ids=["scanned, rounded", "gated", "scanned", "top-2"],
)
def test_checkpoints_of_other_kinds_are_compressed(name, untold, method, fixture_path, documents, tmp_path):
    checkpoint = open_checkpoint(fixture_path(name), **untold)
    ids = np.random.default_rng(0).integers(2, checkpoint.config.vocab_size - 100, (27, 30)).astype(np.int32)
    pairs = [(row[:20], np.append(np.int32(0), row[20:])) for row in ids]
    calibration, validation = (Examples(p, len(p), 0, 0) for p in (pairs[:20], pairs[20:]))
    settings = QuantizationSettings(method=method, **{} if method == "rtn" else {"mask_special_tokens": False})
    output = tmp_path / "out"
    report = compress_examples(
        checkpoint, documents.vocabulary, calibration, validation, settings, MEMORY, output=output
    )
    assert report["experts_total"] == len(checkpoint.config.sparse_layers) * checkpoint.config.num_experts
    loss = streaming.run(open_checkpoint(output), validation.pairs, MEMORY).summary()["loss"]
    assert loss == pytest.approx(report["loss"], abs=1e-6)


# --- The same bytes, however it is run -------------------------------------------------------------------------------


def assert_same_bytes(a, b):
    for layer in tiny_model.CONFIG.sparse_layers:
        for matrix, experts in stored(a, layer).items():
            other = stored(b, layer)[matrix]
            for found, expected in zip(jax.tree.leaves(other), jax.tree.leaves(experts), strict=True):
                np.testing.assert_array_equal(np.asarray(found), np.asarray(expected), f"{layer} {matrix}")


def test_eight_devices_write_the_same_bytes_as_one(tiny, documents, tmp_path, monkeypatch):
    assert len(jax.local_devices()) == 8
    memory = MEMORY._replace(experts_per_group=8)
    assert len(quantizer.expert_sharding(8).device_set) > 1
    checkpoint = open_checkpoint(tiny.checkpoint)
    several = run(checkpoint, documents, memory=memory, output=tmp_path / "several")
    one = NamedSharding(Mesh(np.array(jax.local_devices()[:1]), ("expert",)), PartitionSpec("expert"))
    monkeypatch.setattr(quantizer, "expert_sharding", lambda experts: one)
    report = run(checkpoint, documents, memory=memory, output=tmp_path / "one")
    assert_same_bytes(tmp_path / "several", tmp_path / "one")
    assert report["loss"] == pytest.approx(several["loss"], abs=1e-6)


# Groups of three leave two over, which lie on other devices.
@pytest.mark.parametrize("experts_per_group", [3, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 100))])
def test_groups_of_experts_are_a_matter_of_memory_only(experts_per_group, tiny, documents, compressed, tmp_path):
    memory = MEMORY._replace(experts_per_group=experts_per_group)
    run(open_checkpoint(tiny.checkpoint), documents, memory=memory, codec="dictionary", output=tmp_path / "out")
    assert_same_bytes(compressed[1], tmp_path / "out")


# --- Methods and settings --------------------------------------------------------------------------------------------


def test_round_to_nearest_needs_no_calibration(tiny, documents):
    settings = QuantizationSettings(method="rtn")
    checkpoint = open_checkpoint(tiny.checkpoint)
    alone = dataclasses.replace(documents, calibration=None)
    report = run(checkpoint, alone, settings)
    assert report["loss"] == pytest.approx(run(checkpoint, documents, settings)["loss"], abs=1e-6)
    assert report["experts_quantized"] == 24
    with pytest.raises(ValueError, match="calibration"):
        run(checkpoint, alone, QuantizationSettings())


@pytest.mark.parametrize(
    ("codec", "changes", "mend"),
    [
        ("dictionary", {"bits": 2}, "Use the codec 'gap'"),
        ("dictionary", {"bits": 2, "method": "rtn"}, "Use the codec 'gap'"),
    ],
)
def test_what_the_codec_does_not_hold_is_measured_but_not_stored(codec, changes, mend, tiny, documents, tmp_path):
    settings = QuantizationSettings(**changes)
    checkpoint = open_checkpoint(tiny.checkpoint)
    report = run(checkpoint, documents, settings, codec=codec)
    assert np.isfinite(report["loss"]) and 0 < report["zeros"] < 1 and 0 < report["entropy_per_weight"] < 2
    for field in ("bits_per_weight", "compression_experts", "compression_model", "bytes_model", "bytes_experts"):
        assert report[field] is None

    class Unread:
        def __getattr__(self, name):
            assert name in ("config", "path"), f"read {name} before refusing"
            return getattr(checkpoint, name)

    with pytest.raises(ValueError, match=f"can't be stored.* {mend}"):
        run(Unread(), documents, settings, codec=codec, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "magic"),
        ("bits", 3),
        ("block_size", 0),
        ("damping", -0.1),
        ("damping", float("nan")),
        ("token_cap", 0),
        ("token_cap", float("inf")),
    ],
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=rf"quantization\.{field}: found .*{value}"):
        QuantizationSettings(**{field: value})


def test_experts_that_are_compressed_already_are_refused(documents, compressed):
    with pytest.raises(ValueError, match="compressed already"):
        run(open_checkpoint(compressed[1]), documents)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named_and_never_quantized(value, documents, tmp_path):
    params = random_params()
    params["decoder/layers_1/mlp/expert/wo/kernel"][4, 5, 6] = value
    checkpoint = open_checkpoint(tiny_model.write_checkpoint(tmp_path / "model", params))
    with pytest.raises(ValueError, match="'decoder/layers_1/mlp/expert/wo/kernel', expert 4"):
        run(checkpoint, documents, output=tmp_path / "out")
    assert len(list((tmp_path / "out" / "layers").iterdir())) == 2  # those before it
    with pytest.raises(CheckpointError, match="unfinished"):
        open_checkpoint(tmp_path / "out")
