"""Units: what they hold, that they are the same bytes whoever computes them, and that damage to their files is found."""

from __future__ import annotations

import errno
import fcntl
import random
import sys
import threading
import time
import weakref
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import make_job
from safetensors import safe_open

import fastcfg
from fastcfg.jobs import (
    Job,
    Spec,
    Unit,
    all_units,
    check_unit,
    compute,
    get_unit,
    open_store,
    read_unit,
    set_aside,
    status,
    write_unit,
)
from fastcfg.jobs.errors import DamagedError, JobError
from fastcfg.jobs.job import freeze, resolve
from fastcfg.jobs.local_store import LocalStore
from fastcfg.jobs.units import decode, encode, unit_bytes
from fastcfg.jobs.worker import Outcome, Sampled, Worker


@pytest.fixture
def job(tiny_spec: Spec, tmp_path: Path) -> Job:
    return freeze(open_store(tmp_path / "job"), tiny_spec, resolve(tiny_spec, "cpu"), None)


def written(job: Job) -> Job:
    sampler = job.make_sampler("cpu")
    for unit in all_units(job.spec):
        write_unit(job, unit, compute(sampler, job.spec, unit))
    return job


@pytest.mark.parametrize("output", ["uint8", "latents"])
def test_samples_that_are_no_numbers_are_no_unit(job: Job, output: str) -> None:
    sampler = job.make_sampler("cpu")
    module = sampler.model.module
    assert isinstance(module, fastcfg.DiT)
    with torch.no_grad():
        module.y_embedder.embedding_table.weight[2] = torch.nan
    sampler.refresh()
    spec = replace(job.spec, output=output)
    with pytest.raises(fastcfg.Error, match="2 of 6 samples, the first of them row 4, hold NaN or infinity"):
        compute(sampler, spec, get_unit(spec, 0))


def test_sample_i_has_its_label_scale_and_noise(job: Job) -> None:
    """Each sample again, alone, by the reference engine: labels in turn, all scales of a label from the same noise."""
    spec = job.spec
    model = fastcfg.load(spec.checkpoint)
    sampler = fastcfg.Sampler(model, steps=3, eta=1.0, batch=1, engine="reference", dtype="fp32", device="cpu")
    units = [compute(job.make_sampler("cpu"), spec, unit) for unit in all_units(spec)]
    whole = {name: np.concatenate([unit[name] for unit in units]) for name in units[0]}
    assert whole["images"].shape == (40, 8, 8, 3)
    for i in range(40):
        n, s = divmod(i, 2)
        label, scale = n % 5, [1.0, 3.0][s]
        assert (whole["labels"][i], whole["scales"][i], whole["seeds"][i], whole["indices"][i]) == (label, scale, 5, n)
        x = sampler([label], scale, seeds=[5], indices=[n])[0].numpy()
        expected = np.floor(np.clip(127.5 * x + 128, 0, 255)).transpose(1, 2, 0)
        assert np.abs(whole["images"][i].astype(int) - expected).max() <= 1  # another engine may round across a border
    assert whole["images"].std() > 20
    assert {name: array.dtype.name for name, array in whole.items()} == {
        "labels": "int64", "seeds": "int64", "indices": "int64", "scales": "float32", "images": "uint8",
    }  # fmt: skip


OPTIONS = {
    "steps": 4, "spacing": "trailing", "eta": 0.5, "clip": True, "interval": (100, 900), "rescale": 0.7, "guidance_channels": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "tried"), [(OPTIONS, OPTIONS), ({"solver": "euler", "eta": None}, ["solver"])], ids=["ddim", "euler"]
)
def test_every_option_of_the_spec_is_the_samplers(
    tiny_spec: Spec, tmp_path: Path, options: dict[str, object], tried: Iterable[str]
) -> None:
    spec = replace(tiny_spec, output="latents", **options)  # type: ignore[arg-type]
    job = make_job(spec, tmp_path / "job", [])
    images = compute(job.make_sampler("cpu"), job.spec, get_unit(job.spec, 0))["images"]
    model, common = fastcfg.load(spec.checkpoint), {"engine": "cpu", "dtype": "fp32", "batch": 4, "steps": 3, "eta": 1.0}

    def samples(**options: object) -> torch.Tensor:
        sampler = fastcfg.Sampler(model, **{**common, **options})  # type: ignore[arg-type]
        return sampler([0, 0, 1, 1, 2, 2], [1.0, 3.0] * 3, seeds=5, indices=[0, 0, 1, 1, 2, 2])

    assert np.array_equal(images, samples(**options).numpy())
    for name in tried:
        rest = {key: value for key, value in options.items() if key != name}
        assert not np.array_equal(images, samples(**rest).numpy()), f"{name} makes no difference here"


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_units_are_the_same_bytes_in_any_order_and_on_any_number_of_threads(
    tiny_spec: Spec, tmp_path: Path, engine: str
) -> None:
    spec = replace(tiny_spec, engine=engine)
    job = freeze(open_store(tmp_path / "job"), spec, resolve(spec, "cpu"), None)

    def files(threads: int, order: list[int]) -> dict[int, bytes]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            sampler = job.make_sampler("cpu")
            units = [get_unit(job.spec, k) for k in order]
            return {unit.k: b"".join(encode(job, unit, compute(sampler, job.spec, unit))) for unit in units}
        finally:
            torch.set_num_threads(before)

    assert files(1, [0, 3, 6]) == files(2, [6, 0, 3])


def test_unit_size_changes_no_sample(job: Job) -> None:
    sampler = job.make_sampler("cpu")
    other = replace(job.spec, unit_size=40)
    parts = [compute(sampler, job.spec, unit)["images"] for unit in all_units(job.spec)]
    assert np.array_equal(np.concatenate(parts), compute(sampler, other, get_unit(other, 0))["images"])


def test_latents_are_the_samples_themselves(tiny_spec: Spec, tmp_path: Path) -> None:
    spec = replace(tiny_spec, output="latents")
    job = freeze(open_store(tmp_path / "job"), spec, resolve(spec, "cpu"), None)
    sampler, unit = job.make_sampler("cpu"), get_unit(job.spec, 6)
    write_unit(job, unit, compute(sampler, job.spec, unit))
    images = read_unit(job, unit)["images"]
    expected = sampler([3, 3, 4, 4], [1.0, 3.0, 1.0, 3.0], 5, indices=[18, 18, 19, 19]).numpy()
    assert images.dtype == np.float32
    assert np.array_equal(images, expected)


def test_files_are_safetensors_with_their_origin(job: Job, tmp_path: Path) -> None:
    written(job)
    unit = get_unit(job.spec, 2)
    path = tmp_path / "job" / unit.name
    assert path.stat().st_size == unit_bytes(job, unit)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # so that what is mapped is aligned
    with safe_open(str(path), framework="np") as file:  # the format's own reader
        metadata = file.metadata()
        theirs = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert (metadata["unit"], metadata["spec"]) == ("2", job.spec.sha256)
    assert metadata["checkpoint"] == job.checkpoint_sha256
    ours = read_unit(job, unit)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_every_flipped_bit_is_found(job: Job) -> None:
    """Every bit of the header, and a sample of the rest."""
    unit = get_unit(job.spec, 1)
    content = bytearray(b"".join(encode(job, unit, compute(job.make_sampler("cpu"), job.spec, unit))))
    decode(job, unit, bytes(content))
    header = 8 + int.from_bytes(content[:8], "little")
    bits = [*range(8 * header), *random.Random(0).sample(range(8 * header, 8 * len(content)), 400)]
    for bit in bits:
        content[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedError):
            decode(job, unit, bytes(content))
        content[bit // 8] ^= 1 << bit % 8
    decode(job, unit, bytes(content))


@pytest.mark.parametrize("header", [b"[]", b"3", b'{"__metadata__": 3}', b"{}", b"{", b"\xff", b"[" * 1000])
def test_a_header_of_another_kind_is_damage(job: Job, header: bytes) -> None:
    unit = get_unit(job.spec, 1)
    content = len(header).to_bytes(8, "little") + header
    with pytest.raises(DamagedError, match="its header cannot be read"):
        decode(job, unit, content.ljust(unit_bytes(job, unit), b" "))


def test_damage_is_named(job: Job, tmp_path: Path) -> None:
    written(job)
    units = [get_unit(job.spec, k) for k in range(4)]
    paths = [tmp_path / "job" / unit.name for unit in units]
    assert [check_unit(job, unit) for unit in units] == [None] * 4
    whole = [path.read_bytes() for path in paths]
    paths[0].write_bytes(whole[0][:-1])
    paths[1].write_bytes(whole[2])
    paths[2].write_bytes(whole[1])
    paths[3].write_bytes(whole[3][:-1] + bytes([whole[3][-1] ^ 1]))
    size = len(whole[0])
    assert [check_unit(job, unit) for unit in units] == [
        f"{size - 1} bytes, not {size}",
        "it is unit 2",
        "it is unit 1",
        "its content is not what was written (SHA-256)",
    ]
    with pytest.raises(DamagedError, match="--verify"):
        read_unit(job, units[3])
    read_unit(job, units[3], verify=False)  # the caller's choice


def test_a_file_of_another_size_is_no_unit(job: Job, tmp_path: Path) -> None:
    written(job)
    units = [get_unit(job.spec, k) for k in range(3)]
    paths, size = [tmp_path / "job" / unit.name for unit in units], unit_bytes(job, units[0])
    paths[0].write_bytes(paths[0].read_bytes() + b"\n")
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    found = status(job.store.url)
    assert found.damaged == {0: f"{size + 1} bytes, not {size}", 1: f"{size - 1} bytes, not {size}"}
    assert found.done == tuple(range(2, 7))
    assert found.images == sum(get_unit(job.spec, k).size for k in found.done)


def test_units_of_another_job_are_told(job: Job) -> None:
    unit = get_unit(job.spec, 0)
    other_spec = replace(job, spec=replace(job.spec, seed=6))
    other_weights = replace(job, checkpoint_sha256="0" * 64)
    sampler = job.make_sampler("cpu")
    arrays = compute(sampler, job.spec, unit)
    for other, words in ((other_spec, "another spec"), (other_weights, "another checkpoint")):
        write_unit(other, unit, arrays)
        assert words in str(check_unit(job, unit))


def test_missing_unit_and_wrong_number(job: Job) -> None:
    with pytest.raises(fastcfg.Error, match="unit 3 is not in"):
        read_unit(job, get_unit(job.spec, 3))
    with pytest.raises(fastcfg.Error, match=r"unit 7 asked, .*0\.\.6"):
        get_unit(job.spec, 7)


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_only_what_is_still_damaged_is_set_aside(
    tiny_spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    url = str(tmp_path / "job") if kind == "local" else f"memory://{tmp_path.name}/set aside"
    job = make_job(tiny_spec, url)
    names = [get_unit(job.spec, k).name for k in range(5)]
    whole = [bytes(job.store.read(name)) for name in names]
    for k in (1, 2, 3, 4):
        job.store.write(names[k], [whole[0]])
    found = status(url, verify=True)
    assert list(found.damaged) == [1, 2, 3, 4]
    # Then a run computes unit 2 again and is at unit 3, and somebody else sets unit 4 aside.
    job.store.write(names[2], [whole[2]])
    real = type(job.store).claim
    monkeypatch.setattr(type(job.store), "claim", lambda store, number: number != 3 and real(store, number))
    job.store.set_aside(names[4], "damaged")
    assert set_aside(url, found.damaged) == (1,)
    assert set(job.store.sizes("damaged")) == {"unit-000001.safetensors", "unit-000004.safetensors"}
    assert bytes(job.store.read(names[2])) == whole[2]
    assert open_store(url).claim(1), "what was judged is still claimed"


def test_a_unit_that_goes_while_it_is_verified_is_missing(job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written(job)

    def going(job: Job, unit: Unit) -> str | None:
        if unit.k == 2:
            job.store.set_aside(unit.name, "damaged")
        return check_unit(job, unit)

    monkeypatch.setattr(sys.modules["fastcfg.jobs.run"], "check_unit", going)
    found = status(tmp_path / "job", verify=True)
    assert (found.missing, found.damaged, found.images) == ((2,), {}, 34)
    assert found.done == (0, 1, 3, 4, 5, 6)


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_worker_writes_passes_over_and_reports(
    tiny_spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    url = str(tmp_path / "job") if kind == "local" else f"memory://{tmp_path.name}"
    job = freeze(open_store(url), tiny_spec, resolve(tiny_spec, "cpu"), None)
    events: list[object] = []
    other = open_store(url)

    def report(event: Outcome | Sampled) -> None:
        events.append(event)
        if isinstance(event, Outcome):  # whoever hears of it may claim the unit
            assert other.claim(event.unit.k)
            other.release(event.unit.k)

    worker = Worker(job, "cpu", report)
    units = list(all_units(job.spec))[:3]
    write_unit(job, units[1], compute(worker.sampler, job.spec, units[1]))
    real = compute

    def failing(sampler: object, spec: Spec, unit: object, on_batch: object) -> object:
        if unit == units[2]:
            raise RuntimeError("out of\nmemory")
        return real(sampler, spec, unit, on_batch)

    monkeypatch.setattr("fastcfg.jobs.worker.compute", failing)
    for unit in units:
        worker.take(unit)
    worker.finish()
    outcomes = {event.unit.k: event for event in events if isinstance(event, Outcome)}
    assert [outcomes[k].status for k in range(3)] == ["written", "present", "failed"]
    assert outcomes[2].error == "RuntimeError: out of memory"
    assert sum(event.images for event in events if isinstance(event, Sampled)) == units[0].size
    assert check_unit(job, units[0]) is None
    assert all(other.claim(unit.k) for unit in units), "a unit that is done with is still claimed"


def test_a_store_that_takes_no_claim_stops_the_run(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def claim(*_: object) -> bool:
        raise JobError("cannot lock claims: Input/output error")

    events: list[object] = []
    worker = Worker(job, "cpu", events.append)
    monkeypatch.setattr(LocalStore, "claim", claim)
    worker.take(get_unit(job.spec, 0))
    worker.finish()
    assert events == [Outcome(get_unit(job.spec, 0), "stop", "cannot lock claims: Input/output error")]


def test_a_worker_holds_three_units_and_none_that_is_written(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """One at the device, one waiting for the writer, one being written: while the disk is slow, no fourth is begun."""
    begun: list[weakref.ref[object]] = []
    disk = threading.Event()
    real = compute

    def counted(*arguments: Any) -> dict[str, Any]:
        arrays = real(*arguments)
        begun.append(weakref.ref(arrays["images"]))
        return arrays

    monkeypatch.setattr("fastcfg.jobs.worker.compute", counted)
    monkeypatch.setattr("fastcfg.jobs.worker.write_unit", lambda *_: disk.wait(60))
    events: list[object] = []
    worker = Worker(job, "cpu", events.append)
    device = threading.Thread(target=lambda: [worker.take(unit) for unit in all_units(job.spec)])
    device.start()
    deadline = time.monotonic() + 60
    while len(begun) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)  # in which it would begin others
    assert len(begun) == 3
    disk.set()
    device.join(60)
    while any(images() is not None for images in begun):
        assert time.monotonic() < deadline, "the writer keeps what it has written"
        time.sleep(0.01)
    worker.finish()
    assert sum(isinstance(event, Outcome) for event in events) == len(begun) == 7


def test_a_claim_that_cannot_be_given_up_does_not_end_the_writer(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network file system in trouble. Without its writer a worker waits for ever when it has the next unit."""
    real = fcntl.lockf

    def lockf(file: int, operation: int, *rest: int) -> None:
        if operation == fcntl.LOCK_UN:
            raise OSError(errno.EIO, "Input/output error")
        real(file, operation, *rest)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    events: list[object] = []
    worker = Worker(job, "cpu", events.append)
    worker.take(get_unit(job.spec, 0))
    worker.finish()
    assert events[-1] == Outcome(get_unit(job.spec, 0), "written")
