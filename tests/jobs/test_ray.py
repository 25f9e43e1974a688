"""The Ray runner on a cluster of two nodes on loopback: whatever is killed, the job ends as one that ran here."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from crashing import LIMIT, Start, Started, forking, kill_until_done, unit_hashes
from making import make_job
from object_store import BUCKET, INSTALLED, s3
from ray_cluster import ENVIRONMENT, Cluster, two_nodes

from fastcfg import Error
from fastcfg.jobs import JobError, Spec, all_units, ray_runner, run
from fastcfg.jobs.local_store import LocalStore
from fastcfg.jobs.stores import open_store
from fastcfg.jobs.worker import Outcome

if not importlib.util.find_spec("ray"):
    pytest.skip("Ray is not installed: pip install 'fastcfg[ray]'", allow_module_level=True)

KILLS = 6


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch, s3() if INSTALLED else nullcontext({}) as server:
        for name, value in {**ENVIRONMENT, **server}.items():
            patch.setenv(name, value)
        with two_nodes() as cluster:
            yield cluster


@pytest.fixture(scope="module")
def start(cluster: Cluster) -> Iterator[Start]:
    """`fastcfg` in a process of its own; SIGKILL takes the actors along, as when a machine's plug is pulled."""

    class Run(Started):
        def send(self, signum: int) -> None:
            super().send(signum)
            if signum == signal.SIGKILL:
                cluster.kill_workers()

    with forking() as start:

        def start_run(arguments: Sequence[str]) -> Run:
            started = start(arguments)
            return Run(started.pid, started.poll, started.log)

        yield start_run


@pytest.fixture
def here(tiny_spec: Spec, tmp_path: Path) -> dict[str, str]:
    """The units of the tiny job as this process computes them."""
    make_job(tiny_spec, tmp_path / "here")
    return unit_hashes(tmp_path / "here")


def test_killed_runs_end_as_one_that_was_not(
    start: Start, cluster: Cluster, write_spec: Callable[..., Path], tmp_path: Path
) -> None:
    spec, out = write_spec(count=300, steps=25), tmp_path / "out"  # 100 units
    make_job(Spec.from_toml(spec), tmp_path / "here")
    command = ["job", "run", str(spec), "--out", str(out), "--ray", cluster.address]
    killed = kill_until_done(start, command, out, KILLS, 2.0, draw=random.Random(0))
    assert unit_hashes(out) == unit_hashes(tmp_path / "here")
    assert len({kill.after for kill in killed}) >= 4
    left = sorted(path.name for path in (*out.iterdir(), *(out / "units").glob(".*")))
    assert left == ["claims", "job.json", "spec.toml", "units"]


def test_a_stopped_run_goes_on_where_it_was(
    start: Start, cluster: Cluster, write_spec: Callable[..., Path], tmp_path: Path
) -> None:
    spec, out = write_spec(count=150, steps=25), tmp_path / "out"
    command = ["job", "run", str(spec), "--out", str(out), "--ray", cluster.address]
    run = start(command)
    _wait_for_units(run, out, 4)
    run.send(signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM
    done = unit_hashes(out)
    assert 4 <= len(done) < 50
    assert sorted(path.name for path in out.iterdir()) == ["claims", "job.json", "spec.toml", "units"]
    assert start(command).wait() == 0
    make_job(Spec.from_toml(spec), tmp_path / "here")
    assert unit_hashes(out) == unit_hashes(tmp_path / "here")
    assert done.items() <= unit_hashes(out).items()


@pytest.mark.skipif(not INSTALLED, reason="moto's server or s3fs is not installed: pip install 'fastcfg[dev]'")
def test_workers_write_to_an_object_store(cluster: Cluster, tiny_spec: Spec, tmp_path: Path) -> None:
    url = f"s3://{BUCKET}/on ray"
    assert run(tiny_spec, url, ray=cluster.address, progress=False).computed == 7
    make_job(tiny_spec, tmp_path / "here")
    for unit in all_units(tiny_spec):
        assert bytes(open_store(url).read(unit.name)) == (tmp_path / "here" / unit.name).read_bytes()


def test_a_checkpoint_may_move_between_runs(cluster: Cluster, tiny_spec: Spec, here: dict[str, str], tmp_path: Path) -> None:
    before, now = tmp_path / "before.safetensors", tmp_path / "now.safetensors"
    shutil.copy(tiny_spec.checkpoint, before)
    make_job(replace(tiny_spec, checkpoint=str(before)), tmp_path / "out", [])
    before.rename(now)
    run(replace(tiny_spec, checkpoint=str(now)), tmp_path / "out", ray=cluster.address, progress=False)
    assert unit_hashes(tmp_path / "out") == here


def test_a_unit_that_keeps_failing_is_named_and_the_rest_is_done(
    cluster: Cluster, tiny_spec: Spec, here: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_job(tiny_spec, tmp_path / "out", [])
    monkeypatch.setattr(ray_runner, "Actor", _failing_at(2, 4))
    with pytest.raises(JobError) as raised:
        run(tiny_spec, tmp_path / "out", ray=cluster.address, progress=False)
    message = str(raised.value)
    assert message.startswith("2 units failed 3 times each: unit 2 (ValueError: as the test wants), unit 4 (its worker on ")
    assert "5 of 7 units" in message
    lost = {f"unit-{k:06d}.safetensors" for k in (2, 4)}
    assert unit_hashes(tmp_path / "out") == {name: digest for name, digest in here.items() if name not in lost}


def _failing_at(raising: int, dying: int) -> type:
    class Failing(ray_runner.Actor):  # made in a function, so that Ray sends it whole
        def take(self, unit: Any) -> None:
            if unit.k == raising:
                self._events.put(Outcome(unit, "failed", "ValueError: as the test wants"))
            elif unit.k == dying:
                os._exit(1)
            else:
                super().take(unit)

    return Failing


def test_a_node_that_does_not_see_the_folder_is_left_out(
    cluster: Cluster,
    tiny_spec: Spec,
    here: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("out", "elsewhere"):
        make_job(tiny_spec, tmp_path / name, [])
    monkeypatch.setattr(ray_runner, "Actor", _blind_on(cluster.nodes[1], tmp_path / "elsewhere"))
    assert run(tiny_spec, tmp_path / "out", ray=cluster.address, progress=False).complete
    assert unit_hashes(tmp_path / "out") == here
    assert not unit_hashes(tmp_path / "elsewhere")
    noted = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert len(noted) == 1
    assert re.match(r"note: a worker could not be started and is left out: node .*: it does not see the job's folder", noted[0])


def test_where_no_worker_can_start_it_is_a_job_error(
    cluster: Cluster, tiny_spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_job(tiny_spec, tmp_path / "out", [])
    monkeypatch.setattr(ray_runner, "Actor", _only_here(monkeypatch))
    message = "no worker could be started: node .*: ModuleNotFoundError: No module named 'only_here'"
    with pytest.raises(JobError, match=message):
        run(tiny_spec, tmp_path / "out", ray=cluster.address, progress=False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["claims", "job.json", "units"]


def _only_here(monkeypatch: pytest.MonkeyPatch) -> type:
    """An Actor whose module no node has, as fastcfg is where it was not installed."""
    actor = type("Actor", (ray_runner.Actor,), {"__module__": "only_here"})
    module = ModuleType("only_here")
    module.__dict__["Actor"] = actor
    monkeypatch.setitem(sys.modules, "only_here", module)
    return actor


def _blind_on(node: int, elsewhere: Path) -> type:
    class Blind(ray_runner.Actor):
        def start(self, store: Any, checkpoint: str, token: str | None, device: str) -> str:
            return super().start(LocalStore(elsewhere) if os.getppid() == node else store, checkpoint, token, device)

    return Blind


def test_a_checkpoint_that_does_not_fit_is_bad_input(cluster: Cluster, tiny_spec: Spec, tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"label 7, .*, is out of range") as raised:
        run(replace(tiny_spec, labels=(1, 7), count=None), tmp_path / "out", ray=cluster.address)
    assert type(raised.value) is Error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("noted", [False, True])
def test_no_cluster_is_bad_input_and_soon(
    tiny_spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noted: bool
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    begin = time.monotonic()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        if noted:  # what a head that crashed leaves behind
            (tmp_path / "ray").mkdir()
            (tmp_path / "ray" / "ray_current_cluster").write_text(address)
        with pytest.raises(Error, match=rf"cannot reach a Ray cluster at '{address}' \(.*\): .*: want host:port"):
            run(tiny_spec, tmp_path / "out", ray="auto" if noted else address)
    assert time.monotonic() - begin < 15
    assert not (tmp_path / "out").exists()


def test_what_is_no_address_is_bad_input(tiny_spec: Spec, tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"cannot reach a Ray cluster at 'nonsense': .*nonsense: want host:port"):
        run(tiny_spec, tmp_path / "out", ray="nonsense")


def test_there_is_a_worker_a_gpu_and_on_cpus_one_a_node() -> None:
    def node(name: str, alive: bool = True, **resources: float) -> dict[str, Any]:
        return {"NodeID": name, "NodeManagerHostname": name, "Alive": alive, "Resources": resources}

    nodes = [node("head"), node("a", CPU=64, GPU=8), node("b", CPU=16), node("lost", alive=False, CPU=64, GPU=8)]
    ray = SimpleNamespace(nodes=lambda: nodes)
    assert ray_runner._places(ray, "cuda") == [ray_runner.Place("a", "a", n, 0, 1) for n in range(8)]
    assert ray_runner._places(ray, "cpu") == [ray_runner.Place("a", "a", 0, 64, 0), ray_runner.Place("b", "b", 0, 16, 0)]


def test_tokens_of_runs_that_were_killed_are_removed(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for name in (".ray-17", "..ray-18.0123456789abcdef.tmp"):
        (tmp_path / name).touch()
    with ray_runner._token(store) as token:
        assert token is not None
        assert [name for name in os.listdir(tmp_path) if "ray" in name] == [token]
    assert not list(tmp_path.glob("*ray*"))


def test_a_lost_nodes_units_are_computed_on_the_other(  # the last: one node is left
    start: Start, cluster: Cluster, write_spec: Callable[..., Path], tmp_path: Path
) -> None:
    spec, out = write_spec(count=150, steps=25), tmp_path / "out"
    run = start(["job", "run", str(spec), "--out", str(out), "--ray", cluster.address])
    _wait_for_units(run, out, 6)
    cluster.kill_second_node()
    at_kill = len(unit_hashes(out))
    assert run.wait() == 0
    assert 6 <= at_kill < 50
    make_job(Spec.from_toml(spec), tmp_path / "here")
    assert unit_hashes(out) == unit_hashes(tmp_path / "here")


def _wait_for_units(run: Started, out: Path, count: int) -> None:
    deadline = time.monotonic() + LIMIT
    while len(list((out / "units").glob("[!.]*"))) < count:
        assert run.poll() is None, "the run ended early"
        assert time.monotonic() < deadline
        time.sleep(0.01)
