"""Plots draw the numbers that they are given: guidance geometry against vectors by hand, the trade-off's points and bars."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from fastcfg import Error, Sampler, schedule
from fastcfg.noise import INITIAL_STEP, normal
from fastcfg.plots import guidance_geometry, plot_geometry, plot_tradeoff
from fastcfg.schedules import from_alpha_bar


def test_guidance_geometry_by_hand() -> None:
    """eps_null along one axis, eps_y beside it: every point is read off."""
    made = guidance_geometry(torch.tensor([0.0, 3.0, 0.0]), torch.tensor([-2.0, 1.0, 0.0]), [0.0, 1.0, 2.5])
    assert made.null.tolist() == pytest.approx([3, 0])
    assert made.cond.tolist() == pytest.approx([1, 2])
    assert made.guided.flatten().tolist() == pytest.approx([3, 0, 1, 2, -2, 5])
    assert made.cosine == pytest.approx(-math.sqrt(0.5))
    with pytest.raises(Error, match="parallel"):
        guidance_geometry(torch.ones(3), 2 * torch.ones(3), [1.0])


class Known(nn.Module):
    """A prediction that shows x, t and y."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return x + y.view(-1, 1, 1, 1) * x.flip(-1) + 0.01 * t.view(-1, 1, 1, 1)


@pytest.mark.parametrize("offset", [0, 1])
def test_geometry_is_of_x_t_as_the_model_counts_timesteps(offset: int, tmp_path: Path) -> None:
    levels = from_alpha_bar(schedule("linear", T=100, beta_end=0.2).alpha_bar, time_offset=offset)
    sampler = Sampler(Known().eval(), steps=2, schedule=levels, null_label=3, shape=(1, 4, 4), device="cpu", engine="reference")
    x0, t = torch.linspace(-1, 1, 16).view(1, 4, 4), 99 + offset
    made = plot_geometry(sampler, x0, 2, t, [1.0, 4.0], 7, tmp_path / "g.png", "known")
    x_t = levels.alpha[99] * x0 + levels.sigma[99] * normal([7], [0], INITIAL_STEP, (1, 4, 4))
    null, cond = (Known()(x_t, torch.tensor([t]), torch.tensor([y])).flatten().double() for y in (3, 2))
    assert made.null.tolist() == pytest.approx([null.norm().item(), 0], rel=1e-5, abs=1e-9)
    assert made.cond[0].item() == pytest.approx((cond @ null / null.norm()).item(), rel=1e-5)
    assert made.cond.norm().item() == pytest.approx(cond.norm().item(), rel=1e-5)
    for wrong in (offset - 1, 100 + offset):
        with pytest.raises(Error, match=rf"timestep {wrong} is out of range: {offset}\.\.{99 + offset}"):
            plot_geometry(sampler, x0, 2, wrong, [1.0], 7, tmp_path / "g.png", "known")


def test_tradeoff_draws_points_by_scale_with_their_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[dict[str, Any]] = []
    draw = Axes.errorbar

    def noted(axes: Axes, x: Any, y: Any, **how: Any) -> object:
        drawn.append({"x": x, "y": y, **how})
        return draw(axes, x, y, **how)

    monkeypatch.setattr(Axes, "errorbar", noted)
    rows = [
        {"setting": "a", "scale": "4", "recall": "0.5", "recall_low": "0.4", "recall_high": "0.7", "precision": "0.9"},
        {"setting": "a", "scale": "1", "recall": "0.8", "recall_low": "0.7", "recall_high": "0.85", "precision": "0.6"},
    ]
    plot_tradeoff(rows, tmp_path / "t.png")
    (line,) = drawn
    assert (line["x"], line["y"], line["label"]) == ([0.8, 0.5], [0.6, 0.9], "a")
    np.testing.assert_allclose(line["xerr"], [[0.1, 0.1], [0.05, 0.2]])
    assert line["yerr"] is None
    with pytest.raises(Error, match="two figures to plot"):
        plot_tradeoff([{"setting": "a", "scale": "1", "recall": "0.8"}], tmp_path / "u.png")
    assert [path.name for path in tmp_path.iterdir()] == ["t.png"]
