"""Stores: whole files or none, claims that end with their process, and the frozen spec."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastcfg
from fastcfg.files import replacing
from fastcfg.jobs import Spec, open_job, open_store, remote_store
from fastcfg.jobs.errors import JobError
from fastcfg.jobs.job import check_checkpoint, check_same, check_vacant, checkpoint_sha256, freeze, resolve
from fastcfg.jobs.local_store import LocalStore
from fastcfg.jobs.remote_store import RemoteStore
from fastcfg.jobs.store import FREEZING, Store

UNIT = "units/unit-000003.safetensors"


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    store = open_store(tmp_path / "a job" if request.param == "local" else f"memory://{tmp_path.name}/a job")
    store.prepare()
    return store


def test_files_are_written_read_listed_and_moved(store: Store) -> None:
    store.write(UNIT, [b"one", memoryview(b"two")])
    store.write("job.json", [b"{}"])
    assert bytes(store.read(UNIT)) == b"onetwo"
    assert store.size(UNIT) == 6
    assert store.sizes("units") == {"unit-000003.safetensors": 6}
    assert {"job.json", "units"} <= set(store.names())
    store.write(UNIT, [])
    assert bytes(store.read(UNIT)) == b""
    store.write(UNIT, [b"three"])
    assert bytes(store.read(UNIT)) == b"three"
    store.set_aside(UNIT, "damaged")
    assert store.sizes("units") == {}
    assert bytes(store.read("damaged/unit-000003.safetensors")) == b"three"
    assert store.size(UNIT) is None
    with pytest.raises(FileNotFoundError):
        store.read(UNIT)


def test_a_url_is_no_pattern_of_others() -> None:
    one, odd = RemoteStore("memory://patterns/job1"), RemoteStore("memory://patterns/job[12]")
    for store in (one, odd):
        store.write(UNIT, [store.url.encode()])
    odd.set_aside(UNIT, "damaged")
    assert (bytes(one.read(UNIT)), one.size(f"damaged/{UNIT[6:]}")) == (b"memory://patterns/job1", None)
    assert (odd.size(UNIT), bytes(odd.read(f"damaged/{UNIT[6:]}"))) == (None, b"memory://patterns/job[12]")


def test_stores_can_be_sent(store: Store) -> None:
    store.write(UNIT, [b"x"])
    assert bytes(pickle.loads(pickle.dumps(store)).read(UNIT)) == b"x"


def test_a_relative_folder_is_the_same_one_for_a_worker_that_is_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("job")
    store.prepare()
    store.write(UNIT, [b"x"])
    sent = pickle.dumps(store)
    monkeypatch.chdir("/")
    assert bytes(pickle.loads(sent).read(UNIT)) == bytes(store.read(UNIT)) == b"x"


def test_a_folder_that_is_not_there_is_empty(tmp_path: Path) -> None:
    for out in (tmp_path / "none", "memory://none/at/all"):
        assert open_store(out).names() == []
        assert open_store(out).sizes("units") == {}


def test_a_link_to_nowhere_hides_no_unit(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write(UNIT, [b"x"])
    (tmp_path / "units" / f".unit-000004.safetensors.{'0' * 16}.tmp").touch()  # nor is what is half written one
    (tmp_path / "units" / "unit-000001.safetensors.bak").symlink_to(tmp_path / "nowhere")
    assert store.sizes("units") == {"unit-000003.safetensors": 1}
    with pytest.raises(JobError, match=r"cannot read the folder .*unit-000003.*Not a directory"):
        store.sizes(UNIT)
    with pytest.raises(JobError, match=r"cannot read .*unit-000003.*/x: Not a directory"):
        store.size(f"{UNIT}/x")


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    store.write(UNIT, [b"old"])

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(JobError, match=r"unit-000003.*No space left on device"):
        store.write(UNIT, [b"new"])
    assert [path.name for path in (tmp_path / "units").iterdir()] == ["unit-000003.safetensors"]
    assert bytes(store.read(UNIT)) == b"old"


def test_file_and_folder_are_synced_before_and_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real = os.fsync, os.replace

    def fsync(file: int) -> None:
        folder = os.path.isdir(f"/proc/self/fd/{file}")
        calls.append("folder" if folder else f"file of {os.fstat(file).st_size}")
        real[0](file)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *a: (calls.append("replace"), real[1](*a)))
    LocalStore(tmp_path).write(UNIT, [b"one", b"two"])
    assert calls == ["file of 6", "replace", "folder"]
    calls.clear()
    LocalStore(tmp_path).set_aside(UNIT, "damaged")
    assert calls == ["replace", "folder"]


def test_a_folder_that_cannot_be_synced_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on many shared file systems (SMB, a virtual machine's folders); any other error is one."""
    real, code = os.fsync, errno.EINVAL

    def fsync(file: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{file}"):
            raise OSError(code, os.strerror(code))
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    store = LocalStore(tmp_path)
    store.write(UNIT, [b"x"])
    with replacing(tmp_path / "samples.png") as temporary:
        temporary.touch()
    code = errno.EIO
    with pytest.raises(JobError, match=r"cannot write .*: Input/output error"):
        store.write(UNIT, [b"y"])


HOLD = """
import sys
from pathlib import Path
from fastcfg.jobs.local_store import LocalStore
store = LocalStore(Path(sys.argv[1]))
print(store.claim(3), flush=True)
sys.stdin.read()
"""


def test_local_claims_end_with_their_process_however_it_ends(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.prepare()
    half = tmp_path / "units" / f".unit-000003.safetensors.{'0' * 16}.tmp"
    stale = tmp_path / "units" / f".unit-000004.safetensors.{'0' * 16}.tmp"
    foreign = tmp_path / "units" / ".nfs0001"
    for path in (half, stale, foreign):
        path.touch()
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        assert not store.claim(3)
        assert store.claim(4)
        store.release(4)
        # A temporary file is removed if nobody is at its unit.
        assert store.clean() == 1
        assert (half.exists(), stale.exists(), foreign.exists()) == (True, False, True)
        holder.send_signal(signal.SIGKILL)
    assert store.claim(3)
    store.release(3)
    assert store.clean() == 1
    assert not half.exists()


def test_one_run_freezes_a_job_while_others_wait(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.prepare()
    command = [sys.executable, "-c", HOLD.replace("claim(3)", f"claim({FREEZING})"), str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        threading.Timer(0.3, holder.stdin.close).start()
        with store.freezing():
            assert holder.stdin.closed


def test_two_runs_may_clean_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    store.prepare()
    half = tmp_path / "units" / f".unit-000003.safetensors.{'0' * 16}.tmp"
    half.touch()
    monkeypatch.setattr(store, "_lock", lambda *_: half.unlink(missing_ok=True) is None)  # the other was first
    store.clean()


def another_may_claim(store: LocalStore, number: int) -> bool:
    child = os.fork()
    if not child:
        os._exit(store.claim(number))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_what_is_done_with_a_folder_leaves_no_claim(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.prepare()
    half = [tmp_path / "units" / f".unit-000003.safetensors.{'0' * 16}.tmp", tmp_path / f".job.json.{'0' * 16}.tmp"]
    for path in half:
        path.touch()
    assert store.clean() == 1
    assert another_may_claim(store, 3)
    with store.freezing():
        assert not another_may_claim(store, FREEZING)
    assert another_may_claim(store, FREEZING)
    assert not any(path.exists() for path in half)
    opened = os.listdir("/proc/self/fd")
    assert all(store.claim(number) for number in range(4))
    assert os.listdir("/proc/self/fd") == opened  # one for all units
    assert not another_may_claim(store, 3)
    store.close()
    assert len(os.listdir("/proc/self/fd")) == len(opened) - 1
    assert another_may_claim(store, 3)
    assert store.claim(3)
    assert not another_may_claim(store, 3)


def test_without_locks_every_claim_is_granted_and_nothing_is_cleaned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    store.prepare()
    half = [tmp_path / "units" / f".unit-000003.safetensors.{'0' * 16}.tmp", tmp_path / f".job.json.{'0' * 16}.tmp"]
    for path in half:
        path.touch()

    def failing(code: int) -> Callable[..., None]:
        def lockf(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        return lockf

    for code in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
        monkeypatch.setattr(fcntl, "lockf", failing(code))
        assert store.claim(3)
        assert store.clean() == 0
        with store.freezing():  # another may be in here, too
            assert all(path.exists() for path in half)
    for code in (errno.EACCES, errno.EAGAIN):
        monkeypatch.setattr(fcntl, "lockf", failing(code))
        assert not store.claim(3)
    monkeypatch.setattr(fcntl, "lockf", failing(errno.EIO))
    with pytest.raises(JobError, match=r"cannot lock .*claims: Input/output error"):
        store.claim(3)


def test_leases_are_one_holders_until_released_or_left_to_lapse(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = RemoteStore("memory://leases"), RemoteStore("memory://leases")
    assert one.claim(3)
    assert not two.claim(3)
    assert one.claim(3)  # still its own
    one.release(3)
    assert two.claim(3)
    two.close()
    assert one.claim(3)
    later = time.time() + remote_store.LEASE_SECONDS + 1
    monkeypatch.setattr(time, "time", lambda: later)
    assert two.claim(3)
    assert not one.claim(3)


def test_of_two_that_claim_at_once_the_later_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    store = RemoteStore("memory://at once")
    real = store._put

    def put(what: str, action: Callable[[], object]) -> None:
        real(what, action)
        store._system.pipe_file(store._lease(3), f"another\n{time.time()}".encode())

    monkeypatch.setattr(store, "_put", put)
    assert not store.claim(3)


def test_a_lease_of_a_clock_that_is_far_ahead_has_lapsed() -> None:
    store = RemoteStore("memory://ahead")
    for seconds, free in ((30, False), (90, True)):
        store._system.pipe_file(store._lease(3), f"another\n{time.time() + seconds}".encode())
        assert store.claim(3) == free


def test_a_lease_outlives_a_renewal_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise InterruptedError

    store = RemoteStore("memory://unsteady")
    monkeypatch.setattr(remote_store, "time", SimpleNamespace(sleep=sleep, time=time.time))
    store._held.add(3)
    monkeypatch.setattr(store._system, "pipe_file", lambda *_: 1 / 0)
    with pytest.raises(InterruptedError):
        store._renew()
    assert sum(pauses) < remote_store.LEASE_SECONDS


def test_a_lease_that_cannot_be_removed_is_left_to_lapse(monkeypatch: pytest.MonkeyPatch) -> None:
    store = RemoteStore("memory://unremoved")
    assert store.claim(3)
    monkeypatch.setattr(store._system, "rm_file", lambda _: 1 / 0)
    store.release(3)
    assert not store._held


def test_leases_are_renewed_while_their_holder_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_store, "LEASE_SECONDS", 0.2)
    store = RemoteStore("memory://renewed")
    assert store.claim(3)
    path = store._lease(3)
    holder, renewed = first = store._read_lease(path)
    deadline = time.monotonic() + 30
    while (now := store._read_lease(path)) == first:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert now[0] == holder
    assert now[1] > renewed
    renewing = store._renewing
    assert renewing is not None
    store.close()
    assert store._read_lease(path) == ("", 0.0)
    renewing.join(30)
    assert not renewing.is_alive()  # a service that runs jobs has no thread left of each
    assert store.claim(3)
    assert store._renewing is not None
    assert store._renewing.is_alive()
    store.close()


def test_uploads_are_tried_again_unless_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_store, "PAUSES", (0.0, 0.0))
    store = RemoteStore("memory://retries")
    failures: list[Exception] = [OSError("reset"), TimeoutError("slow")]
    real = store._system.pipe_file

    def unsteady(*arguments: object, **keywords: object) -> None:
        if failures:
            raise failures.pop(0)
        real(*arguments, **keywords)

    monkeypatch.setattr(store._system, "pipe_file", unsteady, raising=False)
    store.write(UNIT, [b"x"])
    assert bytes(store.read(UNIT)) == b"x"
    failures[:] = [TimeoutError()] * 3
    with pytest.raises(JobError, match=r"memory://retries/units.*: TimeoutError$"):
        store.write(UNIT, [b"y"])
    failures[:] = [PermissionError("Access Denied")] * 2
    with pytest.raises(JobError, match=r"memory://retries/units.*Access Denied"):
        store.write(UNIT, [b"y"])


def test_unknown_protocol_and_missing_backend_are_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(fastcfg.Error, match=r"cannot open nowhere://.*s3://"):
        open_store("nowhere://bucket/job")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(fastcfg.Error, match=r"fastcfg\[remote\]"):
        open_store("s3://bucket/job")
    open_store(tmp_path).prepare()  # a local path needs none of it


@pytest.mark.parametrize("out", ["s3:/bucket/job", Path("s3://bucket/job"), "file:/tmp/job", "GS:/bucket"], ids=str)
def test_a_url_that_lost_a_slash_is_no_folder(out: str | Path) -> None:
    with pytest.raises(fastcfg.Error, match=r"cannot open \w+:/[^/].*: want a local path, or a URL with both its slashes"):
        open_store(out)


@pytest.mark.parametrize("out", ["s3://", "gs:///"])
def test_a_url_without_a_bucket_is_no_folder(out: str) -> None:
    """As of s3://$BUCKET where that is not set. fsspec takes what is left without the slashes, s3:, for a local folder."""
    with pytest.raises(fastcfg.Error, match=rf"cannot open {out}: want a bucket and a folder in it, as in \w+://bucket/job"):
        open_store(out)


def test_a_job_that_cannot_be_read_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(fastcfg.Error, match=r"cannot read .*xxx/job\.json: File name too long"):
        open_job(tmp_path / ("x" * 300))

    def locked(*_: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(LocalStore, "read", locked)  # tests may run as root, who is denied nothing
    with pytest.raises(JobError, match=r"cannot read .*job\.json: Permission denied"):
        open_job(tmp_path)


def test_frozen_spec_comes_back_and_another_is_refused(tiny_spec: Spec, tmp_path: Path) -> None:
    store = open_store(tmp_path / "job")
    asked = replace(tiny_spec, dtype="auto", engine="auto")
    job = freeze(store, asked, resolve(asked, "cpu"), "# as given\n")
    assert (tmp_path / "job" / "spec.toml").read_text() == "# as given\n"
    assert job.spec.engine == "cpu"
    assert job.spec.dtype in ("fp32", "bf16")
    assert open_job(tmp_path / "job").describe() == job.describe()
    check_same(job, asked)
    check_same(job, job.spec)
    with pytest.raises(
        fastcfg.Error, match=r"another spec: scales: \[1.0, 3.0\] there, \[1.0, 2.0\] here; seed: 5 there, 6 here"
    ):
        check_same(job, replace(asked, scales=(1.0, 2.0), seed=6))
    # Who freezes second takes what is there.
    late = freeze(store, asked, replace(job.resolved, dtype="int8"), "# later\n")
    assert late.describe() == job.describe()
    assert (tmp_path / "job" / "spec.toml").read_text() == "# as given\n"


def test_another_checkpoint_is_refused_and_a_moved_one_is_not(tiny_spec: Spec, tmp_path: Path) -> None:
    job = freeze(open_store(tmp_path / "job"), tiny_spec, resolve(tiny_spec, "cpu"), None)
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(Path(tiny_spec.checkpoint).read_bytes())
    check_same(job, replace(tiny_spec, checkpoint=str(moved)))
    # Nor for two runs that begin it at once, on machines that have it in different places.
    second = freeze(job.store, replace(tiny_spec, checkpoint=str(moved)), job.resolved, None)
    assert (second.spec.checkpoint, second.describe()["spec_sha256"]) == (str(moved), job.spec.sha256)
    model = fastcfg.load(moved)
    with torch.no_grad():
        model.module.final_layer.linear.bias += 1e-6
    fastcfg.save(model, moved)
    with pytest.raises(fastcfg.Error, match=rf"another checkpoint: SHA-256 {job.checkpoint_sha256[:16]}\.\. there"):
        check_same(job, replace(tiny_spec, checkpoint=str(moved)))
    with pytest.raises(fastcfg.Error, match="cannot read the checkpoint"):
        check_checkpoint(replace(tiny_spec, checkpoint="/nowhere.safetensors"), job.checkpoint_sha256)


def test_checkpoint_sha_of_a_folder_covers_what_is_read_from_it(tmp_path: Path) -> None:
    spec = Spec(checkpoint=str(tmp_path), scales=(1.0,), count=1)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{}")
    first = checkpoint_sha256(spec)
    (tmp_path / "README.md").write_text("not read")
    assert checkpoint_sha256(spec) == first
    (tmp_path / "transformer" / "config.json").write_text("{ }")
    assert checkpoint_sha256(spec) != first


def test_folders_of_other_things_and_damaged_jobs_are_refused(tiny_spec: Spec, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").touch()
    with pytest.raises(fastcfg.Error, match=r"other things \(thesis\.tex\)"):
        check_vacant(open_store(tmp_path / "work"))
    with pytest.raises(fastcfg.Error, match="no job at"):
        open_job(tmp_path / "work")
    job = freeze(open_store(tmp_path / "job"), tiny_spec, resolve(tiny_spec, "cpu"), None)
    path = tmp_path / "job" / "job.json"
    good = json.loads(path.read_text())
    damages: list[Callable[[], str]] = [
        lambda: path.read_text()[:50],
        lambda: "[]",
        lambda: json.dumps({**good, "spec": {**good["spec"], "seed": 6}}),
        lambda: json.dumps({key: value for key, value in good.items() if key != "shape"}),
        lambda: json.dumps({**good, "spec": None}),
    ]
    for damage in damages:
        path.write_text(damage())
        with pytest.raises(fastcfg.Error, match=r"job\.json is damaged"):
            open_job(tmp_path / "job")
    path.write_text(json.dumps(job.describe()))
    open_job(tmp_path / "job")


def test_jobs_need_neither_ray_nor_fsspec(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules.update(ray=None, fsspec=None, s3fs=None)\n"
        "import fastcfg.jobs as jobs\n"
        "jobs.export  # as docs/jobs.md calls it\n"
        "import fastcfg.cli.job\n"
        "jobs.open_store(sys.argv[1]).prepare()"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "job")], check=True)
