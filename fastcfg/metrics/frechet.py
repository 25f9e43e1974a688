"""Frechet distance between the Gaussians fitted to two sets of features (Heusel et al. 1706.08500)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastcfg.errors import Error
from fastcfg.metrics.arrays import SEED, as_features, check_widths, generator, scipy

PURPOSE = "the Frechet distance"  # of scipy


@dataclass(frozen=True)
class Moments:
    """mu float64 [D] and sigma float64 [D, D], the unbiased covariance: what ADM's statistics files hold."""

    mu: NDArray[np.float64]
    sigma: NDArray[np.float64]

    def __post_init__(self) -> None:
        mu, sigma = np.shape(self.mu), np.shape(self.sigma)
        if len(mu) != 1 or sigma != (*mu, *mu):
            raise Error(f"statistics must be mu [D] and sigma [D, D], got shapes {list(mu)} and {list(sigma)}")
        if not (np.isfinite(self.mu).all() and np.isfinite(self.sigma).all()):
            raise Error("statistics must be finite: mu or sigma holds NaN or infinity")


def moments(features: ArrayLike) -> Moments:
    """Mean and unbiased covariance of features [N, D], N >= 2."""
    x = as_features(features)
    return Moments(x.mean(axis=0), np.atleast_2d(np.cov(x, rowvar=False)))


def frechet_distance(a: ArrayLike | Moments, b: ArrayLike | Moments) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features [N, D], [M, D] or their `Moments`.

    Computed in float64; covariances may be singular (N <= D). Needs the extra `metrics` (scipy).
    """
    linalg = scipy("linalg", PURPOSE)
    a, b = _moments(a), _moments(b)
    check_widths(len(a.mu), len(b.mu))
    # tr (C_a C_b)^(1/2) is the sum of the singular values of C_a^(1/2) C_b^(1/2). The square roots of the eigenvalues of the
    # product, the usual way, would turn rounding of 1e-16 in singular directions into 1e-8 each.
    cross = linalg.svdvals(_root(a.sigma) @ _root(b.sigma)).sum()
    difference = a.mu - b.mu
    return float(difference @ difference + np.trace(a.sigma) + np.trace(b.sigma) - 2 * cross)


def frechet_error(a: ArrayLike, b: ArrayLike | Moments, resamples: int = 100, seed: int = SEED) -> float:
    """Bootstrap standard error of `frechet_distance(a, b)` over the rows of a [N, D], with b held fixed.

    A resample costs min(N, D)^2 max(N, D) operations.
    """
    linalg = scipy("linalg", PURPOSE)
    x, other = as_features(a), _moments(b)
    n, width = x.shape
    check_widths(width, len(other.mu))
    if resamples < 2:
        raise Error(f"a bootstrap needs at least 2 resamples, got {resamples}")
    centre = x.mean(axis=0)
    x, offset = x - centre, centre - other.mu
    squares = (x**2).sum(axis=1)
    rooted = x @ _root(other.sigma)
    rng = generator(seed)
    distances = []
    for _ in range(resamples):
        counts = np.bincount(rng.randint(n, size=n), minlength=n).astype(np.float64)
        mean = counts @ x / n
        rows = np.sqrt(counts)[:, None] * (rooted - counts @ rooted / n)
        gram = rows.T @ rows if n >= width else rows @ rows.T
        cross = np.sqrt(np.maximum(linalg.eigvalsh(gram), 0) / (n - 1)).sum()
        trace = (counts @ squares - n * (mean @ mean)) / (n - 1)
        distances.append(((offset + mean) ** 2).sum() + trace - 2 * cross)  # tr C_b is the same in all
    return float(np.std(distances, ddof=1))


def _moments(x: ArrayLike | Moments) -> Moments:
    return x if isinstance(x, Moments) else moments(x)


def _root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The symmetric square root of a covariance; eigenvalues that rounding cannot tell from zero count as zero."""
    values, vectors = np.linalg.eigh(matrix)
    values[values <= len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)] = 0.0
    root: NDArray[np.float64] = (vectors * np.sqrt(values)) @ vectors.T
    return root
