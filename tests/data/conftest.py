import pytest
from tiny_vocabulary import train_pieces

from qmoe_jax.models.switch import Vocabulary


@pytest.fixture(scope="session")
def pieces_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "spm.model"
    path.write_bytes(train_pieces())
    return path


@pytest.fixture(scope="session")
def vocabulary(pieces_path):
    return Vocabulary.load(pieces_path)
