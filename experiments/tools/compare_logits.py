"""Holds a decoder's logits, and its greedy tokens, against those that another implementation saved.

    python experiments/tools/compare_logits.py --output=FILE.md FOLDER ...

A FOLDER has checkpoint/ in any layout, and io.npz: input_ids [batch, length], padded on the right, lengths [batch],
logits [batch, length, vocabulary], and perhaps greedy [batch, prompt + new tokens] after a prompt of --prompt tokens.
"""

import pathlib
import sys

import numpy as np
from absl import app, flags

import qmoe_jax
from qmoe_jax import files, reports

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # experiments/
import command_line

OUTPUT = flags.DEFINE_string("output", None, "File for the table, beside what is printed.")
PROMPT = flags.DEFINE_integer("prompt", 9, "Tokens of `greedy` that are given.")


def compare(folder: pathlib.Path, prompt: int) -> tuple[str, ...]:
    """A row of the table: name, largest difference at real positions, largest logit, greedy tokens."""
    model, params = qmoe_jax.load(folder / "checkpoint")
    io = np.load(folder / "io.npz")
    real = np.arange(io["input_ids"].shape[1]) < io["lengths"][:, None]
    logits = np.asarray(qmoe_jax.forward(model, params, io["input_ids"], lengths=io["lengths"]))
    difference = np.abs(logits - io["logits"])[real].max()
    greedy = "-"
    if "greedy" in io:
        given, new = io["greedy"][:, :prompt], io["greedy"][:, prompt:]
        found = qmoe_jax.generate(model, params, given, max_length=new.shape[1], stop=())
        greedy = f"{int((np.asarray(found) == new).sum())} of {new.size}"
    return folder.name, f"{difference:.1e}", f"{np.abs(io['logits'][real]).max():.2f}", greedy


def main(argv):
    if len(argv) < 2:
        raise ValueError("expected folders: python experiments/tools/compare_logits.py FOLDER ...")
    rows = [compare(pathlib.Path(folder), PROMPT.value) for folder in argv[1:]]
    table = reports.table(("model", "largest difference", "largest logit", "greedy tokens equal"), rows)
    reports.say(table)
    if OUTPUT.value:
        files.write_text(OUTPUT.value, table + "\n")


if __name__ == "__main__":
    app.run(command_line.without_traceback(main))
