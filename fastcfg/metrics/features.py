"""From images to what is compared: features of samples, and statistics of a reference, which are kept."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcfg.engines.choice import memory_path
from fastcfg.errors import Error
from fastcfg.files import is_file, replacing
from fastcfg.metrics.frechet import Moments, moments
from fastcfg.metrics.networks import FeatureNetwork
from fastcfg.metrics.sources import Images, from_arrays, open_images

OnBatch = Callable[[int], object]


@dataclass(frozen=True)
class Features:
    """Of N images: values float32 [N, D]; logits float32 [N, K] or None; labels int64 [N] or None.

    judges_labels: whether logit k is that of label k.
    """

    values: NDArray[np.float32]
    logits: NDArray[np.float32] | None = None
    labels: NDArray[np.int64] | None = None
    judges_labels: bool = False

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class Reference:
    """What samples are compared with. features: float32 [M, D], None where only statistics are known. count: the images that
    the moments are of, None where it is not known; these need not be those of the features.
    """

    moments: Moments
    features: NDArray[np.float32] | None = None
    count: int | None = None


@torch.no_grad()
def extract(images: Images, network: FeatureNetwork, on_batch: OnBatch | None = None) -> Features:
    """The features of all images, a batch at a time. on_batch(n) is called after each with the images it had."""
    values, logits = [], []
    for pixels in images.read(network.batch):
        batch = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).to(network.device)
        own, scores = network.forward(batch)
        _check_rows(f"{network.name} must give features [n, D]", own, len(batch))
        if scores is not None:
            _check_rows(f"{network.name} must give logits [n, K]", scores, len(batch))
        values.append(own.float().cpu().numpy())
        logits += [] if scores is None else [scores.float().cpu().numpy()]
        if on_batch is not None:
            on_batch(len(batch))
    if not values:
        raise Error(f"{images.name} has no images")
    joined = np.concatenate(logits) if logits else None
    return Features(np.concatenate(values), joined, images.labels, network.judges_labels)


def _check_rows(what: str, rows: Any, count: int) -> None:
    if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) != count:
        got = str(list(rows.shape)) if isinstance(rows, Tensor) else type(rows).__name__
        raise Error(f"{what}, a tensor, for n images, got {got} for {count}")


def preview(images: Images, network: FeatureNetwork) -> Features:
    """What `extract` will give, in shape: the features of the first image stand for all. For checks before the work."""
    first = next(iter(images.read(1)), None)
    if first is None:
        raise Error(f"{images.name} has no images")
    one = extract(from_arrays(first), network)
    values = np.broadcast_to(one.values, (images.count, one.values.shape[1]))
    logits = None if one.logits is None else np.broadcast_to(one.logits, (images.count, one.logits.shape[1]))
    return Features(values, logits, images.labels, network.judges_labels)


def open_reference(where: str | Path, network: FeatureNetwork, on_batch: OnBatch | None = None) -> Reference:
    """A statistics file in ADM's layout (npz with mu and sigma), or images as `open_images` takes them, or both in one npz:
    then the statistics serve the Frechet distance and the images everything else, as in ADM's evaluator.
    """
    path = Path(where)
    statistics = read_statistics(path, network) if path.suffix == ".npz" and is_file(path) else None
    if statistics is not None and (statistics.features is not None or not _has_images(path)):
        return statistics
    reference = reference_of(open_images(where), network, on_batch)
    return reference if statistics is None else Reference(statistics.moments, reference.features, statistics.count)


def reference_of(images: Images, network: FeatureNetwork, on_batch: OnBatch | None = None) -> Reference:
    """The statistics of `images`, from `cache_path` where they were computed before, else computed and kept there."""
    path = None
    if network.fingerprint:
        with contextlib.suppress(RuntimeError):  # no home folder
            path = cache_path(images, network)
    if path is not None and path.is_file():
        with contextlib.suppress(Error):  # a damaged file is made again
            kept = read_statistics(path, network)
            if kept is not None and kept.features is not None:
                return kept
    features = extract(images, network, on_batch).values
    reference = Reference(moments(features), features, len(features))
    if path is not None:
        with contextlib.suppress(OSError, Error):  # a place that takes no files costs the next run time, no more
            path.parent.mkdir(parents=True, exist_ok=True)
            write_statistics(path, reference, network)
    return reference


def cache_path(images: Images, network: FeatureNetwork) -> Path:
    """$XDG_CACHE_HOME/fastcfg/features/, one file for each pair of pixels and network weights."""
    name = hashlib.sha256(f"{network.fingerprint} {images.sha256()}".encode()).hexdigest()[:32]
    return memory_path().parent / "features" / f"{name}.npz"


def write_statistics(path: Path, reference: Reference, network: FeatureNetwork) -> None:
    """ADM's mu and sigma, and beside them features, count and the network's fingerprint."""
    arrays: dict[str, Any] = {
        "mu": reference.moments.mu,
        "sigma": reference.moments.sigma,
        "network": np.array(network.fingerprint),
    }
    if reference.features is not None:
        arrays["features"] = reference.features
    if reference.count is not None:
        arrays["count"] = np.array(reference.count)
    with replacing(path) as temporary, open(temporary, "wb") as file:  # an open file keeps numpy from adding a suffix
        np.savez(file, **arrays)


def read_statistics(path: Path, network: FeatureNetwork) -> Reference | None:
    """A statistics file, None if `path` holds no mu and sigma. Raises Error where it is damaged or another network's."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not {"mu", "sigma"} <= set(archive.files):
                return None
            own = ("mu", "sigma", "features", "count", "network")
            arrays = {name: archive[name] for name in own if name in archive.files}
        fitted = Moments(arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64))
        count = int(arrays["count"]) if "count" in arrays else None
    except Exception as error:  # zipfile, zlib and numpy meet foreign bytes with exceptions of many kinds
        raise Error(f"cannot read {path}: {error}") from error
    if "network" in arrays and str(arrays["network"]) != network.fingerprint:
        raise Error(f"{path} holds statistics of another network ({arrays['network']}) than {network.name}: give images")
    features = arrays.get("features")
    if features is not None and (features.ndim != 2 or features.shape[1:] != fitted.mu.shape):
        raise Error(f"{path} is damaged: features {list(features.shape)} beside mu {list(fitted.mu.shape)}")
    return Reference(fitted, features, count)


def _has_images(path: Path) -> bool:
    with np.load(path, allow_pickle=False) as archive:
        return bool({"arr_0", "images"} & set(archive.files))
