import ast
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from fastcfg import Error, Guidance, Interval, Sampler, make_plan, schedule
from fastcfg.guidance import scale_from_w, scale_table
from fastcfg.schedules import timesteps

SCALES = torch.tensor([1.0, 1.5, 4.0, 1.0, 7.25])


def predictions(dtype=torch.float64, channels=4):
    generator = torch.Generator().manual_seed(5)
    draw = [torch.randn(5, channels, 6, 3, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]
    return draw[0], draw[1] * 1.3 + 0.2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_combine_is_null_plus_s_times_the_difference(dtype):
    cond, null = predictions(dtype)
    got = Guidance().combine(cond, null, SCALES.to(dtype))
    assert got.dtype == dtype
    for row, s in enumerate(SCALES.tolist()):
        # as a weighted mean of the two, one value at a time in Python's floats
        for got_value, c, n in zip(*(t[row].flatten().tolist() for t in (got, cond, null)), strict=True):
            assert got_value == pytest.approx(s * c + (1 - s) * n, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_of_scale_1_are_the_conditional_prediction_to_the_bit(dtype, rescale):
    cond, null = predictions(dtype)
    got = Guidance(rescale=rescale).combine(cond, null, SCALES.to(dtype))
    assert torch.equal(got[SCALES == 1], cond[SCALES == 1])
    assert not torch.equal(got[SCALES != 1], cond[SCALES != 1])


def test_rows_of_scale_1_survive_a_null_prediction_that_is_not_finite():
    cond, null = predictions()
    null[0] = float("nan")
    assert torch.equal(Guidance(rescale=0.3).combine(cond, null, SCALES)[0], cond[0])


@pytest.mark.parametrize("w", [0.0, 0.3, 3.0])
def test_w_is_the_papers_form(w):
    cond, null = predictions()
    got = Guidance().combine(cond, null, torch.from_numpy(scale_table(scale_from_w(w), 1, 5)[0]))
    torch.testing.assert_close(got, (1 + w) * cond - w * null, rtol=1e-6, atol=1e-6)


def test_w_takes_rows():
    assert scale_table(scale_from_w([0.0, 0.5]), 3, 2).tolist() == [[1.0, 1.5]] * 3


@pytest.mark.parametrize("phi", [0.25, 0.7, 1.0])
def test_rescale_is_lin_et_al(phi):
    cond, null = predictions()
    got = Guidance(rescale=phi).combine(cond, null, SCALES.double())
    for row, s in enumerate(SCALES.tolist()):
        c, n = cond[row].numpy(), null[row].numpy()
        x = n + s * (c - n)
        matched = x * (c.std(ddof=1) / x.std(ddof=1))  # unbiased, over the whole sample
        want = phi * matched + (1 - phi) * x
        np.testing.assert_allclose(got[row].numpy(), c if s == 1 else want, rtol=1e-12)
    if phi == 1.0:
        torch.testing.assert_close(got.std((1, 2, 3)), cond.std((1, 2, 3)), rtol=1e-12, atol=0)


def of_diffusers(function):
    """A function of diffusers' Stable Diffusion pipeline, read from its source: importing it would need transformers."""
    found = importlib.util.find_spec("diffusers")
    if found is None:
        pytest.skip("diffusers is not installed")
    path = Path(found.origin).parent / "pipelines" / "stable_diffusion" / "pipeline_stable_diffusion.py"
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    names = {}
    exec(compile(tree, str(path), "exec"), names)
    return names[function]


@pytest.mark.parametrize("phi", [0.0, 0.3, 1.0])
def test_rescale_is_that_of_diffusers(phi):
    rescale_noise_cfg = of_diffusers("rescale_noise_cfg")
    cond, null = predictions(torch.float32)
    scale = torch.full((5,), 5.0)
    theirs = rescale_noise_cfg(null + 5.0 * (cond - null), cond, guidance_rescale=phi)
    torch.testing.assert_close(Guidance(rescale=phi).combine(cond, null, scale), theirs, rtol=1e-6, atol=1e-6)


class TwoConstants(torch.nn.Module):
    """eps is 1 for labels and 0 for null (label 1): what a step makes of a channel shows whether it was guided."""

    def forward(self, x, t, y):
        return (y == 0).to(x.dtype).view(-1, 1, 1, 1).expand_as(x).contiguous()


@pytest.mark.parametrize(("channels", "guided"), [(None, 4), (1, 1), (3, 3), (4, 4)])
def test_only_the_first_channels_are_guided(channels, guided):
    sampler = Sampler(
        TwoConstants().eval(),
        steps=1,
        spacing="trailing",
        schedule="linear",
        null_label=1,
        shape=(4, 2, 2),
        guidance_channels=channels,
        batch=1,
        device="cpu",
        engine="reference",
    )
    got = sampler([0], 3.0, x_T=torch.zeros(1, 4, 2, 2))[0, :, 0, 0]
    alpha, sigma = sampler.plan.alpha[0], sampler.plan.sigma[0]
    want = [-sigma / alpha * (3.0 if c < guided else 1.0) for c in range(4)]  # x0 of x = 0
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-6)


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (None, None),
        ("100:261", Interval(100, 261)),
        ("timestep:1:2.5", Interval(1, 2.5)),
        ("sigma:0.34:1.02", Interval(0.34, 1.02, "sigma")),
        ((100, 261), Interval(100, 261, "timestep")),
        ((1 / 3, 1234567.5), Interval(1 / 3, 1234567.5)),
        ([5, 5], Interval(5, 5)),
        (np.array([3, 4]), Interval(3, 4)),
        (Interval(0, 1, "sigma"), Interval(0, 1, "sigma")),
    ],
)
def test_interval_parse(value, want):
    assert Interval.parse(value) == want
    assert Guidance(interval=value).interval == want
    assert Interval.parse(None if want is None else str(want)) == want


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("100", "want two timesteps"),
        ("1:2:3:4", "want two timesteps"),
        ("a:b", "want two timesteps"),
        ("", "want two timesteps"),
        (":", "want two timesteps"),
        ((1, 2, 3), "want two timesteps"),
        (7, "want two timesteps"),
        ((None, 1), "want two timesteps"),
        ("lambda:1:2", "unit must be"),
        ((261, 100), "the lower bound comes first"),
        ("sigma:1:1", "the lower bound comes first"),
        ((-1, 5), "at least 0"),
        ("nan:5", "at least 0"),
    ],
)
def test_bad_intervals_are_refused(value, says):
    with pytest.raises(Error, match=says):
        Interval.parse(value)


@pytest.mark.parametrize("bounds", [(True, 5), (0, True), ("1", 5)])
def test_bounds_that_are_no_numbers_are_refused(bounds):
    with pytest.raises(Error, match="bounds must be numbers"):
        Interval(*bounds)


def test_the_papers_dit_interval_in_sigmas_is_timesteps_100_to_261():
    """Kynkaanniemi et al.: (0.34, 1.02] of DiT's linear schedule."""
    linear = schedule("linear")
    positions = np.arange(1000.0)[::-1]
    ratio = linear.noise_ratio[::-1]
    by_sigma = positions[Interval(0.34, 1.02, "sigma").contains(positions, ratio)]
    by_timestep = positions[Interval(100, 261).contains(positions, ratio)]
    assert by_sigma.tolist() == by_timestep.tolist() == list(range(261, 99, -1))


def test_interval_bounds():
    positions, ratio = np.array([30.0, 20.0, 10.0, 0.0]), np.array([3.0, 2.0, 1.0, 0.1])
    assert Interval(10, 20).contains(positions, ratio).tolist() == [False, True, True, False]  # both ends in
    assert Interval(1, 2, "sigma").contains(positions, ratio).tolist() == [False, True, False, False]  # (lo, hi]
    assert Interval(0, float("inf"), "sigma").contains(positions, ratio).all()


@pytest.mark.parametrize("interval", ["100:261", "sigma:0.34:1.02"])
def test_a_plan_marks_the_steps_inside(interval):
    plan = make_plan(schedule("linear"), steps=250, guidance=Guidance(interval=interval))
    inside = [100 <= t <= 261 for t in timesteps("dit", 1000, 250)]
    assert plan.guided.tolist() == inside
    assert 0 < sum(inside) < 250


STEPS, ROWS = 3, 2


@pytest.mark.parametrize(
    ("scale", "want"),
    [
        (1.5, [[1.5, 1.5]] * 3),
        (2, [[2, 2]] * 3),
        (np.float64(3.5), [[3.5, 3.5]] * 3),
        (torch.tensor(2.5), [[2.5, 2.5]] * 3),
        ([1.0, 4.0], [[1.0, 4.0]] * 3),
        ((2.0,) * 2, [[2.0, 2.0]] * 3),
        (torch.tensor([1.5, 2.5]).bfloat16(), [[1.5, 2.5]] * 3),
        (torch.tensor([1.5, 2.5], requires_grad=True), [[1.5, 2.5]] * 3),
        ([[1.0], [2.0], [3.0]], [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]),
        (np.array([[1, 2], [3, 4], [5, 6]]), [[1, 2], [3, 4], [5, 6]]),
    ],
)
def test_scale_tables(scale, want):
    table = scale_table(scale, STEPS, ROWS)
    assert table.dtype == np.float32
    assert table.tolist() == want


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        ([1.0, 2.0, 3.0], "3 values arrived for 2 rows"),
        ([1.0], "1 values arrived for 2 rows"),
        ([[1.0, 2.0]], r"\[3, 1\] or \[3, 2\], got \[1, 2\]"),
        ([[1.0], [2.0]], r"got \[2, 1\]"),
        ([[1.0] * 3] * 3, r"got \[3, 3\]"),
    ],
)
def test_scale_tables_that_do_not_fit_are_refused(scale, says):
    with pytest.raises(Error, match=says):
        scale_table(scale, STEPS, ROWS)


def test_a_scale_for_some_of_the_rows_is_refused():
    with pytest.raises(Error, match=r"\[3, 1\] or \[3, 4\], got \[3, 2\]"):
        scale_table([[1.0, 2.0]] * 3, 3, 4)


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        (0.99, "at least 1"),
        (-2, "at least 1"),
        ([2.0, 0.5], "at least 1"),
        (float("nan"), "finite"),
        ([1.0, float("inf")], "finite"),
        (1e39, "finite"),  # it would be inf in the float32 table
        ("4", "a number or numbers"),
        (True, "a number or numbers"),
        ([True, False], "a number or numbers"),
        (torch.tensor([True, True]), "a number or numbers"),
        (None, "a number or numbers"),
        ([[1.0], [2.0, 3.0]], "a number or numbers"),
        (2 + 1j, "a number or numbers"),
        ([], "got shape"),
        (np.ones((2, 2, 2)), "got shape"),
    ],
)
def test_bad_scales_are_refused(scale, says):
    with pytest.raises(Error, match=says):
        scale_table(scale, STEPS, ROWS)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rescale": -0.1}, r"rescale must be a number in \[0, 1\]"),
        ({"rescale": 1.01}, "rescale"),
        ({"rescale": float("nan")}, "rescale"),
        ({"rescale": "0.7"}, "rescale"),
        ({"rescale": True}, "rescale"),
        ({"channels": 0}, "guidance_channels"),
        ({"channels": 3.0}, "guidance_channels"),
        ({"channels": True}, "guidance_channels"),
        ({"interval": "5:1"}, "interval"),
    ],
)
def test_bad_guidance_is_refused(settings, says):
    with pytest.raises(Error, match=says):
        Guidance(**settings)


@pytest.mark.parametrize(("w", "says"), [(-0.1, "w must be finite and at least 0"), (float("nan"), "w must be"), ("", "w")])
def test_bad_w_is_refused_by_its_own_name(w, says):
    with pytest.raises(Error, match=says):
        scale_from_w(w)
