import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fastcfg import Error, Schedule, make_plan, schedule
from fastcfg.schedules import SCHEDULES, from_alpha_bar, schedule_from_json, stored_schedule, timesteps

GOLDEN = Path(__file__).parent / "golden" / "dit_tiny.expected.safetensors"
mpmath.mp.dps = 40


def linear_betas(T, first, last):
    return [Fraction(first) + (Fraction(last) - Fraction(first)) * i / (T - 1) for i in range(T)]


def alpha_bar_linear(T, first=1e-4, last=2e-2):
    return cumulated(linear_betas(T, first, last))


def alpha_bar_scaled_linear(T, first=0.00085, last=0.012):
    roots = [mpmath.sqrt(first) + (mpmath.sqrt(last) - mpmath.sqrt(first)) * i / (T - 1) for i in range(T)]
    return cumulated([root**2 for root in roots])


def alpha_bar_cosine(T, cap=0.999):
    def f(i):
        return mpmath.cos((mpmath.mpf(i) / T + mpmath.mpf("0.008")) / mpmath.mpf("1.008") * mpmath.pi / 2) ** 2

    return cumulated([min(1 - f(i + 1) / f(i), mpmath.mpf(cap)) for i in range(T)])


def cumulated(betas):
    """The running product of 1 - beta with 40 digits, as mpmath numbers."""
    product, table = mpmath.mpf(1), []
    for beta in betas:
        product *= 1 - (mpmath.mpf(beta.numerator) / beta.denominator if isinstance(beta, Fraction) else beta)
        table.append(product)
    return table


@pytest.mark.parametrize(
    ("made", "want"),
    [
        (schedule("linear"), alpha_bar_linear(1000)),
        (schedule("linear", T=37, beta_start=1e-3, beta_end=0.3), alpha_bar_linear(37, 1e-3, 0.3)),
        (schedule("scaled_linear"), alpha_bar_scaled_linear(1000)),
        (schedule("scaled_linear", T=50, beta_start=0.01, beta_end=0.2), alpha_bar_scaled_linear(50, 0.01, 0.2)),
        (schedule("cosine"), alpha_bar_cosine(1000)),
        (schedule("cosine", T=20, max_beta=0.7), alpha_bar_cosine(20, 0.7)),
    ],
    ids=lambda value: f"{value.name}-{value.T}" if isinstance(value, Schedule) else "",
)
def test_discrete_schedules_against_40_digits(made, want):
    assert len(want) == made.T
    np.testing.assert_allclose(made.alpha, [float(mpmath.sqrt(a)) for a in want], rtol=1e-11)
    np.testing.assert_allclose(made.sigma, [float(mpmath.sqrt(1 - a)) for a in want], rtol=1e-11)
    np.testing.assert_allclose(made.alpha_bar, [float(a) for a in want], rtol=1e-11)
    np.testing.assert_allclose(made.noise_ratio, [float(mpmath.sqrt((1 - a) / a)) for a in want], rtol=1e-11)
    assert made.alpha.dtype == made.sigma.dtype == np.float64


@pytest.mark.parametrize(
    ("name", "index", "alpha_bar"),
    [
        # widely quoted: DDPM ends at 4.04e-5, Stable Diffusion at 0.0047 (Lin et al. 2305.08891, table 1: sqrt 0.068265)
        ("linear", 999, 4.035830e-5),
        ("scaled_linear", 999, 0.068265**2),
        ("linear", 0, 0.9999),
        ("scaled_linear", 0, 0.99915),
    ],
)
def test_published_end_points(name, index, alpha_bar):
    assert schedule(name).alpha_bar[index] == pytest.approx(alpha_bar, rel=2e-5)


def test_cosine_caps_its_last_beta():
    made = schedule("cosine")
    assert made.alpha_bar[-1] / made.alpha_bar[-2] == pytest.approx(1e-3, rel=1e-9)


@pytest.mark.parametrize(("T", "low", "high"), [(1000, -20.0, 20.0), (11, -20.0, 20.0), (64, -5.0, 9.0)])
def test_log_snr_cosine_is_the_papers(T, low, high):
    made = schedule("log_snr_cosine", T=T, lambda_min=low, lambda_max=high)
    b = mpmath.atan(mpmath.exp(-mpmath.mpf(high) / 2))
    a = mpmath.atan(mpmath.exp(-mpmath.mpf(low) / 2)) - b
    want = [-2 * mpmath.log(mpmath.tan(a * i / (T - 1) + b)) for i in range(T)]  # lambda(u), u = i / (T - 1)
    assert float(want[0]) == pytest.approx(high, rel=1e-12)
    assert float(want[-1]) == pytest.approx(low, rel=1e-12)
    log_snr = np.log(made.alpha**2 / made.sigma**2)
    np.testing.assert_allclose(log_snr, [float(value) for value in want], rtol=0, atol=1e-10)
    # alpha^2 = sigmoid(lambda)
    np.testing.assert_allclose(made.alpha_bar, [float(1 / (1 + mpmath.exp(-value))) for value in want], rtol=1e-10)


def test_flow_is_a_straight_path_whose_t_reaches_T():
    made = schedule("flow", T=8)
    assert made.sigma.tolist() == [1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8, 1.0]
    assert made.alpha.tolist() == [7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0.0]
    assert made.noise_ratio[-1] == math.inf
    assert (np.arange(8) + made.time_offset == 8 * made.sigma).all()  # what the model is given is T tau


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_only_gets_noisier(name):
    made = schedule(name)
    assert (np.diff(made.alpha) < 0).all()
    assert (np.diff(made.sigma) > 0).all()
    if name != "flow":
        np.testing.assert_allclose(made.alpha**2 + made.sigma**2, 1.0, rtol=1e-15)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("linear", {}),
        ("linear", {"T": 10, "beta_start": 0.01, "beta_end": 0.3}),
        ("scaled_linear", {"T": 77, "beta_end": 0.02}),
        ("cosine", {"T": 30, "max_beta": 0.5}),
        ("log_snr_cosine", {"T": 9, "lambda_min": -3.5, "lambda_max": 11.0}),
        ("flow", {"T": 12}),
    ],
)
def test_json_round_trip(name, parameters):
    made = schedule(name, **parameters)
    again = schedule_from_json(json.loads(json.dumps(made.to_json())))
    assert (again.name, again.T, again.time_offset) == (name, parameters.get("T", 1000), made.time_offset)
    assert (again.alpha == made.alpha).all()
    assert (again.sigma == made.sigma).all()
    assert parameters.items() <= made.to_json().items()
    assert schedule(made) is made
    assert schedule_from_json(made.to_json() | {"T": np.int64(made.T)}).to_json() == made.to_json()
    assert stored_schedule(made) == made.to_json()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"alpha": schedule("cosine").alpha, "sigma": schedule("cosine").sigma}, "makes another table"),
        ({"alpha": schedule("linear").alpha[:-1], "sigma": schedule("linear").sigma[:-1]}, "makes another table"),
        ({"time_offset": 1.0}, "makes another table"),
        ({"name": "mine"}, "'mine' cannot be stored.*known are linear"),
        ({"parameters": {"T": 1000, "betas": 3}}, "does not take these parameters"),
        ({"parameters": {"T": np.zeros(3)}}, "not JSON serializable"),
    ],
)
def test_a_schedule_that_its_parameters_do_not_make_is_not_stored(changes, says):
    with pytest.raises(Error, match=says):
        stored_schedule(replace(schedule("linear"), **changes))


ALPHA, SIGMA = schedule("linear").alpha, schedule("linear").sigma


@pytest.mark.parametrize(
    ("alpha", "sigma", "says"),
    [
        (np.append(1.0, ALPHA), np.append(0.0, SIGMA), r"sigma must be above 0, got 0: .*time_offset=1"),
        (ALPHA**2, SIGMA, r"alpha\^2 \+ sigma\^2 must be 1, got 0\.75 at .*from_alpha_bar"),
        (
            ALPHA[::-1],
            SIGMA[::-1],
            "must rise from each timestep to the next, and does not after timestep 0: .*cleanest level first",
        ),
        (ALPHA[[0, 1, 1, 2]], SIGMA[[0, 1, 1, 2]], "does not after timestep 1"),
        (np.append(ALPHA, [0.0, 0.0]), np.append(SIGMA, [1.0, 1.0]), "does not after timestep 1000"),
        (-ALPHA, SIGMA, "alpha must be at least 0, got -0.99995"),
        (ALPHA[:-1], SIGMA, "one value a timestep, at least 2, got 999 and 1000"),
        (ALPHA[:1], SIGMA[:1], "at least 2, got 1 and 1"),
        (ALPHA, SIGMA[:, None], r"sigma must be finite numbers \[T\].* got shape \[1000, 1\]"),
        (np.where(ALPHA < 0.5, np.nan, ALPHA), SIGMA, "alpha must be finite numbers .* got values that are not finite"),
        ("cosine", SIGMA, "alpha must be numbers, one a training timestep, got str"),
        (None, SIGMA, "alpha must be finite numbers"),
    ],
)
def test_a_table_that_is_no_schedule_is_refused(alpha, sigma, says):
    with pytest.raises(Error, match=f"schedule 'mine': .*{says}"):
        Schedule("mine", alpha, sigma, {})


def test_a_flow_schedule_is_a_straight_path():
    tau = np.linspace(0.1, 1.0, 10) ** 2
    assert Schedule("flow", 1 - tau, tau, {}).T == 10
    with pytest.raises(Error, match=r"schedule 'flow': alpha \+ sigma must be 1, got 1\.4"):
        Schedule("flow", ALPHA, SIGMA, {})


@pytest.mark.parametrize("form", [list, np.float32, torch.from_numpy])
def test_a_table_of_ones_own_is_kept_as_float64(form):
    made = Schedule("mine", form(ALPHA), form(SIGMA), {})
    assert made.alpha.dtype == made.sigma.dtype == np.float64
    np.testing.assert_allclose(made.alpha, ALPHA, rtol=1e-7 if form is np.float32 else 0)
    given = from_alpha_bar(form(ALPHA**2))
    np.testing.assert_allclose(given.noise_ratio, schedule("linear").noise_ratio, rtol=1e-3 if form is np.float32 else 1e-11)


def test_from_alpha_bar_makes_both_tables():
    table = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
    assert (from_alpha_bar(table).alpha == ALPHA).all()
    assert (from_alpha_bar(torch.nn.Parameter(torch.from_numpy(table))).alpha == ALPHA).all()  # as a module holds it
    assert (from_alpha_bar(table).sigma == SIGMA).all()
    later = make_plan(from_alpha_bar(table, time_offset=1), steps=10)
    assert later.timesteps.tolist() == (make_plan(schedule("linear"), steps=10).timesteps + 1).tolist()
    assert "over given alpha_bar, T = 1000" in later.title


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ([1.0, 0.9, 0.5], r"must lie in \[0, 1\), got 0.5 to 1: .*time_offset=1"),
        ([0.9, -0.1], r"must lie in \[0, 1\), got -0.1 to 0.9$"),
        ([0.1, 0.5, 0.9], "cleanest level first"),
        ([], "at least 2, got 0"),
        (0.5, r"got shape \[\]"),
        ([0.9, "a"], "must be numbers"),
    ],
)
def test_a_bad_alpha_bar_is_refused(table, says):
    with pytest.raises(Error, match=f"given alpha_bar.*{says}"):
        from_alpha_bar(table)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("predicts", ["v", "x0"])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmpp_2m", "euler"])
def test_zero_terminal_snr_is_sampled_from(solver, spacing, predicts):
    rescaled = (ALPHA - ALPHA[-1]) * ALPHA[0] / (ALPHA[0] - ALPHA[-1])  # Lin et al. 2305.08891, algorithm 1
    made = make_plan(from_alpha_bar(rescaled**2), steps=7, solver=solver, spacing=spacing, predicts=predicts)
    assert (made.alpha[0], made.sigma[0]) == (0, 1)
    for column in (made.rows.c_x, made.rows.c_out, made.rows.c_noise, made.rows.c_prev):
        assert np.isfinite(column).all()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"name": "sigmoid"}, "unknown schedule 'sigmoid'"),
        ({"T": 1000}, "object with a name"),
        ("linear", "object with a name"),
        ({"name": "linear", "T": 1}, "T must be a whole number of at least 2"),
        ({"name": "linear", "T": 10.0}, "T must be a whole number"),
        ({"name": "linear", "T": True}, "T must be a whole number"),
        ({"name": "linear", "betas": 3}, "does not take these parameters"),
        ({"name": "linear", "beta_end": 1.5}, "betas must lie in"),
        ({"name": "linear", "beta_start": 0.0}, "betas must lie in"),
        ({"name": "linear", "beta_end": 1.0}, "betas must lie in"),
        ({"name": "log_snr_cosine", "lambda_min": 3.0, "lambda_max": 3.0}, "lambda_min must be below"),
        ({"name": "log_snr_cosine", "lambda_min": float("nan")}, "lambda_min must be below"),
        ({"name": "log_snr_cosine", "lambda_min": -1e9}, "does not take these parameters"),
    ],
)
def test_bad_schedules_are_refused(data, says):
    with pytest.raises(Error, match=says):
        schedule_from_json(data)


def test_at_returns_table_entries_for_whole_positions():
    made = schedule("linear")
    index = np.array([999.0, 500.0, 3.0, 0.0])
    alpha, sigma = made.at(index)
    assert (alpha == made.alpha[index.astype(int)]).all()
    assert (sigma == made.sigma[index.astype(int)]).all()


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "log_snr_cosine"])
def test_at_interpolates_the_noise_ratio(name):
    made = schedule(name)
    alpha, sigma = made.at(np.array([998.25, 500.0, 0.75]))
    for k, (low, weight) in enumerate([(998, 0.25), (500, 0.0), (0, 0.75)]):
        ends = [float(made.sigma[low + j]) / float(made.alpha[low + j]) for j in (0, 1)]
        ratio = ends[0] * (1 - weight) + ends[1] * weight
        assert sigma[k] / alpha[k] == pytest.approx(ratio, rel=1e-12)
        assert alpha[k] ** 2 + sigma[k] ** 2 == pytest.approx(1.0, rel=1e-14)


def test_at_interpolates_tau_for_flow():
    alpha, sigma = schedule("flow", T=10).at(np.array([8.5, 0.25]))
    np.testing.assert_allclose(sigma, [0.95, 0.125], rtol=1e-14)
    np.testing.assert_allclose(alpha, [0.05, 0.875], rtol=1e-14)


@pytest.mark.skipif(not GOLDEN.is_file(), reason="the golden files are not in this checkout")
@pytest.mark.parametrize(("spacing", "name"), [("ddim", "ddim10_timesteps"), ("dit", "anc10_timesteps")])
def test_spacings_of_the_official_code(spacing, name):
    ascending = load_file(GOLDEN)[name]
    assert timesteps(spacing, 1000, len(ascending))[::-1].tolist() == ascending.tolist()


def by_exact_fractions(T, steps):
    """Official respacing "N" in exact arithmetic; Python rounds a Fraction half to even."""
    return [round(Fraction(T - 1, steps - 1) * i) for i in range(steps)][::-1]


@pytest.mark.parametrize(("T", "steps"), [(1000, 50), (1000, 250), (1000, 10), (1000, 1000), (100, 7)])
def test_dit_spacing(T, steps):
    assert timesteps("dit", T, steps).tolist() == by_exact_fractions(T, steps)


def test_dit_spacing_rounds_halves_to_even():
    assert timesteps("dit", 4, 3).tolist() == [3, 2, 0]  # 1.5 -> 2
    assert timesteps("dit", 6, 3).tolist() == [5, 2, 0]  # 2.5 -> 2
    # the official code adds the stride up in floats, so 499.5 arrives just below the half: exactly it would round to 500
    assert timesteps("dit", 1000, 999)[499] == 499
    assert by_exact_fractions(1000, 999)[499] == 500
    # 250 steps, as DiT is evaluated: the stride is 999 / 249 = 4.012
    assert timesteps("dit", 1000, 250)[:4].tolist() == [999, 995, 991, 987]


@pytest.mark.parametrize(("steps", "stride"), [(50, 20), (100, 10), (250, 4), (25, 40), (1000, 1), (48, 21)])
def test_ddim_spacing(steps, stride):
    assert timesteps("ddim", 1000, steps)[::-1].tolist() == list(range(0, 1000, stride))


def test_ddim_spacing_without_a_stride_names_what_would_do():
    counts = {-(-1000 // stride) for stride in range(1, 1001)}
    below, above = max(n for n in counts if n < 60), min(n for n in counts if n > 60)
    with pytest.raises(Error, match="no whole stride giving 60 of 1000 timesteps") as caught:
        timesteps("ddim", 1000, 60)
    assert str(below) in str(caught.value)
    assert str(above) in str(caught.value)


COUNTS = [2, 3, 7, 20, 50, 333, 1000]


@pytest.mark.parametrize("steps", COUNTS)
def test_leading_trailing_and_linspace_whole(steps):
    leading = [i * (1000 // steps) for i in range(steps)][::-1]
    trailing = [round(Fraction(1000) - Fraction(1000, steps) * i) - 1 for i in range(steps)]
    assert timesteps("leading", 1000, steps).tolist() == leading
    assert timesteps("trailing", 1000, steps).tolist() == trailing
    assert timesteps("linspace", 1000, steps).tolist() == np.linspace(0, 999, steps).round()[::-1].tolist()


@pytest.mark.parametrize("steps", COUNTS)
def test_linspace_fractional(steps):
    got = timesteps("linspace", 1000, steps, fractional=True)
    want = [float(Fraction(999 * i, steps - 1)) for i in range(steps)][::-1]
    np.testing.assert_allclose(got, want, rtol=1e-14)
    assert (timesteps("trailing", 1000, steps, fractional=True) == timesteps("trailing", 1000, steps)).all()


@pytest.mark.parametrize("spacing", ["dit", "ddim", "leading", "linspace"])
@pytest.mark.parametrize("fractional", [True, False])
def test_one_step_from_timestep_0_is_refused(spacing, fractional):
    with pytest.raises(Error, match=f"spacing '{spacing}' with 1 step keeps only timestep 0.*use 'trailing'"):
        timesteps(spacing, 1000, 1, fractional=fractional)
    assert timesteps("trailing", 1000, 1, fractional=fractional).tolist() == [999]
    assert timesteps([0], 1000, 1, fractional=fractional).tolist() == [0]  # asked for by itself


@pytest.mark.parametrize("steps", [1, 5, 20, 60])
def test_open_end_leaves_out_the_last_of_one_point_more(steps):
    leading = [i * (1000 // (steps + 1)) for i in range(steps + 1)][::-1][:-1]
    assert timesteps("leading", 1000, steps, open_end=True).tolist() == leading
    linspace = np.linspace(0, 999, steps + 1).round()[::-1][:-1].tolist()
    assert timesteps("linspace", 1000, steps, open_end=True).tolist() == linspace
    if steps > 1:
        assert (timesteps("dit", 1000, steps, open_end=True) == timesteps("dit", 1000, steps)).all()


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_open_end_visits_every_timestep_where_all_are_asked_for(spacing):
    assert timesteps(spacing, 1000, 1000, open_end=True).tolist() == list(range(999, -1, -1))


@pytest.mark.parametrize("spacing", ["dit", "ddim", "leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [2, 8, 40])
def test_every_spacing_falls_within_the_table(spacing, steps):
    got = timesteps(spacing, 1000, steps)
    assert got.shape == (steps,)
    assert got.dtype == np.float64
    assert (np.diff(got) < 0).all()
    assert got.min() >= 0
    assert got.max() <= 999


def test_given_timesteps_are_kept():
    assert timesteps([999, 500, 0], 1000, 3).tolist() == [999, 500, 0]
    assert timesteps([900.5, 0.25], 1000, 2, fractional=True).tolist() == [900.5, 0.25]


@pytest.mark.parametrize(
    ("spacing", "steps", "says"),
    [
        ("dit", 0, "steps must be a whole number from 1 to the schedule's 1000"),
        ("dit", 1001, "steps must be"),
        ("dit", 10.0, "steps must be"),
        ("dit", True, "steps must be"),
        ("dit", 1, "use 'trailing'"),
        ("karras", 10, "unknown spacing 'karras'"),
        ([999, 0], 3, "one per step"),
        ([[999, 0]], 2, "one per step"),
        ([0, 999], 2, "noisiest first"),
        ([5, 5], 2, "noisiest first"),
        ([1000, 0], 2, "must lie in 0..999"),
        ([5, -1], 2, "must lie in 0..999"),
        ([float("nan"), 0], 2, "must lie in 0..999"),
        ([10.5, 0], 2, "only 'euler' takes fractional"),
        (["a", "b"], 2, "a name or a list"),
    ],
)
def test_bad_spacings_are_refused(spacing, steps, says):
    with pytest.raises(Error, match=says):
        timesteps(spacing, 1000, steps)
