"""Where images to be judged come from: sample files, job folders, image folders, data sets; read as they are needed."""

from __future__ import annotations

import hashlib
import math
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastcfg.errors import Error
from fastcfg.files import is_dir, is_file
from fastcfg.images import read_image
from fastcfg.training.data import load_data

SUFFIXES = (".png", ".jpg", ".jpeg")
SPLITS = ("train", "test")
HASHED = 1024  # images read at once for a hash
WANTED = (
    "an .npz (arr_0 uint8 [N, H, W, C], arr_1 labels, arr_2 scales), a job's folder, a folder of PNG or JPEG images, "
    "or IDX files as FOLDER:test or FOLDER:train"
)


class Read(Protocol):
    def __call__(self, batch: int) -> Iterator[NDArray[np.uint8]]:
        """uint8 [n, H, W, C], n <= batch, in order."""
        ...


@dataclass(frozen=True)
class Images:
    """`count` images of one size. labels: int64 [count], or None where they have none."""

    name: str
    count: int
    labels: NDArray[np.int64] | None
    read: Read

    def sha256(self) -> str:
        """Of the pixels, wherever they are kept."""
        digest = hashlib.sha256()
        for images in self.read(HASHED):
            digest.update(repr(images.shape[1:]).encode())
            digest.update(images.tobytes())
        return digest.hexdigest()


def from_arrays(images: NDArray[np.uint8], labels: NDArray[np.integer] | None = None, name: str = "images") -> Images:
    """Images in memory, uint8 [N, H, W, C]."""
    if images.dtype != np.uint8 or images.ndim != 4:
        raise Error(f"images must be uint8 [N, H, W, C], got {images.dtype} {list(images.shape)}")

    def read(batch: int) -> Iterator[NDArray[np.uint8]]:
        return (images[start : start + batch] for start in range(0, len(images), batch))

    return Images(name, len(images), _labels(labels, len(images), name), read)


def open_images(where: str | Path, scale: float | None = None) -> Images:
    """The images at `where`: see `WANTED`. scale: which ones, where they are of several guidance scales.

    Raises Error where there are several and none is named: no figure is of a mix.
    """
    path, split = _split(str(where))
    if split is not None:
        if not is_dir(path) or not any(path.glob("*-idx3-ubyte*")):
            raise Error(f"{where}: only a folder of IDX files has splits, and {path} is none")
        if scale is not None:
            raise _no_scales(where)
        data = load_data(path, split)
        return from_arrays(data.images.transpose(0, 2, 3, 1), data.labels, str(where))
    if "://" in str(where) or is_file(path / "job.json"):
        return _from_job(str(where), scale)
    if path.suffix == ".npz" and is_file(path):
        return _from_npz(path, scale)
    if is_dir(path):
        return _from_folder(path, scale)
    raise Error(f"no images at {where}: want {WANTED}")


def _split(where: str) -> tuple[Path, str | None]:
    folder, _, split = where.rpartition(":")
    return (Path(folder), split) if folder and split in SPLITS else (Path(where), None)


def _labels(labels: NDArray[np.integer] | None, count: int, name: str) -> NDArray[np.int64] | None:
    if labels is None:
        return None
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise Error(f"{name}: labels must be whole numbers [{count}], got {labels.dtype} {list(labels.shape)}")
    return labels.astype(np.int64)


def _rows(where: str | Path, scales: NDArray[np.floating] | None, count: int, scale: float | None) -> NDArray[np.int64]:
    """The rows to be judged of `count` at `scales`, None where these are not known: those at `scale`, or all."""
    if scales is None and scale is not None:
        raise _no_scales(where)
    if scales is None:
        return np.arange(count)
    known = sorted(set(scales.tolist()))
    if scale is None and len(known) > 1:
        only = "those of SAMPLES; for a REFERENCE, export one scale"
        raise Error(f"{where} has samples at the scales {_listed(known)}: pick one with --scale ({only})")
    rows = np.arange(count) if scale is None else np.flatnonzero(scales == np.float32(scale))
    if scale is not None and not len(rows):
        raise Error(f"{where} has no samples at scale {scale:g}, only at {_listed(known)}")
    return rows


def _listed(scales: list[float]) -> str:
    return ", ".join(f"{scale:g}" for scale in scales)


def _no_scales(where: str | Path) -> Error:
    return Error(f"--scale picks samples of a job's folder, of an .npz with arr_2 or of scale-S folders, and {where} is none")


def _from_job(where: str, scale: float | None) -> Images:
    from fastcfg import jobs

    dataset = jobs.open(where)
    if dataset.job.spec.output != "uint8":
        raise Error(f"{where} holds {dataset.job.spec.output}, and only pixels can be judged: decode them to an .npz")
    rows = _rows(where, dataset.scales, len(dataset), scale)

    def read(batch: int) -> Iterator[NDArray[np.uint8]]:
        for start in range(0, len(rows), batch):
            yield dataset[rows[start : start + batch]].image

    return Images(where, len(rows), dataset.labels[rows], read)


def _from_npz(path: Path, scale: float | None) -> Images:
    """ADM's layout, and arr_2 for scales; `images` and `labels` serve as names, too. Pixels are streamed from the archive."""
    with _archive(path) as archive:
        names = archive.namelist()
        images = next((name for name in ("arr_0.npy", "images.npy") if name in names), None)
        if images is None:
            raise Error(f"{path} must hold arr_0, uint8 [N, H, W, C], but holds {sorted(names)}")
        with archive.open(images) as file:
            shape = _image_header(path, file)
        labels = _labels(_array(archive, "arr_1.npy", "labels.npy"), shape[0], str(path))
        scales = _array(archive, "arr_2.npy")
    if scales is not None and (scales.shape != shape[:1] or scales.dtype.kind not in "fiu"):
        raise Error(f"{path}: arr_2 must be scales, numbers [{shape[0]}], got {scales.dtype} {list(scales.shape)}")
    rows = _rows(path, None if scales is None else scales.astype(np.float32), shape[0], scale)
    wanted = np.isin(np.arange(shape[0]), rows)

    def blocks(batch: int) -> Iterator[NDArray[np.uint8]]:
        with _archive(path) as archive, archive.open(images) as file:
            _image_header(path, file)
            for start in range(0, shape[0], batch):
                block = (min(batch, shape[0] - start), *shape[1:])
                yield np.frombuffer(file.read(math.prod(block)), np.uint8).reshape(block)[wanted[start : start + batch]]

    return Images(str(path), len(rows), None if labels is None else labels[rows], lambda batch: _filled(blocks(batch), batch))


def _array(archive: zipfile.ZipFile, *names: str) -> NDArray[Any] | None:
    """The first of `names` that the archive has."""
    name = next((name for name in names if name in archive.namelist()), None)
    if name is None:
        return None
    with archive.open(name) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _filled(parts: Iterator[NDArray[np.uint8]], batch: int) -> Iterator[NDArray[np.uint8]]:
    """`parts`, each of `batch` images at most, joined to batches of as many; only the last may have fewer."""
    kept: list[NDArray[np.uint8]] = []
    for part in parts:
        kept.append(part)
        if sum(map(len, kept)) >= batch:
            joined = np.concatenate(kept)
            yield joined[:batch]
            kept = [joined[batch:]]
    if any(map(len, kept)):
        yield np.concatenate(kept)


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise Error(f"cannot read {path}: {error}") from error


def _image_header(path: Path, file: IO[bytes]) -> tuple[int, ...]:
    """The shape that an .npy of images begins with."""
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(file)
    if dtype != np.uint8 or len(shape) != 4 or fortran:
        raise Error(f"{path}: images must be uint8 [N, H, W, C], got {dtype} {list(shape)}")
    return tuple(int(n) for n in shape)


def _from_folder(folder: Path, scale: float | None) -> Images:
    """Labels are the names of the images' folders where all of those are numbers; scales those of the folders at the top."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and is_file(p))
    if not files:
        hint = f": for IDX files name the split, {folder}:test or {folder}:train" if any(folder.glob("*-idx3-ubyte*")) else ""
        raise Error(f"{folder} holds no images ({', '.join(SUFFIXES)}){hint or ', nor a job'}")
    scales = _scales(folder, files)
    files = [files[row] for row in _rows(folder, scales, len(files), scale)]
    numbered = all(p.parent.name.isdecimal() and p.parent != folder for p in files)
    labels = np.array([int(p.parent.name) for p in files]) if numbered else None

    def read(batch: int) -> Iterator[NDArray[np.uint8]]:
        first = read_image(files[0])
        for start in range(0, len(files), batch):
            yield np.stack([read_image(file, first.shape) for file in files[start : start + batch]])

    return Images(str(folder), len(files), labels, read)


def _scales(folder: Path, files: list[Path]) -> NDArray[np.float32] | None:
    """Those of images in folders scale-S, as a job's export as PNG has them; None where there are no such folders."""
    names = [re.fullmatch(r"scale-(\d+(?:\.\d+)?(?:e[-+]?\d+)?)", file.relative_to(folder).parts[0]) for file in files]
    scales = [float(name[1]) for name in names if name is not None]
    if not scales:
        return None
    if len(scales) < len(files):
        stray = files[names.index(None)]
        raise Error(f"{folder} mixes images in scale-S folders with others, such as {stray}: keep one kind")
    return np.array(scales, np.float32)
