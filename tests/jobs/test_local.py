"""Jobs run by processes of this machine: one or two at a time, stopped, starved of disk, sharing a folder, losing workers."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from crashing import Start, Started, start_command, unit_hashes

import fastcfg
from fastcfg.jobs import Job, Spec, Unit, all_units, local_runner, open_job, open_store, run, set_aside, status
from fastcfg.jobs.errors import JobError, StoppedError
from fastcfg.jobs.job import freeze, resolve
from fastcfg.jobs.local_runner import SIGNALS, choose_devices, run_units
from fastcfg.jobs.run import _complete, _named, signals
from fastcfg.jobs.worker import Outcome, Sampled

WriteSpec = Callable[..., Path]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def wait_for_units(out: Path, count: int, run: Started) -> None:
    deadline = time.monotonic() + 120
    while len(list((out / "units").glob("[!.]*"))) < count:
        assert time.monotonic() < deadline
        assert run.poll() is None
        time.sleep(0.002)


def test_from_python_as_from_the_command(start: Start, tiny_spec: Spec, tiny_spec_path: Path, tmp_path: Path) -> None:
    """With a real worker process, in a folder with spaces and quotes in its name."""
    out = tmp_path / "it's a job, 100 %"
    found = run(tiny_spec, out, devices="cpu", progress=False)
    assert (found.complete, found.computed, found.images) == (True, 7, 40)
    set_aside(out, [0])
    assert not [file for file in Path("/proc/self/fd").iterdir() if str(out) in os.path.realpath(file)], "it is still open"
    assert run(tiny_spec_path, out, progress=False).computed == 0
    other = tmp_path / "other"
    assert start(["job", "run", str(tiny_spec_path), "--out", str(other), "--workers", "2"]).wait() == 0
    assert unit_hashes(out) == unit_hashes(other)
    assert (other / "spec.toml").read_text() == tiny_spec_path.read_text()


def test_a_spec_that_is_edited_meanwhile_is_kept_as_it_was_begun(
    write_spec: WriteSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, module = write_spec(), sys.modules["fastcfg.jobs.run"]
    text = path.read_text()
    monkeypatch.setattr(module, "resolve", lambda *a, **o: write_spec(seed=6) and resolve(*a, **o))
    monkeypatch.setattr(module, "run_units", lambda job, missing, devices: failing(0, 0)(job, missing))
    run(path, tmp_path / "job", devices="cpu", progress=False)
    assert path.read_text() != text == (tmp_path / "job" / "spec.toml").read_text()
    assert open_job(tmp_path / "job").spec.seed == 5


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_run_between_units(
    start: Start, write_spec: WriteSpec, tmp_path: Path, log: Path, signum: int, code: int
) -> None:
    """The signal goes to the whole group, as a terminal or a batch system sends it. What is computed is still written: the
    disk is slow, so that there is always a unit at the writer."""
    arguments = ["job", "run", str(write_spec(count=300, steps=10)), "--out", str(tmp_path / "job")]
    run = start(arguments, log=log, sync=0.3)
    wait_for_units(tmp_path / "job", 3, run)
    time.sleep(0.45)  # its folder is synced by now, and the next is being written
    run.send(signum)
    assert run.wait() == code
    match = re.search(
        r"error: stopped by (SIG\w+): (\d+) of 100 units, \d+ of 600 images in .*; (\d+) units remain", run.printed
    )
    assert match, run.printed
    assert match[1] == signal.Signals(signum).name
    assert "Traceback" not in run.printed
    files = list((tmp_path / "job" / "units").iterdir())
    assert len(files) == int(match[2]) == 100 - int(match[3])
    assert not [path for path in files if path.suffix == ".tmp"]
    assert not status(tmp_path / "job", verify=True).damaged


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_stops_and_no_other_disturbs_the_ending(first: int) -> None:
    before = [signal.getsignal(signum) for signum in SIGNALS]
    ended = []

    def work() -> None:
        try:
            signal.raise_signal(first)
        finally:
            for signum in SIGNALS:
                signal.raise_signal(signum)
            ended.append(True)

    with pytest.raises(StoppedError) as stopped, signals():
        work()
    assert ended
    assert stopped.value.signum == first
    assert [signal.getsignal(signum) for signum in SIGNALS] == before


def test_a_signal_is_one_whatever_its_ending_meets() -> None:
    def work() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise SystemError("the cluster is gone")

    with pytest.raises(StoppedError) as stopped, signals():
        work()
    assert str(stopped.value) == "stopped by SIGTERM: its ending met SystemError: the cluster is gone"
    assert stopped.value.exit_code == 143
    with pytest.raises(SystemError), signals():
        raise SystemError("no signal was heard")


@pytest.mark.parametrize("caught", [fastcfg.Error, Exception])
def test_a_signal_is_no_error_of_what_it_interrupts(
    tiny_spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caught: type[Exception]
) -> None:
    """While a run finds out what "auto" is. A loader's failures are errors of the spec, and some are survived."""

    def load(_: str) -> None:
        with contextlib.suppress(caught):
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the signal was not heard")

    monkeypatch.setattr("fastcfg.jobs.job.load", load)
    with pytest.raises(StoppedError, match=r"^stopped by SIGINT$"):
        run(tiny_spec, tmp_path / "job", devices="cpu", progress=False)
    assert not (tmp_path / "job").exists()


def test_a_signal_to_the_real_command(write_spec: WriteSpec, tmp_path: Path, log: Path) -> None:
    """Not forked for the test, but as a user starts it."""
    out = tmp_path / "job"
    run = start_command(["job", "run", str(write_spec(count=1000, steps=10)), "--out", str(out)], log)
    wait_for_units(out, 1, run)
    run.send(signal.SIGINT)
    assert run.wait() == 130
    assert "error: stopped by SIGINT" in run.printed
    assert "Traceback" not in run.printed
    assert not status(out, verify=True).damaged


def test_workers_end_with_their_parent(start: Start, write_spec: WriteSpec, tmp_path: Path) -> None:
    """kill -9 of the parent alone: no worker goes on by itself, and none leaves a unit claimed."""
    out, arguments = tmp_path / "job", ["job", "run", str(write_spec(count=300, steps=10)), "--out", str(tmp_path / "job")]
    run = start(arguments)
    wait_for_units(out, 2, run)
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while _group_lives(run.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not status(out, verify=True).damaged


def _group_lives(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_two_runs_at_once_share_the_units(start: Start, write_spec: WriteSpec, tmp_path: Path) -> None:
    spec = str(write_spec(count=120, steps=30))  # 40 units, long enough that a run that starts late finds some
    out, whole = tmp_path / "job", tmp_path / "whole"
    assert start(["job", "run", spec, "--out", str(whole)]).wait() == 0
    both = [start(["job", "run", spec, "--out", str(out)], log=tmp_path / f"log{i}") for i in range(2)]
    assert [one.wait() for one in both] == [0, 0]
    computed = []
    for one in both:
        match = re.search(r"40 of 40 units, 240 of 240 images in .* \((\d+) units computed here\)", one.printed)
        assert match, one.printed
        computed.append(int(match[1]))
    assert sum(computed) == 40
    assert min(computed) >= 5
    assert unit_hashes(out) == unit_hashes(whole)


def test_a_run_takes_over_what_another_leaves(start: Start, write_spec: WriteSpec, tmp_path: Path) -> None:
    """The first run is killed while the second waits for nothing but its units."""
    spec = str(write_spec(count=6, unit_size=6, steps=200))  # two units of a second or so
    out = tmp_path / "job"
    one = start(["job", "run", spec, "--out", str(out), "--workers", "2"])
    deadline = time.monotonic() + 60
    store = None
    while store is None or store.claim(0) or store.claim(1):
        if store is not None:
            store.release(0)
            store.release(1)
        elif (out / "claims").exists() and (out / "job.json").exists():
            store = open_store(out)
        assert time.monotonic() < deadline
        time.sleep(0.002)
    two = start(["job", "run", spec, "--out", str(out)], log=tmp_path / "log")
    time.sleep(0.1)
    one.send(signal.SIGKILL)
    one.wait()
    assert two.wait() == 0
    assert "2 of 2 units" in two.printed


@contextmanager
def tmpfs(path: Path, options: str) -> Iterator[Callable[[str], None]]:
    """Mounts a small file system of its own; yields remount(options). Skips where mounting is not permitted."""
    path.mkdir()

    def mount(*arguments: str) -> None:
        done = subprocess.run(["mount", *arguments, str(path)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no permission to mount a tmpfs: {done.stderr.strip()}")

    if not shutil.which("mount"):
        pytest.skip("no mount command")
    mount("-t", "tmpfs", "-o", options, "tmpfs")
    try:
        yield lambda changed: mount("-o", f"remount,{changed}")
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(
    start: Start, write_spec: WriteSpec, tmp_path: Path, log: Path
) -> None:
    spec = str(write_spec(count=60))  # 20 units of 4 KiB
    disk = tmp_path / "disk"
    with tmpfs(disk, "size=48k") as remount:
        run = start(["job", "run", spec, "--out", str(disk / "job")], log=log)
        assert run.wait() == 1
        assert re.search(r"error: cannot write .*unit-\d+.*No space left on device: \d+ of 20 units", run.printed), run.printed
        assert "Traceback" not in run.printed
        found = status(disk / "job", verify=True)
        assert 2 <= len(found.done) < 20
        assert not found.damaged
        assert not list((disk / "job" / "units").glob(".*"))
        remount("size=4m")
        assert start(["job", "run", spec, "--out", str(disk / "job")]).wait() == 0
        whole = tmp_path / "whole"
        assert start(["job", "run", spec, "--out", str(whole)]).wait() == 0
        assert unit_hashes(disk / "job") == unit_hashes(whole)


def test_a_file_size_limit_stops_the_run_likewise(start: Start, write_spec: WriteSpec, tmp_path: Path, log: Path) -> None:
    """Needs no rights to mount, so it always runs: no file may be longer than 1 KiB."""
    arguments = ["job", "run", str(write_spec()), "--out", str(tmp_path / "job")]
    run = start(arguments, log=log, fsize=1024)
    assert run.wait() == 1
    assert re.search(r"error: cannot write .*unit-000000.*File too large: 0 of 7 units", run.printed), run.printed
    assert list((tmp_path / "job" / "units").iterdir()) == []
    assert start(arguments).wait() == 0


def test_a_read_only_folder_is_a_clear_error(start: Start, tiny_spec_path: Path, tmp_path: Path, log: Path) -> None:
    disk = tmp_path / "disk"
    with tmpfs(disk, "size=1m") as remount:
        command = ["job", "run", str(tiny_spec_path), "--out", str(disk / "job")]
        assert start(command).wait() == 0
        (disk / "job" / "units" / "unit-000003.safetensors").unlink()
        remount("ro")
        run = start(command, log=log)
        assert run.wait() == 1
        assert f"error: cannot write in {disk / 'job'}: Read-only file system" in run.printed
        log.unlink()
        fresh = start([*command[:-1], str(disk / "other")], log=log)
        assert fresh.wait() == 1
        assert f"error: cannot write in {disk / 'other'}: Read-only file system" in fresh.printed
        assert status(disk / "job", verify=True).missing == (3,)  # looking needs no writing


def test_a_place_that_takes_no_files(start: Start, tiny_spec_path: Path, log: Path) -> None:
    run = start(["job", "run", str(tiny_spec_path), "--out", "/proc/job"], log=log)  # whoever asks
    assert run.wait() == 1
    assert "error: cannot write in /proc/job" in run.printed
    assert "Traceback" not in run.printed


def test_a_checkpoint_may_move_between_runs(start: Start, write_spec: WriteSpec, tiny_checkpoint: Path, tmp_path: Path) -> None:
    copy, moved, out = tmp_path / "copy.safetensors", tmp_path / "moved.safetensors", tmp_path / "job"
    shutil.copy(tiny_checkpoint, copy)
    assert start(["job", "run", str(write_spec(checkpoint=str(copy))), "--out", str(out)]).wait() == 0
    copy.rename(moved)
    (out / "units" / "unit-000002.safetensors").unlink()
    whole = unit_hashes(out)
    assert start(["job", "run", str(write_spec(checkpoint=str(moved))), "--out", str(out)]).wait() == 0
    assert whole.items() < unit_hashes(out).items()


def test_a_lost_description_is_written_again(start: Start, tiny_spec_path: Path, tmp_path: Path) -> None:
    command = ["job", "run", str(tiny_spec_path), "--out", str(tmp_path / "job")]
    assert start(command).wait() == 0
    before = (tmp_path / "job" / "job.json").read_bytes()
    (tmp_path / "job" / "job.json").unlink()
    assert start(command).wait() == 0
    assert (tmp_path / "job" / "job.json").read_bytes() == before
    assert status(tmp_path / "job", verify=True).complete


def make_job(spec: Spec, out: Path) -> Job:
    return freeze(open_store(out), spec, resolve(spec, "cpu"), None)


def test_a_worker_that_dies_is_replaced(tiny_spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(replace(tiny_spec, steps=100), tmp_path / "job")
    children: list[subprocess.Popen[bytes]] = []
    real = local_runner._start
    monkeypatch.setattr(local_runner, "_start", lambda theirs: (children.append(real(theirs)), children[-1])[1])
    events = run_units(job, all_units(job.spec), ["cpu"])
    seen: list[Outcome | Sampled] = []
    with contextlib.closing(events):
        for event in events:
            seen.append(event)
            if isinstance(event, Sampled) and len(children) == 1:
                children[0].kill()
    outcomes = [event for event in seen if isinstance(event, Outcome)]
    assert len(children) == 2
    assert sorted(outcome.unit.k for outcome in outcomes) == list(range(7))
    dead = [outcome for outcome in outcomes if outcome.status in ("failed", "lost")]
    assert dead
    assert all(outcome.error == "its worker was killed by signal 9" for outcome in dead)
    assert all(child.poll() is not None for child in children)


def test_a_worker_that_cannot_start_ends_the_run(tiny_spec: Spec, tmp_path: Path) -> None:
    copy = tmp_path / "copy.safetensors"
    shutil.copy(tiny_spec.checkpoint, copy)
    job = make_job(replace(tiny_spec, checkpoint=str(copy)), tmp_path / "job")
    copy.unlink()
    with pytest.raises(JobError, match=r"no worker could be started on cpu: cannot read the checkpoint"):
        list(run_units(job, all_units(job.spec), ["cpu"]))


class StandIn:
    """Of worker processes: each is a thread that does as its script says with the connection, and is killed by signal 9."""

    def __init__(self, *scripts: Callable[[Any], None]):
        self.scripts = list(scripts)
        self.begun: list[tuple[Any, ...]] = []  # what each process was sent first

    def start(self, theirs: Connection[Any, Any]) -> StandIn:
        connection: Any = Connection(os.dup(theirs.fileno()))
        threading.Thread(target=self._serve, args=(connection, self.scripts.pop(0)), daemon=True).start()
        return self

    def _serve(self, connection: Any, script: Callable[[Any], None]) -> None:
        with connection, contextlib.suppress(OSError, EOFError):  # its parent may be gone
            self.begun.append(connection.recv())
            connection.send(local_runner._Ready())
            script(connection)

    def wait(self, _: float | None = None) -> int:
        return -signal.SIGKILL

    kill = wait


def dying(connection: Any) -> None:
    """A worker that dies of its first unit."""
    connection.recv()


def sound(connection: Any) -> None:
    """A worker that writes whatever it is given."""
    while (unit := connection.recv()) is not None:
        connection.send(local_runner._Free())
        connection.send(Outcome(unit, "written"))


class Again:
    """Of a run, what a runner takes units from: those put back while their outcomes are heard come again."""

    def __init__(self, units: Iterable[Unit]):
        self.units = list(units)

    def __iter__(self) -> Again:
        return self

    def __next__(self) -> Unit:
        if not self.units:
            raise StopIteration
        return self.units.pop(0)


def test_a_unit_that_fails_is_not_taken_for_computed_when_it_is_tried_again(
    tiny_spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raises, and the worker dies of it the next time: both are failures of the unit."""

    def script(connection: Any) -> None:
        unit = connection.recv()
        connection.send(Outcome(unit, "failed", "raised"))
        connection.poll(0.3)  # time for the unit to be sent again
        connection.send(local_runner._Free())
        connection.recv()

    monkeypatch.setattr(local_runner, "_start", StandIn(script, sound).start)
    job = make_job(tiny_spec, tmp_path / "job")
    missing = Again([next(iter(all_units(job.spec)))])
    seen = []
    for event in run_units(job, missing, ["cpu"]):
        assert isinstance(event, Outcome)
        seen.append((event.status, event.error))
        if event.status != "written":
            missing.units.append(event.unit)
    assert seen == [("failed", "raised"), ("failed", "its worker was killed by signal 9"), ("written", "")]


def test_only_the_unit_that_a_worker_died_of_is_blamed(
    tiny_spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(connection: Any) -> None:
        connection.recv()
        connection.send(local_runner._Free())  # computed, and not yet written
        connection.recv()

    monkeypatch.setattr(local_runner, "_start", StandIn(script, sound).start)
    job = make_job(tiny_spec, tmp_path / "job")
    events = list(run_units(job, list(all_units(job.spec))[:2], ["cpu"]))
    how = "its worker was killed by signal 9"
    assert events == [Outcome(Unit(0, 0, 6), "lost", how), Outcome(Unit(1, 6, 12), "failed", how)]


def test_a_worker_is_replaced_by_its_like(tiny_spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, half = make_job(tiny_spec, tmp_path / "job"), max(1, torch.get_num_threads() // 2)
    for devices, threads in ((["cpu", "cpu"], half), (["cuda:0", "cuda:1"], None)):
        both = threading.Barrier(2, timeout=60)  # each has a unit, which the other's successor could take otherwise

        def dying_together(connection: Any, both: threading.Barrier = both) -> None:
            dying(connection)
            both.wait()

        workers = StandIn(dying_together, dying_together, sound, sound)
        monkeypatch.setattr(local_runner, "_start", workers.start)
        list(run_units(job, all_units(job.spec), devices))
        deadline = time.monotonic() + 60
        while len(workers.begun) < 4:  # the last may hear of it only now
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert sorted(begun[2:] for begun in workers.begun) == sorted((device, threads) for device in devices * 2)


def test_a_worker_takes_its_share_of_the_cores(tiny_spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve` in this process, which ends as the worker's would when its parent is gone."""
    job, before, ended = make_job(tiny_spec, tmp_path / "job"), torch.get_num_threads(), threading.Event()
    parent, theirs = Pipe()
    parent.send((job.store, {}, "cpu", before + 1))
    monkeypatch.setattr(os, "_exit", lambda _: ended.set())
    monkeypatch.setattr(local_runner, "Worker", lambda *_: pytest.fail(f"{torch.get_num_threads()} threads"))
    try:
        with theirs, pytest.raises(pytest.fail.Exception, match=f"^{before + 1} threads$"):
            local_runner.serve(os.dup(theirs.fileno()))
    finally:
        torch.set_num_threads(before)
        parent.close()
        assert ended.wait(60)


def test_a_worker_that_dies_as_it_starts_is_not_started_again(
    tiny_spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stillborn(StandIn):
        def _serve(self, connection: Any, script: Callable[[Any], None]) -> None:
            del script
            connection.close()

    monkeypatch.setattr(local_runner, "_start", Stillborn(sound).start)
    job = make_job(tiny_spec, tmp_path / "job")
    with pytest.raises(JobError, match="no worker could be started on cpu: its worker was killed by signal 9"):
        list(run_units(job, all_units(job.spec), ["cpu"]))


def test_a_worker_that_does_not_end_is_killed(tiny_spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf(StandIn):
        killed = False

        def wait(self, timeout: float | None = None) -> int:
            assert self.killed or timeout is not None, "it waits for ever"
            if not self.killed:
                raise subprocess.TimeoutExpired("worker", timeout or 0)
            return super().wait()

        def kill(self) -> int:
            self.killed = True
            return 0

    workers = Deaf(sound)
    monkeypatch.setattr(local_runner, "_start", workers.start)
    job = make_job(tiny_spec, tmp_path / "job")
    assert len(list(run_units(job, all_units(job.spec), ["cpu"]))) == 7
    assert workers.killed


def test_no_room_for_a_worker_is_one_error_and_no_other_is_left(
    tiny_spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tiny_spec, tmp_path / "job")
    children: list[subprocess.Popen[bytes]] = []
    real = local_runner._start

    def start(theirs: Any) -> subprocess.Popen[bytes]:
        if len(children) == 2:
            raise OSError(errno.EMFILE, "Too many open files")
        children.append(real(theirs))
        return children[-1]

    monkeypatch.setattr(local_runner, "_start", start)
    with pytest.raises(JobError, match="no worker could be started on cpu: Too many open files"):
        list(run_units(job, all_units(job.spec), ["cpu"] * 3))
    assert [child.poll() for child in children] == [-signal.SIGKILL] * 2


def failing(
    k: int, times: int, status: str = "failed", error: str = "RuntimeError: out of memory"
) -> Callable[[Job, Iterable[Unit]], Iterator[Outcome]]:
    """A runner that writes stand-ins, and fails unit `k`, or loses it, the first `times` times."""
    left = [times]

    def runner(job: Job, missing: Iterable[Unit]) -> Iterator[Outcome]:
        for unit in missing:
            if unit.k == k and left[0]:
                left[0] -= 1
                yield Outcome(unit, status, error)
            else:
                job.store.write(unit.name, [bytes(fastcfg.jobs.units.unit_bytes(job, unit))])
                yield Outcome(unit, "written")

    return runner


def test_a_unit_is_tried_three_times_and_the_rest_is_finished(tiny_spec: Spec, tmp_path: Path) -> None:
    job = make_job(tiny_spec, tmp_path / "twice")
    assert _complete(job, failing(2, 2), progress=False).complete
    job = make_job(tiny_spec, tmp_path / "thrice")
    with pytest.raises(JobError, match=r"1 units failed 3 times each: unit 2 \(RuntimeError: out of memory\)"):
        _complete(job, failing(2, 3), progress=False)
    assert status(tmp_path / "thrice").missing == (2,)


def test_five_units_are_named_and_the_others_counted() -> None:
    assert _named("failed", dict.fromkeys(range(5), "x")) == (
        "5 units failed 3 times each: unit 0 (x), unit 1 (x), unit 2 (x), unit 3 (x), unit 4 (x)"
    )
    assert _named("lost", dict.fromkeys((6, 5, 4, 3, 2, 1), "x")) == (
        "6 units lost their worker 5 times each: unit 1 (x), unit 2 (x), unit 3 (x), unit 4 (x), unit 5 (x) and 1 more"
    )


def test_a_unit_whose_worker_ends_each_time_is_named_and_the_rest_is_finished(tiny_spec: Spec, tmp_path: Path) -> None:
    how = "its worker was killed by signal 9"
    job = make_job(tiny_spec, tmp_path / "four times")
    assert _complete(job, failing(2, 4, "lost", how), progress=False).complete
    job = make_job(tiny_spec, tmp_path / "five times")
    with pytest.raises(JobError, match=rf"1 units lost their worker 5 times each: unit 2 \({how}\)"):
        _complete(job, failing(2, 5, "lost", how), progress=False)
    assert status(tmp_path / "five times").missing == (2,)


def test_a_unit_that_goes_while_others_are_computed_is_an_error(tiny_spec: Spec, tmp_path: Path) -> None:
    job = make_job(tiny_spec, tmp_path / "job")

    def runner(job: Job, missing: Iterable[Unit]) -> Iterator[Outcome]:
        yield from failing(0, 0)(job, missing)
        (tmp_path / "job" / "units" / "unit-000003.safetensors").unlink()

    with pytest.raises(JobError, match=r"moved, removed or cut short while the run was under way: 3$"):
        _complete(job, runner, progress=False)
    assert _complete(job, failing(0, 0), progress=False).computed == 1


def test_what_a_writer_left_that_died_after_the_run_began_is_gone_at_its_end(tiny_spec: Spec, tmp_path: Path) -> None:
    """A worker that SIGKILL finds in a write to the disk ends, and lets go of its unit, when that returns."""
    job = make_job(tiny_spec, tmp_path / "job")

    def runner(job: Job, missing: Iterable[Unit]) -> Iterator[Outcome]:
        (tmp_path / "job" / "units" / f".unit-000003.safetensors.{'0' * 16}.tmp").touch()
        yield from failing(0, 0)(job, missing)

    assert _complete(job, runner, progress=False).computed == 7
    assert not list((tmp_path / "job" / "units").glob(".*"))


def test_what_a_dead_writer_left_is_gone_before_work_begins(tiny_spec: Spec, tmp_path: Path) -> None:
    job, units = make_job(tiny_spec, tmp_path / "job"), tmp_path / "job" / "units"
    (units / f".unit-000003.safetensors.{'0' * 16}.tmp").touch()

    def runner(job: Job, missing: Iterable[Unit]) -> Iterator[Outcome]:
        assert not list(units.iterdir())
        yield from failing(0, 0)(job, missing)

    assert _complete(job, runner, progress=False).complete


class Bar:
    """Of tqdm, what a run uses."""

    def __init__(self, total: int, initial: int, **_: object):
        self.total, self.n, self.text = total, initial, ""

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: int) -> None:
        self.n += n

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        assert not refresh
        self.text = text


def test_the_bar_counts_what_is_there_what_is_sampled_and_what_fails(
    tiny_spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[Bar] = []
    monkeypatch.setattr(sys.modules["fastcfg.jobs.run"], "tqdm", lambda **given: bars.append(Bar(**given)) or bars[0])
    job = make_job(tiny_spec, tmp_path / "job")
    there, todo = list(all_units(job.spec))[:2], list(all_units(job.spec))[2:]
    write = failing(0, 0)
    list(write(job, there))
    n = sum(unit.size for unit in there)
    shown: list[int] = []

    def runner(job: Job, missing: Iterable[Unit]) -> Iterator[Outcome | Sampled]:
        shown.append(bars[0].n)
        unit = next(iter(missing))
        for event in (Sampled(unit, 2), Sampled(unit, 1), Outcome(unit, "failed", "planted"), *write(job, [unit])):
            yield event
            shown.append(bars[0].n)
        for unit in missing:
            if unit != todo[0]:  # written above, and tried again
                job.store.write(unit.name, [bytes(fastcfg.jobs.units.unit_bytes(job, unit))])
                yield Outcome(unit, "written")

    assert _complete(job, runner, progress=False).complete
    assert shown == [n, n + 2, n + 3, n, n + todo[0].size]
    assert bars[0].total == bars[0].n == job.spec.samples
    assert bars[0].text == "units 7/7"


def test_a_lost_folder_of_units_is_made_again(tiny_spec: Spec, tmp_path: Path) -> None:
    job = make_job(tiny_spec, tmp_path / "job")
    (tmp_path / "job" / "units").rmdir()
    assert _complete(job, failing(0, 0), progress=False).computed == 7


def test_units_lost_and_claimed_come_back(tiny_spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["fastcfg.jobs.run"], "POLL_SECONDS", 0.01)
    job = make_job(tiny_spec, tmp_path / "job")
    rounds: list[list[int]] = []

    def runner(job: Job, missing: Iterable[Unit]) -> Iterator[Outcome]:
        rounds.append([])
        for unit in missing:
            rounds[-1].append(unit.k)
            first = sum(taken.count(unit.k) for taken in rounds) == 1
            if first and unit.k in (1, 4):
                if unit.k == 4:
                    job.store.write(unit.name, [b"cut short"])  # by who had claimed it
                yield Outcome(unit, "lost" if unit.k == 1 else "claimed")
            else:
                job.store.write(unit.name, [bytes(fastcfg.jobs.units.unit_bytes(job, unit))])
                yield Outcome(unit, "written")

    assert _complete(job, runner, progress=False).computed == 7
    assert rounds == [[0, 1, 2, 3, 4, 5, 6, 1], [4]]


def test_a_unit_that_is_free_again_is_not_kept_waiting_for_one_that_is_not(
    tiny_spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run is at unit 1 until this one has computed unit 4, which a third had claimed and left."""
    monkeypatch.setattr(sys.modules["fastcfg.jobs.run"], "POLL_SECONDS", 0.01)
    job = make_job(tiny_spec, tmp_path / "job")
    monkeypatch.setattr(type(job.store), "claim", lambda self, k: k != 1)
    write, rounds = failing(0, 0), []

    def runner(job: Job, missing: Iterable[Unit]) -> Iterator[Outcome]:
        rounds.append(list(missing))
        first = len(rounds) == 1
        yield from (Outcome(unit, "claimed") for unit in rounds[-1] if unit.k in (1, 4) and first)
        yield from write(job, [unit for unit in rounds[-1] if unit.k not in (1, 4) or not first])
        if not first:
            list(write(job, [unit for unit in rounds[0] if unit.k == 1]))

    assert _complete(job, runner, progress=False).computed == 6
    assert [[unit.k for unit in units] for units in rounds] == [[0, 1, 2, 3, 4, 5, 6], [4]]


def test_devices_are_named_or_found() -> None:
    assert choose_devices("cpu", None, None) == ["cpu"]
    assert choose_devices("cpu", 3, "cpu") == ["cpu"] * 3
    assert choose_devices(None, 2, "cpu") == ["cpu"] * 2
    cases = [
        (("0,0", None, None), "each once"), (("gpu", None, None), '"cpu" or numbers'), (("", None, None), '"cpu" or numbers'),
        (([0, 1], None, None), r'"cpu" or numbers of GPUs, each once \("0,1"\), got \[0, 1\]'),
        (("0,", None, None), '"cpu" or numbers'), (("cpu", 0, None), "from 1 to 1024"), (("0", 2, None), "workers"),
        (("99", None, None), "torch sees"), (("cpu", None, "cuda"), "begun on 'cuda'"),
    ]  # fmt: skip
    for arguments, words in cases:
        with pytest.raises(fastcfg.Error, match=words):
            choose_devices(*arguments)


def test_devices_follow_the_job_and_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_devices(None, None, None) == ["cuda:0", "cuda:1"]
    assert choose_devices(None, None, "cpu") == ["cpu"]
    assert choose_devices("1", None, "cuda") == ["cuda:1"]
    with pytest.raises(fastcfg.Error, match="sees 2 GPUs"):
        choose_devices("0,2", None, None)


def test_another_processor_is_mentioned(tiny_spec: Spec, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "job"
    job = make_job(tiny_spec, out)
    store = open_store(out)
    elsewhere = replace(job, resolved=replace(job.resolved, processor="Another CPU, torch 9"))
    store.write("job.json", [json.dumps(elsewhere.describe()).encode()])
    _complete(open_job(out), failing(0, 0), progress=False)
    run(tiny_spec, out, progress=False)
    assert "the job was begun on Another CPU, torch 9, this is" in capsys.readouterr().err
