"""Small models of the other kinds of mixtures, trained as the carried model is, but shorter.

    python experiments/train.py --config=configs/train_other_moes.py:KIND --workdir=out/KIND

KIND: gated (experts as Switch-XXL's: wi_0, wi_1, wo), tokens_choose (top-2, GShard's routing) or experts_choose (in the
encoder each expert takes its top tokens; top-2 in the decoder). Six to eight minutes each on two CPU cores, beside
other work. What a parameter tree doesn't tell is then to be given, for instance:

    python experiments/compress.py --config=configs/tiny.py --checkpoint=out/experts_choose --output=out/compressed \
      --config.model.top_k=2 --config.model.experts_choose=1.0
"""

import pathlib
import runpy

KINDS = {
    "gated": dict(gated=True, tied=False),
    "tokens_choose": dict(gated=True, tied=False, top_k=2),
    "experts_choose": dict(gated=True, tied=False, top_k=2, experts_choose=1.0),
}


def get_config(kind: str = "gated"):
    if kind not in KINDS:
        raise ValueError(f"configs/train_other_moes.py:{kind}: expected one of {', '.join(KINDS)}.")
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("train_tiny.py")))["get_config"]()
    config.model.update(d_model=96, d_ff=192, num_heads=6, num_encoder_layers=2, num_decoder_layers=2)
    config.model.update(encoder_sparse_layers=(0, 1), decoder_sparse_layers=(0, 1), **KINDS[kind])
    config.train.update(steps=700, tokens_per_batch=2_560)
    return config
