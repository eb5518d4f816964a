"""A small Switch Transformer trained on windows of 120 tokens without end of sequence (see --checkpoint and FOLDER).

    python experiments/compress.py --config=configs/switch_mini.py:FOLDER --checkpoint=FOLDER --output=OUT

FOLDER holds spm.model, train.jsonl.gz and val.jsonl.gz. Its documents are joined and cut as in training.
"""

import pathlib

import common


def get_config(folder: str = "."):
    config = common.default_config()
    config.data.vocabulary = str(pathlib.Path(folder) / "spm.model")
    config.data.calibration = str(pathlib.Path(folder) / "train.jsonl.gz")
    config.data.validation = str(pathlib.Path(folder) / "val.jsonl.gz")
    config.data.num_calibration = 2_000
    config.data.num_validation = 900
    config.data.append_eos = False
    config.data.window = 120
    return config
