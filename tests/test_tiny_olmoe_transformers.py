"""transformers and the carried OLMoE: the same tokens, and the same loss."""

import pathlib

import numpy as np
import pytest

from qmoe_jax import streaming
from qmoe_jax.checkpoints import open_checkpoint
from qmoe_jax.data import read_documents
from qmoe_jax.models.decoder.task import load_examples
from qmoe_jax.models.decoder.vocabulary import Vocabulary

torch = pytest.importorskip("torch", reason="the extra 'torch' isn't installed")
transformers = pytest.importorskip("transformers", reason="the extra 'torch' isn't installed")

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[1] / "experiments"
MODEL, VALIDATION = EXPERIMENTS / "tiny_olmoe", EXPERIMENTS / "tiny_model/validation.jsonl.gz"


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary.load(MODEL)


def test_loss(vocabulary):
    examples = load_examples(VALIDATION, vocabulary, 12, window=256)
    ours = streaming.run(open_checkpoint(MODEL), examples, streaming.Settings()).summary()["loss"]
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokens = torch.from_numpy(np.stack([window for (window,) in examples]).astype(np.int64))
    with torch.no_grad():
        theirs = model(input_ids=tokens, labels=tokens).loss
    assert ours == pytest.approx(float(theirs), abs=1e-4)


def test_tokens(vocabulary):
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    texts = [text for text, _ in zip(read_documents(VALIDATION), range(50), strict=False)]
    assert tokenizer(texts, add_special_tokens=False)["input_ids"] == vocabulary.encode_batch(texts)
    assert tokenizer.eos_token_id == vocabulary.eos and tokenizer.bos_token_id is None
