"""Experts of a layer on several processes: tokens get what one process gives them, to the bit, with any choices."""

import concurrent.futures
import dataclasses
import threading

import hugging_face
import jax.numpy as jnp
import numpy as np
import pytest
from random_decoders import CONFIGS, random_params

from qmoe_jax import processes, streaming
from qmoe_jax.compression import compress as compression
from qmoe_jax.quantization.settings import QuantizationSettings

CONFIG = dataclasses.replace(CONFIGS["olmoe"], top_k=4, num_layers=2)  # of 8
# In groups of two, of which the first of three processes has one and others two; rounded so that any order shows.
MEMORY = streaming.Settings(dtype=jnp.bfloat16, tokens_per_batch=40, experts_per_group=2)


class Threads(processes.Processes):
    """Processes that are threads of this one: what they tell each other lies where all see it."""

    def __init__(self, index, told, barrier):
        self.count, self.index = len(told), index
        self._told, self._barrier = told, barrier

    def exchange(self, outgoing):
        self._told[self.index] = list(outgoing)
        self._barrier.wait(60)
        received = [sent[self.index] for sent in self._told]
        self._barrier.wait(60)
        return received


def together(count, run):
    """run() by so many processes at once; what the first one gave."""
    told, barrier, own = [None] * count, threading.Barrier(count), threading.local()

    def one(index):
        own.processes = Threads(index, told, barrier)
        try:
            return run()
        except BaseException:
            barrier.abort()
            raise

    with pytest.MonkeyPatch.context() as patch, concurrent.futures.ThreadPoolExecutor(count) as pool:
        patch.setattr(compression, "Processes", lambda: own.processes)
        return [future.result() for future in [pool.submit(one, i) for i in range(count)]][0]


def test_processes_give_the_bytes_of_one(tmp_path):
    checkpoint = hugging_face.InMemory(CONFIG, random_params(CONFIG))
    rng = np.random.RandomState(5)
    texts = [(rng.randint(0, CONFIG.vocab_size, n).astype(np.int32),) for n in (40, 9, 2, 33, 17, 25, 30)]

    def run(count):
        output = tmp_path / str(count)
        settings = QuantizationSettings(router_weighted=True, shrinkage=5.0)
        compress = lambda: compression.compress_examples(
            checkpoint, None, texts[:5], texts[5:], settings, MEMORY, output=output, num_shards=3
        )
        report = together(count, compress) if count > 1 else compress()
        return report["loss"], {
            p.relative_to(output): p.read_bytes() for p in output.rglob("layers/**/*") if p.is_file()
        }

    loss, files = run(1)
    assert len(files) > 3 * CONFIG.num_layers
    for count in (2, 3):
        found = run(count)
        assert found[0] == loss
        assert found[1] == files
