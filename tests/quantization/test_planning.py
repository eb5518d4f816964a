"""Plans of compressions: bytes counted against published sizes, XLA's own accounts and measured files."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qmoe_jax import streaming
from qmoe_jax.compression import planning, rehearsal
from qmoe_jax.models.families import PRESETS, family_of, preset
from qmoe_jax.models.switch import SpanCorruption
from qmoe_jax.quantization import gptq
from qmoe_jax.quantization.methods import METHODS
from qmoe_jax.quantization.rate_distortion import rate_distortion
from qmoe_jax.quantization.settings import QuantizationSettings

PAPER = QuantizationSettings()
C2048, TASK = preset("switch_c_2048"), SpanCorruption()
WORK = planning.greatest_workload(TASK, 160_000, 128, 568)


def plan(config=C2048, work=WORK, quantization=PAPER, is_cpu=False, resident=0, **memory):
    memory = streaming.Settings(dtype=jnp.bfloat16, **memory)
    return planning.plan(
        config, work, memory, quantization, grids=planning.grids_of(config), is_cpu=is_cpu, resident_bytes=resident
    )


def test_documents_of_568_tokens_are_512_for_the_encoder():
    work = planning.greatest_workload(TASK, 10, 2, 568)
    assert work.longest == {"encoder": 512, "decoder": 114}
    assert (work.tokens["encoder"], work.calibration["encoder"], work.documents) == (12 * 512, 10 * 512, 12)


def test_workload_of_documents():
    pairs = [(np.ones(5), np.ones(3)), (np.ones(7), np.ones(9)), (np.ones(2), np.ones(4))]
    found = planning.workload(TASK, pairs, 2)
    tokens, calibration = {"encoder": 14, "decoder": 2 + 8 + 3}, {"encoder": 12, "decoder": 10}
    assert found == planning.Workload(tokens, calibration, {"encoder": 7, "decoder": 8}, 3)
    assert (found.to_json()["encoder_tokens"], found.to_json()["decoder_calibration"]) == (14, 10)


def test_c2048_from_its_name():
    found = plan(weights_bytes=8 << 30)
    assert found["read_bytes"] == pytest.approx(2 * 3142e9, rel=0.005)  # float32; the paper's table 6 has bfloat16
    assert found["write_bytes"] == pytest.approx(158.6e9, rel=0.01)  # likewise
    assert found["chunks_per_layer"] == 2 * 8 * 10 * 24
    assert (found["blocks_per_layer"], found["groups_per_layer"], found["spilled"]) == (8, 128, True)
    assert found["scratch_bytes"] == 2 * 256 * 2 * 2080 * 6144 * 2
    assert found["host_bytes"]["experts read"] <= 8 << 30
    # Inputs and residual stream of all tokens, bfloat16, and a little for routing.
    assert found["host_bytes"]["activations"] == pytest.approx(2 * 160_128 * 512 * 2080 * 2, rel=0.05)
    assert found["device_bytes"]["largest step"] > 16 * 4 * (2080**2 + 6144**2 + 2 * 2080 * 6144)
    assert found["peak_device_bytes"] < 80e9
    assert plan(weights_bytes=64 << 30)["scratch_bytes"] == 0


def test_activations_in_files_are_not_in_memory():
    found = plan(activations="somewhere")
    assert found["host_bytes"]["activations"] == 0
    assert found["activation_file_bytes"] == plan()["host_bytes"]["activations"]


def test_committed_activations_are_the_new_beside_the_old():
    encoder, decoder = 160_128 * 512, 160_128 * 114
    assert plan()["progress_file_bytes"] == max(2 * encoder, encoder + 2 * decoder) * 2080 * 2


def test_on_a_cpu_the_largest_step_is_in_host_memory():
    cpu, gpu = plan(is_cpu=True), plan()
    assert cpu["peak_host_bytes"] == gpu["peak_host_bytes"] + cpu["device_bytes"]["largest step"]


def test_a_bound_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="weights_bytes: found 1,000,000"):
        plan(weights_bytes=1_000_000)


@pytest.mark.parametrize("name", PRESETS)
def test_sizes_add_up(name):
    size = planning.sizes(preset(name))
    assert size.layer * len(preset(name).sparse_layers) == size.experts
    assert 0 < size.dense < size.experts
    work = planning.greatest_workload(family_of(preset(name)).task, 16_000, 128, 568)
    assert all(isinstance(v, str) and v for row in planning.rows(plan(preset(name), work)) for v in row)


@pytest.mark.parametrize("shape", [(2, 128, 256)])
@pytest.mark.parametrize("method", ["gptq", "rd"])
def test_temporaries_are_at_least_those_of_xla(method, shape):
    experts, rows, columns = shape
    W, H = (jax.ShapeDtypeStruct((experts, n, columns), jnp.float32) for n in (rows, columns))
    if method == "gptq":
        step, arguments = functools.partial(gptq, bits=1.5, activation_order=True), (W, H)
    else:
        lagrangian = jax.ShapeDtypeStruct((experts, rows), jnp.float32)
        step, arguments = functools.partial(rate_distortion, refits=2), (W, H, lagrangian)
    xla = jax.jit(step).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    of_H, of_W, *_ = METHODS[method]().needs()
    ours = 4 * experts * columns * (of_H * columns + of_W * rows)
    assert 0.85 * xla < ours < 2.5 * xla


# --- Rehearsals ------------------------------------------------------------------------------------------------------


def test_projection_multiplies_units():
    units = dict.fromkeys(("hessians", "quantization", "encoding", "experts", "attention encoder"), 0.0)
    units |= {"attention decoder": 0.0, "reading": 0.0, "writing": 0.0}

    def seconds(**measured):
        return rehearsal.project(C2048, WORK, PAPER, units | measured)

    assert seconds(quantization=1.0)["total"] == 30 * 2048
    assert seconds(hessians=1.0)["hessians"] == 160_000 * 15 * (512 + 114)
    assert seconds(experts=1.0)["experts"] == 160_128 * 15 * (512 + 114)
    assert seconds(**{"attention decoder": 1.0})["attention"] == 160_128 * 15 * 114
    assert seconds(writing=1.0)["writing"] == pytest.approx(157e9, rel=0.01)
    # Reading goes on beside the rest.
    assert seconds(reading=1e-9, quantization=1.0)["total"] == 30 * 2048
    assert seconds(reading=1.0)["total"] == plan()["read_bytes"]


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_every_stage_is_measured(method, tmp_path):
    config = dataclasses.replace(
        preset("switch_base_8"), d_model=16, d_ff=24, num_heads=2, head_dim=8, vocab_size=64,
        num_encoder_layers=2, num_decoder_layers=2, encoder_sparse_layers=(1,), decoder_sparse_layers=(0, 1),
    )  # fmt: skip
    work = planning.greatest_workload(TASK, 20, 2, 30)
    memory = streaming.Settings(tokens_per_batch=100, scratch=str(tmp_path))
    quantization = QuantizationSettings(method)
    found = rehearsal.measure(config, work, memory, quantization, "gap", experts=2, most_tokens=32)
    assert all(math.isfinite(v) and v >= 0 for v in found.values())
    assert {n for n, v in found.items() if not v} <= {"hessians"} and bool(found["hessians"]) == (method == "gptq")
    assert rehearsal.project(config, work, quantization, found)["total"] > 0
    token = rehearsal.generation(config, "gap", 2, jnp.float32, work.longest)
    assert token["total"] == pytest.approx(sum(v for n, v in token.items() if n != "total"))
    assert list(tmp_path.iterdir()) == []
