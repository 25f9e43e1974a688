"""`fastcfg verify`: the official golden pair, and pairs of other configs made by an independent sampling loop.

The loop below is written from the papers' formulas (2006.11239, 2010.02502, 2102.09672) and the layout's description in
`golden/README.md`; of this package it uses only the network's forward, in float64.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastcfg
from fastcfg.cli import main
from fastcfg.verify import TOLERANCE, Comparison, _compare, _schedule, verify

GOLDEN = Path(__file__).parent / "golden"
PAIR = GOLDEN / "dit_tiny.weights.safetensors", GOLDEN / "dit_tiny.expected.safetensors"


# An independent sampling loop


def kept_timesteps(kind: str, N: int, T: int = 1000) -> list[int]:
    """Ascending. ddimN: the smallest whole stride that keeps N; ancN: N points from 0 to T-1, evenly, half to even."""
    if kind == "ddim":
        stride = next(s for s in range(1, T) if math.ceil(T / s) == N)
        return list(range(0, T, stride))
    return [round(i * (T - 1) / (N - 1)) for i in range(N)]


class Process:
    """Respaced betas and what follows from them, float64, index 0 the cleanest kept timestep."""

    def __init__(self, kept: list[int], T: int = 1000):
        full = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, T, dtype=torch.float64), 0)
        previous, betas = torch.ones((), dtype=torch.float64), []
        for t in kept:
            betas.append(1 - full[t] / previous)
            previous = full[t]
        self.kept = kept
        self.beta = torch.stack(betas)
        self.bar = torch.cumprod(1 - self.beta, 0)
        self.bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), self.bar[:-1]])
        self.posterior = self.beta * (1 - self.bar_prev) / (1 - self.bar)

    def x0(self, x: Tensor, eps: Tensor, i: int, clip: bool) -> Tensor:
        x0 = (x - (1 - self.bar[i]).sqrt() * eps) / self.bar[i].sqrt()
        return x0.clamp(-1, 1) if clip else x0

    def ddim(self, x: Tensor, eps: Tensor, i: int, clip: bool, eta: float, z: Tensor | None) -> Tensor:
        x0 = self.x0(x, eps, i, clip)
        eps = (x / self.bar[i].sqrt() - x0) / (1 / self.bar[i] - 1).sqrt()
        sigma = eta * ((1 - self.bar_prev[i]) / (1 - self.bar[i]) * (1 - self.bar[i] / self.bar_prev[i])).sqrt()
        mean = self.bar_prev[i].sqrt() * x0 + (1 - self.bar_prev[i] - sigma**2).sqrt() * eps
        return mean if z is None or i == 0 else mean + sigma * z

    def ancestral(self, x: Tensor, eps: Tensor, v: Tensor, i: int, clip: bool, z: Tensor) -> Tensor:
        x0 = self.x0(x, eps, i, clip)
        rest = 1 - self.bar[i]
        mean = self.beta[i] * self.bar_prev[i].sqrt() / rest * x0
        mean = mean + (1 - self.bar_prev[i]) * (1 - self.beta[i]).sqrt() / rest * x
        if i == 0:
            return mean
        if v.shape[1]:
            low, high = self.posterior[i].log(), self.beta[i].log()
            log_variance = (v + 1) / 2 * high + (1 - (v + 1) / 2) * low
        else:
            log_variance = self.beta[i].log()
        return mean + torch.exp(log_variance / 2) * z


def forward_with_cfg(model: nn.Module, x: Tensor, t: int | Tensor, y: Tensor, scale: float, channels: int) -> Tensor:
    """The official function on [cond; null] rows of which only the first half of x counts; the first half's result."""
    half = x[: len(x) // 2]
    t = torch.as_tensor(t).expand(len(half)) if isinstance(t, int) else t
    null = torch.full_like(y, model.config.num_classes)
    out = model(torch.cat([half, half]), torch.cat([t, t]), torch.cat([y, null]))
    cond, uncond = out[: len(half)], out[len(half) :]
    guided = uncond[:, :channels] + scale * (cond[:, :channels] - uncond[:, :channels])
    return torch.cat([guided, cond[:, channels:]], dim=1)


def loop(
    model: nn.Module,
    kind: str,
    N: int,
    x: Tensor,
    y: Tensor,
    scale: float,
    channels: int,
    *,
    clip: bool = False,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    process, C = Process(kept_timesteps(kind, N)), x.shape[1]
    for step, i in enumerate(reversed(range(N))):
        out = forward_with_cfg(model, torch.cat([x, x]), process.kept[i], y, scale, channels)
        eps, v = out[:, :C], out[:, C:]
        z = None if noise is None else noise[step]
        x = process.ddim(x, eps, i, clip, eta, z) if kind == "ddim" else process.ancestral(x, eps, v, i, clip, z)
    return x


def denoiser_like(module: nn.Module) -> nn.Module:
    """Random weights, plus a linear way through that makes eps about x: what a denoiser says of noise.

    Clipped sampling needs it: an iterated network that is random alone is chaotic, and a float32 run of any code then
    ends more than 1e-5 from the float64 one.
    """
    config = module.config
    for name, parameter in module.named_parameters():
        if name != "pos_embed":
            parameter.normal_(std=0.07)
    C, p, D = config.in_channels, config.patch_size, config.hidden_size
    into = nn.init.orthogonal_(torch.empty(D, C * p * p))  # into.T @ into is the identity
    module.x_embedder.proj.weight.copy_(math.sqrt(D) * into.view(D, C, p, p))
    back = math.sqrt(C * p * p / D) * into.T  # the final LayerNorm has divided by about |patch|
    rows = module.final_layer.linear.weight.view(p, p, -1, D)  # channels: eps, then v
    rows[:, :, :C] += back.view(C, p, p, D).permute(1, 2, 0, 3)
    return module


@torch.no_grad()
def make_pair(
    folder: Path, config: dict[str, Any], scale: float, eta: float, loops: dict[str, int], seed: int = 0
) -> tuple[Path, Path]:
    """Writes a golden pair of a random DiT. loops: "ddim" and "anc" to their numbers of steps."""
    config = {"input_size": 8, "patch_size": 2, "in_channels": 4, "learn_sigma": True, **config}
    torch.manual_seed(seed)
    module = denoiser_like(fastcfg.DiT(**config))
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    model = module.double().eval()
    C, B = config["in_channels"], 3
    x = torch.randn(B, C, config["input_size"], config["input_size"])
    t, y = torch.tensor([999, 480, 3]), torch.arange(B) % config["num_classes"]
    x64 = x.double()
    null = torch.full_like(y, config["num_classes"])
    made: dict[str, Tensor] = {
        "forward": model(x64, t, y),
        "forward_null": model(x64, t, null),
        "cfg3": forward_with_cfg(model, torch.cat([x64, x64]), t, y, scale, 3),
    }
    for kind, N in loops.items():
        tag = f"{kind}{N}"
        made[f"{tag}_timesteps"] = torch.tensor(kept_timesteps(kind, N))
        noise = torch.randn(N, *x.shape)
        few, every = min(3, C), C
        if kind == "ddim":
            made[f"{tag}_eta_noise"] = noise
            made[f"{tag}_cfg3"] = loop(model, kind, N, x64, y, scale, few)
            made[f"{tag}_cfgall"] = loop(model, kind, N, x64, y, scale, every)
            made[f"{tag}_clip_cfg3"] = loop(model, kind, N, x64, y, scale, few, clip=True)
            made[f"{tag}_clip_cfgall"] = loop(model, kind, N, x64, y, scale, every, clip=True)
            made[f"{tag}_eta_cfgall"] = loop(model, kind, N, x64, y, scale, every, eta=eta, noise=noise.double())
        else:
            made[f"{tag}_noise"] = noise
            made[f"{tag}_cfg3"] = loop(model, kind, N, x64, y, scale, few, noise=noise.double())
            made[f"{tag}_cfgall"] = loop(model, kind, N, x64, y, scale, every, noise=noise.double())
            made[f"{tag}_clip_cfgall"] = loop(model, kind, N, x64, y, scale, every, clip=True, noise=noise.double())
    results = {name: value if value.dtype == torch.int64 else value.float() for name, value in made.items()}
    metadata = {
        "config": json.dumps(config),
        "schedule": "linear 1e-4..2e-2, 1000 steps",
        "guidance_scale": str(scale),
        "eta": str(eta),
    }
    paths = folder / "a.weights.safetensors", folder / "a.expected.safetensors"
    save_file(weights, paths[0], metadata)
    save_file({"x": x, "t": t, "y": y, **results}, paths[1], metadata)
    return paths


def assert_all_ok(comparisons: list[Comparison], expected: Path) -> None:
    assert [str(c) for c in comparisons if not c.ok] == []
    inputs = ("x", "t", "y")
    with safe_open(expected, "pt") as file:
        computed = {name for name in file.keys() if not name.endswith("_noise") and name not in inputs}  # noqa: SIM118
    assert {c.name for c in comparisons} == computed


def unclipped(folder: Path, expected: Path = PAIR[1]) -> Path:
    """The expected file without the clipped loops, whose rounding is the processor's: see `fastcfg.portable`."""

    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "_clip_" in name]:
            del tensors[name]

    return rewritten(folder / "unclipped.safetensors", expected, drop)


@pytest.mark.parametrize("engine", ["auto", "cpu", "reference"])
def test_golden_pair(engine: str) -> None:
    code, output = run(*PAIR, "--engine", engine)
    assert code == 0
    assert output.count(" ok\n") == 11
    assert f"all within {TOLERANCE:g}" in output


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_golden_pair_by_this_processors_own_instructions(engine: str, tmp_path: Path) -> None:
    expected = unclipped(tmp_path)
    comparisons = list(verify(PAIR[0], expected, engine))
    assert_all_ok(comparisons, expected)
    assert len(comparisons) == 9


@pytest.mark.parametrize("engine", ["auto", "cpu", "reference"])
def test_a_gpu_in_the_machine_changes_nothing(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert next(verify(*PAIR, engine=engine)).ok
    with pytest.raises(fastcfg.Error, match="device 'cuda'"):  # which there is not, and whose engine alone asks for it
        next(verify(*PAIR, engine="cuda"))


def test_the_independent_loop_agrees_with_the_golden_pair() -> None:
    """The generator of the pairs below is itself checked against the official results."""
    weights, expected = (load_file(path) for path in PAIR)
    with safe_open(PAIR[1], "pt") as file:
        metadata = file.metadata()
    model = fastcfg.DiT(**json.loads(metadata["config"])).double().eval()
    model.load_state_dict(weights)
    x, y, scale = expected["x"].double(), expected["y"], float(metadata["guidance_scale"])
    eta = {"eta": float(metadata["eta"]), "noise": expected["ddim10_eta_noise"].double()}
    with torch.no_grad():
        results = {
            "ddim10_cfg3": loop(model, "ddim", 10, x, y, scale, 3),
            "ddim10_cfgall": loop(model, "ddim", 10, x, y, scale, 4),
            "ddim10_clip_cfg3": loop(model, "ddim", 10, x, y, scale, 3, clip=True),
            "ddim10_clip_cfgall": loop(model, "ddim", 10, x, y, scale, 4, clip=True),
            "ddim10_eta_cfgall": loop(model, "ddim", 10, x, y, scale, 4, **eta),
            "anc10_cfg3": loop(model, "anc", 10, x, y, scale, 3, noise=expected["anc10_noise"].double()),
        }
    for name, result in results.items():
        # The clipped golden results, float32 of a network that is random alone, are 1.1e-5 from any float64 evaluation.
        tolerance = 3e-5 if "clip" in name else 1e-6
        assert (result - expected[name]).abs().max() <= tolerance * expected[name].abs().max(), name


@pytest.mark.parametrize(
    ("config", "scale", "eta", "loops"),
    [
        ({"hidden_size": 144, "depth": 2, "num_heads": 2, "num_classes": 10}, 4.0, 0.5, {"ddim": 20, "anc": 20}),
        ({"patch_size": 4, "hidden_size": 64, "depth": 2, "num_heads": 1, "num_classes": 3}, 1.5, 1.0, {"ddim": 7, "anc": 7}),
        (
            {"learn_sigma": False, "hidden_size": 64, "depth": 3, "num_heads": 4, "num_classes": 10},
            3.0,
            0.7,
            {"ddim": 25, "anc": 25},
        ),
        (
            {"learn_sigma": False, "in_channels": 1, "hidden_size": 72, "depth": 2, "num_heads": 1, "num_classes": 3},
            1.5,
            1.0,
            {"ddim": 25, "anc": 20},
        ),
        (
            {"in_channels": 3, "input_size": 12, "hidden_size": 64, "depth": 1, "num_heads": 2, "num_classes": 3},
            2.5,
            0.3,
            {"ddim": 20, "anc": 25},
        ),
        ({"in_channels": 1, "hidden_size": 64, "depth": 2, "num_heads": 2, "num_classes": 3}, 2.0, 1.0, {"ddim": 7}),
        ({"hidden_size": 64, "depth": 2, "num_heads": 2, "num_classes": 3}, 1.0, 1.0, {"ddim": 50, "anc": 10}),
    ],
)
def test_other_configs(config: dict[str, Any], scale: float, eta: float, loops: dict[str, int], tmp_path: Path) -> None:
    pair = make_pair(tmp_path, config, scale, eta, loops)
    assert_all_ok(list(verify(*pair)), pair[1])


# The command


def run(*arguments: Path | str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["verify", *map(str, arguments)])
    return result.exit_code, result.output


def run_native(*arguments: Path | str) -> tuple[int, str]:
    """Here and not in another process, which is quicker."""
    return run(*arguments, "--native")


def rewritten(target: Path, source: Path, change: Any = None, **metadata: str | None) -> Path:
    """`source` at `target` with `change(tensors)` applied and metadata replaced (None: removed)."""
    tensors = load_file(source)
    with safe_open(source, "pt") as file:
        kept = {**file.metadata(), **metadata}
    if change is not None:
        change(tensors)
    save_file(tensors, target, {key: value for key, value in kept.items() if value is not None})
    return target


RESULTS = [
    "forward",
    "forward_null",
    "cfg3",
    "ddim10_timesteps",
    "ddim10_cfg3",
    "ddim10_clip_cfgall",
    "ddim10_eta_cfgall",
    "anc10_cfg3",
]


@pytest.mark.parametrize("name", RESULTS)
def test_a_perturbed_result_is_found(name: str, tmp_path: Path) -> None:
    def perturb(tensors: dict[str, Tensor]) -> None:
        flat = tensors[name].view(-1)
        flat[-1] += 1e-3 * tensors[name].abs().max() if flat.is_floating_point() else 1

    expected = rewritten(tmp_path / "e.safetensors", PAIR[1], perturb)
    code, output = run(PAIR[0], expected) if "clip" in name else run_native(PAIR[0], unclipped(tmp_path, expected))
    assert code == 1
    assert [line.split()[0] for line in output.splitlines() if "EXCEEDS" in line] == [name]


@pytest.mark.parametrize(("name", "value"), [("ddim10_cfg3", math.nan), ("forward", math.inf), ("cfg3", math.nan)])
def test_a_result_that_is_no_number_is_found(name: str, value: float, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[5] = value

    expected = unclipped(tmp_path, rewritten(tmp_path / "e.safetensors", PAIR[1], spoil))
    code, output = run_native(PAIR[0], expected)
    assert code == 1
    assert [line.split()[0] for line in output.splitlines() if "EXCEEDS" in line] == [name]


def test_a_perturbed_weight_is_found(tmp_path: Path) -> None:
    def perturb(tensors: dict[str, Tensor]) -> None:
        tensors["blocks.1.attn.qkv.weight"][100, 7] += 1e-2

    code, output = run_native(rewritten(tmp_path / "w.safetensors", PAIR[0], perturb), PAIR[1])
    assert code == 1
    assert "EXCEEDS" in output


@pytest.mark.parametrize(
    ("name", "reported"),
    [
        ("x", ["x"]),
        ("t", ["t"]),
        ("y", ["y"]),
        ("forward", ["forward"]),
        ("forward_null", ["forward_null"]),
        ("cfg3", ["cfg3"]),
        ("ddim10_timesteps", ["ddim10_timesteps"]),
        ("anc10_noise", ["anc10_cfg3"]),
        ("ddim10_eta_noise", ["ddim10_eta_cfgall"]),
        ("ddim10_cfg3", ["ddim10_cfg3"]),
        ("ddim10_cfgall", ["ddim10_cfgall"]),
        ("ddim10_clip_cfg3", ["ddim10_clip_cfg3"]),
        ("ddim10_clip_cfgall", ["ddim10_clip_cfgall"]),
        ("ddim10_eta_cfgall", ["ddim10_eta_cfgall"]),
        ("anc10_cfg3", ["anc10_cfg3"]),
    ],
)
def test_a_removed_tensor_is_found(name: str, reported: list[str], tmp_path: Path) -> None:
    code, output = run_native(PAIR[0], rewritten(tmp_path / "e.safetensors", PAIR[1], lambda tensors: tensors.pop(name)))
    assert code == 1
    assert [line.split()[0] for line in output.splitlines() if "MISSING" in line] == reported


def test_a_result_of_another_shape_is_found(tmp_path: Path) -> None:
    def narrow(tensors: dict[str, Tensor]) -> None:
        tensors["forward"] = tensors["forward"][:, :1].clone()

    code, output = run_native(PAIR[0], rewritten(tmp_path / "e.safetensors", PAIR[1], narrow))
    assert code == 1
    assert re.search(r"^forward +MISSING +it is \[\d+, 1, 8, 8\], recomputed \[\d+, 8, 8, 8\]$", output, re.MULTILINE), output


def test_the_limit_is_1e_5_of_the_largest_expected_value() -> None:
    expected = torch.tensor([0.5, -4.0, 1.0])
    for times, ok in ((0.9, True), (1.1, False)):
        compared = _compare("name", expected + torch.tensor([0, 0, times * 4e-5], dtype=torch.float64), expected)
        assert compared.difference == pytest.approx(times * 4e-5)
        assert compared.relative == pytest.approx(times * 1e-5)
        assert compared.ok == ok
    assert _compare("name", torch.zeros(3), torch.zeros(3)).ok
    assert not _compare("name", torch.full((3,), math.nan), expected).ok


def test_the_schedule_is_the_files() -> None:
    read = _schedule("linear 2e-4..1e-2, 500 steps")
    assert read.alpha**2 == pytest.approx(np.cumprod(1 - np.linspace(2e-4, 1e-2, 500)), rel=1e-12)


def test_every_result_is_the_asked_engines_in_the_asked_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def spied(*arguments: Any, **options: Any) -> fastcfg.Sampler:
        asked.append((options["engine"], options["dtype"]))
        return fastcfg.Sampler(*arguments, **options)

    monkeypatch.setattr("fastcfg.verify.Sampler", spied)
    expected = unclipped(tmp_path)
    comparisons = list(verify(PAIR[0], expected, "cpu", "bf16"))
    computed = [c.name for c in comparisons if not c.name.endswith("_timesteps")]
    assert len(computed) == 7
    assert [c.name for c in comparisons if not c.ok] == computed  # bf16 is not within the limit
    assert Counter(asked) == {("cpu", "bf16"): 5, ("reference", "fp32"): 2}


def test_a_name_outside_the_layout_is_found(tmp_path: Path) -> None:
    change = lambda tensors: tensors.update(ddim10_magic=torch.zeros(1))  # noqa: E731
    code, output = run_native(PAIR[0], rewritten(tmp_path / "e.safetensors", PAIR[1], change))
    assert code == 1
    assert "ddim10_magic" in output


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"config": None}, {}),
        ({"config": "{"}, {}),
        ({"config": '{"hidden_size": 32}'}, {}),
        ({"config": "3"}, {}),
        ({}, {"schedule": None}),
        ({}, {"schedule": "quadratic 1e-4..2e-2, 1000 steps"}),
        ({}, {"schedule": "linear"}),
        ({}, {"guidance_scale": None}),
        ({}, {"guidance_scale": "four"}),
        ({}, {"eta": None}),
    ],
)
def test_metadata_outside_the_layout(weights: dict, expected: dict, tmp_path: Path) -> None:
    pair = (
        rewritten(tmp_path / "w.safetensors", PAIR[0], **weights),
        rewritten(tmp_path / "e.safetensors", PAIR[1], **expected),
    )
    code, output = run_native(*pair)
    assert code == 2
    assert "error: " in output


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("content", [b"", b"text", None, "truncated", "swapped", "folder"])
def test_no_golden_pair(content: Any, which: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "truncated":
        path.write_bytes(PAIR[which].read_bytes()[:-10])
    elif content == "swapped":
        path.write_bytes(PAIR[1 - which].read_bytes())
    elif content == "folder":
        path.mkdir()
    pair = [*PAIR]
    pair[which] = path
    code, output = run_native(*pair)
    # The weights file carries the metadata too: as the expected file it is a pair that lacks everything.
    assert code == (1 if content == "swapped" and which == 1 else 2)
    assert ("error: " in output) == (code == 2)
