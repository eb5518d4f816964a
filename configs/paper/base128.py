"""switch-base-128 (7.4 B parameters, 14.9 GB in bfloat16) with the paper's settings.

    python experiments/compress.py --config=configs/paper/base128.py --output=OUT \
      --checkpoint=gs://t5-data/pretrained_models/t5x/moe/switch_classic/base/e128/checkpoint_550000 \
      --config.data.vocabulary=SPM --config.data.calibration='c4-train.0000[01]-of-01024.json.gz' \
      --config.data.validation=c4-validation.00000-of-00008.json.gz

The paper, on one A6000: 14 minutes; loss 1.73 (bfloat16), 4.54 (round to nearest), 1.99 (ternary); experts 17.06x,
whole model 11.76x smaller. `--plan` lists what the run reads,
writes and holds in memory, and its time. Tables: `experiments/reproduce.py --table=4` with the same flags. Not run by
this project: neither the checkpoint nor C4 could be reached.
"""

import common


def get_config():
    config = common.default_config()
    config.model.preset = "switch_base_128"
    config.model.dtype = "bfloat16"
    config.codec.name = "dictionary"
    return config
