"""Speed of the metrics, features aside: 2,000 samples against 2,000, 128 features."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastcfg import metrics

Pair = tuple[NDArray[np.float32], NDArray[np.float32]]


@pytest.fixture(scope="module")
def pair() -> Pair:
    generator = np.random.default_rng(0)
    a, b = (generator.normal(size=(2000, 128)).astype(np.float32) for _ in range(2))
    return a, b


@pytest.mark.parametrize(
    "metric", [metrics.frechet_distance, metrics.kid, metrics.manifold], ids=["frechet", "kid", "manifold"]
)
def test_metric(benchmark: Any, metric: Any, pair: Pair) -> None:
    benchmark.pedantic(metric, args=pair, rounds=3, warmup_rounds=1)
