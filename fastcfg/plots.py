"""Pictures of what guidance does, what it trades, and how training goes. Needs the extra `plot` (matplotlib)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastcfg.errors import Error, missing_extra
from fastcfg.files import write_file
from fastcfg.noise import INITIAL_STEP, normal

if TYPE_CHECKING:
    from fastcfg.sampler import Sampler
    from fastcfg.schedules import Schedule


@dataclass(frozen=True)
class Geometry:
    """Guidance in the plane through the origin spanned by eps_null and eps_y, in the coordinates of an orthonormal basis.

    null, cond: [2]. guided: [S, 2], the extrapolated points for `scales`. cosine: between eps_null and eps_y - eps_null.
    """

    null: Tensor
    cond: Tensor
    guided: Tensor
    scales: tuple[float, ...]
    cosine: float


def guidance_geometry(eps_null: Tensor, eps_y: Tensor, scales: Sequence[float]) -> Geometry:
    """Projects eps_null + s (eps_y - eps_null) on the plane of the two predictions: nothing is lost, it all lies there."""
    null, cond = eps_null.flatten().double(), eps_y.flatten().double()
    first = null / null.norm()
    rest = cond - (cond @ first) * first
    if rest.norm() <= 1e-12 * null.norm():
        raise Error("eps_null and eps_y are parallel: they span no plane")
    basis = torch.stack([first, rest / rest.norm()])
    a, b = basis @ null, basis @ cond
    difference = cond - null
    cosine = (null @ difference / (null.norm() * difference.norm())).item()
    guided = torch.stack([a + s * (b - a) for s in scales])
    return Geometry(a, b, guided, tuple(scales), cosine)


def plot_geometry(
    sampler: Sampler, x0: Tensor, label: int, t: int, scales: Sequence[float], seed: int, path: Path, title: str
) -> Geometry:
    """Noises x0 [C, H, W] to timestep t, as the model counts, asks it for eps_null and eps_y there, draws both and what
    guidance makes of them, with the images of x0 that each stands for.
    """
    plt = pyplot()
    schedule = sampler.model.schedule
    if sampler.model.predicts != "eps":
        raise Error(f"the picture is of eps predictions, but the model predicts {sampler.model.predicts}")
    check_geometry(schedule, t, scales)
    index = t - int(schedule.time_offset)
    alpha, sigma = float(schedule.alpha[index]), float(schedule.sigma[index])
    x_t = alpha * x0 + sigma * normal([seed], [0], INITIAL_STEP, x0.shape)[0]
    times = torch.tensor([t])
    eps_y = sampler.predict(x_t[None], times, [label])[0].cpu()[: len(x0)]
    eps_null = sampler.predict(x_t[None], times, None)[0].cpu()[: len(x0)]
    geometry = guidance_geometry(eps_null, eps_y, scales)

    figure, (plane, strip) = plt.subplots(2, 1, figsize=(8, 7.2), height_ratios=(2.6, 1), layout="constrained")
    _draw_plane(plane, geometry)
    plane.set_title(
        f"{title}, t = {t}: the plane of eps_null and eps_y\ncos(eps_null, eps_y - eps_null) = {geometry.cosine:.3f}"
    )
    guesses = [(x_t - sigma * eps) / alpha for eps in (eps_null, *(eps_null + s * (eps_y - eps_null) for s in scales))]
    names = ["x_t", "x0 | null", *(f"x0, s = {s:g}" for s in scales)]
    _draw_strip(strip, [x_t, *guesses], names)
    write_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    plt.close(figure)
    return geometry


def check_geometry(schedule: Schedule, t: int, scales: Sequence[float]) -> None:
    """Raises Error for a t that `schedule` does not have, as the model counts timesteps, and for scales that are not finite."""
    first = int(schedule.time_offset)
    if not first <= t < schedule.T + first:
        raise Error(f"timestep {t} is out of range: {first}..{schedule.T - 1 + first}")
    if not all(math.isfinite(s) for s in scales):
        raise Error(f"scales must be finite, got {', '.join(f'{s:g}' for s in scales)}")


def _draw_plane(axes: Any, geometry: Geometry) -> None:
    null, cond = geometry.null.tolist(), geometry.cond.tolist()
    end = geometry.guided[-1].tolist()
    arrow = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.004}
    # The two predictions are long and nearly parallel: the picture is of their ends, the origin is far below.
    axes.plot([null[0], end[0]], [null[1], end[1]], color="0.75", linestyle="--", zorder=1)
    axes.quiver(*null, cond[0] - null[0], cond[1] - null[1], color="tab:red", label="eps_y - eps_null", zorder=3, **arrow)
    axes.scatter(*null, color="tab:blue", s=60, zorder=4, label="eps_null (s = 0)")
    axes.scatter(*cond, color="tab:green", s=60, zorder=4, label="eps_y (s = 1)")
    for s, (x, y) in zip(geometry.scales, geometry.guided.tolist(), strict=True):
        axes.scatter(x, y, color="tab:purple", marker="x", zorder=3)
        axes.annotate(f"s = {s:g}", (x, y), xytext=(6, -12), textcoords="offset points")
    axes.set_xlabel("along eps_null")
    axes.set_ylabel("across it, towards eps_y (another scale)")
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")


def _draw_strip(axes: Any, images: Sequence[Tensor], names: Sequence[str]) -> None:
    axes.set_axis_off()
    width = 1 / len(images)
    for i, (image, name) in enumerate(zip(images, names, strict=True)):
        inset = axes.inset_axes((i * width, 0, width * 0.94, 0.94))
        pixels = ((image.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy()
        inset.imshow(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels, cmap="gray", vmin=0, vmax=1)
        inset.set_title(name, fontsize=8)
        inset.set_axis_off()


def plot_loss(steps: Sequence[int], losses: Sequence[float], path: Path) -> None:
    """The training loss over steps, logarithmic."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, losses)
    axes.set(xlabel="step", ylabel="loss", yscale="log", title="Training loss")
    axes.grid(alpha=0.3, which="both")
    write_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    plt.close(figure)


PANELS = (  # x, y, what they are called; a panel is drawn where the rows have both
    ("inception_score", "frechet_distance", "Inception score", "Frechet distance"),
    ("class_accuracy", "frechet_distance", "class accuracy", "Frechet distance"),
    ("recall", "precision", "recall", "precision"),
    ("scale", "frechet_distance", "guidance scale s", "Frechet distance"),
    ("scale", "class_accuracy", "guidance scale s", "class accuracy"),
    ("gflop_a_sample", "frechet_distance", "GFLOP a sample", "Frechet distance"),
)
COLUMNS = 3  # of panels


def plot_tradeoff(rows: Sequence[Mapping[str, str]], path: Path, title: str = "") -> None:
    """Quality against diversity over the guidance scale, as in Ho & Salimans 2207.12598, figure 4: a line for each setting.

    rows: of a sweep's table (`fastcfg.sweep`), with 95 % intervals; "setting" names the lines where a row has it, else what
    its settings are besides the scale.
    """
    plt = pyplot()
    panels = [panel for panel in PANELS if all(panel[0] in row and panel[1] in row for row in rows)]
    if not rows or not panels:
        raise Error("a trade-off needs rows with two figures to plot: a Frechet distance and a scale, or precision and recall")
    lines: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        lines.setdefault(row.get("setting") or _setting(row), []).append(row)
    columns = min(COLUMNS, len(panels))
    height = -(-len(panels) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(4.6 * columns, 4.2 * height), layout="constrained", squeeze=False)
    for unused in axes.flat[len(panels) :]:
        unused.set_axis_off()
    for panel, (x, y, x_name, y_name) in zip(axes.flat, panels, strict=False):
        for name, points in lines.items():
            ordered = sorted(points, key=lambda row: float(row["scale"]))
            xs, ys = ([float(row[column]) for row in ordered] for column in (x, y))
            bars = {"yerr": _bars(ordered, y), "xerr": _bars(ordered, x), "capsize": 2}
            line = "none" if x == "gflop_a_sample" else "-"  # guided points cost the same: a line would say nothing
            panel.errorbar(xs, ys, **bars, marker="o", ms=3.5, lw=1.2, ls=line, label=name)
            if x != "scale":
                for row, a, b in zip(ordered, xs, ys, strict=True):
                    panel.annotate(row["scale"], (a, b), xytext=(3, 3), textcoords="offset points", fontsize=6.5)
        panel.set(xlabel=x_name, ylabel=y_name)
        if y == "frechet_distance":
            _logarithmic(panel.set_yscale, panel.yaxis)
        if x == "scale":
            scales = sorted({float(row["scale"]) for row in rows})
            _logarithmic(panel.set_xscale, panel.xaxis, scales)
        panel.grid(alpha=0.3, which="both")
    axes[0][0].legend(fontsize=7)
    figure.suptitle(title)
    write_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    plt.close(figure)


def _logarithmic(set_scale: Any, axis: Any, ticks: Sequence[float] | None = None) -> None:
    """A logarithmic axis labelled with plain numbers, at `ticks` if given; linear below 1 where there is a tick at 0."""
    if ticks is not None and min(ticks) <= 0:
        set_scale("symlog", linthresh=1)
    else:
        set_scale("log")
    if ticks is not None:
        axis.set_ticks(ticks, minor=False)
        axis.set_ticks([], minor=True)
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: f"{value:g}")


def _setting(row: Mapping[str, str]) -> str:
    parts = [f"{row['solver']} {row['steps']}"]
    parts += [f"classifier on {row['classifier']}"] if row["classifier"] else []
    parts += [f"guided at {row['interval']}"] if row["interval"] else []
    return ", ".join(parts + ([f"rescale {row['rescale']}"] if float(row["rescale"]) else []))


def _bars(rows: Sequence[Mapping[str, str]], column: str) -> list[list[float]] | None:
    """How far a figure's interval reaches below and above it; None where it has none."""
    if f"{column}_low" not in rows[0]:
        return None
    values = [(float(row[column]), float(row[f"{column}_low"]), float(row[f"{column}_high"])) for row in rows]
    return [[value - low for value, low, _ in values], [high - value for value, _, high in values]]


def pyplot() -> Any:
    """matplotlib.pyplot, without a screen. Raises Error where the extra is missing: to be asked before long work."""
    try:
        import matplotlib
    except ImportError as error:
        raise missing_extra("plot", "plotting", error) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
