"""The local runner: one process a device, on this machine."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from fastcfg.errors import Error
from fastcfg.jobs.errors import JobError
from fastcfg.jobs.job import Job, open_job
from fastcfg.jobs.units import Unit
from fastcfg.jobs.worker import Outcome, Sampled, Worker

STOP_SECONDS = 60.0  # for what is computed to be written when a run is stopped
SIGNALS = {signal.SIGINT, signal.SIGTERM}
_SERVE = "import sys; sys.path[:] = sys.argv[2:]; from fastcfg.jobs.local_runner import serve; serve(int(sys.argv[1]))"


def choose_devices(asked: str | None, workers: int | None, kind: str | None) -> list[str]:
    """torch's name of each worker's device.

    asked: "cpu", or numbers of GPUs: "0,1"; None for every GPU, or the CPU where there is none. workers: processes on the
    CPU, one unless given. kind: what a job that exists runs on, "cpu" or "cuda".
    """
    if asked is None:
        on_cpu = kind == "cpu" or not torch.cuda.is_available()
        asked = "cpu" if on_cpu else ",".join(map(str, range(torch.cuda.device_count())))
    if workers is not None and (not isinstance(workers, int) or isinstance(workers, bool) or not 1 <= workers <= 1024):
        raise Error(f"workers must be a whole number from 1 to 1024, got {workers!r}")
    if asked == "cpu":
        devices = ["cpu"] * (workers or 1)
    else:
        numbers = str(asked).split(",")  # a list, too, is told what would do
        if not all(n.isascii() and n.isdigit() for n in numbers) or len(set(numbers)) != len(numbers):
            raise Error(f'devices must be "cpu" or numbers of GPUs, each once ("0,1"), got {asked!r}')
        if workers is not None:
            raise Error("workers are processes on the CPU: on GPUs there is one a device")
        devices = [f"cuda:{int(n)}" for n in numbers]
        if not torch.cuda.is_available() or max(map(int, numbers)) >= torch.cuda.device_count():
            raise Error(f"devices {asked} asked, but torch sees {torch.cuda.device_count()} GPUs here")
    if kind is not None and torch.device(devices[0]).type != kind:
        raise Error(f"the job was begun on {kind!r}, where samples' bits differ from {devices[0]!r}'s")
    return devices


def run_units(job: Job, missing: Iterable[Unit], devices: list[str]) -> Iterator[Outcome | Sampled]:
    """A runner (see `fastcfg.jobs.worker`) of one process for each of `devices`; the CPU's share its cores."""
    pool: list[_Process] = []
    units, upcoming = iter(missing), None
    try:
        for device in devices:
            pool.append(_Process(job, device, len(devices)))
        while True:
            for process in pool:
                upcoming = upcoming or next(units, None)
                if upcoming is not None and process.free:
                    process.give(upcoming)
                    upcoming = None
            if upcoming is None and not any(process.busy for process in pool):
                return
            for connection in wait([process.connection for process in pool], timeout=1.0):
                at = next(i for i, process in enumerate(pool) if process.connection is connection)
                event = pool[at].receive()
                if event is not None:
                    yield event
                elif pool[at].dead:
                    yield from pool[at].bury()
                    pool[at] = _Process(job, devices[at], len(devices))
    finally:
        for process in pool:
            process.stop()
        deadline = time.monotonic() + STOP_SECONDS
        for process in pool:
            process.end(deadline)


@dataclass(frozen=True)
class _Ready:
    """From a worker process: its sampler is made."""


@dataclass(frozen=True)
class _Broken:
    """From a worker process: its sampler could not be made."""

    reason: str


@dataclass(frozen=True)
class _Free:
    """From a worker process: its unit is computed, or will not be; the device waits for the next."""


class _Process:
    """A worker process as its parent sees it: the unit it computes, and all it was given and has not reported.

    Raises JobError where it cannot be started.
    """

    def __init__(self, job: Job, device: str, share: int):
        self.device = device
        self.ready, self.dead = False, False
        self.computing: Unit | None = None
        self.given: list[Unit] = []
        try:
            self.connection, theirs = Pipe()
            self._child = _start(theirs)
        except OSError as error:  # no more open files, processes or memory
            raise JobError(f"no worker could be started on {device}: {error.strerror}") from error
        theirs.close()
        threads = max(1, torch.get_num_threads() // share) if device == "cpu" else None
        self._send((job.store, job.spec.weights, device, threads))

    @property
    def free(self) -> bool:
        return self.ready and not self.dead and self.computing is None

    @property
    def busy(self) -> bool:
        return bool(self.given)

    def give(self, unit: Unit) -> None:
        self.computing = unit
        self.given.append(unit)
        self._send(unit)

    def receive(self) -> Outcome | Sampled | None:
        """The next event, if it is one for the runner's caller. Raises JobError where the worker could not start."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            self.dead = True
            return None
        match message:
            case _Ready():
                self.ready = True
            case _Broken(reason):
                raise JobError(f"no worker could be started on {self.device}: {reason}")
            case _Free():
                self.computing = None
            case Outcome(unit):  # of a unit that failed this comes before _Free: only then may it be given again
                self.given.remove(unit)
                return message
            case Sampled():
                return message
        return None

    def bury(self) -> Iterator[Outcome]:
        """What became of the units of a process that died."""
        code = self._child.wait()
        how = f"its worker was killed by signal {-code}" if code < 0 else f"its worker ended with exit code {code}"
        if not self.ready:
            raise JobError(f"no worker could be started on {self.device}: {how}")
        self.connection.close()
        for unit in self.given:
            yield Outcome(unit, "failed" if unit == self.computing else "lost", how)

    def stop(self) -> None:
        """Asks the process to write what it has computed, and to end."""
        if self.ready:
            self._send(None)
        else:
            self._child.kill()

    def end(self, deadline: float) -> None:
        """Waits for the process to end, until `deadline` on the monotonic clock."""
        try:
            self._child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self.connection.close()

    def _send(self, message: Any) -> None:
        with suppress(OSError):  # a process that has died is found by receive()
            self.connection.send(message)


def _start(theirs: Connection) -> subprocess.Popen[bytes]:
    """A process that serves `theirs`.

    Signals for the run are its parent's to handle: a terminal sends SIGINT to all, so they are blocked here and thereby in
    the child. A plain child process, not multiprocessing's, which would run the caller's main module again.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        command = [sys.executable, "-c", _SERVE, str(theirs.fileno()), *sys.path]
        return subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve(descriptor: int) -> None:
    """A worker process: serves its parent at the other end of `descriptor` until told to stop, or the parent is gone."""
    connection: Connection[Any, Any] = Connection(descriptor)
    store, weights, device, threads = connection.recv()
    inbox: queue.Queue[Unit] = queue.Queue()
    workers: list[Worker] = []
    turn, stopping = threading.Lock(), threading.Event()

    def send(message: Any) -> None:
        with turn:
            if not stopping.is_set():  # nobody reads any more, and a full pipe would hold up the writer
                with suppress(OSError):
                    connection.send(message)

    def listen() -> None:
        with suppress(EOFError, OSError):
            while (unit := connection.recv()) is not None:
                inbox.put(unit)
        stopping.set()
        for worker in workers:
            worker.finish()
        store.close()
        os._exit(0)  # whatever the device is at: what is half computed is dropped

    threading.Thread(target=listen, name="fastcfg-listener", daemon=True).start()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        workers.append(Worker(open_job(store, weights), device, send))
    except Exception as error:  # an Error, or whatever a device raises
        send(_Broken(str(error) if isinstance(error, Error) else f"{type(error).__name__}: {error}"))
        return
    send(_Ready())
    while True:
        unit = inbox.get()
        workers[0].take(unit)
        send(_Free())
