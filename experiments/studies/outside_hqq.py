"""What HQQ makes of the same experts at 2, 3 and 4 bits: points for `studies/frontier.py --outside`.

    pip install hqq torch
    python experiments/studies/outside_hqq.py --config=configs/tiny_olmoe.py --output=hqq.json

HQQ (Badri and Shaji 2023) takes every expert's matrix, [out, in], as a linear layer of its own, as it is used; it is
not calibrated. The loss is that of the matrices that it dequantizes to, measured as all others: same tokens, same code.
Bits are of the arrays that it keeps of a matrix, packed weights with scales and zeros, in float16.
"""

import pathlib
import sys
from typing import Any

import numpy as np
from absl import app, flags

from qmoe_jax import files, reports, streaming
from qmoe_jax.checkpoints.in_memory import InMemoryCheckpoint

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # experiments/
import common
from studies.laboratory import Laboratory

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = common.define_config("config", str(ROOT / "configs/tiny_olmoe.py"), "Data and settings.")
CHECKPOINT = common.define_checkpoint("Uncompressed checkpoint.")
OUTPUT = flags.DEFINE_string("output", "out/hqq.json", "JSON file for the points.")
BITS = flags.DEFINE_list("bits", ["2", "3", "4"], "Of a weight.")
GROUPS = flags.DEFINE_list("group_sizes", ["64", "128"], "Weights that share a scale and a zero.")


def hqq() -> tuple[Any, Any, str]:
    """(torch, HQQ's Quantizer, its version). Raises ValueError where they aren't installed."""
    try:
        import importlib.metadata

        import torch
        from hqq.core.quantize import Quantizer
    except ImportError as e:
        raise ValueError(f"HQQ cannot be imported ({e}). It is no part of this project: pip install hqq torch") from e
    return torch, Quantizer, importlib.metadata.version("hqq")


def quantize(matrix: np.ndarray, bits: int, group_size: int) -> tuple[np.ndarray, int]:
    """A matrix float [out, in] as HQQ stores it: the values, float32 [out, in], and bytes kept."""
    torch, quantizer, _ = hqq()
    packed, meta = quantizer.quantize(
        torch.from_numpy(np.ascontiguousarray(matrix, np.float32)),
        nbits=bits,
        group_size=group_size,
        axis=1,
        compute_dtype=torch.float16,
        device="cpu",
    )
    scale, zero = (meta[name].to(torch.float16) for name in ("scale", "zero"))
    values = quantizer.dequantize(packed, {**meta, "scale": scale, "zero": zero, "compute_dtype": torch.float16})
    nbytes = sum(t.numel() * t.element_size() for t in (packed, scale, zero))
    return values.float().numpy(), nbytes


def quantize_experts(checkpoint, bits: int, group_size: int) -> tuple[InMemoryCheckpoint, float]:
    """The model with dequantized experts, and bits per expert weight."""
    params, nbytes, weights = {}, 0, 0
    for name in checkpoint.specs:
        params[name] = checkpoint.read(name)
        if checkpoint.is_expert(name):
            matrices = [quantize(kernel.T, bits, group_size) for kernel in params[name]]  # [in, out] each
            params[name] = np.stack([values.T for values, _ in matrices])
            nbytes, weights = nbytes + sum(n for _, n in matrices), weights + params[name].size
    return InMemoryCheckpoint(checkpoint.config, params), 8 * nbytes / weights


def main(_):
    _, _, version = hqq()
    path = common.checkpoint_path(CHECKPOINT, CONFIG.value)
    lab = Laboratory(CONFIG.value, path)
    points = []
    for group_size in map(int, GROUPS.value):
        for bits in map(int, BITS.value):
            model, stored = quantize_experts(lab.checkpoint, bits, group_size)
            loss = streaming.run(model, lab.validation, lab.memory, what=f"HQQ, {bits} bits").summary()["loss"]
            point = dict(
                name=f"HQQ {version}, groups of {group_size}",
                bits=f"{bits} bits",
                codec="HQQ's",
                target_bits=None,
                bits_per_weight=stored,
                entropy_per_weight=None,
                zeros=None,
                loss=loss,
                above_bfloat16=loss - lab.bfloat16["loss"],
                seconds=None,
            )
            points.append(point)
            reports.say(f"{point['name']}, {bits} bits: {stored:.3f} stored, {point['above_bfloat16']:+.4f} nats")
    report = dict(
        tool=f"hqq {version}", bfloat16=lab.bfloat16, points=points, config=common.without_folders(lab.config)
    )
    files.write_json(OUTPUT.value, report)
    reports.say(f"{OUTPUT.value}: {len(points)} points, for studies/frontier.py --outside={OUTPUT.value}")


if __name__ == "__main__":
    app.run(common.without_traceback(main))
