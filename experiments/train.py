"""Trains a small mixture of experts from nothing.

    python experiments/train.py --config=configs/train_tiny.py --workdir=DIR     a Switch Transformer, span corruption
    python experiments/train.py --config=configs/train_olmoe.py --workdir=DIR    an OLMoE, next token

DIR gets the checkpoint in bfloat16 (checkpoint_N/ in T5X's legacy layout; or config.json, model.safetensors and the
tokenizer, as Hugging Face has them), report.json, training.png and TensorBoard events.
"""

import interrupts  # noqa: F401, before all that takes time

# isort: split

import pathlib

import jax
import numpy as np
import optax
from absl import app, flags
from flax import traverse_util

import command_line
import common
from qmoe_jax import files, reports, resources
from qmoe_jax.models.families import FAMILIES, family_of
from qmoe_jax.reports.events import events
from qmoe_jax.reports.figures import plot_training
from training.next_token import NextToken
from training.span_corruption import SpanCorruption

CONFIG = common.define_config(
    "config", str(pathlib.Path(__file__).parents[1] / "configs/train_tiny.py"), "What to train and how."
)
WORKDIR = flags.DEFINE_string("workdir", "out/train_tiny", "Where checkpoint, report and figure go.")


def make_optimizer(settings) -> optax.GradientTransformation:
    """Adafactor as T5X has it, or AdamW with clipped gradients; the learning rate rises, then falls as a cosine."""
    warmup = min(settings.warmup_steps, settings.steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, settings.learning_rate, warmup, settings.steps)
    if settings.optimizer == "adafactor":
        # Steps relative to a parameter's own scale, since embeddings start at 1 and queries at 1 / 45.
        return optax.adafactor(schedule, multiply_by_parameter_scale=True)
    if settings.optimizer == "adamw":
        matrices = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # Norms aren't drawn to zero.
        adamw = optax.adamw(schedule, b2=0.95, weight_decay=settings.weight_decay, mask=matrices)
        return optax.chain(optax.clip_by_global_norm(1.0), adamw)
    raise ValueError(f"config.train.optimizer: found {settings.optimizer!r}, expected 'adafactor' or 'adamw'.")


def make_train_step(task, optimizer, settings):
    """A jitted step: (params, optimizer state, batch) -> (params, optimizer state, metrics)."""

    def loss_fn(params, batch):
        losses = task.losses(params, batch)
        total = losses.loss + settings.balance_loss * losses.balance + settings.router_z_loss * losses.z
        return total, {"loss": losses.loss, "balance": losses.balance}

    def train_step(params, state, batch):
        grads, metrics = jax.grad(loss_fn, has_aux=True)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, metrics

    return jax.jit(train_step, donate_argnums=(0, 1))


def scale_experts(params, config, scale: float):
    """The same parameters, with the experts' output matrices multiplied by `scale`."""
    family, flat = family_of(config), traverse_util.flatten_dict(params, sep="/")
    is_output = lambda name: (family.expert_of(name) or (None, None))[1] == config.expert.last
    scaled = {name: p * scale if is_output(name) else p for name, p in flat.items()}
    return traverse_util.unflatten_dict(scaled, sep="/")


def main(_):
    config = CONFIG.value
    workdir = pathlib.Path(WORKDIR.value)
    stages = resources.Stages()
    if config.family not in FAMILIES:
        raise ValueError(f"config.family: found {config.family!r}, expected one of {', '.join(FAMILIES)}.")
    task = SpanCorruption(config) if config.family == "switch" else NextToken(config)

    # --- Model -------------------------------------------------------------------------------------------------------
    params = task.init(jax.random.key(config.seed))
    params = scale_experts(params, task.model.config, config.train.expert_output_scale)
    optimizer = make_optimizer(config.train)
    train_step = make_train_step(task, optimizer, config.train)
    state = optimizer.init(params)
    parameters = sum(p.size for p in jax.tree.leaves(params))
    reports.say(f"{parameters / 1e6:.2f} M parameters, {task.tokens / 1e6:.2f} M tokens of text")

    # --- Train -------------------------------------------------------------------------------------------------------
    batches = task.batches(np.random.RandomState(config.seed))
    history = []
    with (
        stages("training"),
        events(workdir / "tensorboard") as write_events,
        reports.progress(config.train.steps, "training", "step") as bar,
    ):
        for step in range(config.train.steps):
            params, state, metrics = train_step(params, state, next(batches))
            if step % config.train.log_every == 0 or step == config.train.steps - 1:
                scalars = {k: float(v) for k, v in metrics.items()}
                history.append({"step": step, **scalars})
                write_events(step, scalars)
                bar.set_postfix(loss=f"{history[-1]['loss']:.3f}", balance=f"{history[-1]['balance']:.2f}")
            bar.update()

    # --- Save --------------------------------------------------------------------------------------------------------
    with stages("saving"):
        task.save(workdir, params, config.train.steps)
        plot_training(history, workdir / "training.png")
    report = {"parameters": parameters, "tokens": task.tokens, "seconds": stages.report(), "history": history}
    files.write_json(workdir / "report.json", report)
    reports.say(f"{workdir}: saved; the last batch's loss was {history[-1]['loss']:.4f}.")
    reports.say("Validation loss: python experiments/evaluate.py --checkpoint=" + str(workdir))


if __name__ == "__main__":
    app.run(command_line.without_traceback(main))
