import math
import warnings

import numpy as np
import pytest
import torch

from fastcfg import Error, Guidance, Interval, make_plan, schedule
from fastcfg.plan import Plan
from fastcfg.schedules import timesteps

LINEAR = schedule("linear")


def plan(steps=10, noise_schedule=LINEAR, **settings) -> Plan:
    return make_plan(noise_schedule, steps=steps, **settings)


def printed(made):
    """(title, columns by name as printed) of str(plan)."""
    title, header, *lines = str(made).splitlines()
    cells = [line.split() for line in lines]
    assert all(len(row) == len(header.split()) for row in cells)
    return title, dict(zip(header.split(), zip(*cells, strict=True), strict=True))


@pytest.mark.parametrize("number", [np.float32, np.float64, torch.tensor])
def test_numbers_of_other_libraries_are_numbers(number):
    value, low, high = float(number(0.1)), float(number(100)), float(number(900.5))
    theirs = plan(eta=number(0.1), guidance=Guidance(rescale=number(0.1), interval=Interval(number(100), number(900.5))))
    ours = plan(eta=value, guidance=Guidance(rescale=value, interval=Interval(low, high)))
    assert str(theirs) == str(ours)
    assert theirs.guidance == ours.guidance
    assert repr(theirs.guidance) == repr(ours.guidance)
    assert np.array_equal(theirs.rows.c_noise, ours.rows.c_noise)


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_prints_a_line_a_step(steps):
    made = plan(steps, spacing="trailing", eta=0.5)
    title, columns = printed(made)
    assert f"{steps} steps of ddim, eta 0.5 (trailing) over linear, T = 1000, predicting eps" in title
    assert columns["step"] == tuple(str(i) for i in range(steps))
    assert [float(t) for t in columns["t"]] == timesteps("trailing", 1000, steps).tolist()
    assert columns["guided"] == ("yes",) * steps
    for name, values in [("c_x", made.rows.c_x), ("c_out", made.rows.c_out), ("alpha_bar", made.alpha[:-1] ** 2)]:
        np.testing.assert_allclose([float(v) for v in columns[name]], values, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "shown", "hidden"),
    [
        ({}, {"c_x", "c_out"}, {"c_x0", "c_prev", "c_noise"}),
        ({"eta": 0.3}, {"c_x", "c_out", "c_noise"}, {"c_x0", "c_prev"}),
        ({"clip": True}, {"c_x", "c_x0"}, {"c_out", "c_prev", "c_noise"}),
        ({"clip": "keep_eps"}, {"c_out", "c_x0"}, {"c_x", "c_prev", "c_noise"}),
        ({"solver": "dpmpp_2m"}, {"c_x", "c_out", "c_prev"}, {"c_x0", "c_noise"}),
    ],
)
def test_prints_only_the_columns_that_act(settings, shown, hidden):
    title, columns = printed(plan(**settings))
    assert shown <= set(columns)
    assert not hidden & set(columns)
    assert ("clip" in title) == ("clip" in settings)


def test_prints_which_steps_are_guided():
    _, columns = printed(plan(10, guidance=Guidance(interval=(200, 600))))
    assert columns["guided"] == tuple("yes" if 200 <= float(t) <= 600 else "no" for t in columns["t"])
    assert set(columns["guided"]) == {"yes", "no"}


def test_an_interval_is_in_the_timesteps_that_the_model_is_given():
    """Flow's are one above the table's positions."""
    made = plan(1000, schedule("flow"), solver="euler", predicts="flow", guidance=Guidance(interval=(100, 261)))
    assert made.timesteps[made.guided].tolist() == list(range(261, 99, -1))


@pytest.mark.parametrize(
    ("interval", "settings", "says"),
    [
        ("0.2:0.8", {}, r"interval 0\.2:0\.8 holds none of the plan's 10 steps, from t = 999 to 0: want a wider one"),
        ((5000, 6000), {}, "interval 5000:6000 holds none"),
        ((1, 110), {}, "interval 1:110 holds none"),
        ((1, 2), {"steps": 1, "spacing": [500]}, "the plan's 1 steps, from t = 500 to 500"),
        ((0, 0.5), {"noise_schedule": schedule("flow"), "solver": "euler", "predicts": "flow"}, "from t = 1000 to 1"),
        ("sigma:200:300", {}, r"interval sigma:200:300 holds none .*, from sigma / alpha = 157\.4\d* to 0\.01"),
    ],
)
def test_an_interval_without_a_step_is_refused(interval, settings, says):
    with pytest.raises(Error, match=says):
        plan(**settings, guidance=Guidance(interval=interval))


@pytest.mark.parametrize(("clip", "clips"), [(False, False), (True, True), ("keep_eps", True)])
def test_every_way_of_clipping_clips(clip, clips):
    assert plan(clip=clip).clip is clips


def test_clipping_goes_by_equality():
    """Text that is read from a file is no constant of the source's."""
    assert plan(clip="".join(["keep", "_eps"])).clip


def test_a_flow_plan_starts_at_alpha_0_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow = schedule("flow")
        made = plan(5, flow, solver="euler", spacing="linspace", predicts="flow", guidance=Guidance(interval="sigma:0:2"))
        assert (flow.noise_ratio[-1], made.guided[0]) == (math.inf, False)


@pytest.mark.parametrize(
    ("settings", "noise", "history"),
    [
        ({"solver": "ddim"}, False, False),
        ({"solver": "ddim", "eta": 0.01}, True, False),
        ({"solver": "ddpm"}, True, False),
        ({"solver": "ddpm", "variance": "fixed_large"}, True, False),
        ({"solver": "dpmpp_2m"}, False, True),
        ({"solver": "dpmpp_2m", "steps": 2}, False, False),  # the first step and the one to sigma = 0 are of order 1
        ({"solver": "dpmpp_2m", "steps": 3}, False, True),
        ({"solver": "euler"}, False, False),
        ({"solver": "ddpm", "steps": 1, "spacing": "trailing"}, False, False),  # the last step adds no noise
    ],
)
def test_needs_noise_and_history(settings, noise, history):
    made = plan(**settings)
    assert (made.needs_noise, made.needs_history) == (noise, history)


@pytest.mark.parametrize(
    ("solver", "spacing", "whole"),
    [("ddim", "linspace", True), ("euler", "linspace", False), ("euler", "leading", True), ("dpmpp_2m", "linspace", True)],
)
def test_whole_timesteps(solver, spacing, whole):
    assert plan(7, solver=solver, spacing=spacing).whole_timesteps is whole


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmpp_2m", "euler"])
@pytest.mark.parametrize("spacing", ["dit", "ddim", "leading", "trailing", "linspace", [900, 400, 30]])
def test_levels_are_the_schedules_and_end_at_0(solver, spacing):
    steps = 3 if isinstance(spacing, list) else 8
    made = plan(steps, solver=solver, spacing=spacing)
    assert made.steps == len(made.timesteps) == steps
    ratio = np.interp(made.timesteps, np.arange(1000), LINEAR.noise_ratio)
    np.testing.assert_allclose(made.sigma[:-1] / made.alpha[:-1], ratio, rtol=1e-12)
    assert (made.alpha[-1], made.sigma[-1]) == (1.0, 0.0)
    assert (made.clip, made.learned_variance) == (False, False)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_dpmpp_2m_leaves_out_the_last_of_one_point_more(spacing):
    """As diffusers lays it out: the point left out is t = 0, so sigma = 0 follows a level well above it."""
    points = {"leading": np.arange(11) * (1000 // 11), "linspace": np.linspace(0, 999, 11).round()}[spacing]
    assert plan(10, solver="dpmpp_2m", spacing=spacing).timesteps.tolist() == points[:0:-1].tolist()
    assert plan(10, solver="ddim", spacing=spacing).timesteps[-1] == 0


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"solver": "ddim"}, 1.0),
        ({"solver": "ddpm", "spacing": "leading"}, 1.0),
        ({"solver": "euler", "spacing": "leading"}, 1.0),
        # diffusers starts at z times the largest sigma / alpha, and scales by 1 / sqrt(ratio^2 + 1) = alpha
        ({"solver": "euler", "spacing": "linspace"}, math.sqrt(1 - LINEAR.alpha_bar[999])),
        ({"solver": "euler", "spacing": "trailing"}, math.sqrt(1 - LINEAR.alpha_bar[999])),
    ],
)
def test_start(settings, scale):
    assert plan(**settings).init_scale == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("solver", ["ddim", "euler"])
def test_timesteps_may_be_an_array(solver):
    array, given = (plan(2, solver=solver, spacing=kind([900, 10])) for kind in (np.array, list))
    assert str(array) == str(given)
    assert array.init_scale == given.init_scale


def test_flow_gives_the_model_T_tau():
    made = plan(5, schedule("flow", T=10), solver="euler", spacing="linspace", predicts="flow")
    np.testing.assert_allclose(made.timesteps, 10 * made.sigma[:-1], rtol=1e-12)
    assert made.timesteps[0] == 10
    assert made.init_scale == 1.0


def test_learned_variance_is_marked():
    made = plan(solver="ddpm", variance="learned_range")
    assert made.learned_variance
    assert made.rows.c_noise.tolist() == [1.0] * 9 + [0.0]
    assert (made.rows.log_var_min <= made.rows.log_var_max + 1e-12)[:-1].all()


@pytest.mark.parametrize("predicts", ["eps", "v", "x0"])
@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmpp_2m", "euler"])
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "log_snr_cosine"])
@pytest.mark.parametrize("steps", [2, 1000])
def test_every_coefficient_is_finite(name, solver, predicts, steps):
    made = plan(steps, schedule(name), solver=solver, predicts=predicts)
    for field in ("x0_x", "x0_out", "c_x", "c_out", "c_x0", "c_prev", "c_noise"):
        assert np.isfinite(getattr(made.rows, field)).all(), field


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"solver": "heun"}, "unknown solver 'heun': known are ddim, ddpm, dpmpp_2m, euler"),
        ({"predicts": "score"}, "unknown prediction 'score'"),
        ({"predicts": "flow"}, "go together"),
        ({"noise_schedule": schedule("flow")}, "go together"),
        ({"noise_schedule": schedule("flow"), "predicts": "flow"}, "sampled with solver 'euler'"),
        ({"eta": -0.1}, r"eta must be a number in \[0, 1\]"),
        ({"eta": 1.1}, "eta must be"),
        ({"eta": float("nan")}, "eta must be"),
        ({"eta": "1"}, "eta must be"),
        ({"eta": True}, "eta must be"),
        ({"eta": 0.5, "solver": "ddpm"}, "has no eta"),
        ({"variance": "learned"}, "unknown variance 'learned'"),
        ({"variance": "fixed_large"}, "has no choice of variance"),
        ({"clip": "x0"}, "clip must be False, True or 'keep_eps'"),
        ({"clip": 1}, "clip must be"),
        ({"clip": 0}, "clip must be"),
        ({"clip": None}, "clip must be"),
        ({"steps": 0}, "steps must be"),
        ({"noise_schedule": "linear"}, "schedule must be a fastcfg.Schedule, got 'linear'"),
    ],
)
def test_bad_plans_are_refused(settings, says):
    with pytest.raises(Error, match=says):
        plan(**settings)
