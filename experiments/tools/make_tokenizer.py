"""Makes a byte-level BPE vocabulary as decoders have one: tokenizer.json and tokenizer_config.json.

    python experiments/tools/make_tokenizer.py --documents=experiments/tiny_model/train.jsonl.gz --output=DIR

Token 0 ends texts. The `tokenizers` package does the work; the same documents give the same file. A few seconds.
"""

import pathlib
import sys

import tokenizers
from absl import app, flags

from qmoe_jax import files, reports
from qmoe_jax.data import read_documents

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # experiments/
import command_line

DOCUMENTS = flags.DEFINE_string("documents", None, "JSON lines or plain text, globs too.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Folder for the two files.", required=True)
SIZE = flags.DEFINE_integer("vocabulary_size", 2_048, "Tokens, the bytes and the end of text among them.")
END = "<|endoftext|>"


def train(documents, size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE (GPT-2's): every text can be written in it, and comes back as it was."""
    if size < 257:
        raise ValueError(f"--vocabulary_size={size}: expected at least 257, the bytes and the end of text.")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def main(_):
    documents = list(read_documents(DOCUMENTS.value))
    tokenizer = train(documents, SIZE.value)
    output = pathlib.Path(OUTPUT.value)
    files.write_text(output / "tokenizer.json", tokenizer.to_str(pretty=False) + "\n")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    files.write_json(output / "tokenizer_config.json", settings)
    tokens = sum(len(e.ids) for e in tokenizer.encode_batch(documents))
    characters = sum(map(len, documents))
    reports.say(
        f"{output}: {tokenizer.get_vocab_size()} tokens; {len(documents)} documents take {tokens}, "
        f"{characters / tokens:.2f} characters each"
    )


if __name__ == "__main__":
    app.run(command_line.without_traceback(main))
