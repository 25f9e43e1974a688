"""The capture lint, on the engine's own loops and on planted violations; and what the graphs are asked to replay."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from itertools import groupby

import pytest
import torch
from capture_lint import CaptureLint, lint
from test_cuda_engine import foreign_sampler, random_dit, sampler

import fastcfg
from fastcfg.engines import capture
from fastcfg.engines.capture import Lane, StepGraphs, lane_of
from fastcfg.kernels.adaln import adaln

CPU = torch.device("cpu")


def only_loop(one):
    (loop,) = one.engine._loops.values()
    return loop


@pytest.mark.parametrize(
    "options",
    [{}, {"eta": 0.8}, {"rescale": 0.7, "solver": "dpmpp_2m"}, {"solver": "ddpm", "interval": (0, 600)}],
    ids=str,
)
@pytest.mark.parametrize("given", [False, True])
def test_a_dits_step_passes_and_launches_the_same_every_time(options, given):
    one = sampler(random_dit(depth=1), steps=2, **options)
    noise = torch.randn(2, 2, 3, 8, 8) if given else None
    one([1, 4], 3.0, noise=noise)
    loop = only_loop(one)
    for guided in (True, False):
        first = lint(lambda guided=guided: loop.step(guided))
        one([2, 2], 5.0, 7, noise=noise)  # other labels, scales and seeds
        assert lint(lambda guided=guided: loop.step(guided)) == first
        kernels = [name for name, _ in first]
        assert kernels[:3] == ["_adaln_kernel", "_linear_kernel", "_attention_kernel"]
        assert len(kernels) == 7 + (4 + guided if "rescale" in options else 1)


def test_the_two_kinds_of_step_differ_in_their_rows_only():
    one = sampler(random_dit(depth=1), steps=2)
    one([1, 4], 3.0)
    guided, alone = (lint(lambda flag=flag: only_loop(one).step(flag)) for flag in (True, False))
    assert [name for name, _ in guided] == [name for name, _ in alone]
    assert guided != alone


@pytest.mark.parametrize(
    ("violation", "what"),
    [
        (lambda x: x + 1, "allocates"),
        (lambda x: torch.empty(3), "allocates"),
        (lambda x: x.reshape(2, 2).t().contiguous(), "allocates"),
        (lambda x: x.to(torch.float64), "allocates"),
        (lambda x: x[0].item(), "host"),
        (lambda x: bool(x.any()), "allocates|host"),
        (lambda x: torch.equal(x, x), "host"),
        (lambda x: x.copy_(torch.empty(4, device="meta")), "between devices|allocates"),
        (lambda x: x.nonzero(), "allocates"),
        (lambda x: torch.cuda.synchronize(), "waits"),
        (lambda x: torch.cuda.Event.synchronize(None), "waits"),
        (lambda x: torch.cuda.Stream.synchronize(None), "waits"),
    ],
)
def test_planted_violations_are_refused(violation, what):
    x = torch.ones(4)
    with pytest.raises(fastcfg.Error, match=what):
        lint(lambda: violation(x))


def test_copies_between_devices_are_refused():
    x, elsewhere = torch.ones(4), torch.ones(4, device="meta")
    with pytest.raises(fastcfg.Error, match="between devices"), CaptureLint():
        elsewhere.copy_(x)


def test_what_a_step_may_do_passes():
    x, times = torch.ones(4), torch.arange(5.0)
    out, at = torch.empty(4), torch.zeros(4, dtype=torch.int32)

    def step():
        torch.index_select(times, 0, at, out=out)
        x[1:].view(3).copy_(out[1:])
        at.add_(1)

    assert lint(step) == lint(step) == []


def test_a_kernel_that_makes_its_own_output_is_refused_and_one_that_moves_is_seen():
    x, table, index = torch.ones(1, 4, 16), torch.ones(1, 32), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(fastcfg.Error, match="allocates"):
        lint(lambda: adaln(x, table, index, 0, 16))
    buffers = [torch.empty_like(x), torch.empty_like(x)]
    first, second = (lint(lambda out=out: adaln(x, table, index, 0, 16, out=out)) for out in buffers)
    assert first != second
    assert lint(lambda: adaln(x, table, index, 0, 16, out=buffers[0])) == first


class FakeGraph:
    """Counts replays in place of a device; capturing runs nothing."""

    def __init__(self, log, flag, length):
        self.log, self.flag, self.length = log, flag, length

    def replay(self):
        self.log.append((self.flag, self.length))


@pytest.fixture
def graphs(monkeypatch):
    """StepGraphs on a lane that seems to have a stream, and its log: replays as (guided, steps), eager steps as (guided, 0)."""
    log = []
    lane = Lane(CPU)
    lane.stream = object()
    made = StepGraphs(lane, span=4)
    monkeypatch.setattr(made, "_capture", lambda step, flag, length: FakeGraph(log, flag, length))
    return made, log


def steps_of(log):
    """The guided flags of the steps in a log."""
    return [flag for flag, length in log for _ in range(max(1, length))]


@pytest.mark.parametrize("pattern", ["1" * 50, "0001111100", "1", "01" * 6, "1" * 11 + "0" * 9, "0" * 8])
def test_graphs_run_every_step_once_in_order(graphs, pattern):
    made, log = graphs
    guided = [flag == "1" for flag in pattern]
    made.run(lambda flag: log.append((flag, 0)), guided)
    assert steps_of(log) == guided
    assert sum(length == 0 for _, length in log) == len(set(guided))  # one eager step of each kind, ever
    log.clear()
    made.run(lambda flag: log.append((flag, 0)), guided)
    assert steps_of(log) == guided
    assert all(length in (1, 4) for _, length in log)
    runs = [len(list(run)) for _, run in groupby(guided)]
    assert len(log) == sum(n // 4 + n % 4 for n in runs)


def test_graphs_are_at_most_four_for_a_kind_of_noise_whatever_the_pattern(graphs):
    made, log = graphs
    generator = torch.Generator().manual_seed(0)
    for variant in (False, True):
        for _ in range(20):
            guided = (torch.rand(30, generator=generator) < 0.8).tolist()
            made.run(lambda flag: log.append((flag, 0)), guided, variant)
    assert len(made._graphs) == 8


def test_without_a_stream_steps_run_as_they_are():
    log = []
    StepGraphs(Lane(CPU)).run(log.append, [True, True, False])
    assert log == [True, True, False]


class Stream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def synchronize(self):
        self.log.append(f"{self.name} is done")


@pytest.fixture
def streams(monkeypatch):
    """(a lane that has a stream, the caller's stream, what they did)."""
    log, lane = [], Lane(CPU)
    lane.stream, caller = Stream("lane", log), Stream("caller", log)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: caller)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return lane, caller, log


def test_a_turn_comes_after_what_the_caller_had_and_before_what_it_gets(streams):
    lane, caller, log = streams

    def work():
        with lane.turn() as held:
            log.append("work")
            assert held is caller
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert log == ["lane waits for caller", "work", "caller waits for lane"]


def test_a_turn_inside_a_capture_of_the_callers_is_refused(streams, monkeypatch):
    lane, _, log = streams
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(fastcfg.Error, match="cannot be captured in another"), lane.turn():
        log.append("work")
    assert log == []


def test_graphs_are_forgotten_once_the_device_is_done_with_them(graphs):
    made, log = graphs
    made.lane.stream = Stream("lane", log)
    made.run(lambda flag: log.append((flag, 0)), [True] * 5)
    log.clear()
    made.clear()
    made.run(lambda flag: log.append((flag, 0)), [True] * 5)
    assert log == ["lane is done", (True, 0), (True, 4)]


@pytest.mark.parametrize("collects", [True, False])
def test_the_collector_is_left_as_it_was(collects):
    before = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        with capture.collector_off():
            assert not gc.isenabled()
        assert gc.isenabled() is collects
    finally:
        (gc.enable if before else gc.disable)()


def test_engines_of_a_device_share_a_lane_and_take_turns():
    first, second = sampler(random_dit()).engine, foreign_sampler().engine
    assert first._lane is second._lane is lane_of(CPU)
    entered, order = threading.Event(), []

    def other():
        entered.set()
        with second._lane.turn():
            order.append("other")

    with first._lane.turn():
        thread = threading.Thread(target=other)
        thread.start()
        entered.wait()
        thread.join(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "other"]


def test_calls_from_several_threads_give_what_calls_in_turn_give():
    one = sampler(random_dit(depth=1), steps=2, eta=0.5)
    labels = ([0, 1], [2, 3], [4, 0])
    want = [one(pair, 3.0, seed) for seed, pair in enumerate(labels)]
    got: dict[int, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda s=seed, pair=pair: got.update({s: one(pair, 3.0, s)}))
        for seed, pair in enumerate(labels)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[seed], tensor) for seed, tensor in enumerate(want))


def test_the_callers_random_state_is_left_alone():
    one = sampler(random_dit(depth=1), steps=2, eta=0.5)
    before = torch.get_rng_state()
    one([1, 2], 3.0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def lane(monkeypatch):
    """A lane whose captures only fill their graph, a list, with what is launched in them; `lane.closed` lists pools that were
    closed by hand."""
    made = Lane(CPU)
    handles = iter(range(10))

    @contextlib.contextmanager
    def graph(into, **options):
        assert not gc.isenabled()
        assert options["capture_error_mode"] == "thread_local"  # other threads may allocate meanwhile
        into.append(options["pool"])
        yield

    made.closed = []
    for name, stand_in in (("CUDAGraph", list), ("graph", graph), ("graph_pool_handle", lambda: next(handles))):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda _, pool: made.closed.append(pool), raising=False)
    made.stream, made.pool = object(), torch.cuda.graph_pool_handle()
    return made


def test_after_a_failed_capture_others_are_made_in_a_pool_of_their_own(lane):
    graphs = StepGraphs(lane)

    def fails(_):
        raise RuntimeError("operation not permitted when stream is capturing")

    assert graphs._capture(lambda _: None, True, 1) == [0]
    with pytest.raises(fastcfg.Error, match=r"not permitted when stream is capturing\. Use engine='reference'"):
        graphs._capture(fails, True, 1)
    assert (lane.closed, lane.pool, gc.isenabled()) == ([0], 1, True)
    assert graphs._capture(lambda _: None, True, 1) == [1]


def test_a_sampler_that_is_dropped_gives_its_memory_back_at_once():
    for make in (lambda: sampler(random_dit(depth=1), steps=2), lambda: foreign_sampler(steps=2)):
        one = make()
        one([1, 2], 3.0)
        held = weakref.ref(only_loop(one).samples)
        gc.disable()
        try:
            del one
            assert held() is None
        finally:
            gc.enable()


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_what_a_launch_reads_is_aligned_for_every_batch(batch):
    """Triton compiles a kernel again for an address that no 16 divides."""
    one = sampler(random_dit(depth=1), steps=2, batch=batch, eta=0.5)
    one([1] * batch, 3.0)
    for guided in (True, False):
        for kernel, arguments in lint(lambda guided=guided: only_loop(one).step(guided)):
            given = dict(arguments)
            names = set(given) & {"index", "step", "seeds", "indices", "x", "coef", "scale", "tokens", "out"}
            assert names, kernel
            assert all(given[name] % 16 == 0 for name in names if isinstance(given[name], int)), (kernel, given)


def test_a_failed_capture_names_its_first_cause():
    def leave():
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        finally:
            try:
                raise RuntimeError("capture was invalidated")  # as leaving torch.cuda.graph does
            finally:
                raise RuntimeError("the pool is still open")

    with pytest.raises(RuntimeError, match="still open") as raised:
        leave()
    assert capture._first_cause(raised.value) == "operation not permitted when stream is capturing"
