"""Noise schedules and timestep spacings: which alpha and sigma a model was trained on, and which of them a sampler visits.

Everything here is float64 NumPy. A noisy sample is x_t = alpha_t x0 + sigma_t eps with eps ~ N(0, 1); for all schedules but
`flow`, alpha_t^2 + sigma_t^2 = 1 and alpha_bar_t = alpha_t^2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastcfg.errors import Error, as_whole, check_known

Array = NDArray[np.float64]

_CLEAN = "leave out the level without noise (with time_offset=1, if it was the model's t = 0)"


@dataclass(frozen=True)
class Schedule:
    """The noise levels a model was trained on, as a table over training timesteps 0..T-1 (T-1 the noisiest).

    name: one of `SCHEDULES`, or any other for a table of one's own (`from_alpha_bar`). alpha, sigma: float64 [T], or what
    becomes that. parameters: what rebuilds the table, for checkpoints. time_offset: the model is given table index +
    time_offset as its t (1 for flow, whose t = T tau reaches T).
    Raises Error unless alpha^2 + sigma^2 = 1 (alpha + sigma = 1 for "flow") to float32's accuracy and the noise only grows. The
    last alpha may be 0 (zero terminal SNR, Lin et al. 2305.08891).
    """

    name: str
    alpha: Array = field(repr=False)
    sigma: Array = field(repr=False)
    parameters: dict[str, Any]
    time_offset: float = 0.0

    def __post_init__(self) -> None:
        for name in ("alpha", "sigma"):
            object.__setattr__(self, name, _numbers(f"schedule {self.name!r}: {name}", getattr(self, name)))
        self._check_levels()

    def _check_levels(self) -> None:
        alpha, sigma, says = self.alpha, self.sigma, f"schedule {self.name!r}:"
        if len(alpha) != len(sigma) or len(alpha) < 2:
            raise Error(f"{says} alpha and sigma want one value a timestep, at least 2, got {len(alpha)} and {len(sigma)}")
        if alpha.min() < 0:
            raise Error(f"{says} alpha must be at least 0, got {alpha.min():g}")
        if sigma.min() <= 0:
            raise Error(f"{says} sigma must be above 0, got {sigma.min():g}: {_CLEAN}")
        total, equation = (
            (alpha + sigma, "alpha + sigma") if self.name == "flow" else (alpha**2 + sigma**2, "alpha^2 + sigma^2")
        )
        worst = np.abs(total - 1).argmax()
        if abs(total[worst] - 1) > 1e-6:  # what float32 makes of a table
            raise Error(
                f"{says} {equation} must be 1, got {total[worst]:g} at timestep {worst}: from alpha_bar, which is alpha^2, "
                "fastcfg.schedules.from_alpha_bar makes both"
            )
        rises = sigma[1:] * alpha[:-1] > sigma[:-1] * alpha[1:]  # of sigma / alpha, which may end at infinity
        if not rises.all():
            raise Error(
                f"{says} sigma / alpha must rise from each timestep to the next, and does not after timestep {rises.argmin()}: "
                "want the cleanest level first and the noisiest last"
            )

    @property
    def T(self) -> int:
        """Number of training timesteps."""
        return len(self.alpha)

    @property
    def alpha_bar(self) -> Array:
        """alpha_t squared, float64 [T]."""
        return self.alpha**2

    @property
    def noise_ratio(self) -> Array:
        """sigma_t / alpha_t, float64 [T]: the sigma of the variance-exploding view (Karras et al. 2206.00364)."""
        with np.errstate(divide="ignore"):
            return self.sigma / self.alpha

    def at(self, index: Array) -> tuple[Array, Array]:
        """(alpha, sigma) at table positions, which may be fractional.

        Between entries the noise ratio is interpolated linearly (tau itself for flow), as diffusers' Euler schedulers do.
        """
        index = np.asarray(index, dtype=np.float64)
        whole = np.clip(np.rint(index).astype(np.int64), 0, self.T - 1)
        if np.array_equal(index, whole):
            return self.alpha[whole], self.sigma[whole]
        grid = np.arange(self.T)
        if self.name == "flow":
            sigma = np.interp(index, grid, self.sigma)
            return 1.0 - sigma, sigma
        ratio = np.interp(index, grid, self.noise_ratio)
        alpha = 1.0 / np.sqrt(1.0 + ratio**2)
        return alpha, np.multiply(ratio, alpha, out=np.ones_like(alpha), where=np.isfinite(ratio))

    def to_json(self) -> dict[str, Any]:
        """What `schedule_from_json` needs to build this table again."""
        return {"name": self.name, **self.parameters}


def _numbers(name: str, values: Any) -> Array:
    """`values` as float64 [T], each finite; a copy, which nobody changes after the checks."""
    try:
        values = values.detach().cpu().double() if isinstance(values, Tensor) else values
        table = np.asarray(values, dtype=np.float64).copy()
    except (TypeError, ValueError, RuntimeError):
        raise Error(f"{name} must be numbers, one a training timestep, got {type(values).__name__}") from None
    if table.ndim != 1 or not np.isfinite(table).all():
        what = "values that are not finite" if table.ndim == 1 else f"shape {list(table.shape)}"
        raise Error(f"{name} must be finite numbers [T], one a training timestep, got {what}")
    return table


def from_alpha_bar(alpha_bar: Sequence[float] | Array | Tensor, *, time_offset: float = 0.0) -> Schedule:
    """A schedule of one's own, with alpha = sqrt(alpha_bar) and sigma = sqrt(1 - alpha_bar).

    alpha_bar: the running product of 1 - beta (Ho et al. 2006.11239, eq. 4; diffusers' `alphas_cumprod`), [T], falling, in
    [0, 1); only the last may be 0. time_offset: see `Schedule`. Raises Error for any other table.
    """
    name = "given alpha_bar"
    table = _numbers(name, alpha_bar)
    if table.size and not (table.min() >= 0 and table.max() < 1):
        raise Error(
            f"{name} must lie in [0, 1), got {table.min():g} to {table.max():g}" + (f": {_CLEAN}" if table.max() == 1 else "")
        )
    return Schedule(name, np.sqrt(table), np.sqrt(1.0 - table), {}, time_offset)


def _from_betas(name: str, betas: Array, parameters: dict[str, Any]) -> Schedule:
    if not (np.all(betas > 0) and np.all(betas < 1)):
        raise Error(f"schedule '{name}': betas must lie in (0, 1), got {betas.min():g} to {betas.max():g}")
    alpha_bar = np.cumprod(1.0 - betas, dtype=np.float64)
    return Schedule(name, np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar), parameters)


def linear(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 2e-2) -> Schedule:
    """Betas evenly spaced (Ho et al. 2006.11239); what DiT and ADM use."""
    parameters = {"T": T, "beta_start": beta_start, "beta_end": beta_end}
    return _from_betas("linear", np.linspace(beta_start, beta_end, T), parameters)


def scaled_linear(T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Schedule:
    """Square roots of the betas evenly spaced (Rombach et al. 2112.10752); what Stable Diffusion uses."""
    parameters = {"T": T, "beta_start": beta_start, "beta_end": beta_end}
    return _from_betas("scaled_linear", np.linspace(beta_start**0.5, beta_end**0.5, T) ** 2, parameters)


def cosine(T: int = 1000, max_beta: float = 0.999) -> Schedule:
    """Squared cosine (Nichol & Dhariwal 2102.09672, eq. 17), with betas capped at `max_beta`."""
    edges = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * math.pi / 2) ** 2
    return _from_betas("cosine", np.minimum(1.0 - edges[1:] / edges[:-1], max_beta), {"T": T, "max_beta": max_beta})


def log_snr_cosine(T: int = 1000, lambda_min: float = -20.0, lambda_max: float = 20.0) -> Schedule:
    """The classifier-free guidance paper's schedule (Ho & Salimans 2207.12598, section 2).

    lambda = log(alpha^2 / sigma^2) = -2 log tan(a u + b) for u in [0, 1], from lambda_max (clean) to lambda_min (noise).
    """
    if not lambda_min < lambda_max:
        raise Error(f"schedule 'log_snr_cosine': lambda_min must be below lambda_max, got {lambda_min} and {lambda_max}")
    b = math.atan(math.exp(-lambda_max / 2))
    a = math.atan(math.exp(-lambda_min / 2)) - b
    angle = a * np.linspace(0.0, 1.0, T) + b  # tan(angle) = sigma / alpha
    parameters = {"T": T, "lambda_min": lambda_min, "lambda_max": lambda_max}
    return Schedule("log_snr_cosine", np.cos(angle), np.sin(angle), parameters)


def flow(T: int = 1000) -> Schedule:
    """Straight paths x = (1 - tau) x0 + tau eps (Lipman et al. 2210.02747), tau = 1/T .. 1; the model's t is T tau."""
    tau = np.arange(1, T + 1) / T
    return Schedule("flow", 1.0 - tau, tau, {"T": T}, time_offset=1.0)


SCHEDULES = {f.__name__: f for f in (linear, scaled_linear, cosine, log_snr_cosine, flow)}


def schedule(name: str | Schedule, **parameters: Any) -> Schedule:
    """The schedule called `name` (one of `SCHEDULES`), or `name` itself if it is a Schedule already."""
    if isinstance(name, Schedule):
        return name
    check_known("schedule", name, SCHEDULES)
    asked = parameters.get("T", 1000)
    if (T := as_whole(asked)) is None or T < 2:
        raise Error(f"schedule {name!r}: T must be a whole number of at least 2, got {asked!r}")
    if "T" in parameters:
        parameters["T"] = T
    try:
        return SCHEDULES[name](**parameters)
    except (TypeError, OverflowError) as error:
        raise Error(f"schedule {name!r} does not take these parameters: {parameters}") from error


def schedule_from_json(data: Any) -> Schedule:
    """Rebuilds a schedule from `Schedule.to_json`'s dictionary."""
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        raise Error(f"a schedule is stored as an object with a name, got {data!r}")
    return schedule(data["name"], **{k: v for k, v in data.items() if k != "name"})


def stored_schedule(made: Schedule) -> dict[str, Any]:
    """`made.to_json()`, for a file. Raises Error unless `schedule_from_json` gives back these alpha, sigma and time_offset."""
    data = made.to_json()
    try:
        again = schedule_from_json(json.loads(json.dumps(data)))
    except (Error, TypeError, ValueError) as error:
        raise Error(f"schedule {made.name!r} cannot be stored, since its parameters do not make it again: {error}") from error
    same = np.array_equal(again.alpha, made.alpha) and np.array_equal(again.sigma, made.sigma)
    if not same or again.time_offset != made.time_offset:
        raise Error(
            f"schedule {made.name!r} cannot be stored: {data} makes another table. Want one of fastcfg.schedule's: "
            f"{', '.join(SCHEDULES)}"
        )
    return data


def _dit(T: int, steps: int) -> Array:
    """Official DiT/ADM respacing "N": stride (T-1)/(N-1), accumulated and rounded half to even."""
    stride = (T - 1) / max(steps - 1, 1)
    position, kept = 0.0, []
    for _ in range(steps):  # the official code accumulates the stride, so we do
        kept.append(round(position))
        position += stride
    return np.array(kept[::-1], dtype=np.float64)


def _ddim(T: int, steps: int) -> Array:
    """Official DiT/ADM respacing "ddimN": the first whole stride that gives exactly N timesteps."""
    for stride in range(1, T + 1):
        if len(range(0, T, stride)) == steps:
            return np.arange(0, T, stride, dtype=np.float64)[::-1].copy()
    near = sorted({len(range(0, T, s)) for s in range(1, T + 1)}, key=lambda n: (abs(n - steps), n))[:4]
    raise Error(f"spacing 'ddim' has no whole stride giving {steps} of {T} timesteps: nearest are {sorted(near)}")


def _leading(T: int, points: int) -> Array:
    """diffusers "leading": multiples of T // N, from 0."""
    return (np.arange(points) * (T // points))[::-1].astype(np.float64)


def _trailing(T: int, steps: int) -> Array:
    """diffusers "trailing" (Lin et al. 2305.08891): steps of T / N down from T, minus 1."""
    return np.round(np.arange(T, 0, -T / steps))[:steps] - 1.0


def _linspace(T: int, points: int) -> Array:
    """Evenly spaced from T-1 to 0, both ends included, not rounded."""
    return np.linspace(0, T - 1, points)[::-1].copy()


SPACINGS = {"dit": _dit, "ddim": _ddim, "leading": _leading, "trailing": _trailing, "linspace": _linspace}


def timesteps(
    spacing: str | Sequence[float] | Array,
    T: int,
    steps: int,
    *,
    fractional: bool = False,
    open_end: bool = False,
) -> Array:
    """The table positions a sampler visits, noisiest first, float64 [steps].

    spacing: one of `SPACINGS`, or the positions themselves in falling order.
    fractional: keep "linspace" unrounded (the Euler convention); otherwise positions are whole.
    open_end: "leading" and "linspace" lay out steps + 1 points and leave out the last (diffusers' DPM-Solver convention).
    """
    asked, steps = steps, as_whole(steps) or 0
    if not 1 <= steps <= T:
        raise Error(f"steps must be a whole number from 1 to the schedule's {T}, got {asked!r}")
    if not isinstance(spacing, str):
        return _given_timesteps(spacing, T, steps, fractional)
    check_known("spacing", spacing, SPACINGS, ", or the timesteps themselves")
    opened = open_end and spacing in ("leading", "linspace") and steps < T
    positions = SPACINGS[spacing](T, steps + 1 if opened else steps)[:steps]
    if not (fractional and spacing == "linspace"):
        positions = np.round(positions)
    if steps == 1 and not positions[0]:
        raise Error(f"spacing {spacing!r} with 1 step keeps only timestep 0, which samples nothing: use 'trailing'")
    if len(np.unique(positions)) != steps:
        raise Error(f"spacing {spacing!r} cannot lay {steps} distinct steps over {T} timesteps: ask for fewer steps")
    return positions


def _given_timesteps(given: Sequence[float] | Array, T: int, steps: int, fractional: bool) -> Array:
    try:
        positions = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise Error(f"spacing must be a name or a list of timesteps, got {given!r}") from error
    if positions.shape != (steps,):
        raise Error(f"the given timesteps must be one per step: {steps} steps, but shape {positions.shape}")
    if not np.all(np.isfinite(positions)) or positions.min() < 0 or positions.max() > T - 1:
        raise Error(f"given timesteps must lie in 0..{T - 1}, got {positions.min():g} to {positions.max():g}")
    if np.any(np.diff(positions) >= 0):
        raise Error("given timesteps must fall, the noisiest first")
    if not fractional and np.any(positions != np.round(positions)):
        raise Error("given timesteps must be whole numbers for this solver: only 'euler' takes fractional ones")
    return positions
