"""The carried decoder: a small OLMoE, trained on the same text as the carried Switch Transformer.

    python experiments/train.py --config=configs/train_olmoe.py --workdir=out/tiny_olmoe

3.94 M parameters: 4 layers of 16 experts, top-4. 2800 steps; 51 minutes of a share of one busy CPU core. Matrices start
as OLMoE's own are drawn (deviation .02): with larger ones, what layers add drowns the embedding for some hundred steps.
"""

import pathlib

from ml_collections import config_dict

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[1] / "experiments"


def get_config() -> config_dict.ConfigDict:
    return config_dict.create(
        family="olmoe",
        seed=0,
        data=dict(
            vocabulary=str(EXPERIMENTS / "tiny_olmoe/tokenizer.json"),
            train=str(EXPERIMENTS / "tiny_model/train.jsonl.gz"),
        ),
        model=dict(
            d_model=128,
            num_layers=4,
            num_heads=4,
            num_kv_heads=4,
            head_dim=32,
            d_ff=128,
            num_experts=16,
            top_k=4,
            max_length=1024,
        ),
        train=dict(
            steps=2_800,
            window=256,
            tokens_per_batch=2_048,
            optimizer="adamw",
            learning_rate=3e-3,
            weight_decay=0.1,
            warmup_steps=100,
            initial_deviation=0.02,
            expert_output_scale=1.0,
            balance_loss=0.003,
            router_z_loss=1e-4,
            log_every=50,
        ),
    )
