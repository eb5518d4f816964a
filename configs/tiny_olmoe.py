"""Compress, evaluate or generate with the small OLMoE that the project carries (see experiments/tiny_olmoe).

    python experiments/compress.py --config=configs/tiny_olmoe.py --output=out/tiny_olmoe
    python experiments/evaluate.py --config=configs/tiny_olmoe.py --checkpoint=out/tiny_olmoe
    python experiments/generate.py --config=configs/tiny_olmoe.py --checkpoint=out/tiny_olmoe

Without --checkpoint: the carried model itself. Loss is per token in windows of 256 tokens, as the model was trained;
validation windows are those of the first 750 documents.
"""

import pathlib

import common

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[1] / "experiments"


def get_config():
    config = common.default_config()
    config.model.checkpoint = str(EXPERIMENTS / "tiny_olmoe")
    config.data.vocabulary = str(EXPERIMENTS / "tiny_olmoe/tokenizer.json")
    config.data.calibration = str(EXPERIMENTS / "tiny_model/train.jsonl.gz")
    config.data.validation = str(EXPERIMENTS / "tiny_model/validation.jsonl.gz")
    config.data.window = 256
    config.data.num_calibration = 400
    config.data.num_validation = 300
    return config
