"""Worker threads, one a core, each computing in itself alone."""

from __future__ import annotations

import ctypes
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

_TURN = threading.RLock()  # a turn has all cores
_EVERY: weakref.WeakSet[Workers] = weakref.WeakSet()


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch operations on one thread each, and no other engine's beside them; the number of threads is put back after."""
    with _TURN:
        threads = torch.get_num_threads()
        if threads == 1:
            yield
            return
        torch.set_num_threads(1)
        try:
            _name(threads)
            yield
        finally:
            torch.set_num_threads(threads)


def _name(threads: int) -> None:
    """Makes `threads` the number that new threads begin with, and leaves the caller's own as it is.

    torch.set_num_threads sets both, so another thread is made to call it. Otherwise a thread that the process starts
    meanwhile, for another request, would be at 1 for good.
    """
    _NAMER.submit(torch.set_num_threads, threads).result()


_NAMER = ThreadPoolExecutor(1, "fastcfg-threads")


class StoppedError(Exception):
    """Ends a task whose result nobody waits for any more."""


class Workers:
    """`count` threads in which torch operations run on one thread each, like their caller's, and record no gradients.

    Work is given within `one_thread`. Threads start at the first `map`, and again in a forked process.
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
        self.stopped = ctypes.c_int(False)  # whether a `map` was interrupted and waits for its tasks; C may read it, too

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """function of each item, in order; raises what the first of them raised, once all are done.

        A caller that is interrupted while it waits leaves no work behind: no other task begins, and those under way are
        waited for. A long one should ask `check` now and then, which ends it.
        """
        given: list[tuple[Future[Result], Callable[[], Result]]] = [(Future(), partial(function, item)) for item in items]
        futures = [future for future, _ in given]
        with self._lock:
            self._busy += len(given)
        try:
            if self._pool is None:
                self._pool = self._started()
            for future, work in given:
                self._pool.submit(self._carry_out, future, work)
            for future in futures:
                future.exception()
        except BaseException:
            self._end(futures)
            raise
        return [future.result() for future in futures]

    def check(self) -> None:
        """Raises StoppedError in a task of a `map` that was interrupted."""
        if self.stopped.value:
            raise StoppedError

    def offer(self, function: Callable[[], Result]) -> Future[Result] | None:
        """Gives work from within a task, if a worker has none; None otherwise."""
        assert self._pool is not None
        with self._lock:
            if self._busy >= self.count:
                return None
            self._busy += 1
        future: Future[Result] = Future()
        self._pool.submit(self._carry_out, future, function)
        return future

    def _started(self) -> ThreadPoolExecutor:
        """All threads, each at one thread of torch's for good."""
        pool, ready = ThreadPoolExecutor(self.count, "fastcfg-cpu"), threading.Barrier(self.count + 1)
        threads: list[int] = []

        def begin() -> None:
            threads.append(torch.get_num_threads())  # what it began with: asked first, or torch would put it back later
            torch.set_num_threads(1)
            ready.wait()

        try:
            for _ in range(self.count):
                pool.submit(begin)
            ready.wait()
            _name(threads[0])
        except BaseException:
            ready.abort()
            pool.shutdown(wait=False)
            raise
        return pool

    def _end(self, futures: list[Future[Result]]) -> None:
        """Returns once no task of an interrupted `map` is under way."""
        self.stopped.value = True
        try:
            # Interrupted in the pool's `submit`, a task may be under way, in a thread that the pool does not know of
            begun = [future for future in futures if not future.cancel()]
            with self._lock:
                self._busy -= len(futures) - len(begun)
            wait(begun)
            if self._pool is not None:
                self._pool.shutdown(wait=False)
                self._pool = None
        finally:
            self.stopped.value = False

    def _carry_out(self, future: Future[Result], function: Callable[[], Result]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            try:
                with torch.inference_mode():
                    result = function()
            finally:
                with self._lock:
                    self._busy -= 1
        except BaseException as error:
            future.set_exception(error)
            del future  # which the error's traceback would hold, and with it the error
        else:
            future.set_result(result)


def _after_fork() -> None:
    """A forked process has one thread, and locks as they were: held for ever, if another thread held them."""
    global _TURN, _NAMER
    _TURN, _NAMER = threading.RLock(), ThreadPoolExecutor(1, "fastcfg-threads")
    for workers in _EVERY:
        workers.restart()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
