"""Running a loop of steps as CUDA graphs.

A step is a callable that only launches, on static buffers; which step it is, it reads from a counter in one of them and
counts up at its end. So all steps are the same launches, and one graph serves any of them: one of `SPAN` steps in a row for
the bulk of a run, and one of a single step for the rest. A graph for the whole loop would save a handful of gaps between
graphs, of a few microseconds each, but be captured anew for every pattern of guided steps and grow with their number:
1,000 steps of DiT-XL/2 would be 200,000 nodes.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import groupby

import torch

from fastcfg.errors import Error

SPAN = 10  # steps in the longer graph: its gap is then shared by ten steps, and capturing it costs ten steps' launches

Step = Callable[[bool], None]


class Lane:
    """The stream that all captured loops of a device run on, the memory that their graphs share, and whose turn it is.

    Graphs may share memory because nothing in it outlives a replay and replays follow each other on one stream. On a device
    without streams (the interpreter's) only turns are taken.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._turn = threading.RLock()
        on_gpu = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if on_gpu else None
        self.pool = torch.cuda.graph_pool_handle() if on_gpu else None

    @contextlib.contextmanager
    def turn(self) -> Iterator[torch.cuda.Stream | None]:
        """Work inside goes onto the lane: after what the caller's stream holds by now, and before what it gets later.

        Other threads wait. Tensors that belong to the caller may be read and written inside without more ado. Raises Error
        inside a capture of the caller's, whose graph could not hold this one.
        """
        if self.stream is None:
            with self._turn:
                yield None
            return
        if torch.cuda.is_current_stream_capturing():
            raise Error("engine 'cuda' replays graphs of its own and cannot be captured in another: call it outside")
        with self._turn, torch.cuda.device(self.device):
            caller = torch.cuda.current_stream(self.device)
            self.stream.wait_stream(caller)
            try:
                with torch.cuda.stream(self.stream):
                    yield caller
            finally:
                caller.wait_stream(self.stream)

    def recover(self) -> None:
        """Makes captures possible again after one that failed, with memory of their own.

        Up to torch 2.11 a failed capture leaves its pool open, with which no other may begin (pytorch/pytorch#180395), and the
        device's generator expecting to be captured: a capture that succeeds sets it right.
        """
        assert self.pool is not None
        with contextlib.suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
        self.pool = torch.cuda.graph_pool_handle()
        with contextlib.suppress(RuntimeError), capturing(torch.cuda.CUDAGraph(), self):
            torch.zeros(1, device=self.device)


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, lane: Lane) -> Iterator[None]:
    """Captures into `graph` on the lane's stream and in its memory."""
    # Only this thread is held to what a capture allows: others may allocate and synchronise meanwhile
    with collector_off(), torch.cuda.graph(graph, pool=lane.pool, stream=lane.stream, capture_error_mode="thread_local"):
        yield


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """No garbage is collected inside: that could destroy some other graph, which a capture does not allow."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


_lanes: dict[torch.device, Lane] = {}
_lanes_lock = threading.Lock()


def lane_of(device: torch.device) -> Lane:
    """The device's lane; one for the process."""
    with _lanes_lock:
        if device not in _lanes:
            _lanes[device] = Lane(device)
        return _lanes[device]


class StepGraphs:
    """Runs steps, from graphs where the lane has a stream. span: steps in the longer graph; 0 captures nothing.

    The first step of a kind runs as it is, which compiles its kernels and lets libraries set themselves up; it is a step of
    the run like any other. Capturing draws no random number and leaves torch's generators as they were: a replay moves a
    generator by what its graph drew from it, and ours draw their noise in the kernels.
    """

    def __init__(self, lane: Lane, span: int = SPAN):
        self.lane, self.span = lane, span
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._warm: set[Hashable] = set()

    def run(self, step: Step, guided: Sequence[bool], variant: Hashable = None) -> None:
        """step(guided[0]), step(guided[1]), ..., within the lane's turn.

        variant: names what else tells one step from another; `step` must launch the same for the same variant and flag.
        """
        plain = self.lane.stream is None or not self.span
        for flag, steps in groupby(map(bool, guided)):
            left = len(list(steps))
            if plain or (variant, flag) not in self._warm:
                launched = left if plain else 1
                for _ in range(launched):
                    step(flag)
                self._warm.add((variant, flag))
                left -= launched
            if not left:
                continue
            for length in (self.span, 1):
                for _ in range(left // length):
                    self._graph(step, variant, flag, length).replay()
                left %= length

    def clear(self) -> None:
        """Forgets all graphs, once the device is done with them."""
        if self.lane.stream is not None:
            self.lane.stream.synchronize()
        self._graphs.clear()
        self._warm.clear()

    def _graph(self, step: Step, variant: Hashable, flag: bool, length: int) -> torch.cuda.CUDAGraph:
        key = (variant, flag, length)
        if key not in self._graphs:
            self._graphs[key] = self._capture(step, flag, length)
        return self._graphs[key]

    def _capture(self, step: Step, flag: bool, length: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            with capturing(graph, self.lane):
                for _ in range(length):
                    step(flag)
        except BaseException as error:
            self.lane.recover()
            if not isinstance(error, Exception):
                raise
            raise Error(
                f"a sampling step could not be captured in a CUDA graph: {_first_cause(error)}. Use engine='reference' for a "
                "model that synchronises or copies to the host in its forward"
            ) from error
        return graph


def _first_cause(error: BaseException) -> str:
    """What went wrong first: leaving a broken capture raises once more."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).splitlines() or [type(error).__name__])[0]
