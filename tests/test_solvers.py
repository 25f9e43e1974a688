import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn

from fastcfg import Error, Sampler, Schedule, schedule
from fastcfg.schedules import timesteps
from fastcfg.solvers import SOLVERS, Grid, ddim, ddpm, dpmpp_2m, euler

CLIPS = [False, True, "keep_eps"]


def discrete_grid(predicts="eps", clip=False, name="linear", steps=9):
    """Levels as a run visits them, down to sigma = 0."""
    alpha, sigma = schedule(name).at(timesteps("trailing", 1000, steps))
    return Grid(np.append(alpha, 1.0), np.append(sigma, 0.0), predicts, clip)


def lambda_grid(steps, high=3.0, low=-3.0):
    """Levels with lambda = log(alpha / sigma) rising evenly from `low` to `high`, alpha^2 + sigma^2 = 1."""
    half_log_snr = np.linspace(low, high, steps + 1)
    return Grid(1 / np.sqrt(1 + np.exp(-2 * half_log_snr)), 1 / np.sqrt(1 + np.exp(2 * half_log_snr)), "eps")


def step(grid, rows, i, x, out, x0_prev=0.0, z=0.0):
    """One step as the module's docstring defines it: (x', x0)."""
    x0 = rows.x0_x[i] * x + rows.x0_out[i] * out
    if grid.clip:
        x0 = np.clip(x0, -1, 1)
    moved = rows.c_x[i] * x + rows.c_out[i] * out + rows.c_x0[i] * x0 + rows.c_prev[i] * x0_prev
    return moved + rows.c_noise[i] * z, x0


def run(grid, rows, x, eps):
    """All steps with `eps(x, alpha, sigma)` as the network."""
    x0 = np.zeros_like(x)
    for i in range(len(rows.c_x)):
        x, x0 = step(grid, rows, i, x, eps(x, grid.alpha[i], grid.sigma[i]), x0)
    return x


def output(predicts, x0, eps, alpha, sigma):
    """What a network of this kind says of a sample made of x0 and eps."""
    return {"eps": eps, "v": alpha * eps - sigma * x0, "x0": x0, "flow": eps - x0}[predicts]


def draws(seed, count=4):
    return np.random.default_rng(seed).normal(size=(count, 64))


def clipped(x0, eps, clip, x, alpha, sigma):
    """(x0, eps) as the step uses them, from the definition of each way of clipping."""
    if not clip:
        return x0, eps
    bounded = np.minimum(np.maximum(x0, -1.0), 1.0)
    return bounded, eps if clip == "keep_eps" else (x - alpha * bounded) / sigma


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("name", ["linear", "cosine", "log_snr_cosine"])
def test_ddim_rows_are_equation_12(name, eta, clip):
    grid = discrete_grid(clip=clip, name=name)
    rows = ddim(grid, eta=eta)
    for i in range(9):
        x, eps, z, _ = draws(i)
        now, then = grid.alpha[i] ** 2, grid.alpha[i + 1] ** 2  # alpha_bar
        x0, used = clipped((x - grid.sigma[i] * eps) / grid.alpha[i], eps, clip, x, grid.alpha[i], grid.sigma[i])
        spread = eta * math.sqrt((1 - then) / (1 - now)) * math.sqrt(1 - now / then)
        want = math.sqrt(then) * x0 + math.sqrt(max(1 - then - spread**2, 0.0)) * used + spread * z
        got, predicted = step(grid, rows, i, x, eps, z=z)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9 * np.abs(want).max())
        np.testing.assert_allclose(predicted, x0, rtol=1e-9, atol=1e-9 * np.abs(x0).max())
    assert (rows.c_prev == 0).all()
    assert rows.c_noise[-1] == 0


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("variance", ["posterior", "fixed_large", "learned_range"])
def test_ddpm_rows_are_bayes_rule(variance, clip):
    grid = discrete_grid(clip=clip)
    rows = ddpm(grid, variance=variance)
    for i in range(9):
        x, eps, z, _ = draws(i)
        now, then = grid.alpha[i] ** 2, grid.alpha[i + 1] ** 2
        x0, _ = clipped((x - grid.sigma[i] * eps) / grid.alpha[i], eps, clip, x, grid.alpha[i], grid.sigma[i])
        # x_t = a x_s + N(0, beta) seen from the prior x_s ~ N(sqrt(then) x0, 1 - then): precisions add
        a, beta = math.sqrt(now / then), 1 - now / then
        got, _ = step(grid, rows, i, x, eps)
        if i == 8:
            np.testing.assert_allclose(got, x0, rtol=1e-9, atol=1e-12)
            assert rows.c_noise[i] == 0
            continue
        precision = a**2 / beta + 1 / (1 - then)
        mean = (a * x / beta + math.sqrt(then) * x0 / (1 - then)) / precision
        np.testing.assert_allclose(got, mean, rtol=1e-9, atol=1e-9 * np.abs(mean).max())
        noise = step(grid, rows, i, x, eps, z=z)[0] - got
        if variance == "learned_range":
            assert rows.log_var_min[i] == pytest.approx(-math.log(precision), rel=1e-9)
            assert rows.log_var_max[i] == pytest.approx(math.log(beta), rel=1e-9)
            np.testing.assert_allclose(noise, z, atol=1e-12)
        else:
            deviation = math.sqrt(beta if variance == "fixed_large" else 1 / precision)
            np.testing.assert_allclose(noise, deviation * z, atol=1e-10)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("steps", [9, 1000])
def test_posterior_ddpm_is_ddim_with_eta_1(name, steps):
    grid = discrete_grid(name=name, steps=steps)
    ours, theirs = ddpm(grid), ddim(grid, eta=1.0)
    for field in ("c_x", "c_out", "c_noise"):
        np.testing.assert_allclose(getattr(ours, field), getattr(theirs, field), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_dpmpp_2m_rows_are_algorithm_2(name, clip):
    grid = discrete_grid(clip=clip, name=name)
    rows = dpmpp_2m(grid)
    half_log_snr = [math.log(grid.alpha[i] / grid.sigma[i]) for i in range(9)]
    for i in range(9):
        x, eps, _, x0_prev = draws(i)
        x0, _ = clipped((x - grid.sigma[i] * eps) / grid.alpha[i], eps, clip, x, grid.alpha[i], grid.sigma[i])
        if i == 8:  # to sigma = 0: h is infinite and the step of order 1 lands on x0
            want = x0
        else:
            h = half_log_snr[i + 1] - half_log_snr[i]
            direction = x0
            if i > 0:
                r = (half_log_snr[i] - half_log_snr[i - 1]) / h
                direction = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_prev
            want = grid.sigma[i + 1] / grid.sigma[i] * x - grid.alpha[i + 1] * math.expm1(-h) * direction
        got, _ = step(grid, rows, i, x, eps, x0_prev=x0_prev)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9 * np.abs(want).max())
    assert (rows.c_noise == 0).all()
    assert rows.c_prev[0] == rows.c_prev[-1] == 0
    assert (rows.c_prev[1:-1] < 0).all()


@pytest.mark.parametrize("predicts", ["eps", "v"])
def test_euler_rows_are_a_step_of_sigma(predicts):
    grid = discrete_grid(predicts, name="scaled_linear")
    rows = euler(grid)
    for i in range(9):
        x, out, _, _ = draws(i)
        alpha, ratio = grid.alpha[i], grid.sigma[i] / grid.alpha[i]
        exploding = x / alpha  # x0 + ratio eps
        if predicts == "eps":
            denoised = exploding - ratio * out
        else:  # Karras' c_skip and c_out of v
            denoised = exploding / (ratio**2 + 1) - out * ratio / math.sqrt(ratio**2 + 1)
        slope = (exploding - denoised) / ratio
        moved = exploding + slope * (grid.sigma[i + 1] / grid.alpha[i + 1] - ratio)
        got, _ = step(grid, rows, i, x, out)
        np.testing.assert_allclose(got, moved * grid.alpha[i + 1], rtol=1e-9, atol=1e-9 * np.abs(x).max())


def test_flow_euler_rows_are_a_step_of_tau():
    alpha, sigma = schedule("flow").at(timesteps("linspace", 1000, 7, fractional=True))
    grid = Grid(np.append(alpha, 1.0), np.append(sigma, 0.0), "flow")
    rows = euler(grid)
    assert grid.alpha[0] == 0  # pure noise
    for i in range(7):
        x, out, _, _ = draws(i)
        got, x0 = step(grid, rows, i, x, out)
        np.testing.assert_allclose(got, x + (grid.sigma[i + 1] - grid.sigma[i]) * out, atol=1e-12)
        np.testing.assert_allclose(x0, x - grid.sigma[i] * out, atol=1e-12)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("ddim", {"eta": 0.0}),
        ("ddim", {"eta": 0.7}),
        ("ddpm", {"variance": "posterior"}),
        ("ddpm", {"variance": "fixed_large"}),
        ("dpmpp_2m", {}),
        ("euler", {}),
    ],
)
def test_all_predictions_of_one_sample_take_the_same_step(solver, options, clip):
    x0, eps, z, x0_prev = draws(1)
    x0 = 1.5 * x0  # so that clipping has something to do
    for i in range(9):
        results = {}
        for predicts in ("eps", "v", "x0", "flow"):
            grid = discrete_grid(predicts, clip, name="scaled_linear")
            alpha, sigma = grid.alpha[i], grid.sigma[i]
            out = output(predicts, x0, eps, alpha, sigma)
            results[predicts] = step(grid, SOLVERS[solver](grid, **options), i, alpha * x0 + sigma * eps, out, x0_prev, z)
        for predicts, (moved, predicted) in results.items():
            np.testing.assert_allclose(moved, results["x0"][0], atol=1e-9, err_msg=f"{predicts}, step {i}")
            np.testing.assert_allclose(predicted, np.clip(x0, -1, 1) if clip else x0, atol=1e-9)


def test_the_x0_term_is_folded_where_nothing_is_clipped():
    rows = ddim(discrete_grid(), eta=0.3)
    assert (rows.c_x0 == 0).all()
    assert (ddim(discrete_grid(clip=True), eta=0.3).c_x0 != 0).all()


def test_eps_says_nothing_at_alpha_0():
    with pytest.raises(Error, match="alpha = 0"):
        ddim(Grid(np.array([0.0, 1.0]), np.array([1.0, 0.0]), "eps"))
    with pytest.raises(Error, match="unknown prediction 'score'"):
        ddim(discrete_grid("score"))


MEAN, SPREAD = 0.7, 0.35  # the data of the order tests: x0 ~ N(MEAN, SPREAD^2)
START = np.linspace(-2.5, 2.5, 11)
DOUBLINGS = [16, 32, 64, 128, 256]
ORDERS = [("ddim", 0.85, 1.2), ("euler", 0.85, 1.2), ("dpmpp_2m", 1.8, 2.3)]


def gaussian_eps(x, alpha, sigma):
    """-sigma times the score of N(alpha MEAN, alpha^2 SPREAD^2 + sigma^2)."""
    return sigma * (x - alpha * MEAN) / (alpha**2 * SPREAD**2 + sigma**2)


def gaussian_flow(x, alpha, sigma, alpha_end, sigma_end):
    """The probability-flow ODE carries quantiles to quantiles."""
    stretch = math.sqrt((alpha_end**2 * SPREAD**2 + sigma_end**2) / (alpha**2 * SPREAD**2 + sigma**2))
    return alpha_end * MEAN + stretch * (x - alpha * MEAN)


def fitted_order(steps, errors):
    """Minus the slope of log error over log steps."""
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@pytest.mark.parametrize(("solver", "least", "most"), ORDERS)
def test_order_on_gaussian_data(solver, least, most):
    errors = []
    for steps in DOUBLINGS:
        grid = lambda_grid(steps)
        exact = gaussian_flow(START, grid.alpha[0], grid.sigma[0], grid.alpha[-1], grid.sigma[-1])
        errors.append(np.abs(run(grid, SOLVERS[solver](grid), START, gaussian_eps) - exact).max())
    assert least < fitted_order(DOUBLINGS, errors) < most, errors
    order = {"dpmpp_2m": 2}.get(solver, 1)  # what is left of the next term has gone by the last doubling
    assert math.log2(errors[-2] / errors[-1]) == pytest.approx(order, abs=0.05)


class Exact(nn.Module):
    """The exact eps of a toy distribution as a module(x, t, y) in float64: `eps(x, alpha_t, sigma_t, y)`."""

    def __init__(self, table, eps):
        super().__init__()
        self.eps = eps
        self.register_buffer("alpha", torch.from_numpy(table.alpha))
        self.register_buffer("sigma", torch.from_numpy(table.sigma))
        self.precision = nn.Parameter(torch.zeros((), dtype=torch.float64))  # says float64 to the sampler

    def forward(self, x, t, y):
        shape = (-1, 1, 1, 1)
        return self.eps(x, self.alpha[t].view(shape), self.sigma[t].view(shape), y.view(shape))


def smooth_schedule(T=1025, low=-3.0, high=5.0):
    """Timesteps evenly spaced in lambda, so that a run's steps are even too."""
    half_log_snr = np.linspace(high, low, T)
    alpha, sigma = 1 / np.sqrt(1 + np.exp(-2 * half_log_snr)), 1 / np.sqrt(1 + np.exp(2 * half_log_snr))
    return Schedule("smooth", alpha, sigma, {"T": T})


def sample(eps, solver, steps, x, labels, scale=1.0):
    """The public way: `steps` even steps through the smooth schedule's table, then the one to sigma = 0."""
    table = smooth_schedule()
    sampler = Sampler(
        Exact(table, eps).eval(),
        steps=steps + 1,
        solver=solver,
        spacing=[1024 - i * (1024 // steps) for i in range(steps + 1)],
        schedule=table,
        null_label=2,
        shape=(1, 1, 1),
        batch=len(x),
        device="cpu",
        engine="reference",
    )
    assert sampler.engine.dtype == torch.float64
    start = torch.from_numpy(x).view(-1, 1, 1, 1)
    if solver == "euler":  # whose start is in units of the first level's sigma
        start = start / float(table.sigma[-1])
    return table, sampler(labels, scale, x_T=start).flatten().double().numpy()


@pytest.mark.parametrize(("solver", "least", "most"), ORDERS)
def test_order_through_the_sampler(solver, least, most):
    errors, counts = [], [16, 32, 64, 128]
    for steps in counts:
        table, got = sample(lambda x, a, s, _: gaussian_eps(x, a, s), solver, steps, START, [0] * len(START))
        alpha, sigma = table.alpha[0], table.sigma[0]
        last = gaussian_flow(START, table.alpha[-1], table.sigma[-1], alpha, sigma)
        exact = (last - sigma * gaussian_eps(last, alpha, sigma)) / alpha  # the last step lands on E[x0 | x]
        errors.append(np.abs(got - exact).max())
    assert least < fitted_order(counts, errors) < most, errors


CLASS_MEANS, CLASS_SPREAD = (1.0, -0.6), 0.4  # two Gaussians; the null prediction knows their even mixture


def class_eps(x, alpha, sigma, y):
    return sigma * (x - alpha * CLASS_MEANS[y]) / (alpha**2 * CLASS_SPREAD**2 + sigma**2)


def mixture_eps(x, alpha, sigma):
    """-sigma d/dx log sum_y N(x; alpha mean_y, variance): the classes' eps, weighted by how likely each is."""
    variance = alpha**2 * CLASS_SPREAD**2 + sigma**2
    first, second = (np.exp(-((x - alpha * mean) ** 2) / (2 * variance)) for mean in CLASS_MEANS)
    share = first / (first + second)
    return share * class_eps(x, alpha, sigma, 0) + (1 - share) * class_eps(x, alpha, sigma, 1)


def mixture_module_eps(x, alpha, sigma, y):
    """The same three predictions by autograd of the log densities: label 2 is null."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        variance = alpha**2 * CLASS_SPREAD**2 + sigma**2
        logs = torch.stack([-((x - alpha * mean) ** 2) / (2 * variance) for mean in CLASS_MEANS])
        density = torch.where(y == 2, logs.logsumexp(0), torch.where(y == 0, logs[0], logs[1]))
        return -sigma * torch.autograd.grad(density.sum(), x)[0]


def guided_flow(x, label, scale, table):
    """The guided ODE d(x / alpha) / d(sigma / alpha) = eps_hat at tight tolerance, then the step onto x0."""

    def guided(x, alpha, sigma):
        null = mixture_eps(x, alpha, sigma)
        return null + scale * (class_eps(x, alpha, sigma, label) - null)

    def slope(log_ratio, y):  # in the logarithm of the ratio, over which the path is smooth
        ratio = math.exp(log_ratio)
        alpha = 1 / math.sqrt(1 + ratio**2)
        return ratio * guided(y * alpha, alpha, ratio * alpha)

    ends = [math.log(table.sigma[t] / table.alpha[t]) for t in (-1, 0)]
    solved = solve_ivp(slope, ends, x / table.alpha[-1], method="DOP853", rtol=1e-11, atol=1e-12)
    last = solved.y[:, -1] * table.alpha[0]
    return last / table.alpha[0] - math.exp(ends[1]) * guided(last, table.alpha[0], table.sigma[0])


@pytest.mark.parametrize("scale", [1.0, 2.5, 6.0])
@pytest.mark.parametrize(("solver", "least", "most"), [("ddim", 0.85, 1.2), ("dpmpp_2m", 1.7, 2.4)])
def test_guided_sampling_of_two_gaussians_follows_the_guided_ode(solver, least, most, scale):
    x = np.tile(np.linspace(-2.2, 2.2, 9), 2)
    labels = [0] * 9 + [1] * 9
    exact = np.concatenate([guided_flow(x[:9], label, scale, smooth_schedule()) for label in (0, 1)])
    errors, counts = [], [64, 128, 256, 512, 1024]
    for steps in counts:
        _, got = sample(mixture_module_eps, solver, steps, x, labels, scale)
        errors.append(np.abs(got - exact).max())
    assert errors[-1] < {"ddim": 2e-2, "dpmpp_2m": 2e-4}[solver], errors
    assert least < fitted_order(counts, errors) < most, errors


def test_guidance_moves_the_exact_answer():
    """So that the test above would notice a sampler that ignores the scale."""
    table, x = smooth_schedule(), np.linspace(-2.2, 2.2, 9)
    plain, guided = (guided_flow(x, 0, scale, table) for scale in (1.0, 2.5))
    assert np.abs(guided - plain).max() > 0.1
