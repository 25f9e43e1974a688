"""Worker threads, one a core, each computing in itself alone."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_TURN = threading.RLock()  # a turn has all cores, and torch's number of threads is the process's


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch operations on one thread each, and no other engine's beside them; the number of threads is put back after."""
    with _TURN:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


class Workers:
    """`count` threads in which torch operations run on one thread each, like their caller's, and record no gradients.

    Work is given within `one_thread`. Threads start when they are first needed, and again in a forked process.
    """

    def __init__(self, count: int):
        self.count = count
        self._lock = threading.Lock()
        self._busy = 0  # tasks given and not yet done
        self._pool: ThreadPoolExecutor | None = None
        self._process = 0

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """function of each item, in order; raises what the first of them raised, once all are done."""
        given = list(items)
        with self._lock:
            self._busy += len(given)
        futures = [self._submit(partial(function, item)) for item in given]
        for future in futures:
            future.exception()
        return [future.result() for future in futures]

    def offer(self, function: Callable[[], Result]) -> Future[Result] | None:
        """Gives work from within a task, if a worker has none; None otherwise."""
        with self._lock:
            if self._busy >= self.count:
                return None
            self._busy += 1
        return self._submit(function)

    def _submit(self, function: Callable[[], Result]) -> Future[Result]:
        def task() -> Result:
            try:
                torch.set_num_threads(1)
                with torch.inference_mode():
                    return function()
            finally:
                with self._lock:
                    self._busy -= 1

        if self._pool is None or self._process != os.getpid():
            self._pool, self._process = ThreadPoolExecutor(self.count, "fastcfg-cpu"), os.getpid()
        return self._pool.submit(task)
