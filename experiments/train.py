"""Trains a small Switch Transformer by span corruption and saves it as a native T5X checkpoint.

    python experiments/train.py --config=configs/train_tiny.py --workdir=DIR

DIR gets checkpoint_N/ (legacy T5X layout, bfloat16), report.json, training.png and TensorBoard events.
"""

import interrupts  # noqa: F401, before all that takes time

# isort: split

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

import common
from qmoe_jax import files, reports, resources
from qmoe_jax.checkpoints.t5x import write_t5x
from qmoe_jax.data import read_documents
from qmoe_jax.models.switch import EOS, Vocabulary, training_batches
from qmoe_jax.models.switch.config import ModelConfig
from qmoe_jax.models.switch.model import SwitchTransformer
from qmoe_jax.reports.events import events
from qmoe_jax.reports.figures import plot_training

CONFIG = common.define_config(
    "config", str(pathlib.Path(__file__).parents[1] / "configs/train_tiny.py"), "What to train and how."
)
WORKDIR = flags.DEFINE_string("workdir", "out/train_tiny", "Where checkpoint, report and figure go.")


def balance_loss(logits: jax.Array, mask: jax.Array, top_k: int = 1) -> jax.Array:
    """experts * sum_e f_e P_e, with f_e the share of real tokens routed to e and P_e its mean probability.

    (Fedus et al. 2021, equation 4.) `logits` are [batch, length, experts], `mask` is bool [batch, length].
    """
    experts = logits.shape[-1]
    probabilities = jax.nn.softmax(logits)
    chosen = jax.nn.one_hot(jax.lax.top_k(logits, top_k)[1], experts).sum(-2)
    weight = (mask / jnp.sum(mask))[..., None]
    return experts * jnp.sum(jnp.sum(chosen * weight, (0, 1)) * jnp.sum(probabilities * weight, (0, 1)))


def make_train_step(model, optimizer, settings):
    """A jitted step: (params, optimizer state, batch) -> (params, optimizer state, metrics)."""

    def loss_fn(params, batch):
        """Cross-entropy per predicted token, plus the weighted balance and z losses, means over sparse layers."""
        encoder_input, decoder_input, targets = batch
        logits, state = model.apply(
            {"params": params}, *batch, capacity_factor=settings.capacity_factor, mutable=["intermediates"]
        )
        real = {"encoder": encoder_input > 0, "decoder": targets > 0}
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        loss = jnp.mean(cross_entropy, where=real["decoder"])
        routers = [
            (layer["mlp"]["router_logits"][0], real[stack], stack)
            for stack in real
            for layer in state["intermediates"][stack].values()
            if "mlp" in layer
        ]
        # Experts that choose are balanced already.
        choose = [stack for stack in real if stack == "decoder" or model.config.experts_choose is None]
        balance = [balance_loss(r, mask, model.config.top_k) for r, mask, stack in routers if stack in choose]
        balance = jnp.mean(jnp.stack(balance))
        z = jnp.stack([jnp.mean(jax.nn.logsumexp(r, -1) ** 2, where=mask) for r, mask, _ in routers]).mean()
        total = loss + settings.balance_loss * balance + settings.router_z_loss * z
        return total, {"loss": loss, "balance": balance}

    def train_step(params, state, batch):
        grads, metrics = jax.grad(loss_fn, has_aux=True)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, metrics

    return jax.jit(train_step, donate_argnums=(0, 1))


def scale_experts(params, scale: float):
    """The same parameters, with the experts' output matrices wo multiplied by `scale`."""
    is_output = lambda path: [key.key for key in path[-3:]] == ["expert", "wo", "kernel"]
    return jax.tree_util.tree_map_with_path(lambda path, p: p * scale if is_output(path) else p, params)


def main(_):
    config = CONFIG.value
    workdir = pathlib.Path(WORKDIR.value)
    stages = resources.Stages()
    vocabulary = Vocabulary.load(config.data.vocabulary)
    documents = vocabulary.encode_batch(list(read_documents(config.data.train)))
    documents = [np.array([*ids, EOS], np.int32) for ids in documents if ids]
    tokens = sum(map(len, documents))

    # --- Model -------------------------------------------------------------------------------------------------------
    model = SwitchTransformer(ModelConfig.from_dict({**config.model, "vocab_size": vocabulary.size}))
    example = jnp.ones((1, 8), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(config.seed), example, example)["params"]
    params = scale_experts(params, config.train.expert_output_scale)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.train.learning_rate, min(config.train.warmup_steps, config.train.steps // 2), config.train.steps
    )
    # As T5X: steps relative to a parameter's own scale, since embeddings start at 1 and queries at 1 / 45.
    optimizer = optax.adafactor(schedule, multiply_by_parameter_scale=True)
    train_step = make_train_step(model, optimizer, config.train)
    state = optimizer.init(params)
    parameters = sum(p.size for p in jax.tree.leaves(params))
    reports.say(f"{parameters / 1e6:.2f} M parameters, {tokens / 1e6:.2f} M tokens of text")

    # --- Train -------------------------------------------------------------------------------------------------------
    rng = np.random.RandomState(config.seed)
    batches = training_batches(documents, vocabulary, config.train.tokens_per_batch, rng)
    history = []
    with (
        stages("training"),
        events(workdir / "tensorboard") as write_events,
        reports.progress(config.train.steps, "training", "step") as bar,
    ):
        for step in range(config.train.steps):
            params, state, metrics = train_step(params, state, next(batches)[1:])
            if step % config.train.log_every == 0 or step == config.train.steps - 1:
                scalars = {k: float(v) for k, v in metrics.items()}
                history.append({"step": step, **scalars})
                write_events(step, scalars)
                bar.set_postfix(loss=f"{history[-1]['loss']:.3f}", balance=f"{history[-1]['balance']:.2f}")
            bar.update()

    # --- Save --------------------------------------------------------------------------------------------------------
    with stages("saving"):
        write_t5x(workdir, params, step=config.train.steps, dtype="bfloat16", overwrite=True)
        plot_training(history, workdir / "training.png")
    report = {"parameters": parameters, "tokens": tokens, "seconds": stages.report(), "history": history}
    files.write_json(workdir / "report.json", report)
    reports.say(f"{workdir}: saved; the last batch's loss was {history[-1]['loss']:.4f}.")
    reports.say("Validation loss: python experiments/evaluate.py --checkpoint=" + str(workdir))


if __name__ == "__main__":
    app.run(common.without_traceback(main))
