"""What a runner is, and the worker that every runner gives units to.

A runner computes units somewhere: it is a function

    (job: Job, missing: Iterable[Unit]) -> Iterator[Outcome | Sampled]

that takes units from `missing` as workers become free and yields one Outcome for each that it took. Units that failed are
put back into `missing` while outcomes are consumed, so a runner asks it again after each outcome, even where it was empty
before; it ends when nothing is under way and `missing` is empty. When its generator is closed it stops what it started.
What no unit can be blamed for (a worker that cannot start) is a JobError that it raises. `fastcfg.jobs.local_runner` runs units
in processes of this machine, `fastcfg.jobs.ray_runner` on a Ray cluster.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from fastcfg.jobs.errors import JobError
from fastcfg.jobs.job import Job
from fastcfg.jobs.units import Arrays, Unit, compute, unit_bytes, write_unit


@dataclass(frozen=True)
class Outcome:
    """What became of a unit. status:

    "written": computed and on disk. "present": found there, written by another run. "claimed": another run is at it.
    "lost": its worker ended before it was this unit's turn, or before it was written. "failed": tried in vain. Either is tried
    again, up to a number of times of its own. "stop": the store cannot be written to, so nothing else can be done either.
    error: why, for the last three.
    """

    unit: Unit
    status: str
    error: str = ""


@dataclass(frozen=True)
class Sampled:
    """`images` more samples of `unit` have been computed: for a progress bar, between outcomes."""

    unit: Unit
    images: int


Runner: TypeAlias = Callable[[Job, Iterable[Unit]], Iterator[Outcome | Sampled]]


class Worker:
    """One device's sampler, and a thread that encodes and writes, so that the device does not wait for either.

    report(event) is called from two threads, with an Outcome for every unit given and a Sampled after each batch. At most
    three units are held: one being computed, one waiting to be written, one being written.
    Raises Error where the job's sampler cannot be made on `device`.
    """

    def __init__(self, job: Job, device: str, report: Callable[[Outcome | Sampled], object]):
        self.job, self._report = job, report
        self.sampler = job.make_sampler(device)
        self._outbox: queue.Queue[tuple[Unit, Arrays] | None] = queue.Queue(maxsize=1)
        self._writer = threading.Thread(target=self._write_all, name="fastcfg-writer", daemon=True)
        self._writer.start()

    def take(self, unit: Unit) -> None:
        """Claims and computes `unit` and hands it to the writer; returns when the device is free for the next."""
        store = self.job.store
        try:
            if not store.claim(unit.k):
                self._report(Outcome(unit, "claimed"))
                return
            # Only now: whoever held the claim before has written the unit, or has not and never will.
            if store.size(unit.name) == unit_bytes(self.job, unit):
                self._finish(unit, "present")
                return
            arrays = compute(self.sampler, self.job.spec, unit, lambda n: self._report(Sampled(unit, n)))
        except JobError as error:
            self._finish(unit, "stop", str(error))
        except Exception as error:  # a unit may fail in any way, and the others still be computed
            self._finish(unit, "failed", _text(error))
        else:
            self._outbox.put((unit, arrays))

    def finish(self) -> None:
        """Returns when all that was computed is written and reported; no unit may follow."""
        self._outbox.put(None)
        self._writer.join()

    def _write_all(self) -> None:
        while (item := self._outbox.get()) is not None:
            unit, arrays = item
            try:
                write_unit(self.job, unit, arrays)
            except JobError as error:
                self._finish(unit, "stop", str(error))
            except Exception as error:
                self._finish(unit, "failed", _text(error))
            else:
                self._finish(unit, "written")
            del item, arrays  # not held while waiting for the next

    def _finish(self, unit: Unit, status: str, error: str = "") -> None:
        self.job.store.release(unit.k)  # first: whoever hears of the outcome may claim it
        self._report(Outcome(unit, status, error))


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
