"""Text from a checkpoint of any layout: fills in what is missing in a prompt, or continues it.

    python experiments/generate.py --checkpoint=DIR --prompt="Return the <extra_id_0> of the list."

A prompt without <extra_id_N> is continued; only models trained by span corruption know these. Instead of taking the
likeliest token, --config.generation.temperature and .top_p sample.
"""

import pathlib
import time

import jax
import numpy as np
from absl import app, flags

import common
import qmoe_jax
from qmoe_jax import reports
from qmoe_jax.models.common import check_length
from qmoe_jax.models.expert_parallel import place_param
from qmoe_jax.models.families import family_of

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = common.define_config("config", str(ROOT / "configs/tiny.py"), "Vocabulary and settings.")
CHECKPOINT = flags.DEFINE_string("checkpoint", str(ROOT / "experiments/tiny_model"), "Checkpoint of any layout.")
common.define_process_flags()
PROMPT = flags.DEFINE_string(
    "prompt",
    "def __init__(self, name, value): self.name = <extra_id_0> self.value = <extra_id_1>",
    "Text with <extra_id_0>, <extra_id_1>, ... where words are missing; or text to continue.",
)


def write(model, params, vocabulary, prompt: str, settings) -> str:
    """The prompt with what the model makes of it."""
    task = family_of(model).task
    try:
        tokens, options = task.prompt(vocabulary, prompt)
    except ValueError as e:
        raise ValueError(f"--prompt: {e}") from e
    written = qmoe_jax.generate(
        model,
        params,
        tokens[None],
        max_length=settings.max_length,
        temperature=settings.temperature,
        top_p=settings.top_p,
        key=jax.random.key(settings.seed),
        **options,
    )
    return task.completed(vocabulary, tokens, np.asarray(written)[0])


def check_prompt(prompt: str) -> None:
    """Raises ValueError for bytes of the command line that are no text."""
    try:
        prompt.encode()
    except UnicodeEncodeError as e:
        byte = ord(prompt[e.start]) & 0xFF
        raise ValueError(f"--prompt: not UTF-8 (byte {byte:#04x} at character {e.start}).") from e


def main(_):
    check_prompt(PROMPT.value)
    check_length("config.generation.max_length", CONFIG.value.generation.max_length)
    common.agree(common.start_processes(), CONFIG.value)
    config = CONFIG.value
    checkpoint, vocabulary = common.open_model(CHECKPOINT.value, config)
    mesh = common.mesh(config, checkpoint)
    model = checkpoint.family.model(checkpoint.config, common.activation_dtype(config), mesh)
    params = checkpoint.load(lambda name, value: place_param(name, value, mesh, checkpoint.is_expert(name)))
    started = time.perf_counter()
    text = write(model, params, vocabulary, PROMPT.value, config.generation)
    reports.say(f"prompt: {PROMPT.value}\n\ntext:   {text}\n\n{time.perf_counter() - started:.1f} s with compilation")


if __name__ == "__main__":
    app.run(common.without_traceback(main))
