"""The library as a library: one layer of the carried model is compressed, looked into, and run beside the original.

    python experiments/example.py

Seconds on two CPU cores. Read it from top to bottom; compress.py does the same to all layers, and stores them.
"""

import interrupts  # noqa: F401, before all that takes time

# isort: split

import pathlib

import flax
import jax
import numpy as np
import optax
from absl import app, flags

import command_line
import qmoe_jax
from qmoe_jax import reports, streaming
from qmoe_jax.models.switch import Vocabulary, load_examples, make_batches
from qmoe_jax.quantization import gptq
from qmoe_jax.quantization.output_error import output_error
from qmoe_jax.quantization.sharding import expert_sharding
from qmoe_jax.quantization.statistics import Samples, hidden_statistics, input_hessians

MODEL = pathlib.Path(__file__).resolve().parent / "tiny_model"
LAYER = flags.DEFINE_string("layer", "encoder/layers_1", "Sparse layer to compress.")
CODEC = flags.DEFINE_enum("codec", "gap", list(qmoe_jax.codecs.CODECS), "How symbols become bytes.")


class OneLayer:
    """Compresses the experts of one layer, and leaves the others as they are. See `streaming.Quantizer`."""

    def __init__(self, config: qmoe_jax.ModelConfig):
        self.own = range(config.num_experts)  # Of several processes, each has a part.
        self.sample = {"encoder": np.zeros(0, int), "decoder": np.zeros(0, int)}  # No tokens beside the experts' own.
        self.compressed: dict[str, qmoe_jax.CompressedExperts] = {}  # by matrix: wi, wo
        self.errors: list[float | None] = []

    def __call__(self, group: streaming.ExpertGroup) -> dict:
        if group.layer != LAYER.value:
            return group.kernels
        sharding = expert_sharding(len(self.own))
        kernels = {m: jax.numpy.asarray(k, "float32") for m, k in group.kernels.items()}  # [experts, in, out]
        samples = [Samples(tokens, np.ones(len(tokens), np.float32)) for tokens in group.tokens]
        given = (group.inputs, samples, sharding)
        # 2/n X'X of each matrix's inputs; those of the last one are what the others make.
        hidden, _ = hidden_statistics(group.expert, kernels, kernels, *given, residuals=False)
        hessians = {"wi": input_hessians(*given), "wo": hidden}
        dense = {}
        for matrix, kernel in kernels.items():
            W = kernel.swapaxes(1, 2)  # [experts, out, in]: rows are outputs, here as in the paper.
            quantized = gptq(W, hessians[matrix], bits=1.5)
            symbols, levels = np.asarray(quantized.symbols), np.asarray(quantized.levels)
            self.compressed[matrix] = qmoe_jax.CompressedExperts.from_symbols(symbols, levels, CODEC.value)
            dense[matrix] = self.compressed[matrix].to_dense().swapaxes(1, 2)
        # |y - ŷ|² / |y|² of each expert, on a few of its tokens. (compress.py measures on tokens not calibrated on.)
        measured = (group.inputs, group.tokens, group.gates, sharding)
        self.errors = output_error(group.expert, kernels, dense, *measured).relative()
        return dense

    def begin(self, layer, rows, routed) -> None:
        """Which tokens go where is not asked for: each group brings its own."""

    def finish(self, layer: str) -> None:
        """Nothing is left to be done after a layer."""


def main(_):
    # --- Load --------------------------------------------------------------------------------------------------------
    # A checkpoint is read lazily: so far there are only names, shapes, and the architecture that they tell.
    checkpoint = qmoe_jax.open_checkpoint(MODEL)
    config = checkpoint.config
    if LAYER.value not in config.sparse_layers:
        raise ValueError(f"--layer: found {LAYER.value!r}, expected one of {', '.join(config.sparse_layers)}.")
    vocabulary = Vocabulary.load(str(MODEL / "spm.model"))
    # Pairs of encoder and decoder tokens, by span corruption; of similar lengths, so that everything compiles once.
    calibration, validation = (
        [pair for pair in load_examples(str(MODEL / file), vocabulary, 400).pairs if 64 < len(pair[0]) <= 96]
        for file in ("train.jsonl.gz", "validation.jsonl.gz")
    )
    print(f"{config.num_experts} experts, {config.d_model} -> {config.d_ff} -> {config.d_model}, in each of:")
    print(f"  {', '.join(config.sparse_layers)}")

    # --- Compress one layer ------------------------------------------------------------------------------------------
    # `streaming.run` takes documents through the model layer by layer. A quantizer sees each group of experts with the
    # tokens that the router sent them, and returns the matrices to go on with.
    quantizer = OneLayer(config)
    memory = streaming.Settings(experts_per_group=config.num_experts)
    streaming.run(checkpoint, calibration, memory, quantizer=quantizer, what="compressing one layer")
    compressed = quantizer.compressed

    # --- Look inside -------------------------------------------------------------------------------------------------
    rows = []
    for matrix, experts in compressed.items():
        weights, zeros = np.prod(experts.shape), float((experts.symbols() == 0).mean())
        shape = " x ".join(map(str, experts.shape))
        rows.append([matrix, shape, experts.nbytes, 8 * experts.nbytes / weights, zeros])
    header = ["matrix", "experts x out x in", "bytes", "bits/weight", "zeros"]
    print(f"\n{LAYER.value}, ternary, codec {CODEC.value}:\n\n{reports.table(header, rows)}")

    experts = compressed["wi"]
    low, high = experts.levels[0, 0]
    print("\nexpert 0 of wi, its first rows (. is zero, - the row's lower level, + its upper):")
    for row in experts.symbols()[0, :4, :64]:
        print("  " + "".join(".-+"[s] for s in row))
    print(f"levels of the first row: {low:.4f} and {high:.4f}")
    lost = ("-" if e is None else f"{e:.1%}" for e in quantizer.errors)
    print("\nshare of each expert's output that is lost:", *lost)

    # --- Run compressed against dense --------------------------------------------------------------------------------
    # `CompressedExperts` take the place of kernels in the parameter tree, and go through `jax.jit` as bytes.
    model, params = qmoe_jax.load(MODEL)
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    for matrix, experts in compressed.items():
        flat[f"{LAYER.value}/mlp/expert/{matrix}/kernel"] = experts
    compressed_params = flax.traverse_util.unflatten_dict(flat, sep="/")

    batch = make_batches(validation, tokens_per_batch=8_192)[0]
    targets = batch.decoder_target_tokens
    for name, p in (("dense", params), ("compressed", compressed_params)):
        logits = qmoe_jax.forward(model, p, *batch[1:])  # [documents, length, vocabulary]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        print(f"{name:>10}: {losses.mean(where=targets > 0):.4f} nats per token")


if __name__ == "__main__":
    app.run(command_line.without_traceback(main))
