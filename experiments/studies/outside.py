"""What other tools make of the same experts at 2, 3 and 4 bits: points for `studies/frontier.py --outside`.

    pip install hqq torch
    python experiments/studies/outside.py --tool=hqq --config=configs/tiny_olmoe.py --output=hqq.json

    pip install auto-round torch
    python experiments/studies/outside.py --tool=auto_round --config=configs/tiny_olmoe.py --output=auto_round.json

hqq: Half-Quadratic Quantization (Badri and Shaji 2023), not calibrated; any model that is read here.
auto_round: AutoRound (Cheng et al. 2023), tuned with the first calibration windows; a decoder in Hugging Face's layout.

The loss is that of the matrices that a tool dequantizes to, measured as all others: same tokens, same code. Bits are of
the arrays that it keeps of experts: packed weights, scales and zeros, with what its packing wastes.
"""

import importlib
import importlib.metadata
import pathlib
import sys
import tempfile
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from absl import app, flags

from qmoe_jax import files, reports, streaming
from qmoe_jax.checkpoints.in_memory import InMemoryCheckpoint

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # experiments/
import command_line
import common
from studies.laboratory import Laboratory

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = common.define_config("config", str(ROOT / "configs/tiny_olmoe.py"), "Data and settings.")
CHECKPOINT = common.define_checkpoint("Uncompressed checkpoint.")
TOOL = flags.DEFINE_enum("tool", "hqq", ["hqq", "auto_round"], "Which.")
OUTPUT = flags.DEFINE_string("output", "out/outside.json", "JSON file for the points.")
BITS = flags.DEFINE_list("bits", ["2", "3", "4"], "Of a weight.")
GROUPS = flags.DEFINE_list("group_sizes", ["64", "128"], "Weights that share a scale and a zero.")
ITERATIONS = flags.DEFINE_integer("iterations", 200, "AutoRound's steps for a layer.")
SAMPLES = flags.DEFINE_integer("samples", 128, "AutoRound's calibration windows.")


class Quantized(NamedTuple):
    """Experts' parameters by name, float32 [experts, in, out], as dequantized; and bytes kept of all of them."""

    experts: Mapping[str, np.ndarray]
    nbytes: int


def hqq(lab: Laboratory, bits: int, group_size: int) -> Quantized:
    """Every matrix [out, in] as a linear layer of its own, as HQQ's users have it: scales and zeros are float16."""
    import torch
    from hqq.core.quantize import Quantizer

    def quantize(matrix: np.ndarray) -> tuple[np.ndarray, int]:
        packed, meta = Quantizer.quantize(
            torch.from_numpy(np.ascontiguousarray(matrix, np.float32)),
            nbits=bits,
            group_size=group_size,
            axis=1,
            compute_dtype=torch.float16,
            device="cpu",
        )
        scale, zero = (meta[name].to(torch.float16) for name in ("scale", "zero"))
        values = Quantizer.dequantize(packed, {**meta, "scale": scale, "zero": zero, "compute_dtype": torch.float16})
        return values.float().numpy(), sum(t.numel() * t.element_size() for t in (packed, scale, zero))

    experts, nbytes = {}, 0
    for name in filter(lab.checkpoint.is_expert, lab.checkpoint.specs):
        matrices = [quantize(kernel.T) for kernel in lab.checkpoint.read(name)]  # [in, out] each
        experts[name] = np.stack([values.T for values, _ in matrices])
        nbytes += sum(n for _, n in matrices)
    return Quantized(experts, nbytes)


def auto_round(lab: Laboratory, bits: int, group_size: int) -> Quantized:
    """Of experts only; other layers are left as they are. Bytes: of the files in its own format."""
    import torch
    import transformers
    from auto_round import AutoRound
    from safetensors.torch import load_file

    checkpoint = lab.checkpoint
    windows = [torch.from_numpy(tokens.astype(np.int64))[None] for (tokens,) in lab.calibration(1.0)][: SAMPLES.value]
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    tool = AutoRound(
        model,
        transformers.AutoTokenizer.from_pretrained(checkpoint.path),
        scheme=f"W{bits}A16",
        group_size=group_size,
        dataset=windows,
        nsamples=len(windows),
        seqlen=windows[0].shape[1],
        iters=ITERATIONS.value,
        ignore_layers="self_attn,lm_head",  # and routers, by itself
        device_map="cpu",
        amp=False,
        enable_torch_compile=False,
    )
    model, _ = tool.quantize()
    tensors = {name: value.float().numpy() for name, value in model.state_dict().items() if ".experts." in name}
    names = checkpoint.family.names["huggingface"]
    experts = {
        name: np.stack([tensors[t].T for t in names.tensors(name, checkpoint.config).names])
        for name in filter(checkpoint.is_expert, checkpoint.specs)
    }
    with tempfile.TemporaryDirectory() as directory:
        tool.save_quantized(directory, format="auto_round")
        stored = [load_file(path).items() for path in pathlib.Path(directory).rglob("*.safetensors")]
    kept = [tensor for file in stored for name, tensor in file if ".experts." in name]
    return Quantized(experts, sum(t.numel() * t.element_size() for t in kept))


TOOLS = {"hqq": (hqq, "hqq"), "auto_round": (auto_round, "auto-round")}  # and their packages


def main(_):
    quantize, package = TOOLS[TOOL.value]
    try:
        title = f"{TOOL.value} {importlib.metadata.version(package)}"
        importlib.import_module(TOOL.value)
        importlib.import_module("torch")
    except ImportError as e:
        raise ValueError(f"--tool={TOOL.value}: {e}. It is no part of this project: pip install {package} torch") from e
    lab = Laboratory(CONFIG.value, common.checkpoint_path(CHECKPOINT, CONFIG.value))
    params = {name: lab.checkpoint.read(name) for name in lab.checkpoint.specs}
    weights = sum(value.size for name, value in params.items() if lab.checkpoint.is_expert(name))
    points = []
    for group_size in map(int, GROUPS.value):
        for bits in map(int, BITS.value):
            quantized = quantize(lab, bits, group_size)
            model = InMemoryCheckpoint(lab.checkpoint.config, {**params, **quantized.experts})
            loss = streaming.run(model, lab.validation, lab.memory, what=f"{title}, {bits} bits").summary()["loss"]
            point = dict(
                name=f"{title}, groups of {group_size}",
                bits=f"{bits} bits",
                codec="its own",
                target_bits=None,
                bits_per_weight=8 * quantized.nbytes / weights,
                entropy_per_weight=None,
                zeros=None,
                loss=loss,
                above_bfloat16=loss - lab.bfloat16["loss"],
            )
            points.append(point)
            reports.say(
                f"{point['name']}, {bits} bits: {point['bits_per_weight']:.3f} stored, "
                f"{point['above_bfloat16']:+.4f} nats"
            )
    report = dict(tool=title, bfloat16=lab.bfloat16, points=points, config=common.without_folders(lab.config))
    files.write_json(OUTPUT.value, report)
    reports.say(f"{OUTPUT.value}: {len(points)} points, for studies/frontier.py --outside={OUTPUT.value}")


if __name__ == "__main__":
    app.run(command_line.without_traceback(main))
