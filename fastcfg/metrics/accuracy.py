"""Class accuracy: does a classifier see in a sample the label that was asked for?"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from fastcfg.errors import Error
from fastcfg.metrics.arrays import Estimate, mean_estimate


def class_accuracy(logits: ArrayLike, labels: ArrayLike) -> Estimate:
    """Share of rows of logits [N, K] whose largest entry is that of their label, labels whole numbers [N] in 0..K-1."""
    x, y = np.asarray(logits), np.asarray(labels)
    if x.ndim != 2 or y.shape != x.shape[:1] or not len(y) or not np.issubdtype(y.dtype, np.integer):
        raise Error(
            f"class accuracy needs logits [N, K] and whole labels [N], got {list(x.shape)} and {y.dtype} {list(y.shape)}"
        )
    if np.isnan(x).any():
        raise Error("logits must be numbers, got NaN")
    if y.min() < 0 or y.max() >= x.shape[1]:
        raise Error(f"labels must be classes of the network, 0..{x.shape[1] - 1}, got {y.min()} to {y.max()}")
    return mean_estimate((x.argmax(axis=1) == y).astype(np.float64))
