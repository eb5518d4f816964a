"""Text from a checkpoint, native T5X or compressed: fills the sentinels of a prompt, or continues it.

    python experiments/generate.py --checkpoint=DIR --prompt="Return the <extra_id_0> of the list."

A prompt without <extra_id_N> is continued. --config.generation.temperature and .top_p sample instead of taking the
likeliest token.
"""

import functools
import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # LAPACK's threads fight XLA's; set before jax is imported.

import pathlib
import time

import jax
import numpy as np
from absl import app, flags

import qmoe_jax
from qmoe_jax import experiment, reports
from qmoe_jax.models.expert_parallel import place_param
from qmoe_jax.models.switch import EOS, PAD, Vocabulary

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = experiment.define_config("config", str(ROOT / "configs/tiny.py"), "Vocabulary and settings.")
CHECKPOINT = flags.DEFINE_string("checkpoint", str(ROOT / "experiments/tiny_model"), "T5X or compressed checkpoint.")
experiment.define_process_flags()
PROMPT = flags.DEFINE_string(
    "prompt",
    "def __init__(self, name, value): self.name = <extra_id_0> self.value = <extra_id_1>",
    "Text with <extra_id_0>, <extra_id_1>, ... where words are missing; or text to continue.",
)


def write(model, params, vocabulary: Vocabulary, prompt: str, settings) -> str:
    """The prompt with its sentinels filled in, or continued if it has none."""
    ids = vocabulary.encode(prompt)
    if not ids:
        raise ValueError("--prompt: it is empty; give a text, with <extra_id_0> where it should be filled in.")
    asked = [i for i in ids if vocabulary.is_sentinel(i)]
    if len(set(asked)) < len(asked):
        raise ValueError("--prompt: a sentinel occurs twice; number them <extra_id_0>, <extra_id_1>, ...")
    ids = ids if asked else [*ids, vocabulary.sentinel(0)]
    written = qmoe_jax.generate(
        model,
        params,
        np.array([[*ids, EOS]], np.int32),
        max_length=settings.max_length,
        prefix=asked[:1] or [vocabulary.sentinel(0)],
        stop=(EOS, vocabulary.sentinel(max(len(asked), 1))),
        banned=(PAD,),
        temperature=settings.temperature,
        top_p=settings.top_p,
        key=jax.random.key(settings.seed),
    )
    fills: dict[int, list[int]] = {}
    current = None
    for token in map(int, np.asarray(written)[0]):
        if vocabulary.is_sentinel(token):
            current = token if token not in fills else None  # A sentinel that comes again is noise.
            if current is not None:
                fills[current] = []
        elif current is not None and token not in (PAD, EOS):
            fills[current].append(token)
    return vocabulary.decode([t for i in ids for t in (fills.get(i, [i]) if vocabulary.is_sentinel(i) else [i])])


def main(_):
    experiment.start_processes()
    config = CONFIG.value
    checkpoint, vocabulary = experiment.open_model(CHECKPOINT.value, config)
    mesh = experiment.mesh(config, checkpoint)
    model = qmoe_jax.SwitchTransformer(checkpoint.config, experiment.activation_dtype(config), mesh)
    params = checkpoint.load(functools.partial(place_param, mesh=mesh))
    started = time.perf_counter()
    text = write(model, params, vocabulary, PROMPT.value, config.generation)
    reports.say(f"prompt: {PROMPT.value}\n\ntext:   {text}\n\n{time.perf_counter() - started:.1f} s with compilation")


if __name__ == "__main__":
    app.run(experiment.without_traceback(main))
