"""KID against torchmetrics, the sum written out, and repetition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.image.kid import KernelInceptionDistance, poly_mmd

from fastcfg.errors import Error
from fastcfg.metrics import kid, mmd2


def pair(n: int, m: int, width: int = 16, shift: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((n, width)) + shift, rng.standard_normal((m, width))


def test_mmd2_is_its_definition() -> None:
    a, b = pair(5, 7, width=3)
    k = lambda x, y: (x @ y / 3 + 1) ** 3  # noqa: E731
    within = lambda z: np.mean([k(x, y) for i, x in enumerate(z) for j, y in enumerate(z) if i != j])  # noqa: E731
    expected = within(a) + within(b) - 2 * np.mean([k(x, y) for x in a for y in b])
    assert mmd2(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.filterwarnings("ignore:Metric")
def test_torchmetrics_agrees_on_whole_sets() -> None:
    a, b = pair(300, 300, width=64)
    peer = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=1, subset_size=300).set_dtype(torch.float64)
    peer.update(torch.from_numpy(a), real=False)
    peer.update(torch.from_numpy(b), real=True)
    expected = peer.compute()[0].item()
    assert mmd2(a, b) == pytest.approx(expected, rel=1e-6)
    assert kid(a, b, subsets=1, subset_size=300).value == pytest.approx(expected, rel=1e-6)


def test_subsets_are_those_that_torch_fidelity_draws() -> None:
    """Its draw (`RandomState(seed).choice`, samples first), with torchmetrics' MMD of each pair."""
    a, b = pair(120, 90)
    rng = np.random.RandomState(2020)
    values = []
    for _ in range(10):
        one, other = a[rng.choice(120, 40, replace=False)], b[rng.choice(90, 40, replace=False)]
        values.append(poly_mmd(torch.from_numpy(one), torch.from_numpy(other)).item())
    assert kid(a, b, subsets=10, subset_size=40).value == pytest.approx(np.mean(values), rel=1e-6)
    assert kid(a, b, subsets=10, subset_size=40) == kid(a, b, subsets=10, subset_size=40)
    assert kid(a, b, subsets=10, subset_size=40, seed=1).value != pytest.approx(np.mean(values), rel=1e-6)


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.5])
@pytest.mark.parametrize(("m", "size"), [(400, 200), (400, 40), (200, 150)])
def test_error_is_that_of_repetition(shift: float, m: int, size: int) -> None:
    """Over fresh draws of both sets; where they are alike, too, and for reference and subsets of several sizes."""
    rng = np.random.default_rng(1)
    draws = [kid(rng.standard_normal((200, 8)) + shift, rng.standard_normal((m, 8)), 20, size) for _ in range(80)]
    spread = np.std([x.value for x in draws])
    assert np.mean([x.error for x in draws]) == pytest.approx(spread, rel=0.25)


def test_it_is_unbiased() -> None:
    """Two sets of one distribution: zero within the error of the mean, below it about as often as above."""
    rng = np.random.default_rng(2)
    values = np.array([mmd2(*rng.standard_normal((2, 50, 8))) for _ in range(400)])
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(400)
    assert 0.4 < (values < 0).mean() < 0.7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"subset_size": 31}, "2 to 30 samples"),
        ({"subset_size": 1}, "100 of 1"),
        ({"subsets": 0, "subset_size": 10}, "0 of 10"),
        ({}, "got 100 of 1000"),
    ],
)
def test_impossible_subsets_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(Error, match=message):
        kid(*pair(40, 30), **arguments)


def test_two_widths_are_refused() -> None:
    with pytest.raises(Error, match="one width, got 16 and 3"):
        kid(pair(10, 10)[0], np.zeros((10, 3)))
