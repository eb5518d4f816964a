"""switch-c-2048 (1.6 T parameters, 3.1 TB in bfloat16) with the paper's settings.

    python experiments/compress.py --config=configs/paper/c2048.py --output=OUT \
      --checkpoint=gs://t5-data/pretrained_models/t5x/moe/switch_classic/c/e2048/checkpoint_611800 \
      --config.data.vocabulary=SPM --config.data.calibration='c4-train.0000[01]-of-01024.json.gz' \
      --config.data.validation=c4-validation.00000-of-00008.json.gz

Calibration has 160 000 documents instead of 10 000, since there are 16 times as many experts. bfloat16 and
round-to-nearest aren't measured beside it: each would read the 3.1 TB once more.

The paper, on one A6000: 16 hours; loss 1.18 (bfloat16), 2.15 (round to nearest), 1.26 (ternary); experts 20.07x, whole
model 19.81x smaller (158.6 GB). `--plan` lists what the run reads,
writes and holds in memory, and its time. Tables: `experiments/reproduce.py --table=4` with the same flags. Not run by
this project: neither the checkpoint nor C4 could be reached.
"""

import common


def get_config():
    config = common.default_config()
    config.model.preset = "switch_c_2048"
    config.model.dtype = "bfloat16"
    config.data.num_calibration = 160_000
    config.compare = False
    config.codec.name = "dictionary"
    return config
