"""The whole guided loop at DiT's sizes: fastcfg, the same module in eager and compiled torch, and diffusers."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import fastcfg
from fastcfg.explain import count_flops
from fastcfg.kernels.tuned import VARIABLE
from fastcfg.models import dit
from fastcfg.models.dit import DiT, timestep_frequencies
from gpu.correctness import TINY, invariance, random_dit
from gpu.report import Session, Times, measure

STEPS, SCALE = 50, 4.0
# In order of interest: time may not suffice for all
SHAPES = [("DiT-XL/2", 32), ("DiT-XL/2", 1), ("DiT-S/2", 1), ("DiT-S/2", 32), ("DiT-B/2", 1), ("DiT-B/2", 32),
          ("DiT-XL/2", 8), ("DiT-XL/2", 64), ("DiT-S/2", 8), ("DiT-B/2", 8), ("DiT-S/2", 64), ("DiT-B/2", 64)]  # fmt: skip
COMPILED = SHAPES[:3]  # max-autotune takes about a minute each
SPANS = (0, 1, 10, 50)  # steps in a graph; 0 is none
IN_A_ROW = 10  # a baseline's steps, timed together: as in a loop, the host runs ahead, and only the first step waits for it


def fused(session: Session) -> None:
    """A whole call of the sampler, 50 steps and the result, for every shape."""
    _fused(session, "fastcfg", SHAPES)


def tuned(session: Session) -> None:
    """With the table that `tune` has written, which no section before had: bits across batches, and `fused` again."""
    table = session.report.path.with_suffix(".json")
    if not table.is_file():
        session.report.row("tuned", f"there is no {table.name}", "note")
        return
    with mock.patch.dict(os.environ, {VARIABLE: str(table)}):
        invariance(session)
        _fused(session, "fastcfg, tuned", SHAPES[:4])


def _fused(session: Session, who: str, shapes: list[tuple[str, int]]) -> None:
    for name, batch in _shapes(session, shapes):
        one, steps = _sampler(session, name, batch)
        call = partial(one, [b % 5 for b in range(batch)], SCALE)
        for _ in range(2):  # the first compiles and captures
            call()
        times = measure(call, session.device, seconds=3.0, least=3, most=20)
        _row(session, who, name, batch, _scaled(times, STEPS / steps), one, "" if steps == STEPS else f"{steps} steps")


def spans(session: Session) -> None:
    """How many steps a graph should hold: what `capture.SPAN` is chosen by."""
    for name, batch in _shapes(session, [("DiT-XL/2", 1), ("DiT-S/2", 1)]):  # where gaps between launches count
        one, steps = _sampler(session, name, batch)
        call = partial(one, [0] * batch, SCALE)
        call()
        (loop,) = one.engine._loops.values()  # type: ignore[attr-defined]
        for span in SPANS[:1] if session.dry else SPANS:
            if session.left() <= 0:
                break
            loop.graphs.clear()
            loop.graphs.span = span
            for _ in range(2):
                call()
            times = measure(call, session.device, seconds=2.0, least=3, most=20)
            _row(session, f"{span} steps a graph", name, batch, _scaled(times, STEPS / steps), one)


def eager(session: Session) -> None:
    """The same module as torch runs it, guided steps in a row."""
    for name, batch in _shapes(session, SHAPES):
        _baseline(session, "torch eager", name, batch, lambda step: step)


def compiled(session: Session) -> None:
    """The same step, guidance and solver in it, through torch.compile with autotuning and CUDA graphs."""
    options: dict[str, Any] = {"backend": "eager"} if session.dry else {"mode": "max-autotune"}
    for name, batch in _shapes(session, COMPILED):
        torch.compiler.reset()
        _baseline(session, "torch.compile max-autotune", name, batch, lambda step: torch.compile(step, **options))


def diffusers(session: Session) -> None:
    """diffusers' DiT in eager with its DDIM scheduler, where it can be imported."""
    try:
        from diffusers import DDIMScheduler, DiTTransformer2DModel
    except ImportError as error:
        return session.report.row("diffusers", f"not importable: {error}", "note")
    for name, batch in _shapes(session, [shape for shape in SHAPES if shape[1] in (1, 32)]):
        config = _module(session, name, meta=True).config
        module: Any = DiTTransformer2DModel(
            num_attention_heads=config.num_heads, attention_head_dim=config.hidden_size // config.num_heads,
            in_channels=config.in_channels, out_channels=config.out_channels, num_layers=config.depth,
            sample_size=config.input_size, patch_size=config.patch_size, num_embeds_ada_norm=config.num_classes,
        )  # fmt: skip
        module.eval()
        scheduler: Any = DDIMScheduler(clip_sample=False)
        scheduler.set_timesteps(STEPS)

        def wrap(_: object, module: Any = module, scheduler: Any = scheduler) -> Callable[..., Tensor]:
            module.to(session.device, _dtype(session))

            def step(x: Tensor, t: Tensor, y: Tensor, s: float, *_: float) -> Tensor:
                out = module(torch.cat([x, x]).to(module.dtype), timestep=t, class_labels=y).sample.float()
                cond, null = out.chunk(2)
                C = x.shape[1]
                eps = null[:, :C] + s * (cond[:, :C] - null[:, :C])
                return scheduler.step(eps, int(scheduler.timesteps[10]), x).prev_sample

            return step

        _baseline(session, "diffusers eager", name, batch, wrap)
    return None


def _shapes(session: Session, shapes: list[tuple[str, int]]) -> Any:
    """The shapes, while there is time; what had to be left out is a row."""
    for name, batch in [("tiny", 2)] if session.dry else shapes:
        if session.left() <= 0:
            session.report.row(f"{name} batch {batch}", "left out: out of time", "note")
        else:
            yield name, batch


def _module(session: Session, name: str, meta: bool = False) -> DiT:
    if session.dry:
        return random_dit(**TINY)
    with torch.device("meta" if meta else session.device):
        module = DiT.from_name(name).eval()
    if not meta:
        for parameter in module.parameters():  # the zeros that training starts from would time as nothing else does
            nn.init.normal_(parameter, std=0.02)
    return module


def _dtype(session: Session) -> torch.dtype:
    return torch.float32 if session.dry else torch.bfloat16


def _sampler(session: Session, name: str, batch: int) -> tuple[fastcfg.Sampler, int]:
    steps = 2 if session.dry else STEPS
    return (
        fastcfg.Sampler(
            _module(session, name).to(_dtype(session)),
            steps=steps, batch=batch, engine="cuda", device=str(session.device), dtype="fp32" if session.dry else "bf16",
        ),
        steps,
    )  # fmt: skip


def _baseline(
    session: Session, who: str, name: str, batch: int, wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
) -> None:
    module, device = _module(session, name).to(_dtype(session)), session.device
    C = module.config.in_channels

    def step(x: Tensor, t: Tensor, y: Tensor, s: float, a: float, b: float) -> Tensor:
        cond, null = module(torch.cat([x, x]).to(module.pos_embed.dtype), t, y).float().chunk(2)
        return a * x + b * (null[:, :C] + s * (cond[:, :C] - null[:, :C]))

    x = torch.randn(batch, C, module.config.input_size, module.config.input_size, device=device)
    t = torch.full((2 * batch,), 500, device=device)
    y = torch.arange(2 * batch, device=device) % 5
    wrapped = wrap(step)
    # torch.compile does not see that the table of frequencies is kept: it would copy it to the device in every forward, and do
    # without CUDA graphs
    table = timestep_frequencies(module.config.time_frequency_shift, x.device)

    def known_frequencies(*asked: object) -> Tensor:
        assert asked == (module.config.time_frequency_shift, x.device)
        return table

    def steps() -> None:
        for _ in range(IN_A_ROW):
            wrapped(x, t, y, SCALE, 1.01, -0.1)

    with torch.no_grad(), mock.patch.object(dit, "timestep_frequencies", known_frequencies):
        steps()  # the third call of a compiled function replays its graph
        times = measure(steps, device, seconds=1.0, most=50)
    _row(session, who, name, batch, _scaled(times, STEPS / IN_A_ROW), None, f"{IN_A_ROW} steps x {STEPS // IN_A_ROW}")


def _row(session: Session, who: str, name: str, batch: int, times: Times, one: fastcfg.Sampler | None, note: str = "") -> None:
    """Milliseconds of a loop of 50 steps; for ours also the FLOPs of its products over the matrix ceiling."""
    fraction = None
    if one is not None and session.ceilings.get("product"):
        flops = 2 * batch * STEPS * _flops_of_a_row(name, one)
        fraction = flops / (times[1] / 1e3) / session.ceilings["product"]
    unit = "ms a guided step" + (f" ({note})" if note else "")
    shape = f"{name} batch {batch}, {STEPS} steps"
    session.report.row(who, times[1] / STEPS, unit, shape=shape, dtype=_dtype(session), times=times, fraction=fraction)


_flops: dict[str, int] = {}


def _flops_of_a_row(name: str, one: fastcfg.Sampler) -> int:
    """Of a model's forward; counting them takes a second for the largest."""
    if name not in _flops:
        _flops[name] = count_flops(one.model)
    return _flops[name]


def _scaled(times: Times, factor: float) -> Times:
    low, middle, high = times
    return low * factor, middle * factor, high * factor
