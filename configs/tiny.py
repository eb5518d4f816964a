"""Compress, evaluate or generate with the small model that the project carries (see experiments/tiny_model).

    python experiments/compress.py --config=configs/tiny.py --output=out/tiny
    python experiments/evaluate.py --config=configs/tiny.py --checkpoint=out/tiny
    python experiments/generate.py --config=configs/tiny.py --checkpoint=out/tiny

Half a minute to a minute on two CPU cores. The default of all three.
"""

import pathlib

import common

MODEL = pathlib.Path(__file__).resolve().parents[1] / "experiments/tiny_model"


def get_config():
    config = common.default_config()
    config.model.checkpoint = str(MODEL)
    config.data.vocabulary = str(MODEL / "spm.model")
    config.data.calibration = str(MODEL / "train.jsonl.gz")
    config.data.validation = str(MODEL / "validation.jsonl.gz")
    config.data.num_calibration = 2_000
    config.data.num_validation = 500
    config.generation.prompt = "def __init__(self, name, value): self.name = <extra_id_0> self.value = <extra_id_1>"
    return config
