import numpy as np
import pytest
from tiny_vocabulary import SENTENCES, train_pieces

from qmoe_jax.errors import DataError
from qmoe_jax.models.switch import Vocabulary


def test_sentinels_are_counted_from_the_end(vocabulary):
    num_pieces = vocabulary.pieces.get_piece_size()
    assert vocabulary.size == num_pieces + 100
    assert [vocabulary.sentinel(k) for k in (0, 1, 99)] == [num_pieces + 99, num_pieces + 98, num_pieces]
    for k in (-1, 100):
        with pytest.raises(DataError, match=f"Sentinel {k} "):
            vocabulary.sentinel(k)


def test_is_sentinel_on_arrays_and_numbers(vocabulary):
    num_pieces = vocabulary.pieces.get_piece_size()
    ids = np.array([[0, 1, num_pieces - 1], [num_pieces, num_pieces + 50, num_pieces + 99]])
    assert vocabulary.is_sentinel(ids).tolist() == [[False] * 3, [True] * 3]
    assert vocabulary.is_sentinel(num_pieces) and not vocabulary.is_sentinel(num_pieces - 1)


@pytest.mark.parametrize("text", SENTENCES)
def test_decode_undoes_encode(vocabulary, text):
    ids = vocabulary.encode(text)
    assert all(2 < i < vocabulary.pieces.get_piece_size() for i in ids)  # nothing unknown, no end of sequence
    assert vocabulary.decode(ids) == text


def test_batches_are_encoded_like_single_texts(vocabulary):
    texts = [*SENTENCES, "", "the <extra_id_3>", "<extra_id_0><extra_id_1>"]
    assert vocabulary.encode_batch(texts) == [vocabulary.encode(text) for text in texts]
    assert vocabulary.encode_batch([]) == []


def test_sentinels_in_a_text(vocabulary):
    text = "<extra_id_0> the cat <extra_id_1> on <extra_id_99>"
    ids = vocabulary.encode(text)
    assert [i for i in ids if vocabulary.is_sentinel(i)] == [vocabulary.sentinel(k) for k in (0, 1, 99)]
    assert ids[0] == vocabulary.sentinel(0) and ids[-1] == vocabulary.sentinel(99)
    assert vocabulary.decode(ids) == text
    with pytest.raises(DataError, match="Sentinel 100 "):
        vocabulary.encode("the <extra_id_100>")


def test_decode_shows_ids_of_a_padded_embedding_and_hides_padding(vocabulary):
    the = vocabulary.encode("the")
    assert vocabulary.decode([0, *the, vocabulary.size, 1]) == f"the <unused_{vocabulary.size}>"
    with pytest.raises(DataError, match="-1"):
        vocabulary.decode([-1])


@pytest.mark.parametrize("padding", [0, 28, 127])
def test_embedding_may_be_padded(vocabulary, padding):
    vocabulary.check(vocabulary.size + padding)


def test_vocabulary_larger_than_the_embedding(vocabulary):
    with pytest.raises(DataError, match=f"{vocabulary.size - 1} rows.*larger than the embedding"):
        vocabulary.check(vocabulary.size - 1)


def test_vocabulary_smaller_than_the_ids(vocabulary):
    with pytest.raises(DataError, match=r"spm\.model.* 32128 rows.*smaller than the ids"):
        vocabulary.check(32128)


def test_no_vocabulary_file(tmp_path):
    with pytest.raises(DataError, match=r"none\.model is missing.*SentencePiece"):
        Vocabulary.load(tmp_path / "none.model")


@pytest.mark.parametrize(
    "corrupt",
    [lambda b: b"", lambda b: b[: len(b) // 2 + 1], lambda b: b"\xff" + b, lambda b: b'{"text": 1}\n'],
)
def test_corrupt_vocabulary_file(tmp_path, pieces_path, corrupt, capfd):
    path = tmp_path / "bad.model"
    path.write_bytes(corrupt(pieces_path.read_bytes()))
    with pytest.raises(DataError, match=r"bad\.model: not a SentencePiece model"):
        Vocabulary.load(path)
    assert capfd.readouterr().err == ""


def test_other_special_tokens_than_t5(tmp_path):
    path = tmp_path / "llama.model"
    path.write_bytes(train_pieces(pad_id=-1, unk_id=0, bos_id=1, eos_id=2))
    with pytest.raises(DataError, match="padding is id -1 and end of sequence id 2, expected 0 and 1"):
        Vocabulary.load(path)


def test_vocabulary_of_the_small_trained_model(fixture_path):
    vocabulary = Vocabulary.load(fixture_path("switch_mini") / "spm.model")
    assert (vocabulary.size, vocabulary.sentinel(0)) == (4100, 4099)
    vocabulary.check(4100)
