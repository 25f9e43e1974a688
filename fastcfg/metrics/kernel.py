"""Kernel inception distance: unbiased squared MMD with a cubic kernel (Binkowski et al. 1801.01401)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastcfg.errors import Error
from fastcfg.metrics.arrays import SEED, Estimate, feature_pair, generator

SUBSETS, SUBSET_SIZE = 100, 1000
Kernel = NDArray[np.float64]


def mmd2(a: ArrayLike, b: ArrayLike) -> float:
    """Unbiased estimate of the squared MMD of features [N, D] and [M, D] for k(x, y) = (x.y / D + 1)^3; may be below zero."""
    return _mmd2(*_kernels(*feature_pair(a, b)))


def kid(a: ArrayLike, b: ArrayLike, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE, seed: int = SEED) -> Estimate:
    """The mean of `mmd2` over `subsets` pairs of subsets drawn without replacement; the draw of a seed is torch-fidelity's.

    Its error is over the rows of both: the variance of a U-statistic to second order (Hoeffding), estimated on the subsets,
    and the Monte Carlo error of the mean beside it.
    """
    x, y = feature_pair(a, b)
    smaller = min(len(x), len(y))
    if subsets < 1 or not 2 <= subset_size <= smaller:
        raise Error(f"KID takes subsets of 2 to {smaller} samples, the size of the smaller set, got {subsets} of {subset_size}")
    rng = generator(seed)
    values, variances = np.empty(subsets), np.empty(subsets)
    for i in range(subsets):
        rows = rng.choice(len(x), subset_size, replace=False), rng.choice(len(y), subset_size, replace=False)
        xx, xy, yy = _kernels(x[rows[0]], y[rows[1]])
        values[i] = _mmd2(xx, xy, yy)
        variances[i] = _part(xx, xy, len(x)) + _part(yy, xy.T, len(y)) + 4 * _interaction(xy) / (len(x) * len(y))
    error = np.sqrt(max(variances.mean(), 0.0) + values.var() / subsets)
    return Estimate(float(values.mean()), float(error))


def _kernels(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[Kernel, Kernel, Kernel]:
    """k between x and x, x and y, y and y."""
    x, y = x / np.sqrt(x.shape[1]), y / np.sqrt(x.shape[1])
    xx, xy, yy = x @ x.T + 1.0, x @ y.T + 1.0, y @ y.T + 1.0
    return xx * xx * xx, xy * xy * xy, yy * yy * yy  # numpy's ** is far slower


def _mmd2(xx: Kernel, xy: Kernel, yy: Kernel) -> float:
    return float(_others(xx).mean() + _others(yy).mean() - 2 * xy.mean())


def _part(own: Kernel, cross: Kernel, n: int) -> float:
    """What n rows of one set bring to the variance: 4 var(h) / n + 2 tau / n^2, for h(x) = E k(x, own) - E k(x, other).

    tau is the variance of what a kernel has beside the means of its rows and columns. Means over the few columns of a subset
    add tau / columns to the variance of h, which is taken off.
    """
    half = len(own) // 2
    tau = _interaction(own[:half, half:])  # a block without k(x, x), which is in no mean
    h = _others(own) - cross.mean(axis=1)
    first = h.var(ddof=1) - (tau + _interaction(cross)) / len(own)
    return float(4 * first / n + 2 * tau / n**2)


def _others(kernel: Kernel) -> NDArray[np.float64]:
    """Means over each row, itself left out."""
    means: NDArray[np.float64] = (kernel.sum(axis=1) - kernel.diagonal()) / (len(kernel) - 1)
    return means


def _interaction(kernel: Kernel) -> float:
    return float(kernel.var() - kernel.mean(axis=0).var() - kernel.mean(axis=1).var())
