"""A SentencePiece model small enough to train during the tests."""

import io

import sentencepiece

SENTENCES = [
    "the cat sat on the mat and the dog sat on the log",
    "a dog and a cat ran to the old house on the hill",
    "to read is to think, and to think is to read again",
    "the house on the hill had a red door and a green roof",
]


def train_pieces(**options) -> bytes:
    """The bytes of a SentencePiece model of 60 pieces."""
    model = io.BytesIO()
    special = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 5),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        **(special | options),
    )
    return model.getvalue()
