"""The Frechet distance against closed forms, scipy and torchmetrics, and its bootstrap against real repetition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torchmetrics.image.fid import FrechetInceptionDistance

from fastcfg.errors import Error
from fastcfg.metrics import Moments, frechet_distance, frechet_error, moments


def exactly(mean: np.ndarray, covariance: np.ndarray, n: int = 4000) -> np.ndarray:
    """Points whose sample mean and unbiased sample covariance are exactly these."""
    raw = np.random.default_rng(0).standard_normal((n, len(mean)))
    raw -= raw.mean(axis=0)
    whitened = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False))).T
    return whitened @ np.linalg.cholesky(covariance).T + mean


def correlated(seed: int, n: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, width)) @ rng.standard_normal((width, width)) + rng.standard_normal(width)


def test_known_gaussians() -> None:
    """Diagonal covariances commute: the distance is |mu|^2 + sum (sd_a - sd_b)^2."""
    a = exactly(np.zeros(3), np.diag([1.0, 4.0, 9.0]))
    b = exactly(np.array([1.0, -2.0, 0.5]), np.diag([4.0, 4.0, 1.0]))
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 0.25 + 1 + 0 + 4, rel=1e-9)


def test_covariances_that_do_not_commute() -> None:
    """Against scipy's matrix square root, the textbook formula."""
    a, b = correlated(1, 500, 24), correlated(2, 400, 24)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    difference = a.mean(0) - b.mean(0)
    expected = difference @ difference + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_torchmetrics_agrees() -> None:
    a, b = correlated(3, 600, 64), correlated(4, 800, 64)
    peer = FrechetInceptionDistance(feature=torch.nn.Flatten(), input_img_size=(64, 1, 1), normalize=True).set_dtype(
        torch.float64
    )
    peer.update(torch.from_numpy(a)[..., None, None], real=False)
    peer.update(torch.from_numpy(b)[..., None, None], real=True)
    assert frechet_distance(a, b) == pytest.approx(peer.compute().item(), rel=1e-6)


def test_fewer_samples_than_features() -> None:
    """Singular covariances: tr (C_a C_b)^(1/2) is the nuclear norm of the product of the centred data, rank by rank."""
    a, b = correlated(5, 12, 40), correlated(6, 30, 40)
    one, other = (a - a.mean(0)) / np.sqrt(11), (b - b.mean(0)) / np.sqrt(29)
    cross = np.linalg.svd(one @ other.T, compute_uv=False).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + (one**2).sum() + (other**2).sum() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9 * np.trace(np.cov(a, rowvar=False)))


def test_constant_features_count_for_nothing() -> None:
    """A classifier's dead units: no variance, and no square root of rounding."""
    a, b = correlated(7, 300, 8), correlated(8, 300, 8)
    padded = [np.hstack([x, np.full((300, 56), 3.0)]) for x in (a, b)]
    assert frechet_distance(*padded) == pytest.approx(frechet_distance(a, b), rel=1e-10)


def test_moments_stand_for_their_features() -> None:
    a, b = correlated(9, 200, 6), correlated(10, 200, 6)
    fitted = moments(b)
    np.testing.assert_allclose(fitted.sigma, np.cov(b, rowvar=False))
    assert frechet_distance(a, fitted) == frechet_distance(a, b) == frechet_distance(moments(a), b)
    assert moments(a[:, :1]).sigma.shape == (1, 1)


@pytest.mark.parametrize(("n", "width"), [(300, 8), (20, 30)])
def test_bootstrap_follows_its_definition(n: int, width: int) -> None:
    """The standard deviation of the distance of resampled rows, computed the long way from the same draws."""
    a, b = correlated(11, n, width), correlated(12, 400, width)
    rng = np.random.RandomState(7)
    distances = [frechet_distance(a[rng.randint(n, size=n)], b) for _ in range(20)]
    assert frechet_error(a, b, resamples=20, seed=7) == pytest.approx(np.std(distances, ddof=1), rel=1e-6)


def test_bootstrap_error_is_that_of_repetition() -> None:
    """Sets that differ: the spread over fresh draws of as many samples."""
    rng = np.random.default_rng(13)
    reference = Moments(np.zeros(8), np.eye(8))
    draws = [rng.standard_normal((400, 8)) * 1.3 + 0.5 for _ in range(150)]
    spread = np.std([frechet_distance(x, reference) for x in draws])
    errors = [frechet_error(x, reference, resamples=50) for x in draws[:20]]
    assert np.mean(errors) == pytest.approx(spread, rel=0.2)


BAD = {
    "one row": (np.zeros((1, 3)), "too few"),
    "a vector": (np.zeros(3), r"\[N, D\], got shape \[3\]"),
    "no features": (np.zeros((3, 0)), r"\[N, D\], got shape \[3, 0\]"),
    "NaN": (np.array([[0.0, 0, 0], [np.nan, 0, 0]]), "finite: row 1"),
    "infinity": (np.full((2, 3), np.inf), "finite: row 0"),
    "text": ([["a"]], "numbers"),
    "ragged": ([[1.0], [1.0, 2.0]], "numbers"),
    "another width": (np.zeros((4, 2)), "one width, got 2 and 3"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_features_are_refused(case: str) -> None:
    bad, message = BAD[case]
    for measure in (frechet_distance, frechet_error):
        with pytest.raises(Error, match=message):
            measure(bad, np.eye(3))


@pytest.mark.parametrize(
    ("mu", "sigma", "message"),
    [
        (np.zeros(3), np.zeros((3, 2)), r"\[3\] and \[3, 2\]"),
        (np.zeros((1, 3)), np.eye(3), r"\[1, 3\] and \[3, 3\]"),
        (np.full(3, np.nan), np.eye(3), "NaN"),
    ],
)
def test_bad_statistics_are_refused(mu: np.ndarray, sigma: np.ndarray, message: str) -> None:
    with pytest.raises(Error, match=message):
        Moments(mu, sigma)


def test_a_bootstrap_of_one_is_refused() -> None:
    with pytest.raises(Error, match="at least 2 resamples, got 1"):
        frechet_error(np.eye(3), np.eye(3), resamples=1)
