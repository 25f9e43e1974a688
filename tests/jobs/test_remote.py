"""Jobs in an object store: run, killed and gone on with, checked, exported and read, on a real S3 server."""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crashing import LIMIT, Started, unit_hashes
from making import expected, make_job, make_noise_job
from object_store import BUCKET, INSTALLED, s3
from torch.utils.data import DataLoader

from fastcfg import Error
from fastcfg.jobs import DamagedError, JobError, Spec, get_unit, run, status
from fastcfg.jobs.dataset import Sample, open
from fastcfg.jobs.export import export

if not INSTALLED:
    pytest.skip("moto's server or s3fs is not installed: pip install 'fastcfg[dev]'", allow_module_level=True)


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with s3() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def url(server: None, request: pytest.FixtureRequest) -> str:  # noqa: ARG001 - it must be up
    return f"s3://{BUCKET}/jobs of tests/{request.node.name}"


@pytest.fixture(scope="module")
def files(server: None) -> Any:  # noqa: ARG001 - it must be up
    """The server's content as fsspec sees it."""
    from fsspec.core import url_to_fs

    return url_to_fs(f"s3://{BUCKET}", use_listings_cache=False)[0]


def _hashes(files: Any, url: str) -> dict[str, str]:
    folder = f"{url.removeprefix('s3://')}/units"
    return {name.rpartition("/")[2]: hashlib.sha256(files.cat_file(name)).hexdigest() for name in files.ls(folder)}


# A dead run's lease holds its unit up for a minute; here for two seconds.
COMMAND = "from fastcfg.jobs import remote_store; remote_store.LEASE_SECONDS = 2.0; from fastcfg.cli import main; main()"


def _start(*arguments: str) -> Started:
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return Started(process.pid, process.poll)


def test_killed_and_gone_on_with_it_is_the_local_job(
    url: str, files: Any, write_spec: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_spec(count=60, steps=50)  # 20 units
    spec = Spec.from_toml(path)
    make_job(spec, tmp_path / "here")
    killed = _start("job", "run", str(path), "--out", url)
    deadline = time.monotonic() + LIMIT
    while not (files.exists(f"{url}/job.json") and len(status(url).done) >= 3):
        assert killed.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline
    killed.send(signal.SIGKILL)
    killed.wait()
    assert 3 <= len(status(url).done) < 20
    assert _start("job", "run", str(path), "--out", url).wait() == 0
    assert _hashes(files, url) == unit_hashes(tmp_path / "here")
    assert status(url, verify=True).complete
    export(url, "adm-npz", tmp_path / "there.npz", progress=False)
    export(tmp_path / "here", "adm-npz", tmp_path / "here.npz", progress=False)
    assert (tmp_path / "there.npz").read_bytes() == (tmp_path / "here.npz").read_bytes()


@pytest.fixture
def dataset_and_wanted(url: str, tiny_spec: Spec) -> tuple[Any, Sample]:
    make_job(tiny_spec, url)
    arrays = expected(tiny_spec)
    wanted = Sample(*(arrays[name] for name in ("images", "labels", "seeds", "indices", "scales")))
    return open(url), wanted


def test_dataset_reads_what_it_is_asked_for(dataset_and_wanted: tuple[Any, Sample]) -> None:
    dataset, wanted = dataset_and_wanted
    assert len(dataset) == 40
    rows = np.array([39, 0, 17, 17, 5, 6, 7, -1])
    for column, want in zip(dataset[rows], wanted, strict=True):
        np.testing.assert_array_equal(column, want[rows], strict=True)
    np.testing.assert_array_equal(dataset[13].image, wanted.image[13])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(dataset))[:].image, wanted.image)
    np.testing.assert_array_equal(dataset.labels, wanted.label)
    with pytest.raises(IndexError):
        dataset[40]


@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])
def test_a_data_loader_sees_every_sample_once(dataset_and_wanted: tuple[Any, Sample], method: str, workers: int) -> None:
    dataset, wanted = dataset_and_wanted
    dataset[0]  # a connection is open when the workers are made
    loader = DataLoader(dataset, batch_size=7, shuffle=True, num_workers=workers, multiprocessing_context=method)
    together = Sample(*(torch.cat(columns).numpy() for columns in zip(*loader, strict=True)))
    order = np.lexsort((together.scale, together.index))
    for column, want in zip(together, wanted, strict=True):
        np.testing.assert_array_equal(column[order], want)


def test_a_batch_costs_its_images_and_heads_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_noise_job(url, count=120, unit_size=40, shape=(3, 32, 32))
    dataset = open(url)
    fetched: list[int] = []
    fetch = dataset._files._fetch
    monkeypatch.setattr(dataset._files, "_fetch", lambda spans: fetched.extend(b - a for _, a, b in spans) or fetch(spans))
    image, head = 3 * 32 * 32, 40 * 28
    rows = [0, 1, 2, 50, 119]
    assert dataset[rows].index.tolist() == rows
    assert sorted(size for size in fetched if size % image == 0) == [image, image, 3 * image]
    assert all(head < size < head + 1000 for size in fetched if size % image)
    assert len(fetched) == 6
    fetched.clear()
    assert dataset[[60, 3]].index.tolist() == [60, 3]
    assert fetched == [image, image], "heads are known by now"


def test_a_damaged_unit_is_found_set_aside_and_computed_again(url: str, files: Any, tiny_spec: Spec, tmp_path: Path) -> None:
    make_job(tiny_spec, tmp_path / "here")
    job = make_job(tiny_spec, url)
    names = [f"{url.removeprefix('s3://')}/{get_unit(job.spec, k).name}" for k in range(7)]
    content = bytearray(files.cat_file(names[2]))
    content[-9] ^= 4
    files.pipe_file(names[2], bytes(content))
    files.pipe_file(names[4], files.cat_file(names[3]))
    with pytest.raises(DamagedError, match=r"unit-000004.* is damaged: it is unit 3"):
        open(url)[24]
    with pytest.raises(DamagedError, match="unit-000002"):
        export(url, "png", tmp_path / "x", progress=False)
    done = subprocess.run(_cli("job", "status", url, "--verify"), capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "damaged: unit 2: its content is not what was written" in done.stdout
    assert "damaged: unit 4: it is unit 3" in done.stdout
    assert len(files.ls(f"{url.removeprefix('s3://')}/damaged")) == 2
    assert run(tiny_spec, url, progress=False).computed == 2
    assert _hashes(files, url) == unit_hashes(tmp_path / "here")


def _cli(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from fastcfg.cli import main; main()", *arguments]


def test_an_incomplete_job_must_be_asked_for(url: str, tiny_spec: Spec) -> None:
    make_job(tiny_spec, url, [get_unit(tiny_spec, 5)])
    with pytest.raises(Error, match="1 of 7 units, 6 of 40 images"):
        open(url)
    assert open(url, partial=True)[:].index.tolist() == [15, 15, 16, 16, 17, 17]


@pytest.mark.usefixtures("server")
def test_no_bucket_is_one_error(tiny_spec: Spec) -> None:
    with pytest.raises(JobError, match=r"s3://no-such-bucket/job"):
        run(tiny_spec, "s3://no-such-bucket/job", progress=False)
    with pytest.raises(Error, match=r"no job at s3://no-such-bucket/job"):
        open("s3://no-such-bucket/job")


def test_nobody_there_is_one_error() -> None:
    settings = {"ENDPOINT_URL": "http://127.0.0.1:9", "ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "MAX_ATTEMPTS": "1"}
    environment = {**os.environ, **{f"AWS_{name}": value for name, value in settings.items()}}
    done = subprocess.run(_cli("job", "status", "s3://bucket/job"), capture_output=True, text=True, env=environment)
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("error: cannot read s3://bucket/job/job.json: Could not connect"), done.stderr
