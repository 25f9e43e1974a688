"""Recomputes golden files: what the official DiT code gave for a set of weights, against what this package gives.

The layout of a pair (weights, expected): see `tests/golden/README.md`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastcfg.checkpoints import build_dit
from fastcfg.errors import Error
from fastcfg.files import read_safetensors
from fastcfg.guidance import Guidance
from fastcfg.models.denoiser import Denoiser, describe_dit
from fastcfg.models.dit import DiTConfig
from fastcfg.sampler import Sampler
from fastcfg.schedules import Schedule, schedule

# Of the largest expected value. Between processors the official code itself misses it in clipped loops (docs/design.md).
TOLERANCE = 1e-5
_LOOP = re.compile(r"(?P<tag>(?P<kind>ddim|anc)(?P<steps>\d+))(?P<clip>_clip)?(?P<eta>_eta)?_cfg(?P<channels>3|all)")
_OF_LOOP = re.compile(r"(?P<tag>(ddim|anc)\d+)_")
_REQUIRED = ("x", "t", "y", "forward", "forward_null", "cfg3")


@dataclass(frozen=True)
class Comparison:
    """One tensor of the file. difference: max abs; relative: to the largest expected value; None where it is missing.

    NaN, where either tensor has one, is not ok.
    """

    name: str
    difference: float | None
    relative: float | None
    why: str = ""

    @property
    def ok(self) -> bool:
        return self.relative is not None and self.relative <= TOLERANCE

    def __str__(self) -> str:
        if self.relative is None:
            return f"{self.name:24} MISSING  {self.why}"
        return f"{self.name:24} {self.difference:.3e}  {self.relative:.3e} of max  {'ok' if self.ok else 'EXCEEDS'}"


@dataclass(frozen=True)
class Golden:
    """A golden pair, read and checked."""

    model: Denoiser
    expected: dict[str, Tensor]
    scale: float
    eta: float


def read_golden(weights: Path, expected: Path) -> Golden:
    """Reads the pair; raises Error where a file or its metadata is not of the layout."""
    tensors, metadata = read_safetensors(weights)
    results, settings = read_safetensors(expected)
    try:
        config = DiTConfig.from_json(json.loads(metadata["config"]))
        scale, eta = float(settings["guidance_scale"]), float(settings["eta"])
        noise_schedule = _schedule(settings["schedule"])
    except (KeyError, ValueError, TypeError) as error:
        raise Error(f"{weights} and {expected} are not a golden pair: {type(error).__name__} {error}") from error
    module = build_dit(config, tensors, str(weights)).eval()
    return Golden(describe_dit(module, schedule=noise_schedule), results, scale, eta)


def verify(weights: Path, expected: Path, engine: str = "auto", dtype: str = "fp32") -> Iterator[Comparison]:
    """Yields a Comparison for every tensor that the expected file holds or should hold, as each is recomputed."""
    golden = read_golden(weights, expected)
    missing = [name for name in _REQUIRED if name not in golden.expected]
    yield from (Comparison(name, None, None, "the file must hold it") for name in missing)
    if {"x", "t", "y"} & set(missing):
        return
    yield from _forwards(golden, engine, dtype)
    for tag in sorted({m["tag"] for m in map(_OF_LOOP.match, golden.expected) if m}):
        yield _timesteps(golden, tag)
        for name in _required_of(tag, golden.expected):
            if name not in golden.expected:
                yield Comparison(name, None, None, "the file must hold it")
    for name in golden.expected:
        match = _LOOP.fullmatch(name)
        if match:
            yield _loop(golden, match, engine, dtype)
        elif name not in _REQUIRED and not re.fullmatch(r"(ddim|anc)\d+(_eta)?_(noise|timesteps)", name):
            yield Comparison(name, None, None, "not a name of the layout: it cannot be recomputed")


def _required_of(tag: str, present: Collection[str]) -> list[str]:
    """The results that a file with tensors of this loop must hold; clipped and eta results only where it has some."""
    if tag.startswith("anc"):
        return [f"{tag}_cfg3"]
    names = [f"{tag}_cfg3", f"{tag}_cfgall"]
    if any(name.startswith(f"{tag}_clip") for name in present):
        names += [f"{tag}_clip_cfg3", f"{tag}_clip_cfgall"]
    if f"{tag}_eta_noise" in present:
        names.append(f"{tag}_eta_cfgall")
    return names


def _forwards(golden: Golden, engine: str, dtype: str) -> Iterator[Comparison]:
    x, t, y = (golden.expected[name] for name in "xty")
    sampler = Sampler(golden.model, steps=2, batch=len(x), device=_device(engine), engine=engine, dtype=dtype)
    cond, null = sampler.predict(x, t, y), sampler.predict(x, t, None)
    guided = Guidance().combine(cond[:, :3], null[:, :3], torch.full((len(x),), golden.scale, device=cond.device))
    computed = {"forward": cond, "forward_null": null, "cfg3": torch.cat([guided, cond[:, 3:]], dim=1)}
    for name, value in computed.items():
        if name in golden.expected:
            yield _compare(name, value, golden.expected[name])


def _timesteps(golden: Golden, tag: str) -> Comparison:
    name = f"{tag}_timesteps"
    if name not in golden.expected:
        return Comparison(name, None, None, "the file must hold it")
    plan = _sampler(golden, tag, 3, False, 0.0, "reference", "fp32").plan
    return _compare(name, torch.from_numpy(plan.timesteps[::-1].copy()), golden.expected[name].double())


def _loop(golden: Golden, match: re.Match[str], engine: str, dtype: str) -> Comparison:
    name, tag = match.group(), match["tag"]
    noise_name = f"{tag}_eta_noise" if match["eta"] else f"{tag}_noise"
    noisy = bool(match["eta"]) or match["kind"] == "anc"
    if noisy and noise_name not in golden.expected:
        return Comparison(name, None, None, f"it needs {noise_name}")
    channels = None if match["channels"] == "all" else 3
    sampler = _sampler(golden, tag, channels, bool(match["clip"]), golden.eta if match["eta"] else 0.0, engine, dtype)
    sample = sampler(
        golden.expected["y"],
        golden.scale,
        x_T=golden.expected["x"],
        noise=golden.expected[noise_name] if noisy else None,
    )
    return _compare(name, sample, golden.expected[name])


def _sampler(golden: Golden, tag: str, channels: int | None, clip: bool, eta: float, engine: str, dtype: str) -> Sampler:
    model = golden.model
    ancestral = tag.startswith("anc")
    return Sampler(
        model,
        steps=int(re.sub(r"\D", "", tag)),
        solver="ddpm" if ancestral else "ddim",
        spacing="dit" if ancestral else "ddim",
        variance="fixed_large" if ancestral and not model.learned_variance else None,
        eta=eta,
        clip=clip,
        guidance_channels=None if channels is None else min(channels, model.shape[0]),
        batch=len(golden.expected["x"]),
        device=_device(engine),
        engine=engine,
        dtype=dtype,
    )


def _device(engine: str) -> str:
    """A GPU is for its own engine: what torch computes there differs from GPU to GPU, and it rounds convolutions to TF32."""
    return "auto" if engine == "cuda" else "cpu"


def _compare(name: str, computed: Tensor, expected: Tensor) -> Comparison:
    if computed.shape != expected.shape:
        return Comparison(name, None, None, f"it is {list(expected.shape)}, recomputed {list(computed.shape)}")
    difference = (computed.cpu().double() - expected.double()).abs().max().item()
    return Comparison(name, difference, difference / max(expected.double().abs().max().item(), 1e-30))


def _schedule(text: str) -> Schedule:
    """ "linear 1e-4..2e-2, 1000 steps" as a Schedule."""
    match = re.fullmatch(r"(\w+) (\S+?)\.\.(\S+), (\d+) steps", text)
    if not match:
        raise ValueError(f"schedule {text!r}")
    name, start, end, T = match.groups()
    return schedule(name, T=int(T), beta_start=float(start), beta_end=float(end))
