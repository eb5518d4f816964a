"""The library as a library: one layer of the carried model is compressed, looked into, and run beside the original.

    python experiments/example.py

Seconds on two CPU cores. Read it from top to bottom; compress.py does the same to all layers, and stores them.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # LAPACK's threads fight XLA's; set before jax is imported.

import pathlib

import flax
import jax
import numpy as np
import optax
from absl import app, flags

import qmoe_jax
from qmoe_jax import experiment, reports, streaming
from qmoe_jax.models.switch import Vocabulary, load_examples, make_batches
from qmoe_jax.quantization import gptq
from qmoe_jax.quantization.output_error import output_error
from qmoe_jax.quantization.pipeline import expert_hessians, expert_sharding

MODEL = pathlib.Path(__file__).resolve().parent / "tiny_model"
LAYER = flags.DEFINE_string("layer", "encoder/layers_1", "Sparse layer to compress.")
CODEC = flags.DEFINE_enum("codec", "gap", list(qmoe_jax.codecs.CODECS), "How symbols become bytes.")


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
    # `streaming.run` takes documents through the model layer by layer. A hook sees each group of experts with the
    # tokens that the router sent them, and returns the matrices to go on with.
    compressed: dict[str, qmoe_jax.CompressedExperts] = {}  # by matrix: wi, wo
    errors = None

    def quantize_one_layer(group: streaming.ExpertGroup):
        nonlocal errors
        if group.layer != LAYER.value:
            return group.kernels
        sharding = expert_sharding(config.num_experts)
        kernels = {m: jax.numpy.asarray(k, "float32") for m, k in group.kernels.items()}  # [experts, in, out]
        hessians = expert_hessians(kernels, group.inputs, group.tokens, sharding)  # 2/n X'X of each matrix's inputs
        dense = {}
        for matrix, kernel in kernels.items():
            W = kernel.swapaxes(1, 2)  # [experts, out, in]: rows are outputs, here as in the paper.
            quantized = gptq(W, hessians["wo" if matrix == "wo" else "wi"], bits=1.5)
            symbols, levels = np.asarray(quantized.symbols), np.asarray(quantized.levels)
            compressed[matrix] = qmoe_jax.CompressedExperts.from_symbols(symbols, levels, CODEC.value)
            dense[matrix] = compressed[matrix].to_dense().swapaxes(1, 2)
        # |y - ŷ|² / |y|² of each expert, on a few of its tokens. (compress.py measures on tokens not calibrated on.)
        errors = output_error(kernels, dense, group.inputs, group.tokens, group.gates, sharding).relative()
        return dense

    memory = streaming.Settings(experts_per_group=config.num_experts)
    streaming.run(checkpoint, calibration, memory, hook=quantize_one_layer, what="compressing one layer")

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
    print("\nshare of each expert's output that is lost:", *("-" if e is None else f"{e:.1%}" for e in errors))

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
    app.run(experiment.without_traceback(main))
