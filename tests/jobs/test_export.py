"""fastcfg.jobs.export: every sample once, in order, in bytes that other tools read, and whole or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crashing import Start
from making import expected, make_job, make_noise_job
from PIL import Image
from tqdm import tqdm

from fastcfg import Error
from fastcfg.jobs import DamagedError, JobError, Spec, all_units, get_unit
from fastcfg.jobs.export import _appearing, export
from fastcfg.jobs.units import Arrays

FORMATS = ["adm-npz", "png", "webdataset"]
LABELS = [3, 0, 4, 4, 1, 2, 3, 0, 1, 4, 0, 2, 2, 3, 1, 0, 4, 2, 1, 3]


@pytest.fixture(scope="module")
def spec(tiny_checkpoint: Path) -> Spec:
    options = {"steps": 3, "eta": 1.0, "dtype": "fp32", "engine": "cpu", "seed": 5, "unit_size": 7, "batch": 4}
    return Spec(str(tiny_checkpoint), scales=(1.0, 3.1), labels=tuple(LABELS), **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def wanted(spec: Spec) -> Arrays:
    return expected(spec)


@pytest.mark.parametrize(("scale", "rows"), [(None, slice(None)), (1.0, slice(0, None, 2)), (3.1, slice(1, None, 2))])
def test_npz_is_what_numpy_would_have_saved(
    folder: Path, wanted: Arrays, tmp_path: Path, scale: float | None, rows: slice
) -> None:
    count = export(folder, "adm-npz", tmp_path / "x.npz", scale=scale, progress=False)
    arrays = [wanted["images"][rows], wanted["labels"][rows], *([wanted["scales"]] if scale is None else [])]
    np.savez(tmp_path / "numpy.npz", *arrays)
    with zipfile.ZipFile(tmp_path / "x.npz") as ours, zipfile.ZipFile(tmp_path / "numpy.npz") as theirs:
        assert ours.testzip() is None
        assert ours.namelist() == theirs.namelist()
        for name in ours.namelist():
            assert ours.read(name) == theirs.read(name), name
    with np.load(tmp_path / "x.npz") as loaded:
        assert loaded["arr_0"].shape == (count, 8, 8, 3)
        assert (loaded["arr_0"].dtype, loaded["arr_1"].dtype) == (np.uint8, np.int64)


def test_png_folder_has_every_sample_under_its_label(folder: Path, wanted: Arrays, tmp_path: Path) -> None:
    assert export(folder, "png", tmp_path / "png", scale=3.1, progress=False) == 20
    found = {str(path.relative_to(tmp_path / "png")): path for path in (tmp_path / "png").rglob("*.png")}
    assert sorted(found) == sorted(f"{LABELS[i // 2]}/{i:08d}.png" for i in range(1, 40, 2))
    for i in range(1, 40, 2):
        with Image.open(found[f"{LABELS[i // 2]}/{i:08d}.png"]) as image:
            np.testing.assert_array_equal(np.asarray(image), wanted["images"][i])


def test_png_folder_of_several_scales_has_a_folder_for_each(folder: Path, tmp_path: Path) -> None:
    assert export(folder, "png", tmp_path / "png", progress=False) == 40
    found = sorted(str(path.relative_to(tmp_path / "png")) for path in (tmp_path / "png").rglob("*.png"))
    assert found == sorted(f"scale-{(1.0, 3.1)[i % 2]}/{LABELS[i // 2]}/{i:08d}.png" for i in range(40))


def test_label_folders_sort_as_numbers(tmp_path: Path) -> None:
    make_noise_job(tmp_path / "out", count=110, unit_size=50, shape=(1, 4, 4), classes=11)
    export(tmp_path / "out", "png", tmp_path / "png", progress=False)
    assert sorted(path.name for path in (tmp_path / "png").iterdir()) == [f"{label:02d}" for label in range(11)]
    with Image.open(tmp_path / "png" / "10" / "00000109.png") as image:
        assert image.mode == "L"


def test_webdataset_shards_read_by_tarfile(folder: Path, spec: Spec, wanted: Arrays, tmp_path: Path) -> None:
    export(folder, "webdataset", tmp_path / "wds", shard_size=16, progress=False)
    shards = sorted((tmp_path / "wds").iterdir())
    assert [shard.name for shard in shards] == [f"shard-{k:06d}.tar" for k in range(3)]
    i = 0
    for shard, size in zip(shards, [16, 16, 8], strict=True):
        with tarfile.open(shard) as tar:
            names = tar.getnames()
            assert names == [f"{k:08d}.{kind}" for k in range(i, i + size) for kind in ("png", "json")]
            for k in range(i, i + size):
                image, about = (tar.extractfile(f"{k:08d}.{kind}") for kind in ("png", "json"))
                assert image is not None
                assert about is not None
                np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image.read()))), wanted["images"][k])
                assert json.load(about) == {"label": LABELS[k // 2], "scale": spec.scales[k % 2], "seed": 5, "index": k // 2}
        i += size
    assert i == 40


def test_webdataset_shards_read_by_webdataset(folder: Path, wanted: Arrays, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    export(folder, "webdataset", tmp_path / "wds", shard_size=16, progress=False)
    shards = webdataset.WebDataset(str(tmp_path / "wds" / "shard-{000000..000002}.tar"), shardshuffle=False)
    samples = list(shards.decode("rgb8").to_tuple("__key__", "png", "json"))
    assert [key for key, _, _ in samples] == [f"{i:08d}" for i in range(40)]
    np.testing.assert_array_equal(np.stack([image for _, image, _ in samples]), wanted["images"])
    assert [about["label"] for _, _, about in samples] == wanted["labels"].tolist()


@pytest.mark.parametrize("shard_size", [1, 20, 39, 40, 41])
def test_no_shard_is_empty_and_none_too_large(folder: Path, tmp_path: Path, shard_size: int) -> None:
    export(folder, "webdataset", tmp_path / "wds", shard_size=shard_size, progress=False)
    sizes = []
    for shard in sorted((tmp_path / "wds").iterdir()):
        with tarfile.open(shard) as tar:
            sizes.append(len(tar.getnames()) // 2)
    assert sizes == [min(shard_size, 40 - i) for i in range(0, 40, shard_size)]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shard_size", [20, 30])
def test_the_bar_counts_every_sample(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, shard_size: int
) -> None:
    bars: list[tqdm[Any]] = []

    def bar(**given: Any) -> tqdm[Any]:
        bars.append(tqdm(**{**given, "file": io.StringIO(), "disable": False}))
        return bars[0]

    monkeypatch.setitem(export.__globals__, "tqdm", bar)
    export(folder, format, tmp_path / "x", shard_size=shard_size)
    assert [(bar.n, bar.total) for bar in bars] == [(40, 40)]


@pytest.mark.parametrize("format", FORMATS)
def test_what_appears_is_on_the_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    calls: list[str] = []
    for name in ("sync", "fsync", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    export(folder, format, tmp_path / "x", progress=False)
    assert calls[-3:] == ["fsync" if format == "adm-npz" else "sync", "rename", "fsync"]


def test_an_npz_may_be_larger_than_old_zip_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """50,000 images of 256 x 256 are 9.8 GB; what zipfile holds to be too large for a plain member is here a few bytes."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    export(folder, "adm-npz", tmp_path / "x.npz", progress=False)
    with np.load(tmp_path / "x.npz") as loaded:
        assert len(loaded["arr_0"]) == 40


@pytest.mark.parametrize("format", FORMATS)
def test_equal_jobs_are_equal_bytes(spec: Spec, folder: Path, tmp_path: Path, format: str) -> None:
    make_job(spec, tmp_path / "backwards", reversed(list(all_units(spec))))
    export(folder, format, tmp_path / "a", progress=False)
    export(tmp_path / "backwards", format, tmp_path / "b", progress=False)
    assert _hashes(tmp_path / "a") == _hashes(tmp_path / "b")
    for path in [tmp_path / "a", *(tmp_path / "a").rglob("*.tar")]:  # nor does the time of writing matter
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "")}
        elif path.is_file():
            assert {info.date_time for info in zipfile.ZipFile(path).infolist()} == {(1980, 1, 1, 0, 0, 0)}


def _hashes(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "npz"}, "unknown format 'npz': known are adm-npz, png, webdataset"),
        ({"path": "exists"}, "exists: remove it, or give another path"),
        ({"path": "missing/x"}, "the folder .*missing does not exist"),
        ({"path": "s3://bucket/x"}, "exports are written to local paths"),
        ({"scale": 2.0}, r"no samples of scale 2\.0 .*: its scales are 1\.0, 3\.1"),
        ({"shard_size": 0}, "shard_size must be a whole number of at least 1, got 0"),
        ({"shard_size": True}, "shard_size must be a whole number of at least 1, got True"),
    ],
    ids=str,
)
def test_bad_input_is_one_error_before_any_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exists").mkdir()
    with pytest.raises(Error, match=message) as raised:
        export(folder, **{"format": "png", "path": "x", "progress": False, **arguments})  # type: ignore[arg-type]
    assert type(raised.value) is Error
    assert [path.name for path in tmp_path.iterdir()] == ["exists"]


def test_a_link_to_nowhere_is_not_written_over(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("nowhere")
    with pytest.raises(Error, match="exists: remove it"):
        export(folder, "png", tmp_path / "x", progress=False)


@pytest.mark.parametrize("format", FORMATS)
def test_latents_are_no_pixels(spec: Spec, tmp_path: Path, format: str) -> None:
    make_job(replace(spec, output="latents"), tmp_path / "out")
    with pytest.raises(Error, match=r"holds latents, and exports are of pixels: .*fastcfg\.jobs\.open"):
        export(tmp_path / "out", format, tmp_path / "x", progress=False)
    assert not (tmp_path / "x").exists()


def test_two_channels_are_no_picture(tmp_path: Path) -> None:
    make_noise_job(tmp_path / "out", count=4, unit_size=4, shape=(2, 4, 4))
    with pytest.raises(Error, match="of 1 or 3 channels, the job's have 2"):
        export(tmp_path / "out", "png", tmp_path / "x", progress=False)


def test_an_incomplete_job_is_not_exported(spec: Spec, tmp_path: Path) -> None:
    make_job(spec, tmp_path / "out", [get_unit(spec, 0)])
    with pytest.raises(Error, match=r"1 of 6 units, 7 of 40 images .*: run the job to its end"):
        export(tmp_path / "out", "adm-npz", tmp_path / "x", progress=False)


@pytest.mark.parametrize("format", FORMATS)
def test_a_changed_byte_stops_the_export_and_nothing_is_left(spec: Spec, tmp_path: Path, format: str) -> None:
    job = make_job(spec, tmp_path / "out")
    file = tmp_path / "out" / get_unit(job.spec, 4).name
    content = bytearray(file.read_bytes())
    content[-50] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedError, match="unit-000004"):
        export(tmp_path / "out", format, tmp_path / "x", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("format", FORMATS)
def test_no_room_is_a_job_error_and_nothing_is_left(tmp_path: Path, format: str) -> None:
    make_noise_job(tmp_path / "out", count=40, unit_size=10, shape=(3, 16, 16))
    with _no_file_above(500), pytest.raises(JobError, match=r"cannot write .*x: File too large"):
        export(tmp_path / "out", format, tmp_path / "x", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_name_too_long_is_one_error_and_nothing_is_left(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(export.__globals__, "check_writable", lambda _: None)
    for format in FORMATS:
        with pytest.raises(JobError, match=r"cannot write .*: File name too long"):
            export(folder, format, tmp_path / ("x" * 249), progress=False)
    assert list(tmp_path.iterdir()) == []


def test_two_exports_have_a_temporary_file_each(tmp_path: Path) -> None:
    """In containers every export is process 1, and one that was killed has left its folder there."""
    with _appearing(tmp_path / "x") as one, _appearing(tmp_path / "x") as two:
        assert one != two
        one.touch()
        two.touch()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing_of_an_export(start: Start, tmp_path: Path, signum: int, code: int) -> None:
    make_noise_job(tmp_path / "out", count=30_000, unit_size=10_000, shape=(1, 8, 8))
    arguments = ["job", "export", str(tmp_path / "out"), "--format", "png", "--out", str(tmp_path / "x")]
    run = start(arguments, log=tmp_path / "log")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".x.*.tmp/*/*.png")):
        assert time.monotonic() < deadline
        assert run.poll() is None
        time.sleep(0.002)
    run.send(signum)
    assert run.wait() == code
    assert f"error: stopped by {signal.Signals(signum).name}: nothing of {tmp_path / 'x'} was kept\n" in run.printed
    assert "Traceback" not in run.printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "out"]


@contextmanager
def _no_file_above(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes of a file fail, as on a disk without room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


MEASURE = """
import sys
from pathlib import Path
from fastcfg.jobs.export import export
peak = lambda: int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
before = peak()
export(sys.argv[1], sys.argv[2], sys.argv[3], progress=False)
print(peak() - before)
"""


def test_npz_needs_the_memory_of_a_unit_not_of_the_job(tmp_path: Path) -> None:
    make_noise_job(tmp_path / "out", count=1000, unit_size=50, shape=(3, 256, 256))  # 197 MB in units of 9.8 MB
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "out"), "adm-npz", str(tmp_path / "x.npz")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 40e6, f"{grown / 1e6:.0f} MB"
    with np.load(tmp_path / "x.npz") as loaded:
        assert len(loaded["arr_1"]) == 1000
