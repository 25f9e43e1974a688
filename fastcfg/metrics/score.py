"""Inception score: how sure a classifier is of each sample, and how many classes it sees (Salimans et al. 1606.03498)."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastcfg.errors import Error
from fastcfg.metrics.arrays import SEED, generator, scipy

SPLITS = 10


def inception_score(logits: ArrayLike, splits: int = SPLITS, seed: int = SEED) -> float:
    """exp(mean KL(p(y|x) || p(y))) of each of `splits` equal parts, averaged over them; 1 to the number of classes.

    logits: [N, K], up to a constant a row, so np.log(p) serves for probabilities p. Rows are shuffled by `seed` first, since
    samples often come in the order of their labels. The parts and the draw are torch-fidelity's.
    """
    return float(np.mean([_score(p, np.ones((1, len(p))))[0] for p in _parts(logits, splits, seed)]))


def inception_score_error(logits: ArrayLike, splits: int = SPLITS, resamples: int = 100, seed: int = SEED) -> float:
    """Bootstrap standard error of `inception_score`: rows are resampled within their part."""
    if resamples < 2:
        raise Error(f"a bootstrap needs at least 2 resamples, got {resamples}")
    rng = generator(seed)
    parts = _parts(logits, splits, seed)
    scores = [_score(p, rng.multinomial(len(p), np.full(len(p), 1 / len(p)), size=resamples)) for p in parts]
    return float(np.std(np.mean(scores, axis=0), ddof=1))


def _score(p: NDArray[np.float64], counts: NDArray[np.integer] | NDArray[np.float64]) -> NDArray[np.float64]:
    """The score of p [n, K] for each row of `counts` [B, n], which says how often each sample is taken."""
    from scipy.special import entr

    shares = counts / len(p)
    score: NDArray[np.float64] = np.exp(entr(shares @ p).sum(axis=1) - shares @ entr(p).sum(axis=1))
    return score


def _parts(logits: ArrayLike, splits: int, seed: int) -> list[NDArray[np.float64]]:
    """Probabilities of the parts."""
    special = scipy("special", "the inception score")
    x = np.asarray(logits, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] < 2:
        raise Error(f"logits must be [N, K] with two classes or more, got shape {list(x.shape)}")
    if splits < 1 or len(x) < splits:
        raise Error(f"too few samples: {splits} splits need at least as many rows of logits, got {len(x)}")
    if np.isnan(x).any() or np.isinf(x.max(axis=1)).any():
        raise Error("logits must be numbers, with at least one a row above -inf: got NaN or infinity")
    p = special.softmax(x[generator(seed).permutation(len(x))], axis=1)
    edges = [i * len(x) // splits for i in range(splits + 1)]
    return [p[a:b] for a, b in pairwise(edges)]
