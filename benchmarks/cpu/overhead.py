"""What a call costs beside its products: the call, and its products alone, in turn."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

import fastcfg
from cpu.cases import SCALE, Case
from cpu.timing import Call
from fastcfg.engines.cpu import CpuEngine
from fastcfg.engines.cpu_dit import NativeDiT
from fastcfg.engines.workers import one_thread


def call_and_products(case: Case, dtype: str) -> dict[str, Call]:
    """{"call", "products", "products and attention"} of one request on the cpu engine.

    The products are those that the engine asked of its operations in one call, on the worker threads that asked for them, with
    bias and GELU where it asks for that, but without gates, residuals, adaLN, the step and Python in between. Where the engine
    asks for a whole network in one call, they are its products with their bias and nothing else, the halves of a step on two
    threads if there are so many.
    """
    sampler = fastcfg.Sampler(case.model, steps=case.steps, batch=case.batch, engine="cpu", dtype=dtype, eta=0.0)
    engine = sampler.engine
    assert isinstance(engine, CpuEngine)

    def call() -> Tensor:
        return sampler(case.labels, SCALE, x_T=case.x_T)

    call()
    operations = engine._program.operations
    recorder = _Recorder(operations)
    engine._program.operations = recorder
    try:
        call()
    finally:
        engine._program.operations = operations
    kinds = {"products": {"linear"}, "products and attention": {"linear", "attention"}}
    return {"call": call, **{name: partial(_replay, engine, recorder, some, case.steps) for name, some in kinds.items()}}


class _Recorder:
    """Operations that remember which products and attentions were asked of them, by thread."""

    def __init__(self, operations: Any):
        self._operations = operations
        self._inputs: dict[tuple[Any, ...], Tensor] = {}
        self.work: dict[int, list[tuple[str, Callable[[], Tensor]]]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._operations, name)

    def linear(self, h: Tensor, weight: Any, bias: Any = None, **options: Any) -> Tensor:
        product = partial(self._operations.linear, self._stored(h), weight, bias, gelu=options.get("gelu", False))
        self._remember("linear", product)
        return self._operations.linear(h, weight, bias, **options)

    def attention(self, qkv: Tensor, heads: int, **options: Any) -> Tensor:
        self._remember("attention", partial(self._operations.attention, self._stored(qkv), heads))
        return self._operations.attention(qkv, heads, **options)

    def _stored(self, value: Tensor) -> Tensor:
        """A copy, one for each shape and thread: in a call, an operation's input has just been written too."""
        return self._inputs.setdefault((threading.get_ident(), value.dtype, *value.shape), value.clone())

    def _remember(self, kind: str, call: Callable[[], Tensor]) -> None:
        self.work.setdefault(threading.get_ident(), []).append((kind, call))


def _replay(engine: CpuEngine, recorder: _Recorder, kinds: set[str], steps: int) -> None:
    program, workers = engine._program, engine._workers
    with one_thread():
        work = [[call for kind, call in calls if kind in kinds] for calls in recorder.work.values()]
        workers.map(lambda calls: [call() for call in calls], work)
        if isinstance(program, NativeDiT):
            halves = [2] if workers.count == 1 else [1, 1]
            workers.map(lambda rows: [program.products(rows, "attention" in kinds) for _ in range(steps)], halves)
