"""Running a loop of steps as CUDA graphs, and the lint that says whether a step may be captured.

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
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.tools.tensor_descriptor import TensorDescriptor

from fastcfg.errors import Error
from fastcfg.kernels._launch import Config, Grid, offline

SPAN = 10  # steps in the longer graph: its gap is then shared by ten steps, and capturing it costs ten steps' launches

Step = Callable[[bool], None]
Launch = tuple[str, tuple[tuple[str, Any], ...]]


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
        except Exception as error:
            self.lane.recover()
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


def lint(loop: Callable[[], object], target: str = "sm_90") -> list[Launch]:
    """Runs `loop` with the kernels' launches recorded in place of made, as on `target`, and returns them.

    A launch is (kernel, its arguments by name), tensors given by address; a loop that may be replayed records the same
    every time. Raises Error, naming the operation, where the loop allocates a tensor, reads one on the host, copies between
    devices or synchronises.
    """
    launches: list[Launch] = []

    def record(kernel: Any, grid: Grid, config: Config, arguments: dict[str, Any]) -> None:
        named = {name: _address(value) for name, value in (arguments | config | {"grid": grid}).items()}
        launches.append((kernel.fn.__name__, tuple(sorted(named.items()))))

    with offline(target, record), _no_synchronisation(), CaptureLint():
        loop()
    return launches


class CaptureLint(TorchDispatchMode):
    """Refuses torch operations that a captured step must not contain."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if len({tensor.device for tensor in given}) > 1:
            raise Error(f"{func} copies between devices, inside a captured step")
        result = func(*args, **(kwargs or {}))
        storages = {tensor.untyped_storage()._cdata for tensor in given}
        for leaf in tree_leaves(result):
            if not isinstance(leaf, Tensor):
                raise Error(f"{func} reads a tensor on the host, inside a captured step")
            if leaf.untyped_storage()._cdata not in storages:
                raise Error(f"{func} allocates a tensor {list(leaf.shape)}, inside a captured step")
        return result


@contextlib.contextmanager
def _no_synchronisation() -> Iterator[None]:
    """Inside, torch's ways to wait for a device raise Error."""

    def refuse(*_: object, **__: object) -> None:
        raise Error("the host waits for the device, inside a captured step")

    waits = ((torch.cuda, "synchronize"), (torch.cuda.Stream, "synchronize"), (torch.cuda.Event, "synchronize"))
    with contextlib.ExitStack() as patches:
        for owner, name in waits:
            patches.enter_context(mock.patch.object(owner, name, refuse))
        yield


def _address(value: Any) -> Any:
    """What a launch would hold of an argument."""
    if isinstance(value, TensorDescriptor):
        return value.base.data_ptr(), tuple(value.shape), tuple(value.strides), tuple(value.block_shape)
    return value.data_ptr() if isinstance(value, Tensor) else value
