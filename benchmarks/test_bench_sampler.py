"""Speed of the pieces of a sampling run: pytest-benchmark, one figure a piece (`make bench`)."""

from __future__ import annotations

from typing import Any

import pytest

import fastcfg
from fastcfg.engines.openvino_module import openvino_version
from fastcfg.noise import normal
from fastcfg.plan import make_plan
from fastcfg.schedules import linear

needs_openvino = pytest.mark.skipif(openvino_version() is None, reason="OpenVINO is not installed")


def test_plan(benchmark: Any) -> None:
    """The table of 50 steps, from a schedule."""
    benchmark(make_plan, linear(), steps=50)


def test_noise(benchmark: Any) -> None:
    """x_T of 16 latents of 4 x 32 x 32."""
    benchmark(normal, range(16), range(16), 0, (4, 32, 32))


@pytest.mark.parametrize(
    ("scale", "interval"),
    [(1.0, None), (3.0, None), (3.0, (200, 700))],
    ids=["unguided", "guided", "guided in half of the steps"],
)
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("engine", ["auto", pytest.param("openvino", marks=needs_openvino)])
def test_shipped_model(benchmark: Any, engine: str, batch: int, scale: float, interval: Any) -> None:
    """Ten DDIM steps of the shipped model: one forward a row, two, and two in half of the steps."""
    sampler = fastcfg.Sampler(fastcfg.load("fashion-mnist"), steps=10, batch=batch, interval=interval, engine=engine)
    labels = [i % 10 for i in range(batch)]
    benchmark.pedantic(sampler, args=(labels, scale), rounds=5, warmup_rounds=1)
