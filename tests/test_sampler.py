import copy
import math
import pickle
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fastcfg import ClassifierGuidance, Denoiser, DiT, Error, Sampler
from fastcfg.engines.workers import one_thread
from fastcfg.models.denoiser import as_denoiser
from fastcfg.noise import INITIAL_STEP, normal

CLASSES = 5
SHAPE = (4, 4, 4)


def small_dit(seed=0, **changes):
    """A DiT whose every weight is random: as initialised, its output is zero."""
    settings = {"input_size": 4, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "depth": 2, "num_heads": 2}
    model = DiT(**(settings | {"num_classes": CLASSES, "learn_sigma": False} | changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.15, generator=generator)
    return model


def sampler_of(model, **settings):
    return Sampler(model, **({"steps": 4, "batch": 3, "device": "cpu", "engine": "reference"} | settings))


class Counting(nn.Module):
    """Passes calls on, and keeps how many rows each had, with their timesteps and labels."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, []

    def forward(self, x, t, y):
        self.calls.append(SimpleNamespace(rows=len(x), t=t.clone(), y=y.clone()))
        return self.inner(x, t, y)


def counting_sampler(**settings):
    module = Counting(small_dit()).eval()
    sampler = sampler_of(module, **({"schedule": "linear", "null_label": CLASSES, "shape": SHAPE} | settings))
    module.calls.clear()  # the trial call
    return sampler, module.calls


@pytest.mark.parametrize("foreign", [False, True])
def test_torchs_default_device_does_not_matter(foreign):
    """A program sets it to its GPU, and may sample on the CPU beside it; here it is meta, from which no value comes back."""

    described = {"schedule": "linear", "null_label": CLASSES, "shape": SHAPE} if foreign else {}
    module, x, t = Counting(small_dit()).eval() if foreign else small_dit(), torch.ones(1, *SHAPE), torch.tensor([500])

    def results():
        sampler = sampler_of(module, eta=1.0, **described)
        return sampler(LABELS[:3], 3.0), sampler.predict(x, t, None), sampler.explain().flops

    want = results()
    with torch.device("meta"):
        got = results()
    assert all(map(torch.equal, got[:2], want[:2]))
    assert got[2] == want[2] > 0


LABELS = [0, 3, 1, 4, 4, 2, 0, 1]
ROW_SCALES = torch.tensor([4.0, 1.0, 2.0, 4.0, 7.5, 1.0, 1.5, 3.0])
# The variants' widths are multiples of 32. torch's CPU kernels end a tensor's odd elements (those past a multiple of two
# vector registers) with scalar code whose SiLU and GELU round differently, so at other widths the place in the batch shows.
KINDS = [
    {},
    {"batch": 1},
    {"batch": 5, "eta": 0.7},
    {"solver": "ddpm", "clip": True},
    {"solver": "dpmpp_2m", "rescale": 0.6, "batch": 8},
    {"solver": "euler", "spacing": "linspace", "guidance_channels": 3},
    {"interval": (200, 700), "batch": 2},
    {"dtype": "bf16"},
]
VARIANTS = [{}, {"learn_sigma": True}, {"hidden_size": 64, "patch_size": 1, "num_heads": 1}, {"input_size": 6}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_bits_do_not_depend_on_the_other_rows(variant, kind):
    sampler = sampler_of(small_dit(**variant), **kind)
    together = sampler(LABELS, ROW_SCALES, seeds=11)
    assert torch.isfinite(together).all()
    assert len({tuple(row.flatten().tolist()) for row in together}) == len(LABELS)
    assert torch.equal(sampler(LABELS, ROW_SCALES, seeds=11), together)  # again
    orders = [[7, 6, 5, 4, 3, 2, 1, 0], [4, 1], [2, 2, 2, 6, 0], [3, 5, 7, 1, 0, 2, 4, 6, 3]]
    for order in [[row] for row in range(len(LABELS))] + orders:
        got = sampler([LABELS[i] for i in order], ROW_SCALES[order], seeds=11, indices=order)
        assert torch.equal(got, together[order]), order


@pytest.mark.parametrize("neighbours", [[2, 2], [4, 0]])
def test_bits_do_not_depend_on_what_the_neighbours_are(neighbours):
    sampler = sampler_of(small_dit())
    alone = sampler([1], 3.0, seeds=[5])
    for scale in ([3.0, 3.0, 3.0], [3.0, 9.0, 1.0]):
        assert torch.equal(sampler([1, *neighbours], scale, seeds=[5, 8, 9])[:1], alone)


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_a_batch_that_is_full_or_not_gives_the_plain_loop(batch):
    """Against a loop written out here: DDIM in float64 on a float64 module."""
    model = small_dit().double()
    sampler = sampler_of(model, batch=batch, steps=5, spacing="trailing")
    got = sampler(LABELS[:4], ROW_SCALES[:4], seeds=3)
    betas = np.linspace(1e-4, 2e-2, 1000)
    alpha_bar = np.append(np.cumprod(1 - betas)[[199, 399, 599, 799, 999]], 1.0)
    y, s = torch.tensor(LABELS[:4]), ROW_SCALES[:4].double().view(-1, 1, 1, 1)
    x = normal([3] * 4, range(4), INITIAL_STEP, SHAPE).double()
    with torch.no_grad():
        for k, (now, then) in zip([4, 3, 2, 1, 0], [(4, 3), (3, 2), (2, 1), (1, 0), (0, 5)], strict=True):
            t = torch.full((4,), 200 * k + 199)
            null = model(x, t, torch.full_like(y, CLASSES))
            eps = null + s * (model(x, t, y) - null)
            x0 = (x - math.sqrt(1 - alpha_bar[now]) * eps) / math.sqrt(alpha_bar[now])
            x = math.sqrt(alpha_bar[then]) * x0 + math.sqrt(1 - alpha_bar[then]) * eps
    torch.testing.assert_close(got, x.float(), rtol=2**-23, atol=0)  # rounded once, at the end


def test_seeds_and_indices():
    sampler = sampler_of(small_dit())
    one = sampler([1, 1, 1, 1], 2.0, seeds=9)  # (9, 0), (9, 1), (9, 2), (9, 3)
    assert torch.equal(sampler([1, 1], 2.0, seeds=[9, 9], indices=[3, 0]), one[[3, 0]])
    assert torch.equal(sampler([1], 2.0, seeds=[9]), one[:1])
    assert torch.equal(sampler([1, 1], 2.0, seeds=9, indices=torch.tensor([2, 2])), one[[2, 2]])
    assert torch.equal(sampler([1], 2.0, seeds=torch.tensor(9)), one[:1])
    assert torch.equal(sampler([1, 1], 2.0, seeds=torch.tensor([9, 4]))[:1], one[:1])
    assert torch.equal(sampler([1] * 4, 2.0), sampler([1] * 4, 2.0, seeds=0))
    assert not torch.equal(sampler([1] * 4, 2.0), one)
    assert torch.equal(sampler([1], 2.0, seeds=2**64 - 1), sampler([1], 2.0, seeds=[-1]))


def test_scale_and_w_are_one_setting():
    sampler = sampler_of(small_dit())
    guided = sampler([1, 2], 3.0)
    assert torch.equal(sampler([1, 2], w=2.0), guided)
    assert torch.equal(sampler([1, 2], [3.0, 3.0]), guided)
    assert torch.equal(sampler([1, 2], [[3.0]] * 4), guided)
    assert torch.equal(sampler([1, 2]), sampler([1, 2], 1.0))
    assert not torch.equal(sampler([1, 2]), guided)
    with pytest.raises(Error, match="once"):
        sampler([1, 2], 3.0, w=2.0)


@pytest.mark.parametrize(
    ("settings", "scale", "rows_a_step"),
    [
        ({}, 1.0, [3, 3, 3, 3]),
        ({}, 2.0, [6, 6, 6, 6]),
        ({"interval": (300, 700)}, 2.0, [3, 6, 6, 3]),  # timesteps 999, 666, 333, 0
        ({"interval": (300, 700)}, 1.0, [3, 3, 3, 3]),
        ({"interval": (0, 1)}, 2.0, [3, 3, 3, 6]),
        ({}, [[1.0], [5.0], [1.0], [2.0]], [3, 6, 3, 6]),
        ({"interval": (300, 1000)}, [[2.0], [1.0], [3.0], [3.0]], [6, 3, 6, 3]),
    ],
)
def test_steps_without_guidance_cost_one_row_a_sample(settings, scale, rows_a_step):
    sampler, calls = counting_sampler(**settings)
    sampler([0, 1, 2], scale)
    assert [call.rows for call in calls] == rows_a_step
    assert [call.t.unique().tolist() for call in calls] == [[999], [666], [333], [0]]
    for call in calls:
        # conditional rows first, then the null label for each
        assert call.y.tolist() == ([0, 1, 2] + [CLASSES] * 3)[: call.rows]


@pytest.mark.parametrize(
    ("settings", "dtype"), [({"solver": "euler"}, torch.int64), ({"solver": "euler", "spacing": "linspace"}, torch.float32)]
)
def test_a_module_is_given_whole_timesteps_where_all_are_whole(settings, dtype):
    sampler, calls = counting_sampler(steps=5, **settings)
    sampler([0, 1, 2], 2.0)
    assert {call.t.dtype for call in calls} == {dtype}
    assert [float(call.t[0]) for call in calls] == pytest.approx(sampler.plan.timesteps.tolist(), rel=1e-6)


def test_rows_with_and_without_guidance_do_not_share_a_batch():
    sampler, calls = counting_sampler(batch=2)
    sampler([0, 1, 2, 3], [2.0, 1.0, 2.0, 1.0])
    assert sorted(call.rows for call in calls) == [2] * 4 + [4] * 4
    assert all(set(call.y[:2].tolist()) in ({0, 2}, {1, 3}) for call in calls)


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_rows_are_padded_and_split_to_the_batch(rows):
    sampler, calls = counting_sampler()
    finished = []
    got = sampler([2] * rows, 1.0, on_batch=finished.append)
    assert got.shape == (rows, *SHAPE)
    assert sum(finished) == rows
    assert len(finished) == -(-rows // 3)
    assert all(call.rows == 3 for call in calls)


def test_scale_tables_per_step():
    """A step of scale 1 is the conditional step, and a table's column is what that row alone would get."""
    sampler = sampler_of(small_dit())
    table = torch.tensor([[1.0, 3.0], [2.0, 3.0], [8.0, 3.0], [1.0, 3.0]])
    both = sampler([1, 2], table, seeds=4)
    assert torch.equal(both[:1], sampler([1], table[:, :1], seeds=4))
    assert torch.equal(both[1:], sampler([2], 3.0, seeds=4, indices=[1]))
    assert torch.equal(sampler([1, 2], torch.ones(4, 1), seeds=4), sampler([1, 2], 1.0, seeds=4))
    # that the order is the executed one: with only the first step guided, the last sees no null label
    counted, calls = counting_sampler()
    counted([1, 1, 1], [[2.0], [1.0], [1.0], [1.0]])
    assert [(int(call.t[0]), call.rows) for call in calls] == [(999, 6), (666, 3), (333, 3), (0, 3)]


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_given_noise_takes_the_place_of_the_drawn(solver):
    sampler = sampler_of(small_dit(), solver=solver, eta=1.0 if solver == "ddim" else 0.0)
    seeds, zeros = [6, 7, 8, 9, 10], np.zeros(5, int)
    drawn = sampler(LABELS[:5], 2.0, seeds=seeds)
    x_T = normal(seeds, zeros, INITIAL_STEP, SHAPE)
    noise = torch.stack([normal(seeds, zeros, i + 1, SHAPE) for i in range(4)])
    kept = x_T.clone(), noise.clone()
    assert torch.equal(sampler(LABELS[:5], 2.0, seeds=123, x_T=x_T, noise=noise), drawn)
    assert torch.equal(sampler(LABELS[:5], 2.0, seeds=seeds, x_T=x_T), drawn)
    assert torch.equal(x_T, kept[0])
    assert torch.equal(noise, kept[1])
    assert not torch.equal(sampler(LABELS[:5], 2.0, seeds=seeds, noise=noise.flip(0)), drawn)
    # the last step of either solver adds none
    noise[-1] = float("nan")
    assert torch.equal(sampler(LABELS[:5], 2.0, x_T=x_T, noise=noise), drawn)


@pytest.mark.parametrize(("spacing", "scaled"), [([500, 100], True), ("trailing", True), ("leading", False)])
def test_euler_starts_at_its_first_level(spacing, scaled):
    """As diffusers does: x_T is in units of the first level's sigma, but for "leading"."""
    sampler = sampler_of(small_dit(), solver="euler", steps=2, spacing=spacing, schedule="scaled_linear")
    counted = Counting(sampler.model.module).eval()
    seen = []
    counted.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    foreign = {"schedule": "scaled_linear", "null_label": CLASSES, "shape": SHAPE}
    watched = sampler_of(counted, solver="euler", steps=2, spacing=spacing, **foreign)
    seen.clear()
    x_T = normal([1], [0], INITIAL_STEP, SHAPE)
    assert torch.equal(watched([2], x_T=x_T), sampler([2], x_T=x_T))
    sigma = sampler.plan.sigma[0]
    assert sigma < 0.999
    torch.testing.assert_close(seen[0][0], x_T[0] * (sigma if scaled else 1.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_autocast_of_the_caller_changes_no_bit(engine):
    sampler = sampler_of(small_dit(), engine=engine)
    want, of_network = sampler([1, 2], 2.0), sampler.predict(torch.zeros(1, *SHAPE), torch.tensor([9]), [1])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sampler([1, 2], 2.0), want)
        assert torch.equal(sampler.predict(torch.zeros(1, *SHAPE), torch.tensor([9]), [1]), of_network)


def test_rows_that_need_no_full_batch_are_not_filled_up(monkeypatch):
    """Only what the bits need is computed: here samples are computed each by itself."""
    asked = []
    for engine in ("cpu", "reference"):
        sampler, rows = sampler_of(small_dit(), engine=engine, batch=4), []
        run = sampler.engine.run
        monkeypatch.setattr(
            sampler.engine, "run", lambda request, run=run, rows=rows: rows.append(len(request.seeds)) or run(request)
        )
        counts = []
        sampler([1] * 6, 2.0, on_batch=counts.append)
        sampler([1, 2, 3], [1.0, 2.0, 2.0], on_batch=counts.append)
        sampler([1], 2.0, on_batch=counts.append)
        assert counts == [4, 2, 1, 2, 1]
        asked.append(rows)
    assert asked == [[4, 2, 1, 2, 1], [4] * 5]


def test_the_returned_tensor_is_the_callers():
    sampler = sampler_of(small_dit())
    first = sampler([1, 2, 3], 2.0, seeds=1)
    kept = first.clone()
    second = sampler([1, 2, 3], 2.0, seeds=2)
    assert torch.equal(first, kept)
    first.zero_()
    assert second.abs().max() > 0
    assert torch.equal(sampler([1, 2, 3], 2.0, seeds=1), kept)
    assert not kept.requires_grad
    assert kept.dtype == torch.float32
    x_T = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    assert sampler([1], 2.0, x_T=x_T).data_ptr() != x_T.data_ptr()


def test_a_module_in_training_mode_is_refused():
    model = small_dit()
    sampler = sampler_of(model)
    model.blocks[1].train()  # a part of it is enough
    for call in (lambda: sampler([1]), lambda: sampler.predict(torch.zeros(1, *SHAPE), torch.zeros(1), [1])):
        with pytest.raises(Error, match=r"model.eval\(\)"):
            call()
    model.eval()
    assert torch.isfinite(sampler([1])).all()


def changed_by_an_optimizer(model):
    model.final_layer.linear.weight.grad = torch.ones_like(model.final_layer.linear.weight)
    torch.optim.SGD([model.final_layer.linear.weight], lr=0.1).step()


def changed_by_loading(model):
    model.load_state_dict(small_dit(seed=1).state_dict())


def changed_by_assignment(model):
    model.final_layer.linear.weight = nn.Parameter(model.final_layer.linear.weight * 2)


@pytest.mark.parametrize("change", [changed_by_an_optimizer, changed_by_loading, changed_by_assignment])
def test_a_converted_copy_that_went_stale_is_noticed(change):
    model = small_dit()
    sampler = sampler_of(model, dtype="bf16")
    before = sampler([1, 2], 2.0)
    change(model)
    with pytest.raises(Error, match=r"sampler.refresh\(\)"):
        sampler([1, 2], 2.0)
    sampler.refresh()
    after = sampler([1, 2], 2.0)
    assert not torch.equal(before, after)
    assert torch.equal(after, sampler_of(model, dtype="bf16")([1, 2], 2.0))


def test_a_module_that_is_used_as_it_is_needs_no_refresh():
    model = small_dit()
    sampler = sampler_of(model)
    before = sampler([1, 2], 2.0)
    changed_by_loading(model)
    assert torch.equal(sampler([1, 2], 2.0), sampler_of(small_dit(seed=1))([1, 2], 2.0))
    assert not torch.equal(sampler([1, 2], 2.0), before)


def test_a_device_by_its_number_is_that_without():
    """As cuda is cuda:0: a module that lies there already is used as it is, not copied."""
    model = small_dit()
    sampler = sampler_of(model, device="cpu:0")
    assert sampler.engine.device == torch.device("cpu")
    changed_by_loading(model)
    assert torch.equal(sampler([1, 2], 2.0), sampler_of(small_dit(seed=1))([1, 2], 2.0))


class Fixed(nn.Module):
    """eps 0, and v the same everywhere: what is left of a step is its mean and its spread."""

    def __init__(self, v):
        super().__init__()
        self.v = v

    def forward(self, x, t, y):
        return torch.cat([torch.zeros_like(x), torch.full_like(x, self.v)], dim=1)


@pytest.mark.parametrize("v", [-1.0, 0.0, 0.5, 1.0])
def test_learned_variance_interpolates_between_the_logarithms(v):
    settings = {"steps": 2, "solver": "ddpm", "schedule": "linear", "null_label": 1, "shape": (1, 2, 2)}
    sampler = sampler_of(Fixed(v).eval(), spacing=[600, 200], **settings)
    assert sampler.model.learned_variance
    assert sampler.plan.learned_variance
    z = normal([0], [0], 1, (1, 2, 2)).double()
    x_T = torch.ones(1, 1, 2, 2)
    got = sampler([0], x_T=x_T, noise=torch.stack([z, z]))
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
    now, then = alpha_bar[600], alpha_bar[200]
    beta = 1 - now / then
    variance = beta ** ((1 + v) / 2) * (beta * (1 - then) / (1 - now)) ** ((1 - v) / 2)
    # eps 0: x_s = x / a + noise, whose last step divides by sqrt(alpha_bar) once more
    want = (x_T / math.sqrt(now / then) + math.sqrt(variance) * z) / math.sqrt(then)
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-6, atol=1e-6)


def test_variance_is_the_models_unless_asked_for():
    learned, plain = small_dit(learn_sigma=True), small_dit()
    assert sampler_of(learned, solver="ddpm").plan.learned_variance
    assert not sampler_of(learned, solver="ddpm", variance="fixed_large").plan.learned_variance
    assert not sampler_of(learned).plan.learned_variance
    assert not sampler_of(plain, solver="ddpm").plan.learned_variance
    with pytest.raises(Error, match="predicts no variance"):
        sampler_of(plain, solver="ddpm", variance="learned_range")


def test_eta_and_clip_are_the_models_unless_asked_for():
    model = Denoiser(small_dit(), SHAPE, CLASSES, CLASSES, clip=True, eta=0.7)
    for settings, eta, clip in [({}, 0.7, True), ({"eta": 0.0, "clip": False}, 0.0, False), ({"clip": "keep_eps"}, 0.7, True)]:
        made = sampler_of(model, **settings).plan
        assert (f"eta {eta}" in made.title, made.clip, made.needs_noise) == (True, clip, eta > 0)
    assert not sampler_of(model, solver="euler").plan.needs_noise


def test_guidance_leaves_the_variance_channels_alone():
    """They come from the conditional half: with eps 0 and v by label, the null's v must not show."""

    class VByLabel(nn.Module):
        def forward(self, x, t, y):
            v = torch.where(y == 1, 1.0, -1.0).view(-1, 1, 1, 1)
            return torch.cat([torch.zeros_like(x), v.expand_as(x)], dim=1)

    sampler = sampler_of(VByLabel().eval(), solver="ddpm", schedule="linear", null_label=1, shape=(2, 2, 2))
    assert torch.equal(sampler([0], 5.0), sampler([0], 1.0))


class ByEmbedding(nn.Module):
    """A foreign module conditioned on an embedding [N, 3], whose output is a diffusers-like object."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(2, 2, 3, padding=1)
        self.add = nn.Linear(3, 2)

    def forward(self, x, t, y):
        out = self.mix(x) + self.add(y)[:, :, None, None] * (1 + t.view(-1, 1, 1, 1) / 1000)
        return SimpleNamespace(sample=out)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_embeddings_as_labels_and_wrapped_outputs(dtype):
    torch.manual_seed(0)
    module, null = ByEmbedding().eval(), torch.tensor([0.5, -1.0, 2.0])
    settings = {"schedule": "linear", "null_label": null, "shape": (2, 5, 5), "dtype": dtype}
    sampler = sampler_of(module, **settings)
    y = torch.randn(4, 3)
    together = sampler(y, 3.0, seeds=2)
    assert torch.equal(sampler(y[[2]], 3.0, seeds=2, indices=[2]), together[[2]])
    assert not torch.equal(sampler(y, 1.0, seeds=2), together)
    # the null label as the label: both halves agree, so the scale changes nothing but rounding
    nulls = null.expand(2, 3)
    torch.testing.assert_close(sampler(nulls, 8.0), sampler(nulls, 1.0), rtol=1e-5, atol=1e-5)
    x, t = torch.randn(2, 2, 5, 5), torch.tensor([3, 700])
    tolerance = None if dtype == "fp32" else 0.05
    for labels, rows in ((y[:2], y[:2]), (None, nulls)):
        exact = module(x, t, rows).sample.detach()
        torch.testing.assert_close(sampler.predict(x, t, labels), exact, rtol=tolerance, atol=tolerance)
    for wrong in (y[0], torch.randn(4, 2), torch.randn(4, 3, 1), torch.randn(0, 3)):
        with pytest.raises(Error, match="labels must be embeddings"):
            sampler(wrong)


def test_predict_is_the_networks_output():
    model = small_dit(learn_sigma=True)
    sampler = sampler_of(model, batch=2)
    x, t, y = torch.randn(5, *SHAPE), torch.tensor([0, 10, 500, 999, 3]), torch.tensor([0, 1, 2, 3, 4])
    with torch.no_grad(), one_thread():  # as the engine runs it: products are cut otherwise on more
        cond, null = model(x, t, y), model(x, t, torch.full((5,), CLASSES))
    assert torch.equal(sampler.predict(x, t, y), cond)
    assert not sampler.predict(x, t, y).requires_grad
    assert torch.equal(sampler.predict(x, t, y.tolist()), cond)
    assert torch.equal(sampler.predict(x, t, None), null)
    assert cond.shape == (5, 8, 4, 4)
    for bad in ((x[:, :3], t, y), (x, t[:4], y), (x, t, y[:4]), (x, t, y + 1), (x[0, 0, 0, 0], t, y), (x, t[0], y)):
        with pytest.raises(Error):
            sampler.predict(*bad)
    for rows, what in ((x, 5), (x.tolist(), t), (x[:0], t[:0])):
        with pytest.raises(Error, match=r"want tensors x \[N, 4, 4, 4\] and t \[N\], N at least 1, got"):
            sampler.predict(rows, what, None)


def test_a_model_without_a_null_label_samples_at_scale_1_only():
    model = small_dit(class_dropout_prob=0.0)
    sampler = sampler_of(model)
    assert sampler([1, 2]).shape == (2, *SHAPE)
    with pytest.raises(Error, match="no null label"):
        sampler([1, 2], 2.0)
    with pytest.raises(Error, match="no null label"):
        sampler.predict(torch.zeros(1, *SHAPE), torch.zeros(1), None)
    last = sampler_of(model, interval=(0, 1))  # a scale outside the interval guides nothing, so nothing is missing
    assert torch.equal(last([1, 2], [[2.0], [2.0], [2.0], [1.0]]), sampler([1, 2]))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"labels": []}, "at least one"),
        ({"labels": torch.empty(0, dtype=torch.int64)}, "at least one"),
        ({"labels": 3}, "labels must be whole numbers"),
        ({"labels": [1.0]}, "labels must be whole numbers"),
        ({"labels": [[1], [2]]}, "labels must be whole numbers"),
        ({"labels": ["1"]}, "labels must be whole numbers"),
        ({"labels": [True]}, "labels must be whole numbers"),
        ({"labels": torch.ones(2, dtype=torch.bfloat16)}, "labels must be whole numbers"),
        ({"labels": torch.ones(2, requires_grad=True)}, "labels must be whole numbers"),
        ({"labels": torch.ones(2, dtype=torch.int64, device="meta")}, "labels must be whole numbers"),
        ({"scale": torch.ones(2, device="meta")}, "scale must be a number or numbers"),
        ({"labels": [1, CLASSES]}, "label 5 is out of range: the model's labels are 0..4"),
        ({"labels": [-1]}, "label -1 is out of range"),
        ({"scale": 0.5}, "at least 1"),
        ({"scale": [2.0]}, "1 values arrived for 2 rows"),
        ({"seeds": [1]}, "1 arrived for 2 rows"),
        ({"seeds": torch.tensor([1])}, "1 arrived for 2 rows"),
        ({"seeds": 1.5}, "seeds must be whole numbers"),
        ({"seeds": None}, "seeds must be whole numbers"),
        ({"seeds": [1, 2.5]}, "seeds must be whole numbers"),
        ({"seeds": 2**64}, "seeds must be whole numbers of up to 64 bits"),
        ({"indices": [0]}, "1 arrived for 2 rows"),
        ({"indices": [0, -1]}, "indices must be at least 0"),
        ({"indices": [0, 2**63]}, r"indices must be .* below 2\^63, got \[0, 9223372036854775808\]"),
        ({"indices": 1}, r"indices must be whole numbers of up to 64 bits, got 1$"),
        ({"seeds": torch.tensor([True, False])}, "seeds must be whole numbers"),
        ({"seeds": torch.ones(2, dtype=torch.int64, device="meta")}, "seeds must be whole numbers"),
        ({"x_T": torch.zeros(2, 4, 4, 3)}, r"x_T must be \[2, 4, 4, 4\]"),
        ({"x_T": torch.zeros(2, *SHAPE, dtype=torch.int64)}, "x_T must be a floating-point tensor"),
        ({"x_T": np.zeros((2, *SHAPE))}, "x_T must be a floating-point tensor"),
        ({"noise": torch.zeros(3, 2, *SHAPE)}, r"noise must be \[4, 2, 4, 4, 4\]"),
    ],
)
def test_bad_calls_are_refused_before_any_forward(arguments, says):
    sampler, calls = counting_sampler()
    with pytest.raises(Error, match=says):
        sampler(**({"labels": [1, 2], "scale": 2.0} | arguments))
    assert calls == []


class Giving(nn.Module):
    """What a function makes of x."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, t, y):
        return self.function(x)


class Configured(Giving):
    """A module that says its samples' size as diffusers' do."""

    def __init__(self, size):
        super().__init__(torch.sin)
        self.config = {"in_channels": 1, "sample_size": size}


class Refusing(nn.Module):
    def forward(self, x, t, y):
        raise ValueError("wants four inputs")


@pytest.mark.parametrize(
    ("model", "settings", "says"),
    [
        (small_dit(), {"batch": 0}, "batch must be"),
        (small_dit(), {"batch": 2.0}, "batch must be"),
        (small_dit(), {"batch": True}, "batch must be"),
        (small_dit(), {"guidance_channels": 5}, "samples have 4 channels"),
        (small_dit(), {"engine": "fast"}, "unknown engine 'fast'"),
        (small_dit(), {"dtype": "int4"}, "unknown dtype 'int4'"),
        (small_dit(), {"device": "abacus"}, "device 'abacus' cannot be used here"),
        (small_dit(), {"device": "abacus", "engine": "cpu"}, "device 'abacus' cannot be used here"),
        (small_dit(), {"null_label": 6}, "label table has rows 0..5"),
        (small_dit(), {"null_label": -1}, "null_label must be"),
        (small_dit(), {"shape": (4, 8, 8)}, "the model's samples are"),
        (small_dit(), {"interval": (5, 1)}, "interval"),
        ("a path", {}, "model must be a torch.nn.Module"),
        (Fixed(0.0), {"shape": (1, 2, 2)}, "pass null_label="),
        (Fixed(0.0), {"null_label": 1}, "pass shape="),
        (Fixed(0.0), {"null_label": 1, "shape": (1, 2)}, r"three whole numbers \(C, H, W\)"),
        (Configured([8]).eval(), {"null_label": 1}, r"shape must be three whole numbers \(C, H, W\), got \(1, 8\)"),
        (Configured(0.5).eval(), {"null_label": 1}, r"shape must be three whole numbers .*, got \(1, 0.5, 0.5\)"),
        (Refusing().eval(), {"null_label": 1, "shape": (1, 2, 2)}, "wants four inputs"),
        (nn.Bilinear(2, 2, 2).eval(), {"null_label": 1, "shape": (1, 2, 2)}, r"could not be called as module\(x"),
        (small_dit(), {"num_classes": 7}, "num_classes 7 asked, but the model's label table has rows 0..5"),
        (Denoiser(small_dit(), SHAPE, CLASSES, 7), {}, "num_classes 7 asked, but"),
        (Denoiser(small_dit(), (4, 8, 8), CLASSES, CLASSES), {"engine": "cpu"}, r"shape \(4, 8, 8\) asked, but the model's"),
        (Denoiser(small_dit(), SHAPE, CLASSES, CLASSES, learned_variance=True), {}, "the model predicts no variance"),
        (Denoiser(nn.Flatten, SHAPE, 1, 1), {}, "model must be a torch.nn.Module .*, got type"),
        (Denoiser(Giving(lambda x: x[:, :3]).eval(), SHAPE, 1, 1), {}, r"Giving turned .* into \[1, 3, 4, 4\]: want 4 or 8"),
        (Denoiser(Giving(lambda x: (x,)).eval(), SHAPE, 1, 1), {}, "Giving must return a tensor .*, got tuple"),
        (Denoiser(Giving(torch.sin).eval(), SHAPE, 1, 1, learned_variance=True), {}, "Giving turned .*: want 8 channels"),
        (small_dit(), {"num_classes": "5"}, "num_classes must be a whole number of at least 1, got '5'"),
        (Fixed(0.0).eval(), {"null_label": 1, "shape": (1, 2, 2), "num_classes": 2.5}, "num_classes must be .* got 2.5"),
        (Fixed(0.0).eval(), {"null_label": 1, "shape": (1, 2, 2), "num_classes": 0}, "num_classes must be .* got 0"),
        (small_dit(), {"classifier_guidance": nn.Linear(1, 1)}, r"fastcfg.ClassifierGuidance, got Linear: want .*\(module\)"),
        (small_dit(), {"classifier_guidance": "fashion-mnist"}, "fastcfg.ClassifierGuidance, got str"),
        (small_dit(), {"shape": [4, 8, 8]}, r"shape \(4, 8, 8\) asked, but the model's samples are \(4, 4, 4\)"),
    ],
    ids=lambda value: None if isinstance(value, nn.Module) else str(value),
)
def test_bad_samplers_are_refused(model, settings, says):
    with pytest.raises(Error, match=says):
        sampler_of(model, **settings)


@pytest.mark.parametrize(("dtype", "engine"), [("fp32", "cpu"), ("fp16", "reference")])
def test_auto_takes_an_engine_that_has_the_precision(dtype, engine):
    made = sampler_of(small_dit(), engine="auto", dtype=dtype)
    assert made.engine.name == engine
    assert torch.isfinite(made([1], 2.0)).all()


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        model = DiT(input_size=4, hidden_size=32, depth=1, num_heads=2).eval()
    for engine in ("reference", "cpu"):
        with pytest.raises(Error, match="weights are on the meta device"):
            sampler_of(model, engine=engine)


def test_a_sampler_on_the_meta_device_only_explains():
    sampler = sampler_of(small_dit(), device="meta")
    assert sampler.explain().flops_per_row
    for call in (lambda: sampler([1, 2]), lambda: sampler.predict(torch.zeros(1, *SHAPE), torch.zeros(1), [1])):
        with pytest.raises(Error, match="on the meta device"):
            call()


def test_a_module_in_training_mode_is_refused_before_its_trial():
    """The trial's zeros would become part of a normalisation's statistics."""

    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(2)

        def forward(self, x, t, y):
            return self.norm(x)

    module = Normalised()
    module.norm.running_mean.fill_(3.0)
    for whole in (True, False):
        module.train(whole)
        module.norm.train()  # a part of it is enough
        with pytest.raises(Error, match=r"model.eval\(\)"):
            sampler_of(module, null_label=1, shape=(2, 4, 4))
        assert module.norm.running_mean.tolist() == [3.0, 3.0]
        assert module.norm.num_batches_tracked == 0
    sampler_of(module.eval(), null_label=1, shape=(2, 4, 4))


@pytest.mark.parametrize("shape", [[1, 2, 2], np.array([1, 2, 2]), torch.Size([1, 2, 2])])
def test_a_shape_is_any_three_numbers(shape):
    assert sampler_of(Fixed(0.0).eval(), null_label=1, shape=shape).model.shape == (1, 2, 2)
    known = Denoiser(Fixed(0.0).eval(), shape, 1, 1, learned_variance=True)
    assert sampler_of(known).predict(torch.zeros(1, 1, 2, 2), torch.zeros(1), [0]).shape == (1, 2, 2, 2)


def test_a_dits_null_label_may_be_made_a_label():
    sampler = sampler_of(small_dit(), num_classes=CLASSES + 1)
    x, t = torch.randn(2, *SHAPE), torch.tensor([3, 700])
    assert torch.equal(sampler.predict(x, t, [CLASSES, CLASSES]), sampler.predict(x, t, None))
    with pytest.raises(Error, match="label 5 is out of range"):
        sampler_of(small_dit(), num_classes=CLASSES)([CLASSES])


@pytest.mark.parametrize("number", [np.int64, torch.tensor], ids=["numpy", "tensor"])
def test_whole_numbers_may_be_any_librarys(number):
    settings = {"null_label": CLASSES, "num_classes": CLASSES, "steps": 6, "batch": 2, "guidance_channels": 3}
    plain = sampler_of(small_dit(), **settings)
    sampler = sampler_of(small_dit(), **{name: number(value) for name, value in settings.items()})
    assert torch.equal(sampler([1, 2, 3], 2.0), plain([1, 2, 3], 2.0))
    kept = (sampler.model.null_label, sampler.model.num_classes, sampler.plan.steps, sampler.batch, sampler.guidance.channels)
    assert kept == (CLASSES, CLASSES, 6, 2, 3)
    assert {type(value) for value in kept} == {int}
    foreign = sampler_of(Counting(small_dit()).eval(), null_label=number(CLASSES), shape=SHAPE)
    assert (foreign.model.null_label, foreign.model.num_classes) == (CLASSES, CLASSES)


class Unconditional(nn.Module):
    """A DiT that is given the null label, whatever the label."""

    def __init__(self):
        super().__init__()
        self.inner = small_dit()

    def forward(self, x, t, y):
        return self.inner(x, t, torch.full_like(y, CLASSES))


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_unconditional_samples_are_those_of_the_null_label(engine):
    want = sampler_of(Unconditional().eval(), null_label=CLASSES, shape=SHAPE)([0, 1, 2], seeds=4)
    sampler = sampler_of(small_dit(), num_classes=CLASSES + 1, engine=engine, dtype="fp32")
    torch.testing.assert_close(sampler([CLASSES] * 3, seeds=4), want, rtol=1e-4, atol=1e-4)


def test_a_foreign_module_is_tried_at_the_null_label_and_at_the_plans_first_t():
    module = Counting(small_dit()).eval()
    sampler_of(module, null_label=CLASSES, shape=SHAPE, solver="euler", spacing="linspace", steps=5)
    assert [(call.rows, call.t.tolist(), call.t.dtype, call.y.tolist()) for call in module.calls] == [
        (1, [0], torch.int64, [CLASSES]),
        (1, [999.0], torch.float32, [CLASSES - 1]),
    ]


def test_embeddings_may_come_as_a_list():
    settings = {"null_label": torch.tensor([0.5, -1.0, 2.0]), "shape": (2, 5, 5)}
    sampler = sampler_of(ByEmbedding().eval(), **settings)
    y = torch.randn(4, 3)
    assert torch.equal(sampler(list(y), 3.0), sampler(y, 3.0))
    assert torch.equal(sampler(y.tolist(), 3.0), sampler(y, 3.0))


class Judging(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(math.prod(SHAPE), CLASSES)

    def forward(self, x, t):
        return self.linear(x.flatten(1))


@pytest.mark.parametrize(
    "kind", [{}, {"dtype": "bf16"}, {"classifier_guidance": ClassifierGuidance(Judging().double().eval())}]
)
@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda sampler: pickle.loads(pickle.dumps(sampler))], ids=["copied", "pickled"]
)
def test_a_sampler_over_the_reference_engine_is_copied_and_pickled(again, kind):
    sampler = sampler_of(small_dit(), **kind)
    samples = sampler([1, 2])
    sampler._watch.no_other_may_have_it = threading.Lock()  # as the stream and events of a GPU
    other = again(sampler)
    assert other.last_seconds is None
    assert torch.equal(other([1, 2]), samples)
    if "dtype" in kind:  # then the weights are a converted copy
        nn.init.zeros_(other.model.module.final_layer.linear.weight)
        assert torch.equal(sampler([1, 2]), samples)
        with pytest.raises(Error, match=r"sampler\.refresh\(\)"):
            other([1, 2])


def test_a_module_of_another_precision_is_noticed():
    model = small_dit()
    sampler = sampler_of(model)
    before = sampler([1, 2], 2.0)
    model.double()
    for call in (lambda: sampler([1, 2], 2.0), lambda: sampler.predict(torch.zeros(1, *SHAPE), torch.zeros(1), [1])):
        with pytest.raises(Error, match=r"torch\.float64 on cpu since .* made for torch\.float32 .*sampler\.refresh\(\)"):
            call()
    sampler.refresh()
    assert torch.equal(sampler([1, 2], 2.0), before)
    model.float()
    with pytest.raises(Error, match=r"sampler\.refresh\(\)"):  # the copy's source changed again
        sampler([1, 2], 2.0)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda model: torch.compile(nn.DataParallel(model))])
def test_a_wrapped_dit_is_sampled_as_the_dit_it_is(wrap):
    model = small_dit()
    sampler = Sampler(wrap(model), steps=4, device="cpu", dtype="fp32")
    assert sampler.model.module is model
    assert sampler.engine.name == "cpu"
    assert isinstance(as_denoiser(wrap(Fixed(0.0)).eval(), null_label=1, shape=(1, 2, 2)).module, type(wrap(Fixed(0.0))))


class OneLinear(nn.Module):
    """One product a row: 12 values to 12."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x, t, y):
        return self.linear(x.flatten(1)).view_as(x)


def test_explain_counts_a_linear_module_by_hand():
    settings = {"steps": 10, "spacing": "ddim", "interval": (100, 300), "batch": 4}
    sampler = sampler_of(OneLinear().eval(), schedule="linear", null_label=1, shape=(3, 2, 2), **settings)
    told = sampler.explain()
    assert told.flops_per_row == 2 * 12 * 12
    assert told.guided_steps == 3
    assert told.rows == 4 * (10 + 3)
    assert told.flops == 2 * 12 * 12 * 4 * 13
    assert told.weight_bytes == 4 * (12 * 12 + 12)
    assert (told.engine, told.device, told.dtype, told.batch, told.steps) == ("reference", "cpu", "float32", 4, 10)
    assert told.last_seconds is None
    sampler([0])
    assert sampler.explain().last_seconds > 0
    assert str(sampler.plan) in str(sampler.explain())
    assert told.to_json()["flops"] == told.flops


def test_on_a_gpu_a_batch_takes_as_long_as_the_device_does(monkeypatch):
    """The host only enqueues: the time is one between two events on the caller's stream, read when it is asked for."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def synchronize(self):
            done.append(self)

        def elapsed_time(self, last):
            assert done == [last]
            return 2500.0

    class Stream:
        def record_event(self, event):
            return event

    sampler = sampler_of(small_dit(), batch=1)
    samples = sampler([0])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    sampler.engine = SimpleNamespace(device=torch.device("cuda", 0), whole_batches=True, run=lambda request: samples)
    sampler([0])
    assert not done
    assert sampler.last_seconds == 2.5


def dit_flops(tokens, width, depth, mlp_width, patch_values, out_values):
    """Multiply-adds of one row by hand, counted as two operations; the conditioning's products are one row each."""
    block = tokens * width * (3 * width + width + 2 * mlp_width) + 2 * tokens * tokens * width + 6 * width * width
    embedders = tokens * patch_values * width + 256 * width + width * width
    final = 2 * width * width + tokens * width * out_values
    return 2 * (depth * block + embedders + final)


def test_explain_counts_a_dit_by_hand():
    told = sampler_of(small_dit(learn_sigma=True)).explain()
    assert told.flops_per_row == dit_flops(4, 32, 2, 128, 16, 32)


def test_explain_counts_dit_xl_2_as_published():
    """118.64 Gflops in the DiT paper's table 9, which counts a multiply-add once; no weight is ever allocated."""
    with torch.device("meta"):
        model = DiT.from_name("DiT-XL/2").eval()
    sampler = sampler_of(Denoiser(model, (4, 32, 32), 1000, 1000, learned_variance=True), steps=250, batch=1, device="meta")
    told = sampler.explain()
    assert told.flops_per_row == dit_flops(256, 1152, 28, 4608, 16, 32)
    assert told.flops_per_row / 2e9 == pytest.approx(118.64, rel=1e-3)
    assert told.weight_bytes == pytest.approx(4 * 675.1e6, rel=2e-3)  # 675 M parameters and the position table
