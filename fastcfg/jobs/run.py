"""Running a job to its end, and seeing how far it is."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from fastcfg.errors import Error
from fastcfg.jobs.errors import JobError, Signalled, StoppedError
from fastcfg.jobs.job import Job, Resolved, check_same, check_vacant, freeze, open_job, processor, resolve
from fastcfg.jobs.local_runner import SIGNALS, choose_devices, run_units
from fastcfg.jobs.spec import Spec
from fastcfg.jobs.store import Store
from fastcfg.jobs.stores import open_store
from fastcfg.jobs.toml import read_text
from fastcfg.jobs.units import Unit, all_units, check_unit, get_unit, unit_bytes
from fastcfg.jobs.worker import Outcome, Runner, Sampled

LIMITS = {"failed": 3, "lost": 5}  # times of a unit; more for a worker's end, which may be its machine's fault
POLL_SECONDS = 1.0  # between looks at units that another run computes


@dataclass(frozen=True)
class Status:
    """How far a job is. damaged: units whose file is there and not what was written, and what is wrong with it.

    computed: units that the run which returned this wrote itself.
    """

    url: str
    units: int
    samples: int
    done: tuple[int, ...]
    images: int
    missing: tuple[int, ...]
    damaged: dict[int, str]
    computed: int = 0

    @property
    def complete(self) -> bool:
        return len(self.done) == self.units

    def __str__(self) -> str:
        return f"{len(self.done)} of {self.units} units, {self.images} of {self.samples} images in {self.url}"


def run(
    spec: Spec | str | Path,
    out: str | Path,
    *,
    devices: str | None = None,
    workers: int | None = None,
    ray: str | None = None,
    progress: bool = True,
) -> Status:
    """Computes what is missing of the job `spec` at `out`, a local folder or a URL; begins it where there is none.

    spec: a Spec, or the path of a TOML file. devices: "cpu" or GPUs ("0,1"); None for the kind the job was begun on, every
    GPU, or the CPU. workers: processes on the CPU, 1 unless given. ray: "auto" or a cluster's address, to run there.
    Raises Error for bad input, before any work; StoppedError after SIGINT or SIGTERM; JobError where `out` cannot be written
    to, where units are gone at the end that were there before, and, once all others are done, where units failed three times
    each (a worker's death is a failure of the unit that it computed) or lost their worker five times before they were written.
    """
    with signals(), closing(open_store(out)) as store:
        # A file is read once: it may be edited for the next job while this one begins.
        text = None if isinstance(spec, Spec) else read_text(spec)
        asked = spec if isinstance(spec, Spec) else Spec.from_toml(spec, text)
        job, runner = _begin(store, asked, text, devices, workers, ray)
        try:
            return _complete(job, runner, progress)
        except Signalled as stop:
            raise StoppedError(stop.signum, _remaining(job)) from None
        except JobError as error:
            raise JobError(f"{error}: {_remaining(job)}") from error


def status(out: str | Path, *, verify: bool = False, progress: bool = False) -> Status:
    """How far the job at `out` is, by the names and sizes of its files. Changes nothing.

    verify: read every file whole, and check that it is what was written.
    """
    job = open_job(out)
    found = _survey(job)
    if not verify:
        return found
    whole = [get_unit(job.spec, k) for k in found.done]
    changed, gone = {}, []
    with tqdm(whole, "verify", unit="unit", file=sys.stderr, disable=not progress) as units:
        for unit in units:
            try:
                if (reason := check_unit(job, unit)) is not None:
                    changed[unit.k] = reason
            except FileNotFoundError:  # set aside by another since it was listed
                gone.append(unit.k)
    return replace(
        found,
        done=tuple(k for k in found.done if k not in changed and k not in gone),
        images=found.images - sum(get_unit(job.spec, k).size for k in (*changed, *gone)),
        missing=tuple(sorted((*found.missing, *gone))),
        damaged=dict(sorted({**found.damaged, **changed}.items())),
    )


def set_aside(out: str | Path, damaged: Iterable[int]) -> tuple[int, ...]:
    """Moves the files of damaged units to the job's folder `damaged`, so that the next run computes them again.

    Returns the units whose files were moved. A run may have computed others since they were judged, or be at them now:
    each is claimed and judged again first.
    """
    moved = []
    with closing(open_store(out)) as store:
        job = open_job(store)
        for k in damaged:
            unit = get_unit(job.spec, k)
            if not store.claim(k):
                continue
            try:
                with suppress(FileNotFoundError):
                    if check_unit(job, unit) is not None:
                        store.set_aside(unit.name, "damaged")
                        moved.append(k)
            finally:
                store.release(k)
    return tuple(moved)


def _begin(
    store: Store, spec: Spec, text: str | None, devices: str | None, workers: int | None, ray: str | None
) -> tuple[Job, Runner]:
    """The job at `store`, frozen now if there is none, and the runner for it."""
    job = open_job(store, spec.weights) if "job.json" in store.names() else None
    if job is None:
        check_vacant(store)
    else:
        check_same(job, spec)
    kind = None if job is None else job.resolved.device
    if ray is not None:
        if devices is not None or workers is not None:
            raise Error("devices and workers are for this machine: a Ray cluster has its own")
        runner, find = _on_ray(ray)
    else:
        names = choose_devices(devices, workers, kind)
        runner, find = partial(run_units, devices=names), partial(resolve, device=names[0])
        if job is not None and processor(names[0]) != job.resolved.processor:
            print(
                f"note: the job was begun on {job.resolved.processor}, this is {processor(names[0])}: "
                "bits of the samples made here may differ in the last place",
                file=sys.stderr,
            )
    if job is None:
        job = freeze(store, spec, find(spec), text)
        check_same(job, spec)
    return job, runner


def _on_ray(address: str) -> tuple[Runner, Callable[[Spec], Resolved]]:
    """The runner of a Ray cluster, and `resolve` on one of its nodes, which may have GPUs where this machine has none."""
    from fastcfg.jobs import ray_runner

    return partial(ray_runner.run_units, address=address), partial(ray_runner.resolve, address=address)


def _complete(job: Job, runner: Runner, progress: bool) -> Status:
    job.store.prepare()
    job.store.clean()
    found = _survey(job)
    todo = deque(get_unit(job.spec, k) for k in sorted((*found.missing, *found.damaged)))
    shown = {"desc": "job", "unit": "image", "file": sys.stderr, "disable": not progress}
    with tqdm(total=found.samples, initial=found.images, **shown) as bar:
        going = _Run(job, todo, bar, done_units=len(found.done), done_images=found.images)
        while going.todo:
            with closing(runner(job, going)) as events:  # type: ignore[type-var]
                for event in events:
                    going.note(event)
            going.wait_for_others()
    if going.given_up:
        raise JobError("; ".join(_named(status, units) for status, units in sorted(going.given_up.items())))
    found = _survey(job)
    if not found.complete:
        gone = [str(k) for k in sorted((*found.missing, *found.damaged))]
        raise JobError(f"units were moved, removed or cut short while the run was under way: {_first(gone)}")
    job.store.clean()  # once more: a killed run's worker may still have held its unit when this run began
    return replace(found, computed=going.computed)


def _named(status: str, units: dict[int, str]) -> str:
    """The units that were tried as often as they may be, and why each did not come about."""
    how = {"failed": "failed", "lost": "lost their worker"}[status]
    reasons = [f"unit {k} ({reason})" for k, reason in sorted(units.items())]
    return f"{len(units)} units {how} {LIMITS[status]} times each: {_first(reasons)}"


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@dataclass
class _Run:
    """A run under way: what is left, and what became of the rest. Its iterator is the runner's `missing`."""

    job: Job
    todo: deque[Unit]
    bar: tqdm[Any]
    done_units: int
    done_images: int
    computed: int = 0
    given_up: dict[str, dict[int, str]] = field(default_factory=dict)  # by status, with the reason
    _tries: Counter[tuple[str, int]] = field(default_factory=Counter)
    _elsewhere: list[Unit] = field(default_factory=list)
    _under_way: Counter[int] = field(default_factory=Counter)  # samples of each unit that is not written yet

    def __iter__(self) -> Iterator[Unit]:
        return self

    def __next__(self) -> Unit:
        if not self.todo:
            raise StopIteration  # for now: what fails comes back
        return self.todo.popleft()

    def note(self, event: Outcome | Sampled) -> None:
        if isinstance(event, Sampled):
            self._under_way[event.unit.k] += event.images
            self._show()
            return
        unit = event.unit
        self._under_way.pop(unit.k, None)
        match event.status:
            case "written" | "present":
                self.computed += event.status == "written"
                self._done(unit)
            case "claimed":
                self._elsewhere.append(unit)
            case "failed" | "lost":
                self._tries[event.status, unit.k] += 1
                if self._tries[event.status, unit.k] < LIMITS[event.status]:
                    self.todo.append(unit)
                else:
                    self.given_up.setdefault(event.status, {})[unit.k] = event.error
            case _:
                raise JobError(event.error)
        self._show()

    def wait_for_others(self) -> None:
        """Until all units that other runs were at are there, or some are free to be computed here, their run having ended."""
        store = self.job.store
        while self._elsewhere and not self.todo:
            time.sleep(POLL_SECONDS)
            for unit in list(self._elsewhere):
                there = store.size(unit.name) == unit_bytes(self.job, unit)
                if there or store.claim(unit.k):
                    self._elsewhere.remove(unit)
                if there:
                    self._done(unit)
                elif unit not in self._elsewhere:
                    store.release(unit.k)
                    self.todo.append(unit)
            self._show()

    def _done(self, unit: Unit) -> None:
        self.done_units += 1
        self.done_images += unit.size

    def _show(self) -> None:
        self.bar.set_postfix_str(f"units {self.done_units}/{self.job.spec.unit_count}", refresh=False)
        self.bar.update(self.done_images + sum(self._under_way.values()) - self.bar.n)


def _survey(job: Job) -> Status:
    """The job's units by the sizes of their files."""
    sizes = job.store.sizes("units")
    done, missing, damaged, images = [], [], {}, 0
    for unit in all_units(job.spec):
        size, want = sizes.get(unit.name.rpartition("/")[2]), unit_bytes(job, unit)
        if size is None:
            missing.append(unit.k)
        elif size != want:
            damaged[unit.k] = f"{size} bytes, not {want}"
        else:
            done.append(unit.k)
            images += unit.size
    spec = job.spec
    return Status(job.store.url, spec.unit_count, spec.samples, tuple(done), images, tuple(missing), damaged)


def _remaining(job: Job) -> str:
    found = _survey(job)
    return f"{found}; {found.units - len(found.done)} units remain, and the same command goes on from here"


@contextmanager
def signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise Signalled, once: what comes after is the ending, and then StoppedError. Only a main thread
    hears signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    heard: list[int] = []

    def stop(signum: int, _: FrameType | None) -> None:
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        heard.append(signum)
        raise Signalled(signum)

    before = {signum: signal.signal(signum, stop) for signum in SIGNALS}
    try:
        yield
    except Error:
        raise
    except BaseException as error:
        if not heard:
            raise
        # Signalled, or what a library made of it, or met in the ending
        what = "" if isinstance(error, Signalled) else f"its ending met {type(error).__name__}: {error}"
        raise StoppedError(heard[0], what) from error
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
