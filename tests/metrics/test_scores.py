"""Inception score, class accuracy and variety against torchmetrics, torch-fidelity's formula and arithmetic by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.image.inception import InceptionScore

from fastcfg.errors import Error
from fastcfg.metrics import class_accuracy, inception_score, inception_score_error, within_class_distance


def logits(n: int = 300, classes: int = 10) -> np.ndarray:
    return 2.5 * np.random.default_rng(n).standard_normal((n, classes))


@pytest.mark.filterwarnings("ignore:Metric", "ignore:std")
def test_torchmetrics_agrees_on_one_split() -> None:
    """Its splits are shuffled by torch's generator, so only one split can be compared."""
    x = logits()
    peer = InceptionScore(feature=torch.nn.Identity(), splits=1).set_dtype(torch.float64)
    peer.update(torch.from_numpy(x))
    assert inception_score(x, splits=1) == pytest.approx(peer.compute()[0].item(), rel=1e-9)


def test_splits_are_those_of_torch_fidelity() -> None:
    """Written out from its definition: a shuffle by RandomState(2020), parts i N // 10, the mean of exp(KL)."""
    x = logits(307)
    p = torch.from_numpy(x[np.random.RandomState(2020).permutation(307)])
    scores = []
    for i in range(10):
        part = p[i * 307 // 10 : (i + 1) * 307 // 10].log_softmax(1)
        marginal = part.exp().mean(0, keepdim=True).log().expand_as(part)
        scores.append(torch.nn.functional.kl_div(marginal, part, log_target=True, reduction="batchmean").exp().item())
    assert inception_score(x) == pytest.approx(np.mean(scores), rel=1e-10)


def test_its_bounds() -> None:
    """1 where the classifier cannot tell anything, K where it is sure and sees all classes alike; -inf is probability 0."""
    assert inception_score(np.zeros((50, 10))) == pytest.approx(1)
    with np.errstate(divide="ignore"):
        sure = np.log(np.tile(np.eye(10), (20, 1)))
    assert inception_score(sure, splits=1) == pytest.approx(10)
    assert inception_score(logits() + 7.0) == pytest.approx(inception_score(logits()))


def test_its_bootstrap_error_is_that_of_repetition() -> None:
    rng = np.random.default_rng(3)
    draws = [2.5 * rng.standard_normal((400, 10)) for _ in range(150)]
    spread = np.std([inception_score(x) for x in draws])
    errors = [inception_score_error(x, resamples=60) for x in draws[:20]]
    assert np.mean(errors) == pytest.approx(spread, rel=0.2)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((9, 10)), "10 splits need at least as many"),
        (np.zeros(20), r"got shape \[20\]"),
        (np.zeros((20, 1)), "two classes"),
        (np.full((20, 3), np.nan), "NaN"),
        (np.full((20, 3), -np.inf), "-inf"),
        (np.full((20, 3), np.inf), "NaN or infinity"),
    ],
)
def test_bad_logits_are_refused(bad: np.ndarray, message: str) -> None:
    for score in (inception_score, inception_score_error):
        with pytest.raises(Error, match=message):
            score(bad)


def test_class_accuracy_by_hand() -> None:
    found = class_accuracy([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [0.0, 9.0]], [1, 0, 1, 0])
    assert found.value == 0.75
    assert found.error == pytest.approx(np.sqrt(0.75 * 0.25 / 4))
    assert found.interval == pytest.approx((0.75 - 1.96 * found.error, 0.75 + 1.96 * found.error))


@pytest.mark.parametrize(
    ("x", "labels", "message"),
    [
        (np.zeros((3, 2)), [0, 1], r"\[3, 2\] and int64 \[2\]"),
        (np.zeros((2, 2)), [0.0, 1.0], "float64"),
        (np.zeros((0, 2)), np.zeros(0, int), r"\[0, 2\] and int64 \[0\]"),
        (np.zeros((2, 2)), [0, 2], r"0\.\.1, got 0 to 2"),
        (np.zeros((2, 2)), [-1, 0], "got -1 to 0"),
        (np.full((2, 2), np.nan), [0, 1], "NaN"),
    ],
)
def test_labels_that_do_not_fit_are_refused(x: np.ndarray, labels: list[int], message: str) -> None:
    with pytest.raises(Error, match=message):
        class_accuracy(x, labels)


def test_within_class_distance_by_hand() -> None:
    features = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    labels = np.array([0, 0, 1, 1, 1])
    assert within_class_distance(features, labels) == pytest.approx((5 + (1 + 1 + 2**0.5) / 3) / 2)
    twins = np.repeat(100 * logits(60), 2, axis=0)  # whose squared distances round to less than zero, too
    assert within_class_distance(twins, np.repeat(np.arange(60), 2)) == pytest.approx(0, abs=1e-4)
    with pytest.raises(Error, match="at least two samples"):
        within_class_distance(features, np.arange(5))
    with pytest.raises(Error, match=r"one label a row: labels \[4\] for features \[5, 2\]"):
        within_class_distance(features, labels[:4])
