"""Precision, recall, density and coverage: who lies in the other set's neighbourhoods.

Precision and recall: Kynkaanniemi et al. 1904.06991, k = 3. Density and coverage: Naeem et al. 2002.09797, k = 5. The manifold
of a set is the union of balls around its points, each reaching to the k-th nearest neighbour in the set, its surface included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastcfg.errors import Error
from fastcfg.metrics.arrays import Estimate, feature_pair, mean_estimate

K_PRECISION, K_DENSITY = 3, 5
BLOCK = 2**24  # distances held at a time: 128 MiB


class Manifold(NamedTuple):
    """precision: share of samples in the reference's manifold. recall: share of the reference in the samples' manifold.
    density: mean number of reference balls that hold a sample, over k; may pass 1. coverage: share of reference balls with a
    sample in them. Errors are over the rows that the mean runs over, the balls held fixed.
    """

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def manifold(samples: ArrayLike, reference: ArrayLike, k_precision: int = K_PRECISION, k_density: int = K_DENSITY) -> Manifold:
    """All four for samples [N, D] and reference [M, D], N and M above both k.

    N M + N^2 + M^2 distances, in float64 and by blocks of rows: 50,000 rows a side fit in memory.
    """
    if min(k_precision, k_density) < 1:
        raise Error(f"k must be at least 1, got {k_precision} and {k_density}")
    x, y = feature_pair(samples, reference, least=max(k_precision, k_density) + 1)
    own = neighbour_distances(x, [k_precision])[0]
    near, far = neighbour_distances(y, [k_precision, k_density])
    inside, count = np.zeros(len(x), bool), np.zeros(len(x))
    recalled, covered = np.zeros(len(y), bool), np.zeros(len(y), bool)
    for rows, squares in _blocks(x, y):
        inside[rows] = (squares <= near).any(axis=1)
        held = squares <= far
        count[rows] = held.sum(axis=1)
        covered |= held.any(axis=0)
        recalled |= (squares <= own[rows, None]).any(axis=0)
    return Manifold(*(mean_estimate(v.astype(np.float64)) for v in (inside, recalled, count / k_density, covered)))


def neighbour_distances(x: NDArray[np.float64], ks: Sequence[int]) -> NDArray[np.float64]:
    """Squared distances from each row of x [N, D] to its k-th nearest other row, [len(ks), N]."""
    radii = np.empty((len(ks), len(x)))
    for rows, squares in _blocks(x, x):
        squares[np.arange(len(squares)), np.arange(rows.start, rows.stop)] = -1.0  # itself, first whatever its twins
        radii[:, rows] = np.partition(squares, ks, axis=1)[:, ks].T
    return radii


def _blocks(x: NDArray[np.float64], y: NDArray[np.float64]) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """(rows of x, their squared distances [rows, M] to all of y), in order."""
    squares_y = (y**2).sum(axis=1)
    step = max(1, BLOCK // len(y))
    for start in range(0, len(x), step):
        part = x[start : start + step]
        squares = (part**2).sum(axis=1)[:, None] + squares_y - 2.0 * (part @ y.T)
        yield slice(start, start + len(part)), np.maximum(squares, 0.0, out=squares)
