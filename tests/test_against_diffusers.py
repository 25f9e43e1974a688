"""Guided sampling against diffusers: same weights, same noise, float32, 20 steps, its schedulers' own loop beside ours."""

from __future__ import annotations

import copy
import math
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcfg

diffusers = pytest.importorskip("diffusers")

from diffusers.guiders.guider_utils import rescale_noise_cfg  # noqa: E402 - after the skip
from diffusers.schedulers import scheduling_ddpm  # noqa: E402

STEPS, CLASSES, SIZE, CHANNELS = 20, 5, 8, 3
LABELS = torch.tensor([0, 3, 4])
SHAPE = (len(LABELS), CHANNELS, SIZE, SIZE)
TOLERANCE = 1e-5  # of the largest expected value


@lru_cache
def network(name: str) -> nn.Module:
    """A random diffusers model; label CLASSES is the null label of each."""
    torch.manual_seed(7)
    if name == "unet":
        model = diffusers.UNet2DModel(
            sample_size=SIZE,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=8,
            num_class_embeds=CLASSES + 1,
        )
    else:
        model = diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=CHANNELS,
            out_channels=2 * CHANNELS if name == "dit-learned" else CHANNELS,
            num_layers=2,
            sample_size=SIZE,
            patch_size=2,
            num_embeds_ada_norm=CLASSES,
        )
    return model.eval().requires_grad_(False)


class Plausible(nn.Module):
    """eps_hat = sigma_t x + 0.3 network: the denoiser of unit-variance data, disturbed by a random network.

    Clipping needs it. With a random network alone the first steps of DDIM are x' = network(x) plus almost nothing, and an
    iterated random network is chaotic: float32 runs of either library then end 1e-4 from their own float64 runs.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.register_buffer("sigma", (1 - torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000), 0)).sqrt())

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        output = 0.3 * self.network(x, t, y).sample
        C = x.shape[1]
        return torch.cat([output[:, :C] + self.sigma[t].view(-1, 1, 1, 1) * x, output[:, C:]], dim=1)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def guided_output(model: nn.Module, x: Tensor, t: Tensor, scale: float, rescale: float) -> Tensor:
    """[cond; null] through the model, and guidance on the channels of x; variance channels come from the cond half."""
    y = torch.cat([LABELS, torch.full_like(LABELS, CLASSES)])
    output = model(torch.cat([x, x]), t.expand(len(y)), y)
    cond, null = getattr(output, "sample", output).chunk(2)
    C = x.shape[1]
    guided = null[:, :C] + scale * (cond[:, :C] - null[:, :C])
    if rescale:
        guided = rescale_noise_cfg(guided, cond[:, :C], guidance_rescale=rescale)
    return torch.cat([guided, cond[:, C:]], dim=1)


def diffusers_loop(
    model: nn.Module,
    scheduler: Any,
    x_T: Tensor,
    noise: Tensor,
    *,
    scale: float,
    rescale: float = 0.0,
    eta: float | None = None,
) -> Tensor:
    """What a diffusers pipeline does; `noise` [steps, ...] goes to DDIM as variance_noise when eta is given."""
    scheduler.set_timesteps(STEPS)
    x = x_T * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else x_T
    for i, t in enumerate(scheduler.timesteps):
        model_input = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = guided_output(model, model_input, t, scale, rescale)
        extra = {} if eta is None else {"eta": eta, "variance_noise": noise[i]}
        x = scheduler.step(output, t, x, **extra).prev_sample
    assert i == STEPS - 1
    return x


def check(
    model: nn.Module,
    scheduler: Any,
    scale: float,
    ours: dict[str, Any],
    noise: Tensor,
    tolerance: float = TOLERANCE,
    **loop: Any,
) -> None:
    dtype = next(model.parameters()).dtype
    x_T = draw(*SHAPE, seed=1)
    expected = diffusers_loop(model, scheduler, x_T.to(dtype), noise.to(dtype), scale=scale, **loop)
    options = {"steps": STEPS, "null_label": CLASSES, "num_classes": CLASSES, "batch": len(LABELS), "shape": SHAPE[1:]}
    sampler = fastcfg.Sampler(model, **options, device="cpu", engine="reference", **ours)
    computed = sampler(LABELS, scale, x_T=x_T, noise=noise)
    relative = ((computed - expected).abs().max() / expected.abs().max()).item()
    assert relative <= tolerance, f"{relative:.2e} of the largest value {expected.abs().max():.3g}"


def step_noise() -> Tensor:
    return draw(STEPS, *SHAPE, seed=2)


NETWORKS = pytest.mark.parametrize("name", ["unet", "dit"])


@NETWORKS
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim(name: str, spacing: str, eta: float, clip: bool) -> None:
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, clip_sample=clip)
    ours = {"solver": "ddim", "spacing": spacing, "eta": eta, "clip": "keep_eps" if clip else False}
    model = Plausible(network(name)).eval() if clip else network(name)
    check(model, scheduler, 3.0, ours, step_noise(), eta=eta)


@NETWORKS
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_in_float64(name: str, spacing: str, eta: float, clip: bool) -> None:
    """The bare random network, where float32 cannot tell a wrong step from rounding: in float64 both agree far closer."""
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, clip_sample=clip)
    scheduler.alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0)
    scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    ours = {"solver": "ddim", "spacing": spacing, "eta": eta, "clip": "keep_eps" if clip else False}
    check(copy.deepcopy(network(name)).double(), scheduler, 3.0, ours, step_noise(), tolerance=1e-6, eta=eta)


def exact_cosine(T: int = 1000) -> Tensor:
    """alpha_bar of Nichol & Dhariwal (2102.09672, eq. 17) in float64, betas capped at 0.999."""
    f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
    return torch.cumprod(torch.tensor([max(f[t + 1] / f[t], 0.001) for t in range(T)], dtype=torch.float64), 0)


@NETWORKS
@pytest.mark.parametrize(
    ("beta_schedule", "betas", "ours"),
    [
        ("scaled_linear", {"beta_start": 0.00085, "beta_end": 0.012}, "scaled_linear"),
        ("squaredcos_cap_v2", {}, "cosine"),
    ],
)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim_schedules_and_predictions(name: str, prediction: str, beta_schedule: str, betas: dict, ours: str) -> None:
    scheduler = diffusers.DDIMScheduler(
        beta_schedule=beta_schedule, prediction_type=prediction, timestep_spacing="leading", clip_sample=False, **betas
    )
    if ours == "cosine":
        # diffusers takes 1 - alpha_bar in float32; near alpha_bar = 1 its rounding alone costs an x0 prediction 1e-5.
        scheduler.alphas_cumprod = exact_cosine()
    predicts = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}[prediction]
    check(network(name), scheduler, 2.0, {"schedule": ours, "predicts": predicts, "spacing": "leading"}, step_noise())


@NETWORKS
@pytest.mark.parametrize("rescale", [0.7, 1.0])
def test_guidance_rescale(name: str, rescale: float) -> None:
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    ours = {"solver": "ddim", "spacing": "trailing", "rescale": rescale}
    check(network(name), scheduler, 4.0, ours, step_noise(), rescale=rescale)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("unet", "fixed_small", "posterior"),
        ("dit", "fixed_small", "posterior"),
        ("unet", "fixed_large", "fixed_large"),
        ("dit", "fixed_large", "fixed_large"),
        ("dit-learned", "learned_range", "learned_range"),
    ],
)
def test_ddpm(name: str, theirs: str, ours: str, spacing: str, clip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = step_noise()
    # diffusers adds noise at every t > 0, so with "trailing", which ends at t = 49, at the last step too. Ancestral
    # sampling ends on the mean (Ho et al. 2006.11239, algorithm 2), as ours does: the last draw is made zero for both.
    noise[-1] = 0
    draws = iter(noise)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: next(draws))
    scheduler = diffusers.DDPMScheduler(timestep_spacing=spacing, variance_type=theirs, clip_sample=clip)
    model = Plausible(network(name)).eval() if clip else network(name)
    check(model, scheduler, 3.0, {"solver": "ddpm", "spacing": spacing, "variance": ours, "clip": clip}, noise)
    # All draws were used ("leading" ends at t = 0, where diffusers draws none): else the noise was never compared.
    assert len(list(draws)) == (1 if spacing == "leading" else 0)


@NETWORKS
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_dpmpp_2m(name: str, prediction: str, spacing: str) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        lower_order_final=True,
        timestep_spacing=spacing,
        prediction_type=prediction,
    )
    predicts = {"epsilon": "eps", "v_prediction": "v"}[prediction]
    ours = {"solver": "dpmpp_2m", "spacing": spacing, "predicts": predicts, "schedule": "linear"}
    check(network(name), scheduler, 3.0, ours, step_noise())


@NETWORKS
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize(("prediction", "predicts"), [("v_prediction", "v"), ("epsilon", "eps")])
def test_euler(name: str, prediction: str, predicts: str, spacing: str) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type=prediction, timestep_spacing=spacing)
    ours = {"solver": "euler", "spacing": spacing, "predicts": predicts, "schedule": "linear"}
    check(network(name), scheduler, 3.0, ours, step_noise())


@NETWORKS
def test_flow_matching(name: str) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    ours = {"solver": "euler", "spacing": "linspace", "predicts": "flow", "schedule": "flow"}
    check(network(name), scheduler, 3.0, ours, step_noise())


@NETWORKS
def test_guidance_matters_here(name: str) -> None:
    """The comparisons above would pass for a model that ignores its label or its noise; this one does not."""
    model, x, t = network(name), draw(*SHAPE, seed=1), torch.tensor(500)
    outputs = [guided_output(model, x, t, scale, 0.0) for scale in (1.0, 3.0)]
    assert (outputs[1] - outputs[0]).abs().max() > 0.05 * outputs[0].abs().max()
