"""QMoE in JAX: mixture-of-experts models below one bit per parameter, from the checkpoints they come in.

qmoe_jax.compress("checkpoint", "compressed", vocabulary="spm.model", calibration="train.jsonl", validation="val.jsonl")

model, params = qmoe_jax.load("compressed")     # of any layout
logits = qmoe_jax.forward(model, params, *tokens)
"""

from qmoe_jax import codecs, kernels, moved, quantization
from qmoe_jax.api import compress, finetune, forward, generate, load
from qmoe_jax.checkpoints import CheckpointError, open_checkpoint
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.models.expert_parallel import expert_mesh
from qmoe_jax.models.families import FAMILIES, PRESETS
from qmoe_jax.models.switch import ModelConfig, SwitchTransformer
from qmoe_jax.version import __version__

moved.install()

__all__ = [
    "FAMILIES",
    "PRESETS",
    "CheckpointError",
    "CompressedExperts",
    "ModelConfig",
    "SwitchTransformer",
    "__version__",
    "codecs",
    "compress",
    "expert_mesh",
    "finetune",
    "forward",
    "generate",
    "kernels",
    "load",
    "open_checkpoint",
    "quantization",
]
