"""`guided_step` against the reference engine's own arithmetic, step by step, for every path and for rows apart in time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import poisoned, randn, relative_error

from fastcfg import Error, Guidance, Interval, make_plan, schedule
from fastcfg.engines.base import Request
from fastcfg.engines.reference import ReferenceEngine
from fastcfg.kernels._step import step_table
from fastcfg.kernels.guided_step import guided_step, guided_step_cost, guided_step_ref, moments_shape
from fastcfg.models.denoiser import Denoiser

LINEAR = schedule("linear")
PLANS = {
    "ddim": {"solver": "ddim"},
    "ddim-eta": {"solver": "ddim", "eta": 0.7},
    "ddim-clip": {"solver": "ddim", "clip": True},
    "ddim-keep-eps": {"solver": "ddim", "clip": "keep_eps", "eta": 0.3},
    "ddpm": {"solver": "ddpm"},
    "ddpm-large": {"solver": "ddpm", "variance": "fixed_large", "clip": True},
    "ddpm-learned": {"solver": "ddpm", "variance": "learned_range"},
    "dpmpp": {"solver": "dpmpp_2m", "spacing": "leading"},
    "dpmpp-clip": {"solver": "dpmpp_2m", "spacing": "leading", "clip": True},
    "euler": {"solver": "euler", "spacing": "linspace"},
    "v": {"solver": "ddim", "predicts": "v", "eta": 1.0},
}


class Toy(torch.nn.Module):
    """Any function of (x, t, y) whose two halves differ; `wide` adds the variance's channels."""

    def __init__(self, wide):
        super().__init__()
        self.wide, self.weight = wide, torch.nn.Parameter(torch.tensor(0.9))

    def forward(self, x, t, y):
        bend = (0.3 * y + 0.001 * t).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        eps = torch.sin(self.weight * x + bend)
        return torch.cat([eps, torch.cos(3 * x + bend)], dim=1) if self.wide else eps


def run_with_kernel(plan, module, request, model_dtype=torch.float32):
    """The reference engine's loop with `guided_step` in place of everything after the forward."""
    B = len(request.labels)
    coef, seeds, indices = step_table(plan), torch.from_numpy(request.seeds), torch.from_numpy(request.indices)
    noise = {"noise": request.noise} if request.noise is not None else {"seeds": seeds, "indices": indices}
    x = request.x_T * plan.init_scale
    history = poisoned(*x.shape) if plan.needs_history else None  # never read before it is written
    labels = torch.cat([request.labels, torch.full_like(request.labels, 10)])
    model_input = torch.cat([x, x]).to(model_dtype)
    for i in range(plan.steps):
        halves = 2 if plan.guided[i] else 1
        t = torch.full((halves * B,), plan.timesteps[i])
        guided_step(
            module(model_input[: halves * B], t, labels[: halves * B]), x, coef, request.scale,
            torch.full((B,), i, dtype=torch.int32), x0_prev=history, channels=plan.guidance.channels,
            rescale=plan.guidance.rescale, clip=plan.clip, learned=plan.learned_variance, model_input=model_input,
            out=x, **(noise if plan.needs_noise else {}),
        )  # fmt: skip
        assert torch.equal(model_input, torch.cat([x, x]).to(model_dtype))
    return x


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(PLANS)),
    B=st.integers(1, 3),
    shape=st.sampled_from([(1, 1, 7), (3, 5, 3), (4, 8, 8), (4, 1, 300)]),
    channels=st.sampled_from([None, 1, 3]),
    rescale=st.sampled_from([0.0, 0.7]),
    interval=st.sampled_from([None, Interval(200, 800)]),
    drawn=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_the_reference_engine(name, B, shape, channels, rescale, interval, drawn, seed):
    if channels is not None and channels > shape[0]:
        channels = None
    guidance = Guidance(interval=interval, rescale=rescale, channels=channels)
    plan = make_plan(LINEAR, steps=4, guidance=guidance, **PLANS[name])
    module = Toy(wide=plan.learned_variance).eval()
    denoiser = Denoiser(module, shape, null_label=10, num_classes=10, schedule=LINEAR)
    rng = np.random.default_rng(seed)
    request = Request(
        labels=torch.from_numpy(rng.integers(0, 10, B)),
        scale=torch.from_numpy(rng.choice([1.0, 1.5, 4.0], (4, B)).astype(np.float32)),
        guided=plan.guided,
        seeds=rng.integers(-(2**63), 2**63, B),
        indices=rng.integers(0, 2**40, B),
        x_T=randn(B, *shape, seed=seed),
        noise=None if drawn else randn(4, B, *shape, seed=seed + 1),
    )
    want = ReferenceEngine(denoiser, plan, torch.device("cpu"), torch.float32).run(request)
    with torch.no_grad():
        got = run_with_kernel(plan, module, request)
    # x is fp32 here and fp64 there, and x0 = (x - sigma eps) / alpha magnifies rounding 160 times at the noisiest step
    assert relative_error(got, want) < 1e-4


def inputs(B=3, shape=(4, 6, 5), out_channels=8, halves=2, dtype=torch.float32):
    return randn(halves * B, out_channels, *shape[1:], seed=1, dtype=dtype), randn(B, *shape, seed=2)


def learned_plan(steps=6):
    guidance = Guidance(interval=Interval(300, 1000))
    return make_plan(LINEAR, steps=steps, solver="ddpm", variance="learned_range", guidance=guidance, clip=True)


SCALE = torch.tensor([[1.0, 4.0, 1.5]]).expand(6, 3).contiguous()
SEEDS, INDICES = torch.tensor([3, 3, -9]), torch.tensor([0, 1, 2**33])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rescale", [0.0, 0.4])
def test_rows_at_different_steps(dtype, rescale):
    model_out, x = inputs(dtype=dtype)
    options = {"seeds": SEEDS, "indices": INDICES, "channels": 3, "clip": True, "learned": True, "rescale": rescale}
    step = torch.tensor([0, 5, 2], dtype=torch.int32)  # the noisiest, the last (no noise, unguided), one inside
    coef = step_table(learned_plan())
    got = guided_step(model_out, x, coef, SCALE, step, out=poisoned(*x.shape), **options)
    want = guided_step_ref(model_out.double(), x.double(), coef, SCALE, step, **options)
    assert relative_error(got, want) < 2e-6
    for b in range(3):  # alone, a row has the same bits
        rows = [b, b + 3]
        alone = guided_step(
            model_out[rows], x[b : b + 1], coef, SCALE[:, b : b + 1].contiguous(), step[b : b + 1],
            **options | {"seeds": SEEDS[b : b + 1], "indices": INDICES[b : b + 1]},
        )  # fmt: skip
        assert torch.equal(alone[0], got[b])


def test_scale_1_is_the_conditional_prediction_to_the_bit():
    model_out, x = inputs()
    model_out[3:] = float("nan")  # the null half of rows that need none is not even read
    coef, step = step_table(learned_plan()), torch.zeros(3, dtype=torch.int32)
    ones = torch.ones(6, 3)
    got = guided_step(model_out, x, coef, ones, step)
    assert torch.equal(got, guided_step(model_out[:3], x, coef, ones, step))
    outside = torch.full((3,), 5, dtype=torch.int32)
    assert torch.equal(
        guided_step(model_out, x, coef, 4 * ones, outside), guided_step(model_out[:3], x, coef, 4 * ones, outside)
    )


@pytest.mark.parametrize("clip", [False, True])
def test_what_is_not_a_number_stays_so(clip):
    model_out, x = inputs()
    model_out[1, 2, 3, 4] = float("nan")
    got = guided_step(model_out, x, step_table(learned_plan()), SCALE, torch.zeros(3, dtype=torch.int32), clip=clip)
    assert got.isnan().nonzero().tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("function", [guided_step, guided_step_ref])
def test_noise_of_a_step_that_adds_none_is_not_read(function):
    model_out, x = inputs()
    coef, step = step_table(learned_plan()), torch.full((3,), 5, dtype=torch.int32)
    got = function(model_out, x, coef, SCALE, step, noise=poisoned(6, *x.shape))
    assert torch.equal(got, function(model_out, x, coef, SCALE, step))


def test_rescale_over_several_chunks():
    """9,000 guided elements are three chunks of moments, far from mean 0, the last one short."""
    model_out, x = randn(4, 2, 90, 50, seed=1) + 20, randn(2, 2, 90, 50, seed=2)
    coef, step = step_table(learned_plan()), torch.zeros(2, dtype=torch.int32)
    assert moments_shape(x) == (2, 3, 4)
    assert moments_shape(x, 1) == (2, 2, 4)
    got = guided_step(model_out, x, coef, SCALE[:, 1:].contiguous(), step, rescale=0.7, moments=poisoned(2, 3, 4))
    want = guided_step_ref(model_out.double(), x.double(), coef, SCALE[:, 1:].contiguous(), step, rescale=0.7)
    assert relative_error(got, want) < 2e-6


def test_writes_nothing_beyond_its_rows():
    model_out, x = inputs()
    frame = poisoned(5, *x.shape[1:])
    guided_step(model_out, x, step_table(learned_plan()), SCALE, torch.zeros(3, dtype=torch.int32), out=frame[1:4])
    assert frame[[0, 4]].isnan().all()
    assert not frame[1:4].isnan().any()


@pytest.mark.parametrize(
    "change",
    [
        {"model_out": torch.zeros(5, 8, 6, 5)},
        {"model_out": torch.zeros(6, 7, 6, 5)},
        {"model_out": torch.zeros(6, 4, 6, 5), "learned": True},
        {"x": torch.zeros(3, 4, 6, 5).half()},
        {"x": torch.zeros(3, 4, 5, 6).transpose(2, 3)},
        {"coef": torch.zeros(6, 9)},
        {"scale": torch.ones(6, 2)},
        {"step": torch.zeros(3, dtype=torch.int64)},
        {"channels": 5},
        {"channels": 0},
        {"rescale": 1.5},
        {"rescale": -0.1},
        {"seeds": SEEDS},
        {"seeds": SEEDS, "indices": INDICES.int()},
        {"seeds": SEEDS[:2], "indices": INDICES},
        {"noise": torch.zeros(3, 4, 6, 5)},
        {"noise": torch.zeros(6, 3, 4, 6, 5), "seeds": SEEDS, "indices": INDICES},
        {"model_input": torch.zeros(4, 4, 6, 5)},
        {"moments": torch.zeros(3, 2, 4), "rescale": 0.5},
        {"x0_prev": torch.zeros(3, 4, 6, 4)},
    ],
)
def test_refuses_what_does_not_fit(change):
    model_out, x = inputs()
    arguments = {"model_out": model_out, "x": x, "coef": step_table(learned_plan()), "scale": SCALE}
    with pytest.raises(Error):
        guided_step(**arguments | {"step": torch.zeros(3, dtype=torch.int32)} | change)


def test_cost_is_the_hand_count():
    """DiT-XL/2 at 256 px, one guided sample in bf16: 4096 values, eps of both halves read, x read and written."""
    model_out, x = torch.empty(2, 4, 32, 32, dtype=torch.bfloat16), torch.empty(1, 4, 32, 32)
    assert guided_step_cost(model_out, x) == (4096 * (2 * 2 + 2 * 4), 4096 * 11)
    assert guided_step_cost(model_out, x, channels=3).bytes == 4096 * 2 + 3072 * 2 + 4096 * 8
    assert guided_step_cost(model_out[:1], x) == (4096 * (2 + 8), 4096 * 8)
    assert guided_step_cost(model_out, x, learned=True).bytes == 4096 * (3 * 2 + 8)
    assert guided_step_cost(model_out, x, history=True, given_noise=True).bytes == 4096 * (2 * 2 + 2 * 8 + 4)
    assert guided_step_cost(model_out, x, model_input=model_out).bytes == 4096 * (2 * 2 + 8 + 2 * 2)
    # the moments read both halves once more, and take a mean and a square of each
    assert guided_step_cost(model_out, x, rescale=0.7) == (4096 * (4 * 2 + 8), 4096 * (11 + 7))
