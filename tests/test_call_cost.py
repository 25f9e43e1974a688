"""What a call costs beside the engine's work: its Python, and the memory that it takes."""

import gc
import time
import tracemalloc

import pytest
import torch

import fastcfg

pytestmark = pytest.mark.alone
BATCHES = {1: 100e-6, 64: 300e-6}  # rows: most seconds outside the engine


class Idle:
    """An engine that has its result ready."""

    name, notes, device, dtype, whole_batches = "idle", (), torch.device("cpu"), torch.float32, True

    def __init__(self, rows):
        self.result = torch.zeros(rows, 1, 28, 28)

    def run(self, request):
        return self.result


@pytest.mark.parametrize("rows", BATCHES)
def test_a_call_takes_little_outside_its_engine(rows):
    sampler = fastcfg.Sampler(fastcfg.load("fashion-mnist"), batch=rows)
    sampler.engine = Idle(rows)
    labels = [row % 10 for row in range(rows)]
    seconds = []
    for _ in range(300):
        start = time.perf_counter()
        sampler(labels, 4.0, seeds=1)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < BATCHES[rows]  # the quickest: others may have waited for the machine


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="the library's products take no memory of ours")
def test_calls_at_batch_1_keep_nothing_and_ask_the_system_for_nothing():
    resource = pytest.importorskip("resource")
    sampler = fastcfg.Sampler(fastcfg.load("fashion-mnist"), steps=2, batch=1)

    def calls(n):
        for seed in range(n):
            sampler([3], 4.0, seeds=seed)
        gc.collect()

    calls(20)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    calls(50)
    # a call's tensors are 0.5 MB, so 50 calls that took new pages would be 6,000 faults
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults < 600
    tracemalloc.start()
    try:
        calls(100)  # until Python's own lists of freed tuples, which begin untraced, are full of traced ones
        kept = tracemalloc.get_traced_memory()[0]
        calls(100)
        assert tracemalloc.get_traced_memory()[0] - kept < 20_000
    finally:
        tracemalloc.stop()
