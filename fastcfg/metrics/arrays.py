"""What metrics take and give: feature arrays that were checked, and estimates with their standard error."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastcfg.errors import Error, missing_extra

CONFIDENCE = 1.96  # standard errors on either side: 95 % of a normal distribution
SEED = 2020  # torch-fidelity's, with whose draws those of this seed agree


class Estimate(NamedTuple):
    """A figure and the standard deviation that it has over other draws of as many samples (docs/metrics.md says of what)."""

    value: float
    error: float

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, by the normal approximation."""
        return self.value - CONFIDENCE * self.error, self.value + CONFIDENCE * self.error


def generator(seed: int) -> np.random.RandomState:
    """A generator whose stream NumPy has frozen, so that the figures of a seed stay what they are."""
    if not 0 <= seed < 2**32:
        raise Error(f"the seed of a metric must be 0 to 2^32 - 1, got {seed}")
    return np.random.RandomState(seed)


def mean_estimate(rows: NDArray[np.floating]) -> Estimate:
    """The mean of one value a row. Its bootstrap error needs no resampling: it is the rows' standard deviation / sqrt(N)."""
    return Estimate(float(rows.mean()), float(rows.std() / np.sqrt(len(rows))))


def as_features(x: ArrayLike, least: int = 2) -> NDArray[np.float64]:
    """`x` as float64 [N, D], N at least `least`, every value finite; raises Error for anything else."""
    try:
        features: NDArray[np.float64] = np.asarray(x, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise Error(f"features must be numbers [N, D]: {error}") from error
    if features.ndim != 2 or not features.shape[1]:
        raise Error(f"features must be [N, D], got shape {list(features.shape)}")
    if len(features) < least:
        raise Error(f"too few samples: need at least {least} rows of features, got {len(features)}")
    if not np.isfinite(features).all():
        raise Error(f"features must be finite: row {int(np.argmin(np.isfinite(features).all(axis=1)))} is not")
    return features


def feature_pair(a: ArrayLike, b: ArrayLike, least: int = 2) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two sets of features of one width."""
    one, other = as_features(a, least), as_features(b, least)
    check_widths(one.shape[1], other.shape[1])
    return one, other


def check_widths(a: int, b: int) -> None:
    if a != b:
        raise Error(f"features must have one width, got {a} and {b}: both sets must come from one network")


def scipy(part: str, purpose: str) -> ModuleType:
    """scipy's module `part`. Raises Error where the extra `metrics` is missing."""
    try:
        return import_module(f"scipy.{part}")
    except ImportError as error:
        raise missing_extra("metrics", purpose, error) from error
