"""Distances against closed forms, and the shipped judge against real images."""

from __future__ import annotations

import numpy as np
import pytest

from fastcfg.errors import Error
from fastcfg.metrics.frechet import frechet_distance, within_class_distance


def exactly(mean: np.ndarray, covariance: np.ndarray, n: int = 4000) -> np.ndarray:
    """Points whose sample mean and unbiased sample covariance are exactly these."""
    raw = np.random.default_rng(0).standard_normal((n, len(mean)))
    raw -= raw.mean(axis=0)
    whitened = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False))).T
    return whitened @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_known_gaussians() -> None:
    """Diagonal covariances commute: the distance is |mu|^2 + sum (sd_a - sd_b)^2."""
    a = exactly(np.zeros(3), np.diag([1.0, 4.0, 9.0]))
    b = exactly(np.array([1.0, -2.0, 0.5]), np.diag([4.0, 4.0, 1.0]))
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 0.25 + 1 + 0 + 4, rel=1e-9)


def test_frechet_distance_of_covariances_that_do_not_commute() -> None:
    """Against scipy's matrix square root, the textbook formula."""
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(1)
    left, right = rng.standard_normal((2, 5, 5))
    cov_a, cov_b = left @ left.T + np.eye(5), right @ right.T + np.eye(5)
    a, b = exactly(np.zeros(5), cov_a), exactly(np.ones(5), cov_b)
    expected = 5 + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_within_class_distance_by_hand() -> None:
    features = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    labels = np.array([0, 0, 1, 1, 1])
    assert within_class_distance(features, labels) == pytest.approx((5 + (1 + 1 + 2**0.5) / 3) / 2)


@pytest.mark.parametrize("bad", [np.zeros(3), np.zeros((1, 3)), np.full((4, 2), np.nan)])
def test_features_that_are_none_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(Error, match="features"):
        frechet_distance(bad, np.zeros((4, 2)))
