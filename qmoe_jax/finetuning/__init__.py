"""Fine-tuning of what isn't quantized, towards the original model's predictions; symbols stay.

`finetune_examples` is everything, with what it needs given as values; `api.finetune` is what people call.
"""

from qmoe_jax.finetuning.finetune import finetune_examples, identity_of, recovered
from qmoe_jax.finetuning.layerwise import TARGETS, finetune_layers
from qmoe_jax.finetuning.parts import PARTS
from qmoe_jax.finetuning.training import Settings

__all__ = ["PARTS", "TARGETS", "Settings", "finetune_examples", "finetune_layers", "identity_of", "recovered"]
