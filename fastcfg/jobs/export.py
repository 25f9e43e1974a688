"""A complete job's samples in the formats that other tools read: ADM's npz, a folder of PNGs, WebDataset's tar shards."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from fastcfg.errors import Error, check_known
from fastcfg.files import check_writable, sync_folder, temporary_path
from fastcfg.jobs.dataset import image_layout
from fastcfg.jobs.errors import JobError, Signalled, StoppedError
from fastcfg.jobs.job import Job, open_job
from fastcfg.jobs.run import signals, status
from fastcfg.jobs.stores import looks_remote
from fastcfg.jobs.units import Arrays, all_units, read_unit


def export(
    out: str | Path,
    format: str,
    path: str | Path,
    *,
    scale: float | None = None,
    shard_size: int = 10_000,
    progress: bool = True,
) -> int:
    """Writes the samples of the complete job at `out` to `path`, in the order of their numbers; how many they were.

    format:
      "adm-npz"     a file that ADM's evaluator reads: arr_0 uint8 [N, H, W, C], arr_1 int64 labels [N].
      "png"         a folder of LABEL/NUMBER.png, labels padded to equal width: 07/00000012.png.
      "webdataset"  a folder of shard-000000.tar, .. of `shard_size` samples each: NUMBER.png, and NUMBER.json with label,
                    scale, seed and index.

    scale: only the samples of this scale. Of a job of several scales all are written unless one is named, and told apart:
    by arr_2 in the npz, float32 scales [N]; by folders scale-S/LABEL/NUMBER.png; in the json. Evaluators look at arr_0
    alone, so name the scale for them.

    Every unit is checked, byte for byte, as it is read. The same job gives the same bytes. `path` must not exist, and
    appears when it is whole. Raises Error before anything is written, JobError where it cannot be, and StoppedError after
    SIGINT or SIGTERM.
    """
    job, path = open_job(out), Path(path)
    check_known("format", format, _WRITERS)
    if not isinstance(shard_size, int) or isinstance(shard_size, bool) or shard_size < 1:
        raise Error(f"shard_size must be a whole number of at least 1, got {shard_size!r}")
    _check_pixels(job)
    _check_path(path)
    scales = job.spec.scales if scale is None else (_known_scale(job, scale),)
    found = status(out)
    if not found.complete:
        raise Error(f"{found}: run the job to its end before it is exported")
    N = job.spec.samples // len(job.spec.scales) * len(scales)
    with (
        signals(),
        tqdm(total=N, desc="export", unit="image", file=sys.stderr, disable=not progress) as bar,
        _appearing(path) as temporary,
    ):
        _WRITERS[format](temporary, Export(job, scales, N, shard_size, bar.update))
    return N


@dataclass(frozen=True)
class Export:
    """What is written. N: number of samples. on_samples(n): called when n more are written."""

    job: Job
    scales: tuple[float, ...]
    N: int
    shard_size: int
    on_samples: Callable[[int], object]

    def units(self) -> Iterator[tuple[NDArray[np.int64], Arrays]]:
        """(numbers, arrays) of the samples wanted, unit by unit. Raises JobError where a unit cannot be read."""
        spec = self.job.spec
        wanted = np.isin(np.arange(len(spec.scales)), [spec.scales.index(scale) for scale in self.scales])
        for unit in all_units(spec):
            arrays = read_unit(self.job, unit)
            numbers = np.arange(unit.start, unit.stop)
            rows = slice(None) if wanted.all() else wanted[numbers % len(spec.scales)]
            yield numbers[rows], {name: array[rows] for name, array in arrays.items()}
            del arrays  # one unit in memory, not two

    def samples(self) -> Iterator[tuple[int, NDArray[np.uint8], dict[str, Any]]]:
        """(number, image [H, W, C], {label, scale, seed, index}) of the samples wanted, one by one."""
        S = len(self.job.spec.scales)
        for numbers, arrays in self.units():
            columns = [arrays[name].tolist() for name in ("labels", "seeds", "indices")]
            for i, image, label, seed, index in zip(numbers.tolist(), arrays["images"], *columns, strict=True):
                yield i, image, {"label": label, "scale": self.job.spec.scales[i % S], "seed": seed, "index": index}


Writer: TypeAlias = Callable[[Path, Export], None]


def _write_npz(path: Path, export: Export) -> None:
    """np.savez's layout, member by member and unit by unit, so that no more than a unit is ever in memory."""
    shape, _ = image_layout(export.job)
    labels, scales = [], []
    with zipfile.ZipFile(path, "w") as archive:
        with _member(archive, "arr_0", np.dtype(np.uint8), (export.N, *shape)) as member:
            for _, arrays in export.units():
                member.write(np.ascontiguousarray(arrays["images"]).data)
                labels.append(np.array(arrays["labels"]))
                scales.append(np.array(arrays["scales"]))
                export.on_samples(len(arrays["labels"]))
                del arrays  # before the next is read
        columns = [labels] if len(export.scales) == 1 else [labels, scales]
        for number, parts in enumerate(columns, 1):
            column = np.concatenate(parts)
            with _member(archive, f"arr_{number}", column.dtype, column.shape) as member:
                member.write(column.tobytes())


@contextmanager
def _member(archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Iterator[Any]:
    """An array of an npz, open for its content: C order, as it lies in memory."""
    info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
    with archive.open(info, "w", force_zip64=True) as member:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)
        yield member


def _write_png(path: Path, export: Export) -> None:
    path.mkdir()
    tops = {scale: path / f"scale-{scale}" if len(export.scales) > 1 else path for scale in export.scales}
    folders: dict[tuple[float, int], Path] = {}
    for i, image, about in export.samples():
        key = about["scale"], about["label"]
        if key not in folders:
            folders[key] = tops[about["scale"]] / str(about["label"])
            folders[key].mkdir(parents=True)
        (folders[key] / f"{i:08d}.png").write_bytes(_png(image))
        export.on_samples(1)
    # Readers number classes in the order of their folders' names, so these are padded, once the largest label is known.
    width = max(len(folder.name) for folder in folders.values())
    for folder in folders.values():
        folder.rename(folder.with_name(folder.name.zfill(width)))


def _write_webdataset(path: Path, export: Export) -> None:
    path.mkdir()
    samples = enumerate(export.samples())
    for shard in range(-(-export.N // export.shard_size)):
        with tarfile.open(path / f"shard-{shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for n, (i, image, about) in samples:
                _add(tar, f"{i:08d}.png", _png(image))
                _add(tar, f"{i:08d}.json", json.dumps(about).encode())
                export.on_samples(1)
                if (n + 1) % export.shard_size == 0:
                    break


_WRITERS: dict[str, Writer] = {"adm-npz": _write_npz, "png": _write_png, "webdataset": _write_webdataset}


def _png(image: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(file, "PNG")
    return file.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # of time 0 and nobody's, so that equal samples are equal files
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _check_pixels(job: Job) -> None:
    if job.spec.output != "uint8":
        raise Error(
            f"{job.store.url} holds latents, and exports are of pixels: read them with fastcfg.jobs.open "
            "and decode them with fastcfg.images.decode"
        )
    if job.resolved.shape[0] not in (1, 3):
        raise Error(f"exports are of images of 1 or 3 channels, the job's have {job.resolved.shape[0]}: use fastcfg.jobs.open")


def _check_path(path: Path) -> None:
    if looks_remote(path):
        raise Error(f"cannot write {path}: exports are written to local paths")
    if os.path.lexists(path):
        raise Error(f"{path} exists: remove it, or give another path to export to")
    check_writable(path)


def _known_scale(job: Job, scale: float) -> float:
    for known in job.spec.scales:
        if known == scale:
            return known
    raise Error(f"no samples of scale {scale!r} in {job.store.url}: its scales are {', '.join(map(str, job.spec.scales))}")


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, for a file or a folder that is moved to `path` if all goes well, else removed."""
    temporary = temporary_path(path)
    try:
        yield temporary
        if temporary.is_dir():
            os.sync()  # once, rather than 50,000 files one by one
        else:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.rename(temporary, path)
        sync_folder(path.parent)  # whoever is told that it is there may remove the job
    except OSError as error:
        raise JobError(f"cannot write {path}: {error.strerror or error}: nothing of it was kept") from error
    except Signalled as stop:
        raise StoppedError(stop.signum, f"nothing of {path} was kept") from None
    finally:
        if os.path.isdir(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):  # nothing is there, or its name is longer than names may be
                temporary.unlink()
