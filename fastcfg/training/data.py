"""Class-conditional data sets as arrays in memory: IDX files, an npz, or a folder of images by class."""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastcfg.errors import Error
from fastcfg.files import reading
from fastcfg.images import read_image

MOST_CLASSES = 1_000_000  # where no names say how many there are: one damaged label is not to fill the memory
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FASHION_MNIST_LABELS = (
    "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot",
)  # fmt: skip


@dataclass(frozen=True)
class ImageData:
    """images: uint8 [N, C, H, W], H = W. labels: int64 [N] in 0..len(label_names)-1."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    label_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.shape[2] != self.images.shape[3] or 0 in self.images.shape[1:]:
            raise Error(f"images must be square, [N, C, H, W], got shape {list(self.images.shape)}")
        if len(self.images) != len(self.labels) or not len(self.images):
            raise Error(f"need one label an image: {len(self.images)} images, {len(self.labels)} labels")
        if self.labels.min() < 0 or self.labels.max() >= len(self.label_names):
            raise Error(f"labels must lie in 0..{len(self.label_names) - 1}, got {self.labels.min()} to {self.labels.max()}")

    @property
    def num_classes(self) -> int:
        return len(self.label_names)

    @property
    def empty_classes(self) -> tuple[str, ...]:
        """The names of those without an image."""
        counts = np.bincount(self.labels, minlength=self.num_classes)
        return tuple(self.label_names[label] for label in np.flatnonzero(counts == 0))

    def sha256(self) -> str:
        """Of images, labels and the number of classes; the first 16 digits, which tell one data set from another."""
        digest = hashlib.sha256(repr((self.images.shape, self.num_classes)).encode())
        for array in (self.labels, self.images):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]


def hold_out(data: ImageData, count: int, seed: int) -> tuple[ImageData, ImageData]:
    """(the rest, `count` images drawn by `seed`)."""
    if count >= len(data.images):
        raise Error(f"cannot hold {count} images out of {len(data.images)}: some must be left to train on")
    order = np.random.default_rng(seed).permutation(len(data.images))
    rest, held = (ImageData(data.images[part], data.labels[part], data.label_names) for part in (order[count:], order[:count]))
    return rest, held


def load_data(path: str | Path, split: str = "train") -> ImageData:
    """Reads `path`: a folder with IDX files (`train-images-idx3-ubyte[.gz]` ...), an npz, or a folder of class folders.

    npz: `images` or `arr_0` uint8 [N, H, W, C] or [N, H, W], `labels` or `arr_1` [N], optional `label_names`.
    split: "train" or "test"; only IDX folders tell them apart. Raises Error for what is missing, damaged or may not be read.
    """
    path = Path(path)
    try:
        return _load(path, split)
    except OSError as error:  # a folder that may not be searched, a name that is too long
        raise Error(f"cannot read {error.filename or path}: {error.strerror or error}") from error


def _load(path: Path, split: str) -> ImageData:
    if path.is_file() and path.suffix == ".npz":
        return _load_npz(path)
    if not path.is_dir():
        raise Error(f"no data at {path}: want a folder of IDX files, a folder of class folders, or an .npz")
    if any(path.glob("*-idx3-ubyte*")):
        return _load_idx(path, split)
    return _load_folder(path)


def _read_idx(path: Path, rank: int) -> NDArray[np.uint8]:
    """One IDX file of bytes (LeCun's format: two zero bytes, type 8, rank, big-endian sizes, data), gzipped or not."""
    with reading(str(path)):
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    start = 4 + 4 * rank
    if data[:4] != bytes((0, 0, 8, rank)) or len(data) < start:
        raise Error(f"{path} is not an IDX file of unsigned bytes of rank {rank}")
    shape = struct.unpack(f">{rank}I", data[4:start])
    values = np.frombuffer(data, np.uint8, offset=start)
    if values.size != math.prod(shape):
        raise Error(f"{path} is cut short: its header says {shape}, but {values.size} values follow")
    if not values.size:
        raise Error(f"{path} holds no values: its header says {shape}")
    return values.reshape(shape).copy()  # the buffer of the file is read-only


def _load_idx(folder: Path, split: str) -> ImageData:
    prefix = {"train": "train", "test": "t10k"}.get(split)
    if prefix is None:
        raise Error(f"split must be 'train' or 'test', got {split!r}")
    files = {kind: sorted(folder.glob(f"{prefix}-{kind}-ubyte*")) for kind in ("images-idx3", "labels-idx1")}
    for kind, found in files.items():
        if not found:
            raise Error(f"{folder} has no {prefix}-{kind}-ubyte or {prefix}-{kind}-ubyte.gz")
    images, labels = _read_idx(files["images-idx3"][0], 3), _read_idx(files["labels-idx1"][0], 1)
    names = tuple(str(i) for i in range(int(labels.max()) + 1))
    if "fashion" in folder.name.lower() and len(names) == len(FASHION_MNIST_LABELS):
        names = FASHION_MNIST_LABELS
    return ImageData(images[:, None], labels.astype(np.int64), names)


def _load_npz(path: Path) -> ImageData:
    with reading(str(path)), open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise Error(f"{path} is not an npz: no zip archive, or one that is cut short")
        file.seek(0)
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: np.asarray(archive[name]) for name in archive.files}  # what is no array comes as bytes
    images, labels = arrays.get("images", arrays.get("arr_0")), arrays.get("labels", arrays.get("arr_1"))
    if images is None or labels is None:
        raise Error(f"{path} must hold images (or arr_0) and labels (or arr_1), but holds {sorted(arrays)}")
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise Error(f"{path}: images must be uint8 [N, H, W, C] or [N, H, W], got {images.dtype} {list(images.shape)}")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or not len(labels):
        raise Error(f"{path}: labels must be whole numbers [N], got {labels.dtype} {list(labels.shape)}")
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    names = arrays.get("label_names", np.arange(min(int(labels.max()) + 1, MOST_CLASSES)))
    if names.ndim != 1:
        raise Error(f"{path}: label_names must be a list, got shape {list(names.shape)}")
    return ImageData(np.ascontiguousarray(images), labels.astype(np.int64), tuple(str(n) for n in names))


def _load_folder(folder: Path) -> ImageData:
    """Class folders, sorted by name; every image must have the same size, and be grey where the first one is."""
    classes = sorted(p for p in folder.iterdir() if p.is_dir())
    if not classes:
        raise Error(f"{folder} holds neither IDX files nor class folders of images")
    images: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    shape: tuple[int, ...] | None = None
    for label, name in enumerate(classes):
        for file in sorted(p for p in name.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES):
            pixels = read_image(file, shape)
            shape = pixels.shape
            images.append(pixels.transpose(2, 0, 1))
            labels.append(label)
    if not images:
        raise Error(f"{folder}: no images ({', '.join(IMAGE_SUFFIXES)}) in its class folders")
    return ImageData(np.ascontiguousarray(np.stack(images)), np.asarray(labels, np.int64), tuple(p.name for p in classes))
