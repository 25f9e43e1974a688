"""Worker threads, one a core, each computing in itself alone."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_TURN = threading.RLock()  # a turn has all cores, and torch's number of threads is the process's
_EVERY: weakref.WeakSet[Workers] = weakref.WeakSet()


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
        self.restart()
        _EVERY.add(self)

    def restart(self) -> None:
        """Without the threads that there were, which a forked process has not."""
        self._lock = threading.Lock()
        self._busy = 0  # tasks given and not yet done
        self._pool: ThreadPoolExecutor | None = None

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """function of each item, in order; raises what the first of them raised, once all are done.

        Interrupted, it leaves no work behind: what has begun is waited for, and nothing else begins.
        """
        given = list(items)
        with self._lock:
            self._busy += len(given)
        futures: list[Future[Result]] = []
        try:
            for item in given:
                futures.append(self._submit(partial(function, item)))
            for future in futures:
                future.exception()
        except BaseException:
            never = len(given) - len(futures) + sum(future.cancel() for future in futures)
            with self._lock:
                self._busy -= never
            wait(futures)
            raise
        return [future.result() for future in futures]

    def offer(self, function: Callable[[], Result], in_torch: bool = True) -> Future[Result] | None:
        """Gives work from within a task, if a worker has none; None otherwise. in_torch: whether it calls torch."""
        with self._lock:
            if self._busy >= self.count:
                return None
            self._busy += 1
        return self._submit(function, in_torch)

    def _submit(self, function: Callable[[], Result], in_torch: bool = True) -> Future[Result]:
        def task() -> Result:
            try:
                if in_torch:  # work that does not end with its turn must not set it: the number is also that of threads to come
                    torch.set_num_threads(1)
                with torch.inference_mode():
                    return function()
            finally:
                with self._lock:
                    self._busy -= 1

        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.count, "fastcfg-cpu")
        return self._pool.submit(task)


def _after_fork() -> None:
    """A forked process has one thread, and locks as they were: held for ever, if another thread held them."""
    global _TURN
    _TURN = threading.RLock()
    for workers in _EVERY:
        workers.restart()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
