"""The Ray runner: one worker a GPU of a cluster, or one a node where the job runs on CPUs. Needs the extra `ray`.

Every node needs fastcfg, the checkpoint at the spec's path, and the job's folder at its path, if it is no object store: a
folder that all nodes share. Units are written by the workers; between them and the driver go only events.

Nodes may come and go. A node that joins gets workers; what a lost node or a dead worker was at is computed elsewhere. A
worker that cannot start is said so on stderr and left out, and ends the run with a JobError if no other is left.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcfg.errors import Error, missing_extra
from fastcfg.jobs.errors import JobError
from fastcfg.jobs.job import Job, Resolved, open_job, processor
from fastcfg.jobs.job import resolve as resolve_here
from fastcfg.jobs.local_store import LocalStore
from fastcfg.jobs.spec import Spec
from fastcfg.jobs.store import FREEZING, Store
from fastcfg.jobs.units import Unit
from fastcfg.jobs.worker import Outcome, Sampled, Worker

STARTS = 3  # times that a worker may die while it starts
GATHER_SECONDS = 0.1  # in which a worker gathers events, so that small batches do not flood the driver
LOOK_SECONDS = 2.0  # between looks at which nodes there are
NO_NODE_SECONDS = 300.0  # how long a run waits for a node when there is none
PATIENCE_SECONDS = 60.0  # after which a run says that a node's CPUs or GPUs are taken by others
STOP_SECONDS = 60.0  # for what is computed to be written when a run is stopped
CONNECT_SECONDS = 10.0
WANTED = 'want host:port of its head, "auto" on one of its nodes, or "local" to start one here'
TOKEN = ".ray-"  # what the name of a run's token begins with, the file by which workers know the job's folder
_TOKENS = re.compile(rf"\.?{re.escape(TOKEN)}([0-9]+)(\.[0-9a-f]+\.tmp)?")  # whole, or half written


@dataclass(frozen=True)
class Place:
    """Where a worker can be: a GPU, or all CPUs, of a node."""

    node: str
    host: str
    number: int
    cpus: float
    gpus: int

    @property
    def needs(self) -> str:
        return "a GPU" if self.gpus else f"all {self.cpus:g} CPUs"


def run_units(job: Job, missing: Iterable[Unit], address: str) -> Iterator[Outcome | Sampled]:
    """A runner (see `fastcfg.jobs.worker`) of the Ray cluster at `address`: "auto", "local" or host:port."""
    with _connected(address) as ray, _token(job.store) as token:
        crew = _Crew(ray, job, token)
        units, upcoming = iter(missing), None
        try:
            while True:
                crew.look()
                for hand in crew.hands:
                    upcoming = upcoming or next(units, None)
                    if upcoming is not None and hand.free:
                        hand.give(upcoming)
                        upcoming = None
                if upcoming is None and not any(hand.busy for hand in crew.hands):
                    return
                yield from crew.listen()
        finally:
            crew.stop()


def resolve(spec: Spec, address: str) -> Resolved:
    """`fastcfg.jobs.job.resolve` on a node of the cluster: on a GPU if it has any. Raises Error."""
    with _connected(address) as ray:
        places = _places(ray, "cuda") or _places(ray, "cpu")
        if not places:
            raise Error(f"the Ray cluster at {address!r} has no GPU and no CPU to compute on")
        task = ray.remote(resolve_here).options(**_options(places[0]), max_retries=STARTS)
        try:
            found: Resolved = ray.get(task.remote(spec, "cuda" if places[0].gpus else "cpu"))
        except ray.exceptions.RayError as error:
            if isinstance(cause := getattr(error, "cause", None), Error):
                raise cause from None
            raise JobError(f"node {places[0].host} could not try the checkpoint: {_reason(error)}") from error
        return found


class Actor:
    """A worker in a process of a node. take, events and finish are each called by a thread of their own."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[Outcome | Sampled] = queue.SimpleQueue()

    def start(self, store: Store, weights: dict[str, str], token: str | None, device: str) -> str:
        """Makes the sampler; the processor it is on. Raises Error where this node cannot work for the job.

        weights: where checkpoint and classifier are now, on every node.
        """
        if token is not None and token not in store.names():
            raise Error(
                f"it does not see the job's folder {store.url}: want a folder that all nodes share, or an object store (s3://)"
            )
        self._store = store
        self._worker = Worker(open_job(store, weights), device, self._events.put)
        return processor(device)

    def take(self, unit: Unit) -> None:
        """Computes `unit`; returns when the device is free for the next."""
        self._worker.take(unit)

    def events(self) -> list[Outcome | Sampled]:
        """What has happened since this was last called; waits for something to happen."""
        found = [self._events.get()]
        time.sleep(GATHER_SECONDS)
        with suppress(queue.Empty):
            while True:
                found.append(self._events.get_nowait())
        return found

    def finish(self) -> None:
        """Returns when all that was computed is written, and gives up the unit that is not."""
        self._worker.finish()
        self._store.close()


class _Hand:
    """An actor as the driver sees it: the unit it computes, and all it was given and has not reported."""

    def __init__(self, ray: Any, place: Place, job: Job, token: str | None):
        self.ray, self.place = ray, place
        self.actor = ray.remote(Actor).options(max_concurrency=3, **_options(place)).remote()
        self.since = time.monotonic()
        self.starting: Any = self.actor.start.remote(job.store, job.spec.weights, token, job.resolved.device)
        self.processor: str | None = None
        self.taking: Any = None
        self.hearing: Any = None
        self.computing: Unit | None = None
        self.given: list[Unit] = []

    @property
    def free(self) -> bool:
        return self.starting is None and self.taking is None

    @property
    def busy(self) -> bool:
        return bool(self.given)

    @property
    def refs(self) -> list[Any]:
        return [ref for ref in (self.starting, self.taking, self.hearing) if ref is not None]

    def give(self, unit: Unit) -> None:
        self.computing = unit
        self.given.append(unit)
        self.taking = self.actor.take.remote(unit)

    def receive(self, ref: Any) -> Iterator[Outcome | Sampled]:
        """What `ref`, one of `refs` that is ready, brings. Raises RayError where the actor is no more or cannot start."""
        content = self.ray.get(ref)
        if ref == self.starting:
            self.starting, self.processor = None, content
        if ref == self.taking:
            self.taking = self.computing = None
        if ref == self.hearing:
            for event in content:
                if isinstance(event, Outcome):
                    self.given.remove(event.unit)
                yield event
        if ref == self.hearing or self.hearing is None:
            self.hearing = self.actor.events.remote()

    def bury(self, reason: str, node_is_there: bool) -> Iterator[Outcome]:
        """What became of the units of an actor that is no more. Only one it died of is blamed, and none if its node did."""
        with suppress(Exception):
            self.ray.kill(self.actor)
        for unit in self.given:
            blamed = node_is_there and unit == self.computing
            yield Outcome(unit, "failed" if blamed else "lost", f"its worker on {self.place.host} ended: {reason}")


class _Crew:
    """The actors of a run: one for each place that the cluster has, as far as they can start."""

    def __init__(self, ray: Any, job: Job, token: str | None):
        self.ray, self.job, self.token = ray, job, token
        self.hands: list[_Hand] = []
        self._broken: dict[Place, str] = {}
        self._deaths: Counter[Place] = Counter()  # while starting
        self._noted: set[str] = set()
        self._next_look = -math.inf
        self._last_place = time.monotonic()

    def look(self) -> None:
        """Starts actors at places that have none. Raises JobError where none is left that could work."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        places = _places(self.ray, self.job.resolved.device)
        taken = {hand.place for hand in self.hands} | set(self._broken)
        self.hands += [_Hand(self.ray, place, self.job, self.token) for place in places if place not in taken]
        for hand in self.hands:
            if hand.starting is not None and now - hand.since > PATIENCE_SECONDS:
                self._note(f"no worker runs on node {hand.place.host} yet: is it busy? {hand.place.needs} must be free for it")
        if self.hands:
            self._last_place = now
        elif self._broken:
            raise JobError(f"no worker could be started: {'; '.join(sorted(set(self._broken.values())))}")
        elif now - self._last_place > NO_NODE_SECONDS:
            kind = {"cuda": "GPU", "cpu": "CPU"}[self.job.resolved.device]
            raise JobError(f"the Ray cluster has had no {kind} for {NO_NODE_SECONDS:g} s")

    def listen(self) -> Iterator[Outcome | Sampled]:
        """What the actors have to say, within a second or so."""
        owners = {ref: hand for hand in self.hands for ref in hand.refs}
        if not owners:
            time.sleep(1.0)
            return
        ready, _ = self.ray.wait(list(owners), num_returns=1, timeout=1.0)
        ready, _ = self.ray.wait(list(owners), num_returns=len(owners), timeout=0)
        for ref in ready:
            hand = owners[ref]
            if hand not in self.hands:  # buried a moment ago
                continue
            try:
                yield from hand.receive(ref)
                self._check_processor(hand)
            except self.ray.exceptions.RayError as error:
                self.hands.remove(hand)
                yield from self._lose(hand, error)

    def stop(self) -> None:
        """Lets actors write what they have computed, and ends them."""
        working = [hand for hand in self.hands if hand.starting is None]
        with suppress(Exception):  # whatever the cluster has come to, its actors must not stay
            self.ray.wait([h.actor.finish.remote() for h in working], num_returns=len(working), timeout=STOP_SECONDS)
        for hand in self.hands:
            with suppress(Exception):
                self.ray.kill(hand.actor)

    def _lose(self, hand: _Hand, error: Exception) -> Iterator[Outcome]:
        place, there = hand.place, _is_there(self.ray, hand.place)
        if hand.starting is not None and there:
            self._deaths[place] += 1
            raised = not isinstance(error, self.ray.exceptions.RayActorError)
            if raised or self._deaths[place] == STARTS:
                self._broken[place] = f"node {place.host}: {_reason(error)}"
                self._note(f"a worker could not be started and is left out: {self._broken[place]}")
        self._next_look = -math.inf
        yield from hand.bury(_reason(error), there)

    def _check_processor(self, hand: _Hand) -> None:
        here, there = self.job.resolved.processor, hand.processor
        if there not in (None, here):
            self._note(
                f"the job was begun on {here}, node {hand.place.host} is {there}: "
                "bits of the samples made there may differ in the last place"
            )

    def _note(self, message: str) -> None:
        """Says it once."""
        if message not in self._noted:
            self._noted.add(message)
            print(f"note: {message}", file=sys.stderr)


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """The module ray, connected: by the caller of this package, whose connection is left as it is, or for this time."""
    try:
        import ray
    except ImportError as error:
        raise missing_extra("ray", f"a run on the Ray cluster {address!r}", error) from error
    if ray.is_initialized():
        yield ray
        return
    _check_address(address)
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise Error(f"cannot reach a Ray cluster at {address!r}: {_reason(error)}: {WANTED}") from error
    try:
        if main:
            signal.signal(signal.SIGTERM, before)  # Ray's handler ends the process without a word
        yield ray
    finally:
        ray.shutdown()
        if main:
            signal.signal(signal.SIGTERM, before)


def _check_address(address: str) -> None:
    """Raises Error where nobody answers at `address`, for which Ray itself waits for minutes, deaf to signals."""
    asked, where = address, os.environ.get("RAY_ADDRESS") or address
    if where == "auto":
        note = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
        where = note.read_text().strip() if note.is_file() else where
        asked = f"auto, in {note}"
    host, colon, port = where.rpartition(":")
    if not colon or "://" in where:
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS):
            pass
    except (OSError, ValueError, OverflowError) as error:
        raise Error(f"cannot reach a Ray cluster at {where!r} ({asked}): {error}: {WANTED}") from error


@contextmanager
def _token(store: Store) -> Iterator[str | None]:
    """The name of a file that is in the job's folder while a run lasts: who sees it there sees the same folder.

    None for an object store, which is the same from everywhere. Tokens of runs that were killed are removed: as with units,
    what can be claimed is nobody's.
    """
    if not isinstance(store, LocalStore):
        yield None
        return
    for name in store.names():
        if (left := _TOKENS.fullmatch(name)) and store.claim(number := int(left[1])):
            (store.root / name).unlink(missing_ok=True)
            store.release(number)
    number = 2 * FREEZING + secrets.randbelow(FREEZING)
    token = f"{TOKEN}{number}"
    store.claim(number)
    store.write(token, [])
    try:
        yield token
    finally:
        (store.root / token).unlink(missing_ok=True)
        store.release(number)


def _places(ray: Any, kind: str) -> list[Place]:
    """Where workers can be now. kind: "cuda" or "cpu"."""
    places = []
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        cpus, gpus = node["Resources"].get("CPU", 0), int(node["Resources"].get("GPU", 0))
        if kind == "cuda":
            places += [Place(node["NodeID"], node["NodeManagerHostname"], n, 0, 1) for n in range(gpus)]
        elif cpus:
            places.append(Place(node["NodeID"], node["NodeManagerHostname"], 0, cpus, 0))
    return places


def _is_there(ray: Any, place: Place) -> bool:
    return any(node["NodeID"] == place.node and node["Alive"] for node in ray.nodes())


def _options(place: Place) -> dict[str, Any]:
    """Ray's options for what is to run at `place`."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    pinned = NodeAffinitySchedulingStrategy(place.node, soft=False)
    return {"num_cpus": place.cpus, "num_gpus": place.gpus, "scheduling_strategy": pinned}


def _reason(error: BaseException) -> str:
    """An exception in one line. Ray's carry the node's exception as their cause, or its traceback in their text."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Error):
        return str(cause)
    text = f"{type(cause).__name__}: {cause}" if isinstance(cause, BaseException) else str(error)
    raised = re.findall(r"^\s*(\w*(?:Error|Exception): .*)", text, re.MULTILINE)
    return raised[-1] if raised else text.strip().partition("\n")[0] or type(error).__name__
