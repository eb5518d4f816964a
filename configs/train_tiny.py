"""The carried model: a small Switch Transformer, trained on the Python documentation of a Python installation.

    python experiments/train.py --config=configs/train_tiny.py --workdir=out/train_tiny

5.6 M parameters: 3 + 3 layers, every MLP sparse with 8 experts. The text is made by experiments/tools/make_text.py.
A quarter of an hour on two busy CPU cores.

Every layer is sparse, the router starts wide, the experts' outputs start large and the balance loss is small: with the
usual 0.01 a short training leaves the router's probabilities near 1 / experts, and then the experts hardly matter.
"""

import pathlib

from ml_collections import config_dict

MODEL = pathlib.Path(__file__).resolve().parents[1] / "experiments/tiny_model"


def get_config() -> config_dict.ConfigDict:
    return config_dict.create(
        family="switch",
        seed=0,
        data=dict(
            vocabulary=str(MODEL / "spm.model"),
            train=str(MODEL / "train.jsonl.gz"),
        ),
        model=dict(
            d_model=128,
            d_ff=384,
            num_heads=8,
            head_dim=16,
            num_encoder_layers=3,
            num_decoder_layers=3,
            num_experts=8,
            encoder_sparse_layers=(0, 1, 2),
            decoder_sparse_layers=(0, 1, 2),
        ),
        train=dict(
            steps=3_000,
            tokens_per_batch=5_120,  # padding included
            optimizer="adafactor",
            learning_rate=0.02,  # relative to a parameter's scale
            warmup_steps=100,
            expert_output_scale=2.5,
            capacity_factor=2.0,
            balance_loss=0.003,
            router_z_loss=1e-4,
            log_every=100,
        ),
    )
