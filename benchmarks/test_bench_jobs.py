"""Speed of a job's own work, sampling aside: a unit to bytes and back, to disk, and out again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastcfg
from fastcfg import jobs
from fastcfg.jobs import Job, Spec, compute, get_unit, open_store, write_unit
from fastcfg.jobs.export import export
from fastcfg.jobs.job import freeze, resolve
from fastcfg.jobs.units import Arrays, decode, encode

UNIT = 1000


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    spec = Spec("fashion-mnist", (2.0,), count=UNIT, steps=2, dtype="fp32", unit_size=UNIT)
    return freeze(open_store(tmp_path_factory.mktemp("job") / "out"), spec, resolve(spec, "cpu"), None)


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    """What a unit's sampling would give: pixels and who they are."""
    i = np.arange(UNIT)
    images = np.random.default_rng(0).integers(0, 256, (UNIT, 28, 28, 1), np.uint8)
    return {"labels": i % 10, "seeds": i * 0, "indices": i, "scales": np.full(UNIT, 2, np.float32), "images": images}


def test_encode_and_decode(benchmark: Any, job: Job, arrays: Arrays) -> None:
    """1,000 images of 28 x 28 to the bytes of a unit's file and back, every byte hashed twice."""
    unit = get_unit(job.spec, 0)
    benchmark(lambda: decode(job, unit, b"".join(encode(job, unit, arrays))))


def test_write(benchmark: Any, job: Job, arrays: Arrays) -> None:
    """The same to the disk, synced."""
    benchmark(write_unit, job, get_unit(job.spec, 0), arrays)


def test_export(benchmark: Any, job: Job, arrays: Arrays, tmp_path: Path) -> None:
    """A job of one unit to ADM's npz."""
    write_unit(job, get_unit(job.spec, 0), arrays)
    count = iter(range(10**9))
    benchmark(lambda: export(job.store.url, "adm-npz", tmp_path / f"{next(count)}.npz"))


def test_read_one(benchmark: Any, job: Job, arrays: Arrays) -> None:
    """One sample of an open job, as a DataLoader asks for it."""
    write_unit(job, get_unit(job.spec, 0), arrays)
    samples = jobs.open(job.store.url)
    benchmark(lambda: samples[500])


def test_compute(benchmark: Any, job: Job) -> None:
    """50 samples of two steps as a unit's, batches, padding and pixels included."""
    sampler = fastcfg.Sampler(fastcfg.load("fashion-mnist"), **job.spec.sampler_options())
    benchmark.pedantic(compute, args=(sampler, job.spec, jobs.Unit(0, 0, 50)), rounds=5, warmup_rounds=1)
