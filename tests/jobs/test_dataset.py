"""fastcfg.jobs.open: a job's samples, one by one or several, in this process or in a DataLoader's workers."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from making import expected, make_job, make_noise_job
from torch.utils.data import DataLoader

from fastcfg import Error
from fastcfg.jobs import DamagedError, Spec, get_unit, read_unit, write_unit
from fastcfg.jobs.dataset import JobDataset, Sample, open

FIELDS = {"image": "images", "label": "labels", "seed": "seeds", "index": "indices", "scale": "scales"}


@pytest.fixture(scope="module")
def spec(tiny_checkpoint: Path) -> Spec:
    labels = [int(label) for label in np.random.default_rng(0).integers(0, 5, 20)]
    options = {"steps": 3, "eta": 1.0, "dtype": "fp32", "engine": "cpu", "seed": 5, "unit_size": 6, "batch": 4}
    return Spec(str(tiny_checkpoint), scales=(1.0, 3.0), labels=tuple(labels), **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def dataset(folder: Path) -> JobDataset:
    return open(folder)


@pytest.fixture(scope="module")
def wanted(spec: Spec) -> Sample:
    arrays = expected(spec)
    return Sample(**{field: arrays[name] for field, name in FIELDS.items()})


def test_each_sample_is_the_samplers_own(dataset: JobDataset, wanted: Sample) -> None:
    assert len(dataset) == 40
    for i in range(40):
        sample = dataset[i]
        assert sample.image.dtype == np.uint8
        np.testing.assert_array_equal(sample.image, wanted.image[i])
        assert sample[1:] == tuple(column[i] for column in wanted[1:])
        assert [type(value) for value in sample[1:]] == [int, int, int, float]
    assert dataset[-1][1:] == dataset[39][1:]
    assert len(list(dataset)) == 40  # ends, which takes an IndexError


@pytest.mark.parametrize(
    "key",
    [
        slice(None),
        slice(4, 9),
        slice(None, None, -3),
        slice(7, 7),
        [39, 0, 17, 17, 5, 6],
        [-1, -40],
        [],
        np.arange(40) % 7 == 3,
        np.array([12, 11], np.int32),
        torch.tensor([3, 38, 20]),
        range(5, 15),
    ],
    ids=str,
)
def test_several_are_as_numpy_takes_them(dataset: JobDataset, wanted: Sample, key: object) -> None:
    rows = np.arange(40)[key if isinstance(key, (slice, np.ndarray)) else [int(i) for i in key]]  # type: ignore[attr-defined]
    found = dataset[key]
    for column, want in zip(found, wanted, strict=True):
        assert isinstance(column, np.ndarray)
        np.testing.assert_array_equal(column, want[rows], strict=column is found.scale)
    found.image[:] = 0  # the caller's, not the file's


@pytest.mark.parametrize("key", [40, -41, [0, 40], 1.5, "1", None, True, [[0, 1]], np.ones(39, bool), [0.0]], ids=str)
def test_what_is_no_position_is_an_index_error(dataset: JobDataset, key: object) -> None:
    with pytest.raises(IndexError):
        dataset[key]


@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1), (None, 0)])
def test_a_data_loader_sees_every_sample_once(dataset: JobDataset, wanted: Sample, method: str | None, workers: int) -> None:
    dataset[0]  # a file is open when the workers are made
    loader = DataLoader(dataset, batch_size=7, shuffle=True, num_workers=workers, multiprocessing_context=method)
    batches = list(loader)
    assert [len(batch.label) for batch in batches] == [7] * 5 + [5]
    together = Sample(*(torch.cat(columns).numpy() for columns in zip(*batches, strict=True)))
    order = np.lexsort((together.scale, together.index))
    for column, want in zip(together, wanted, strict=True):
        np.testing.assert_array_equal(column[order], want)


def test_labels_and_scales_are_there_without_images(dataset: JobDataset, wanted: Sample) -> None:
    np.testing.assert_array_equal(dataset.labels, wanted.label, strict=True)
    np.testing.assert_array_equal(dataset.scales, wanted.scale, strict=True)


def test_heads_are_fetched_in_rounds_and_the_latest_are_kept(
    spec: Spec, wanted: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("REQUESTS", 3), ("KNOWN_UNITS", 2)):
        monkeypatch.setitem(open.__globals__, name, value)
    dataset = open(make_job(spec, f"memory://{tmp_path.name}/heads").store.url)
    rounds: list[list[int]] = []
    fetch = dataset._files._fetch  # type: ignore[union-attr]
    monkeypatch.setattr(dataset._files, "_fetch", lambda spans: rounds.append([unit.k for unit, *_ in spans]) or fetch(spans))
    np.testing.assert_array_equal(dataset.labels, wanted.label)
    assert rounds == [[0, 1, 2], [3, 4, 5], [6]]
    assert dataset[[30, 39]].label.tolist() == wanted.label[[30, 39]].tolist()
    assert rounds[3:] == [[5, 6], []], "images alone: the heads of units 5 and 6 are known"


def test_it_can_be_pickled(dataset: JobDataset, wanted: Sample) -> None:
    dataset[3]
    copy = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(copy[:].image, wanted.image)


def test_latents_are_float(spec: Spec, tmp_path: Path) -> None:
    latents = replace(spec, output="latents")
    make_job(latents, tmp_path / "out")
    found = open(tmp_path / "out")[5:30]
    np.testing.assert_array_equal(found.image, expected(latents)["images"][5:30], strict=True)


def test_an_incomplete_job_must_be_asked_for(spec: Spec, wanted: Sample, tmp_path: Path) -> None:
    make_job(spec, tmp_path / "out", [get_unit(spec, k) for k in (1, 4, 6)])
    with pytest.raises(Error, match=r"3 of 7 units, 16 of 40 images .* partial=True"):
        open(tmp_path / "out")
    there = open(tmp_path / "out", partial=True)
    rows = [*range(6, 12), *range(24, 30), *range(36, 40)]
    assert len(there) == len(rows)
    for column, want in zip(there[:], wanted, strict=True):
        np.testing.assert_array_equal(column, want[rows])
    assert there[15].index == wanted.index[39]


def test_nothing_computed_yet_is_an_empty_dataset(spec: Spec, tmp_path: Path) -> None:
    make_job(spec, tmp_path / "out", [])
    there = open(tmp_path / "out", partial=True)
    assert len(there) == 0
    assert there[:].image.shape == (0, 8, 8, 3)
    assert there.labels.shape == (0,)


def test_no_job_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(Error, match="no job at"):
        open(tmp_path)


def test_another_units_file_is_not_read(spec: Spec, tmp_path: Path) -> None:
    job = make_job(spec, tmp_path / "out", [get_unit(spec, k) for k in range(7)])
    (tmp_path / "out" / get_unit(spec, 2).name).write_bytes(bytes(job.store.read(get_unit(spec, 3).name)))
    dataset = open(tmp_path / "out")
    assert dataset[18].index == 9
    with pytest.raises(DamagedError, match=r"unit-000002.*it is unit 3"):
        dataset[12]


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_a_unit_of_another_checkpoint_is_not_read(spec: Spec, tmp_path: Path, kind: str) -> None:
    """Its file has the right size, so where job.json was lost and made again by a newer checkpoint, it counts as done."""
    job = make_job(spec, tmp_path / "out" if kind == "local" else f"memory://{tmp_path.name}/checkpoints")
    write_unit(replace(job, checkpoint_sha256="0" * 64), get_unit(spec, 2), read_unit(job, get_unit(spec, 2)))
    with pytest.raises(DamagedError, match=r"unit-000002.* is damaged: it was made with another checkpoint"):
        open(job.store.url)[12]


def test_a_unit_that_was_cut_short_since_is_damaged(spec: Spec, tmp_path: Path) -> None:
    job = make_job(spec, f"memory://{tmp_path.name}/out")
    dataset, name = open(job.store.url), get_unit(spec, 2).name
    job.store.write(name, [bytes(job.store.read(name))[:-1]])
    with pytest.raises(DamagedError, match=r"unit-000002\.safetensors ended at byte \d+; `job status --verify`"):
        dataset[12:18]


def test_few_units_are_open_at_once(tmp_path: Path) -> None:
    job = make_noise_job(tmp_path / "out", count=200, unit_size=2, shape=(3, 8, 8))
    dataset = open(tmp_path / "out")
    for i in np.random.default_rng(0).permutation(200):
        assert dataset[i].index == i
    assert np.array_equal(dataset[::-1].index, np.arange(199, -1, -1))
    mapped = Path("/proc/self/maps").read_text().count(f"{job.store.url}/units/unit-")
    assert 0 < mapped <= 20
