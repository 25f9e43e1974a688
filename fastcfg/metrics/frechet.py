"""Distances between sets of features, float arrays [N, D]."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastcfg.errors import Error, missing_extra


def frechet_distance(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of the Gaussians fitted to features a [N, D] and b [M, D].

    Heusel et al. 1706.08500, with unbiased covariances. Computed in float64; needs the extra `metrics` (scipy).
    """
    try:
        from scipy import linalg
    except ImportError as error:
        raise missing_extra("metrics", "the Frechet distance", error) from error
    a, b = _features(a), _features(b)
    if a.shape[1] != b.shape[1]:
        raise Error(f"features must have one width, got {a.shape[1]} and {b.shape[1]}")
    mean = a.mean(axis=0) - b.mean(axis=0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # tr (C_a C_b)^(1/2) from the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is symmetric: no complex square root.
    root_a = _symmetric_root(np.atleast_2d(cov_a))
    eigenvalues = linalg.eigvalsh(root_a @ np.atleast_2d(cov_b) @ root_a)
    cross = np.sqrt(np.maximum(eigenvalues, 0.0)).sum()
    return float(mean @ mean + np.trace(np.atleast_2d(cov_a)) + np.trace(np.atleast_2d(cov_b)) - 2 * cross)


def within_class_distance(features: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """Mean Euclidean distance between two different rows of `features` [N, D] with one label, averaged over labels [N]."""
    features = _features(features)
    means = []
    for label in np.unique(labels):
        own = features[labels == label]
        if len(own) > 1:
            squares = (own**2).sum(axis=1)
            distances = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * own @ own.T, 0.0))
            means.append(distances[np.triu_indices(len(own), k=1)].mean())
    if not means:
        raise Error("variety needs a label with at least two samples")
    return float(np.mean(means))


def _symmetric_root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(matrix)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return root.astype(np.float64)


def _features(x: NDArray[np.floating]) -> NDArray[np.float64]:
    features: NDArray[np.float64] = np.asarray(x, dtype=np.float64)
    if features.ndim != 2 or len(features) < 2 or not np.all(np.isfinite(features)):
        raise Error(f"features must be finite numbers [N, D] with N of at least 2, got shape {list(features.shape)}")
    return features
