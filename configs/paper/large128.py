"""switch-large-128 (26 B parameters, 52.7 GB in bfloat16) with the paper's settings.

    python experiments/compress.py --config=configs/paper/large128.py --output=OUT \
      --checkpoint=gs://t5-data/pretrained_models/t5x/moe/switch_classic/large/e128/checkpoint_483100 \
      --config.data.vocabulary=SPM --config.data.calibration='c4-train.0000[01]-of-01024.json.gz' \
      --config.data.validation=c4-validation.00000-of-00008.json.gz

The paper, on one A6000: 30.2 minutes; loss 1.55 (bfloat16), 2.79 (round to nearest), 1.69 (ternary); experts 18.34x,
whole model 13.32x smaller. `--plan` lists what the run reads,
writes and holds in memory, and its time. Tables: `experiments/reproduce.py --table=4` with the same flags. Not run by
this project: neither the checkpoint nor C4 could be reached.
"""

import common


def get_config():
    config = common.default_config()
    config.model.preset = "switch_large_128"
    config.model.dtype = "bfloat16"
    config.codec.name = "dictionary"
    return config
