"""Text from a checkpoint of any layout: fills in what is missing in a prompt, or continues it.

    python experiments/generate.py --checkpoint=DIR --prompt="Return the <extra_id_0> of the list."

A prompt without <extra_id_N> is continued; only models trained by span corruption know these. Decoders write while they
go on, a character when all of its bytes are there. Several prompts, --prompt=A --prompt=B, are gone through one by one.
Instead of taking the likeliest token, --config.generation.temperature and .top_p sample.
"""

import interrupts  # noqa: F401, before all that takes time

# isort: split

import pathlib
import time
from collections.abc import Iterator

import jax
from absl import app, flags

import command_line
import common
from qmoe_jax import reports
from qmoe_jax.codecs.experts import in_codec
from qmoe_jax.kernels.compressed_ragged_dot import api
from qmoe_jax.models.common import check_length
from qmoe_jax.models.expert_parallel import place_param
from qmoe_jax.models.families import family_of

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = common.define_config("config", str(ROOT / "configs/tiny.py"), "Vocabulary and settings.")
CHECKPOINT = common.define_checkpoint("Checkpoint of any layout.")
command_line.define_process_flags()
PROMPT = flags.DEFINE_multi_string(
    "prompt",
    None,
    "Text with <extra_id_0>, <extra_id_1>, ... where words are missing, or text to continue; one or several. "
    "Default: the config's.",
)


def pieces(model, params, vocabulary, prompt: str, settings) -> Iterator[str]:
    """The prompt with what the model makes of it, in pieces as they come."""
    family = family_of(model)
    try:
        tokens, options = family.task.prompt(vocabulary, prompt)
    except ValueError as e:
        raise ValueError(f"--prompt: {e}") from e
    written = family.written(
        model,
        params,
        tokens[None],
        max_length=settings.max_length,
        temperature=settings.temperature,
        top_p=settings.top_p,
        key=jax.random.key(settings.seed),
        **options,
    )
    return family.task.pieces(vocabulary, tokens, (row[0] for row in written))


def check_prompt(prompt: str) -> None:
    """Raises ValueError for bytes of the command line that are no text."""
    try:
        prompt.encode()
    except UnicodeEncodeError as e:
        byte = ord(prompt[e.start]) & 0xFF
        raise ValueError(f"--prompt: not UTF-8 (byte {byte:#04x} at character {e.start}).") from e


def main(_):
    for prompt in PROMPT.value or ():
        check_prompt(prompt)
    check_length("config.generation.max_length", CONFIG.value.generation.max_length)
    processes = command_line.start_processes()
    common.agree(processes, CONFIG.value, prompt=PROMPT.value)
    config = CONFIG.value
    checkpoint, vocabulary = common.open_model(common.checkpoint_path(CHECKPOINT, config), config)
    common.agree_on_model(processes, checkpoint)
    mesh = common.mesh(config, checkpoint)
    model = checkpoint.family.model(checkpoint.config, common.activation_dtype(config), mesh)
    codec = common.codec_in_memory(config)

    def place(name, value):
        return place_param(name, in_codec(value, codec), mesh, checkpoint.is_expert(name))

    params = checkpoint.load(place)
    for prompt in PROMPT.value or [config.generation.prompt]:
        started = time.perf_counter()
        text = pieces(model, params, vocabulary, prompt, config.generation)
        reports.say(f"prompt: {prompt}\n")
        for i, piece in enumerate(text):
            print(piece if i else f"text:   {piece}", end="", flush=True)
        products = f"; products on compressed experts: {', '.join(api.used())}" if api.used() else ""
        reports.say(f"\n\n{time.perf_counter() - started:.1f} s with compilation{products}")


if __name__ == "__main__":
    app.run(command_line.without_traceback(main))
