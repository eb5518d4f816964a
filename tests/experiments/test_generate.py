"""experiments/generate.py with a decoder: text as it comes is the text that there is in the end."""

import numpy as np
import tokenizers
from test_convert import run  # noqa: F401, a fixture

import qmoe_jax
from qmoe_jax.models.families import family_of


def write_vocabulary(path, size):
    """Words, and halves of '€' as byte-level tokenizers have them."""
    letters = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("€")[0][0]
    words = ["<unk>", letters[:2], letters[2:], *(f"w{i}Ġ" for i in range(size - 3))]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("#", "removed")
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(path))


def test_text_as_it_comes(run, fixture_path, tmp_path):  # noqa: F811
    path = fixture_path("olmoe_tiny") / "checkpoint"
    model, params = qmoe_jax.load(path)
    write_vocabulary(tmp_path / "tokenizer.json", model.config.vocab_size)
    task = family_of(model).task
    vocabulary = task.vocabulary(tmp_path)
    expected = []
    for prompt in ("w1Ġ#w7Ġ", "w9Ġ#w2Ġ"):  # Of one length: one program.
        tokens, options = task.prompt(vocabulary, prompt)
        written = qmoe_jax.generate(model, params, tokens[None], max_length=9, **options)
        expected.append(task.completed(vocabulary, tokens, np.asarray(written)[0]))
    code, out, errors = run(
        "generate",
        f"--checkpoint={path}",
        f"--config.data.vocabulary={tmp_path / 'tokenizer.json'}",
        "--config.generation.max_length=9",
        "--prompt=w1Ġ#w7Ġ",
        "--prompt=w9Ġ#w2Ġ",
    )
    assert code == 0, errors
    assert [text.split("\n\n")[0] for text in out.split("text:   ")[1:]] == expected


def test_prompts_and_lengths_that_cannot_be(run):  # noqa: F811
    code, _, errors = run("generate", "--prompt=caf\udce9")
    assert code == 1 and errors.splitlines()[-1].endswith("error: --prompt: not UTF-8 (byte 0xe9 at character 3).")
    code, _, errors = run("generate", "--config.generation.max_length=100000000")
    assert code == 1 and "config.generation.max_length: found 100000000, expected 1 to 1,000,000" in errors
