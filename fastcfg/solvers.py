"""Solvers as tables of numbers: each turns a falling grid of noise levels into the coefficients of its steps.

A step of any solver here is

    x0 = x0_x x + x0_out out                      (out: the network's output; x0 clipped to [-1, 1] where asked)
    x' = c_x x + c_out out + c_x0 x0 + c_prev x0_prev + c_noise z,    z ~ N(0, 1), x0_prev: x0 of the step before

with eps, v, x0 and flow predictions all linear in (x, out). Without clipping the x0 term is folded into c_x and c_out
in float64, which spares float32 the cancellation in (x - sigma eps) / alpha at the noisy end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from fastcfg.errors import Error, check_known
from fastcfg.schedules import Array

CLIPS = (False, True, "keep_eps")
VARIANCES = ("posterior", "fixed_large", "learned_range")
PREDICTIONS = ("eps", "v", "x0", "flow")

Pair = tuple[Array, Array]  # coefficients of (x, out), each [steps]


@dataclass(frozen=True)
class Grid:
    """The noise levels of a run: alpha, sigma float64 [steps + 1], noisiest first; the last is where the run ends.

    predicts: what the network's output is. clip: False, True (x0 clipped and eps derived from it again, as in the
    official ADM and DiT code) or "keep_eps" (x0 clipped, eps as predicted, as in diffusers' DDIM).
    """

    alpha: Array
    sigma: Array
    predicts: str
    clip: bool | str = False

    def __post_init__(self) -> None:
        check_known("prediction", self.predicts, PREDICTIONS)

    @property
    def here(self) -> Pair:
        return self.alpha[:-1], self.sigma[:-1]

    @property
    def there(self) -> Pair:
        return self.alpha[1:], self.sigma[1:]


@dataclass(frozen=True)
class Rows:
    """Coefficients of every step, float64 [steps]; see the module's equations.

    log_var_min, log_var_max: for a learned variance, between which the network's v in [-1, 1] interpolates; the noise of
    such a step is c_noise exp(log_var / 2) z.
    """

    x0_x: Array
    x0_out: Array
    c_x: Array
    c_out: Array
    c_x0: Array
    c_prev: Array
    c_noise: Array
    log_var_min: Array | None = None
    log_var_max: Array | None = None


def x0_from(grid: Grid) -> Pair:
    """x0 as a combination of x and the network's output."""
    alpha, sigma = grid.here
    ones = np.ones_like(alpha)
    match grid.predicts:
        case "eps":
            if np.any(alpha == 0):
                raise Error("an eps prediction says nothing of x0 at alpha = 0: use a schedule that ends above it")
            return 1 / alpha, -sigma / alpha
        case "v":  # v = alpha eps - sigma x0 (Salimans & Ho 2202.00512)
            return alpha * ones, -sigma
        case "x0":
            return 0 * ones, ones
        case _:  # "flow": out = eps - x0
            return ones / (alpha + sigma), -sigma / (alpha + sigma)


def eps_from(grid: Grid) -> Pair:
    """eps as a combination of x and the network's output."""
    alpha, sigma = grid.here
    ones = np.ones_like(alpha)
    match grid.predicts:
        case "eps":
            return 0 * ones, ones
        case "v":
            return sigma, alpha
        case "x0":
            return 1 / sigma, -alpha / sigma
        case _:  # "flow"
            return ones / (alpha + sigma), alpha / (alpha + sigma)


def _rows(grid: Grid, on_x: Array, on_x0: Array, on_eps: Array, on_prev: Array, noise: Array) -> Rows:
    """Rows of x' = on_x x + on_x0 x0 + on_eps eps + on_prev x0_prev + noise z, with the grid's clipping."""
    alpha, sigma = grid.here
    x0_x, x0_out = x0_from(grid)
    eps_x, eps_out = eps_from(grid)
    zeros = np.zeros_like(sigma)
    if grid.clip == "keep_eps":
        c_x, c_out, c_x0 = on_x + on_eps * eps_x, on_eps * eps_out, on_x0
    elif grid.clip:  # eps = (x - alpha x0) / sigma with the clipped x0
        c_x, c_out, c_x0 = on_x + on_eps / sigma, zeros, on_x0 - on_eps * alpha / sigma
    else:
        c_x, c_out, c_x0 = on_x + on_eps * eps_x + on_x0 * x0_x, on_eps * eps_out + on_x0 * x0_out, zeros
    return Rows(x0_x, x0_out, c_x, c_out, c_x0, on_prev, noise)


def ddim(grid: Grid, *, eta: float = 0.0) -> Rows:
    """DDIM (Song et al. 2010.02502, eq. 12 and 16): eta 0 is deterministic, eta 1 ancestral with the posterior variance."""
    (alpha, sigma), (alpha_next, sigma_next) = grid.here, grid.there
    ratio = sigma_next / sigma
    spread = eta * ratio * np.sqrt(np.maximum(sigma**2 - (alpha / alpha_next * sigma_next) ** 2, 0.0))
    zeros = np.zeros_like(sigma)
    return _rows(grid, zeros, alpha_next, np.sqrt(np.maximum(sigma_next**2 - spread**2, 0.0)), zeros, spread)


def ddpm(grid: Grid, *, variance: str = "posterior") -> Rows:
    """Ancestral sampling (Ho et al. 2006.11239, eq. 6-7). The last step adds no noise.

    variance: "posterior", "fixed_large" (beta), or "learned_range" (Nichol & Dhariwal 2102.09672, eq. 15).
    """
    (alpha, sigma), (alpha_next, sigma_next) = grid.here, grid.there
    transition = alpha / alpha_next
    beta = sigma**2 - (transition * sigma_next) ** 2
    posterior = beta * (sigma_next / sigma) ** 2
    last = np.arange(len(sigma)) == len(sigma) - 1
    noise = np.sqrt(beta if variance == "fixed_large" else posterior)
    rows = _rows(
        grid,
        transition * (sigma_next / sigma) ** 2,
        alpha_next * beta / sigma**2,
        np.zeros_like(sigma),
        np.zeros_like(sigma),
        np.where(last, 0.0, noise),
    )
    if variance != "learned_range":
        return rows
    # The last step's posterior variance is 0; its logarithm is not used, since no noise is added there.
    log_min = np.log(np.where(posterior > 0, posterior, 1.0))
    return replace(rows, c_noise=np.where(last, 0.0, 1.0), log_var_min=log_min, log_var_max=np.log(beta))


def dpmpp_2m(grid: Grid) -> Rows:
    """DPM-Solver++(2M) (Lu et al. 2211.01095, alg. 2), midpoint form; the first step, and one to sigma = 0, are order 1."""
    (alpha, sigma), (alpha_next, sigma_next) = grid.here, grid.there
    decay = sigma_next / sigma * alpha / alpha_next  # exp(-h), h the step in lambda = log(alpha / sigma)
    with np.errstate(divide="ignore"):
        h = -np.log(decay)
    correction = np.zeros_like(h)  # h / (2 h_before), where the step has one before it and an end to extrapolate to
    correction[1:] = np.where(np.isfinite(h[1:]), h[1:] / (2 * h[:-1]), 0.0)
    weight = alpha_next * (1 - decay)
    zeros = np.zeros_like(h)
    return _rows(grid, sigma_next / sigma, weight * (1 + correction), zeros, -weight * correction, zeros)


def euler(grid: Grid) -> Rows:
    """Euler on the probability-flow ODE: in sigma / alpha (Karras et al. 2206.00364) for eps, v and x0, in tau for flow.

    As a map from one level to the next, alpha' x0 + sigma' eps, it is DDIM with eta 0; it differs in its grid (fractional
    timesteps) and in the scale of its start.
    """
    return ddim(grid, eta=0.0)


SOLVERS: dict[str, Callable[..., Rows]] = {f.__name__: f for f in (ddim, ddpm, dpmpp_2m, euler)}
