"""The plan: everything a sampling run will compute, as a table made before anything runs. NumPy float64, no device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastcfg.errors import Error, as_number, check_known
from fastcfg.guidance import Guidance, Interval
from fastcfg.schedules import Array, Schedule, timesteps
from fastcfg.solvers import CLIPS, PREDICTIONS, SOLVERS, VARIANCES, Grid, Rows, eps_from


@dataclass(frozen=True)
class Plan:
    """One row a step, noisiest first; `print(plan)` shows it.

    timesteps: what the model is given as t, [steps]. alpha, sigma: noise levels, [steps + 1], the last where the run ends.
    rows: the solver's coefficients. guided: steps inside the guidance interval, [steps]. init_scale: x = init_scale z at
    the start. clip: whether x0 is clipped to [-1, 1]. gradient: see `gradient_column`; None without classifier guidance.
    """

    title: str
    solver: str
    timesteps: Array
    alpha: Array
    sigma: Array
    rows: Rows
    guided: NDArray[np.bool_]
    guidance: Guidance
    init_scale: float
    clip: bool
    gradient: Array | None = None

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @property
    def whole_timesteps(self) -> bool:
        """Whether t can be given to the model as int64."""
        return bool(np.all(self.timesteps == np.round(self.timesteps)))

    @property
    def needs_noise(self) -> bool:
        return bool(np.any(self.rows.c_noise))

    @property
    def needs_history(self) -> bool:
        return bool(np.any(self.rows.c_prev))

    @property
    def learned_variance(self) -> bool:
        return self.rows.log_var_min is not None

    def __str__(self) -> str:
        rows = self.rows
        columns: dict[str, Array] = {
            "t": self.timesteps,
            "alpha_bar": self.alpha[:-1] ** 2,
            "sigma": self.sigma[:-1],
            "c_x": rows.c_x,
            "c_out": rows.c_out,
            "c_x0": rows.c_x0,
            "c_prev": rows.c_prev,
            "c_noise": rows.c_noise,
            "gradient": np.zeros(self.steps) if self.gradient is None else self.gradient,
        }
        shown = {k: v for k, v in columns.items() if k in ("t", "alpha_bar", "sigma") or np.any(v)}
        lines = [self.title, "  step " + " ".join(f"{name:>12}" for name in shown) + "  guided"]
        for i in range(self.steps):
            values = " ".join(f"{column[i]:12.6g}" for column in shown.values())
            lines.append(f"  {i:4d} {values}  {'yes' if self.guided[i] else 'no'}")
        return "\n".join(lines)


def make_plan(
    schedule: Schedule,
    *,
    steps: int,
    solver: str = "ddim",
    spacing: str | Sequence[float] | NDArray[Any] = "dit",
    predicts: str = "eps",
    eta: float = 0.0,
    variance: str = "posterior",
    clip: bool | str = False,
    guidance: Guidance | None = None,
    by_classifier: bool = False,
) -> Plan:
    """The plan of a run: `steps` steps of `solver` over `schedule`, visiting `spacing`'s timesteps, down to sigma = 0.

    predicts: what the network's output is ("eps", "v", "x0", "flow"). eta: DDIM's noise in [0, 1]; no other solver has it.
    variance: DDPM's ("posterior", "fixed_large", "learned_range"). clip: see `fastcfg.solvers.Grid`. by_classifier: whether
    there is classifier guidance, in the steps in which `guidance` is.
    Raises Error for anything unknown, out of range or at odds, and for a guidance interval that no step is in.
    """
    guidance = guidance if guidance is not None else Guidance()
    _check(schedule, solver, predicts, eta, variance, clip)
    eta = float(eta)
    positions = timesteps(spacing, schedule.T, steps, fractional=solver == "euler", open_end=solver == "dpmpp_2m")
    steps = len(positions)
    alpha, sigma = schedule.at(positions)
    grid = Grid(np.append(alpha, 1.0), np.append(sigma, 0.0), predicts, clip)
    all_options: dict[str, dict[str, Any]] = {"ddim": {"eta": eta}, "ddpm": {"variance": variance}}
    options = all_options.get(solver, {})
    with np.errstate(divide="ignore"):
        noise_ratio = sigma / alpha
    t = positions + schedule.time_offset
    guided = np.ones(steps, bool) if guidance.interval is None else _inside(guidance.interval, t, noise_ratio)
    where = spacing if isinstance(spacing, str) else "given timesteps"
    # Euler's state starts at the sigma of its first level in the sigma / alpha view (diffusers' init_noise_sigma), except
    # with "leading", whose first level is not the schedule's last.
    init_scale = float(sigma[0]) if solver == "euler" and where != "leading" else 1.0
    name = solver + "".join(f", {key} {value}" for key, value in options.items())
    title = f"{steps} steps of {name} ({where}) over {schedule.name}, T = {schedule.T}, predicting {predicts}"
    return Plan(
        title=title + (f", clip {clip}" if clip else ""),
        solver=solver,
        timesteps=t,
        alpha=grid.alpha,
        sigma=grid.sigma,
        rows=SOLVERS[solver](grid, **options),
        guided=guided,
        guidance=guidance,
        init_scale=init_scale,
        clip=bool(clip),
        gradient=gradient_column(grid) if by_classifier else None,
    )


def _inside(interval: Interval, t: Array, noise_ratio: Array) -> NDArray[np.bool_]:
    """The steps in the interval, [steps]; Error where there are none: guidance asked for would be left out."""
    guided = interval.contains(t, noise_ratio)
    if not guided.any():
        visited, name = (t, "t") if interval.unit == "timestep" else (noise_ratio, "sigma / alpha")
        raise Error(
            f"interval {interval} holds none of the plan's {len(t)} steps, from {name} = {visited[0]:g} to {visited[-1]:g}: "
            "want a wider one, or more steps"
        )
    return guided


def gradient_column(grid: Grid) -> Array:
    """What grad_x log p(y | x_t) is multiplied by as it is added to the network's output, float64 [steps], at scale 1.

    The definition is eps - sigma grad (Dhariwal & Nichol 2105.05233, algorithm 2); with x_t held fixed, the output of any
    prediction moves by -sigma grad / (d eps / d out). At alpha = 0, where flow starts, x_t says nothing of y: the gradient is
    zero, infinitely magnified, and left out.
    """
    _, eps_out = eps_from(grid)
    return np.divide(-grid.here[1], eps_out, out=np.zeros_like(eps_out), where=eps_out != 0)


def _check(schedule: Any, solver: str, predicts: str, eta: Any, variance: str, clip: Any) -> None:
    if not isinstance(schedule, Schedule):
        raise Error(f"schedule must be a fastcfg.Schedule, got {schedule!r}: fastcfg.schedule(name) makes one")
    check_known("solver", solver, SOLVERS)
    check_known("prediction", predicts, PREDICTIONS)
    if (predicts == "flow") != (schedule.name == "flow"):
        raise Error(f"prediction 'flow' and schedule 'flow' go together, got {predicts!r} with {schedule.name!r}")
    if schedule.name == "flow" and solver != "euler":
        raise Error(f"a flow model is sampled with solver 'euler', got {solver!r}")
    if (number := as_number(eta)) is None or not 0 <= number <= 1:
        raise Error(f"eta must be a number in [0, 1], got {eta!r}")
    if number and solver != "ddim":
        raise Error(f"solver {solver!r} has no eta: only 'ddim' has, got {eta}")
    check_known("variance", variance, VARIANCES)
    if variance != "posterior" and solver != "ddpm":
        raise Error(f"solver {solver!r} has no choice of variance: only 'ddpm' has, got {variance!r}")
    if not any(clip is known or (isinstance(clip, str) and clip == known) for known in CLIPS):
        raise Error(f"clip must be False, True or 'keep_eps', got {clip!r}")
