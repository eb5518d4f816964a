"""The few names of the package itself: `load` and `forward` on every layout."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

import qmoe_jax
from qmoe_jax.checkpoints import CompressedWriter, param_shapes, write_t5x

CONFIG = qmoe_jax.ModelConfig(
    vocab_size=24,
    d_model=8,
    d_ff=12,
    num_heads=2,
    head_dim=4,
    num_encoder_layers=1,
    num_decoder_layers=1,
    num_experts=2,
    encoder_sparse_layers=(0,),
    decoder_sparse_layers=(),
)
LEVELS = np.float32([-0.5, 1.0])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One ternary model twice: the parent of a T5X checkpoint, and a compressed checkpoint."""
    rng = np.random.default_rng(0)
    flat, experts = {}, {}
    for name, shape in param_shapes(CONFIG).items():
        if "/expert/" in name:
            trits = rng.integers(0, 3, shape).astype(np.uint8).swapaxes(1, 2)  # [experts, out, in]
            levels = np.broadcast_to(LEVELS, (*trits.shape[:2], 2))
            experts[name.split("/")[-2]] = qmoe_jax.CompressedExperts.from_symbols(trits, levels, codec="dictionary")
            flat[name] = np.append(np.float32(0), LEVELS)[trits].swapaxes(1, 2)
        else:
            flat[name] = rng.normal(size=shape).astype(ml_dtypes.bfloat16)
    native, compressed = tmp_path_factory.mktemp("native"), tmp_path_factory.mktemp("compressed")
    write_t5x(native, flat, step=7, dtype="bfloat16")
    with CompressedWriter(compressed, CONFIG, {}, "dictionary", {}) as writer:
        writer.write_layer("encoder/layers_0", experts)
        writer.finish({name: value for name, value in flat.items() if "/expert/" not in name})
    return native, compressed, flat


@pytest.fixture(scope="module")
def tokens():
    rng = np.random.default_rng(1)
    return [rng.integers(1, CONFIG.vocab_size, (2, n)).astype(np.int32) for n in (5, 4, 4)]


def test_step_directory_and_its_parent_are_the_same_checkpoint(checkpoints):
    native, _, flat = checkpoints
    for path in (native, str(native), native / "checkpoint_7"):
        model, params = qmoe_jax.load(path)
        assert model.config == CONFIG and model.dtype == jnp.float32
        found = traverse_util.flatten_dict(params, sep="/")
        assert set(found) == set(flat)
        for name, value in found.items():
            assert isinstance(value, jax.Array) and value.dtype == jnp.bfloat16, name
            np.testing.assert_array_equal(np.asarray(value, np.float32), flat[name].astype(np.float32), err_msg=name)


def test_compressed_experts_stay_compressed_and_give_the_same_logits(checkpoints, tokens):
    native, compressed, _ = checkpoints
    model, params = qmoe_jax.load(compressed)
    kernel = params["encoder"]["layers_0"]["mlp"]["expert"]["wi"]["kernel"]
    assert isinstance(kernel, qmoe_jax.CompressedExperts) and kernel.shape == (2, 12, 8)
    logits = qmoe_jax.forward(model, params, *tokens)
    assert logits.dtype == jnp.float32 and logits.shape == (2, 4, 24)
    np.testing.assert_allclose(logits, qmoe_jax.forward(*qmoe_jax.load(native), *tokens), rtol=1e-5, atol=1e-5)


def test_experts_in_memory_may_have_another_codec_than_stored(checkpoints, tokens):
    _, compressed, flat = checkpoints
    model, params = qmoe_jax.load(compressed, codec="nibbles")
    kernel = params["encoder"]["layers_0"]["mlp"]["expert"]["wi"]["kernel"]
    assert kernel.codec == "nibbles" and kernel.data["nibbles"].shape == (2, 12, 4)
    np.testing.assert_array_equal(kernel.to_dense().swapaxes(1, 2), flat["encoder/layers_0/mlp/expert/wi/kernel"])
    stored = qmoe_jax.forward(*qmoe_jax.load(compressed), *tokens)
    np.testing.assert_allclose(qmoe_jax.forward(model, params, *tokens), stored, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="Unknown codec 'bytes'"):
        qmoe_jax.load(compressed, codec="bytes")


def test_dtype_is_that_of_activations_only(checkpoints, tokens):
    model, params = qmoe_jax.load(checkpoints[0], dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    encoded = model.apply({"params": params}, tokens[0], method="encode")
    assert encoded.dtype == jnp.bfloat16
    assert jax.eval_shape(lambda: qmoe_jax.forward(model, params, *tokens)).dtype == jnp.float32


def test_fields_that_a_checkpoint_cannot_tell_are_overridden(checkpoints):
    native, compressed, _ = checkpoints
    for path in (native, compressed):
        model, _ = qmoe_jax.load(path, top_k=2, router_group_size=16)
        assert (model.config.top_k, model.config.router_group_size) == (2, 16)


def test_overrides_that_contradict_or_do_not_exist_are_refused(checkpoints):
    with pytest.raises(qmoe_jax.CheckpointError, match="num_experts|expert"):
        qmoe_jax.load(checkpoints[0], num_experts=4)
    with pytest.raises(ValueError, match="topk"):
        qmoe_jax.load(checkpoints[0], topk=2)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.int32, "float33"])
def test_activations_other_than_float32_and_bfloat16_are_refused(checkpoints, dtype):
    # In float16 the attention mask would overflow.
    with pytest.raises(ValueError, match="expected float32 or bfloat16"):
        qmoe_jax.load(checkpoints[0], dtype=dtype)


def test_nothing_at_the_path(tmp_path):
    with pytest.raises(qmoe_jax.CheckpointError, match="nowhere"):
        qmoe_jax.load(tmp_path / "nowhere")


def test_targets_are_optional_and_lists_are_fine(checkpoints, tokens):
    model, params = qmoe_jax.load(checkpoints[0])
    encoder, inputs, targets = tokens
    full = qmoe_jax.forward(model, params, encoder, inputs, targets)
    without = qmoe_jax.forward(model, params, encoder.tolist(), inputs.tolist())
    np.testing.assert_allclose(without, full, rtol=1e-5, atol=1e-5)


def test_forward_inside_jit(checkpoints, tokens):
    model, params = qmoe_jax.load(checkpoints[0])
    traced = jax.jit(lambda params, tokens: qmoe_jax.forward(model, params, *tokens))(params, tokens)
    np.testing.assert_allclose(traced, qmoe_jax.forward(model, params, *tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({0: np.full((2, 5), 24)}, "encoder_input_tokens: found ids from 24 to 24, expected 0 to 23"),
        ({1: np.full((2, 4), -1)}, "decoder_input_tokens: found ids from -1"),
        ({2: np.full((2, 4), 99)}, "decoder_target_tokens: found ids from 99"),
        ({0: np.ones(5, int)}, r"encoder_input_tokens: int64 \[5\]"),
        ({1: np.ones((2, 4))}, r"decoder_input_tokens: float64 \[2, 4\]"),
        ({0: np.ones((1, 5), int)}, r"encoder_input_tokens \[1, 5\], .*one batch size"),
        ({2: np.ones((2, 3), int)}, r"decoder_target_tokens \[2, 3\].*as long as the decoder's inputs"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(checkpoints, tokens, changed, message):
    model, params = qmoe_jax.load(checkpoints[0])
    with pytest.raises(ValueError, match=message):
        qmoe_jax.forward(model, params, *(changed.get(i, t) for i, t in enumerate(tokens)))


def test_public_names_exist():
    for name in qmoe_jax.__all__:
        assert hasattr(qmoe_jax, name), name
