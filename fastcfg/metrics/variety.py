"""Variety: how far apart samples of one class are."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastcfg.errors import Error
from fastcfg.metrics.arrays import as_features


def within_class_distance(features: ArrayLike, labels: NDArray[np.integer]) -> float:
    """Mean Euclidean distance between two different rows of `features` [N, D] with one label, averaged over labels [N]."""
    x = as_features(features)
    if np.shape(labels) != x.shape[:1]:
        raise Error(f"variety needs one label a row: labels {list(np.shape(labels))} for features {list(x.shape)}")
    means = []
    for label in np.unique(labels):
        own = x[labels == label]
        if len(own) > 1:
            squares = (own**2).sum(axis=1)
            distances = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * own @ own.T, 0.0))
            means.append(distances[np.triu_indices(len(own), k=1)].mean())
    if not means:
        raise Error("variety needs a label with at least two samples")
    return float(np.mean(means))
