"""Precision, recall, density and coverage against the prdc package, and by hand where points are alike."""

from __future__ import annotations

import numpy as np
import pytest
from prdc import compute_prdc

from fastcfg.errors import Error
from fastcfg.metrics import manifold, neighbours
from fastcfg.metrics.neighbours import neighbour_distances


def clouds(n: int, m: int, width: int = 12) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    return 0.8 * rng.standard_normal((n, width)) + 0.3, rng.standard_normal((m, width))


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block", [None, 1, 5000])
def test_prdc_agrees(k: int, block: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For any size of block: all distances at once, one row at a time, some rows with a shorter last block."""
    if block is not None:
        monkeypatch.setattr(neighbours, "BLOCK", block)
    samples, reference = clouds(207, 161)
    expected = compute_prdc(reference, samples, nearest_k=k)
    for name, estimate in manifold(samples, reference, k, k)._asdict().items():
        assert estimate.value == pytest.approx(expected[name], rel=1e-12), name


def test_each_figure_has_its_own_k() -> None:
    samples, reference = clouds(100, 120)
    three, five = compute_prdc(reference, samples, 3), compute_prdc(reference, samples, 5)
    found = manifold(samples, reference)
    assert (found.precision.value, found.recall.value) == pytest.approx((three["precision"], three["recall"]))
    assert (found.density.value, found.coverage.value) == pytest.approx((five["density"], five["coverage"]))
    assert three["recall"] != five["recall"]
    assert three["coverage"] != five["coverage"]


def test_by_hand_on_a_line() -> None:
    """k = 1, and several points on the surface of a ball, which counts as in it."""
    reference, samples = np.array([[0.0], [2.0], [10.0]]), np.array([[-2.0], [-1.0], [18.0], [18.0]])
    np.testing.assert_allclose(neighbour_distances(reference, [1])[0], [4, 4, 64])
    np.testing.assert_allclose(neighbour_distances(samples, [1])[0], [1, 1, 0, 0])
    found = manifold(samples, reference, 1, 1)
    assert found.precision.value == 1  # -2 is 2 from 0, and 18 is 8 from 10
    assert found.recall.value == pytest.approx(1 / 3)  # 0 is 1 from -1
    assert found.density.value == 1  # each sample is in one ball
    assert found.coverage.value == pytest.approx(2 / 3)  # no sample is within 2 of 2


def test_twins_are_at_no_negative_distance() -> None:
    twins = np.repeat(100 * clouds(60, 10)[0], 2, axis=0)
    assert (neighbour_distances(twins, [1]) >= 0).all()


def test_a_set_against_itself() -> None:
    x, _ = clouds(80, 10)
    found = manifold(x, x)
    assert (found.precision.value, found.recall.value, found.coverage.value) == (1, 1, 1)
    assert found.density.value == pytest.approx(1.2)  # a point lies in its own ball and in those of 5 others, on average


def test_errors_are_those_of_a_mean() -> None:
    samples, reference = clouds(150, 200)
    found = manifold(samples, reference)
    for estimate, n in ((found.precision, 150), (found.recall, 200), (found.coverage, 200)):
        assert estimate.error == pytest.approx(np.sqrt(estimate.value * (1 - estimate.value) / n))


@pytest.mark.parametrize(
    ("n", "m", "k", "message"),
    [(5, 50, 5, "at least 6 rows of features, got 5"), (50, 3, 3, "at least 6"), (9, 9, 0, "k must be at least 1")],
)
def test_too_few_are_refused(n: int, m: int, k: int, message: str) -> None:
    with pytest.raises(Error, match=message):
        manifold(*clouds(n, m), k_precision=k)
