"""Who runs in the session: each a guided DDIM loop over the same weights, labels and noise, set up as its user would."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastcfg
from cpu.cases import SCALE, Case, diffusers_twin
from fastcfg.engines.cpu_ops import has_bf16, has_int8
from fastcfg.engines.openvino_module import core, quantises_activations, unreported
from fastcfg.models.denoiser import call_module

Loop = Callable[[int], Tensor]  # of so many steps -> samples, float32 [B, C, H, W]
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Contender:
    """options: ways to run it, by name; the session keeps the fastest. once: too slow to be run more than once."""

    name: str
    dtype: str
    options: dict[str, Loop]
    once: bool = False


def contenders(case: Case, cores: int, dry: bool) -> Iterator[Contender]:
    """Everyone who can be had here, fastcfg first. cores: threads for those who have a choice. dry: compile nothing."""
    yield from _fastcfg(case)
    twin = diffusers_twin(case.model) if installed("diffusers") else None
    if twin is not None:
        yield from _diffusers(case, twin, cores, dry)
        yield from _compiled(case, cores, dry)
    if twin is not None and installed("openvino"):
        yield from _openvino(case, twin, cores)


def absent() -> list[str]:
    """The peers that are not installed."""
    missing = [name for name in ("diffusers", "openvino") if not installed(name)]
    return missing if "diffusers" not in missing else ["diffusers", "openvino (it runs diffusers' module)"]


def installed(name: str) -> bool:
    try:
        with unreported():
            __import__(name)
    except ImportError:
        return False
    return True


def _dtypes() -> list[str]:
    return ["fp32", *["bf16"] * has_bf16()]


def _fastcfg(case: Case) -> Iterator[Contender]:
    for dtype in (*_dtypes(), *["int8"] * has_int8()):
        yield Contender("fastcfg", dtype, {"": _sampler_loop(case, "cpu", dtype)})
    if installed("openvino"):
        for dtype in (*_dtypes(), *["int8"] * quantises_activations()):
            yield Contender("fastcfg, engine openvino", dtype, {"": _sampler_loop(case, "openvino", dtype)})
    yield Contender("fastcfg's reference engine", "fp32", {"": _sampler_loop(case, "reference", "fp32")}, once=True)


def _sampler_loop(case: Case, engine: str, dtype: str) -> Loop:
    def loop(steps: int) -> Tensor:
        assert steps == case.steps
        return sampler(case.labels, SCALE, x_T=case.x_T)

    sampler = fastcfg.Sampler(
        case.model, steps=case.steps, spacing="leading", eta=0.0, clip="keep_eps" if case.model.clip else False,
        batch=case.batch, engine=engine, dtype=dtype,
    )  # fmt: skip
    return loop


def _diffusers(case: Case, twin: nn.Module, cores: int, dry: bool) -> Iterator[Contender]:
    """In eager its threads are an option. A compiled module gets all cores: its code is made for one number of threads."""
    for dtype in _dtypes():
        module = copy.deepcopy(twin).to(DTYPES[dtype])
        loop = partial(pipeline_loop, case, partial(call_module, module), DTYPES[dtype])
        yield Contender("diffusers, eager", dtype, {f"threads: {n}": _on_threads(n, loop) for n in sorted({1, cores})})
        yield Contender("diffusers, compiled", dtype, _compiled_loop(case, module, dtype, cores, dry))


def _compiled(case: Case, cores: int, dry: bool) -> Iterator[Contender]:
    """The training module in diffusers' loop: what a user has with one line and no other library's module."""
    for dtype in _dtypes():
        module = copy.deepcopy(case.model.module).to(DTYPES[dtype])
        yield Contender("our module, compiled", dtype, _compiled_loop(case, module, dtype, cores, dry))


def _compiled_loop(case: Case, module: nn.Module, dtype: str, cores: int, dry: bool) -> dict[str, Loop]:
    compiled: Any = torch.compile(module, dynamic=False, backend="eager" if dry else "inductor")
    loop = partial(pipeline_loop, case, partial(call_module, compiled), DTYPES[dtype])
    return {f"threads: {cores}": _on_threads(cores, loop)}


def _on_threads(count: int, loop: Loop) -> Loop:
    def run(steps: int) -> Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            return loop(steps)
        finally:
            torch.set_num_threads(before)

    return run


@torch.no_grad()
def pipeline_loop(case: Case, predict: Predict, dtype: torch.dtype, steps: int) -> Tensor:
    """The loop of diffusers' DiTPipeline from x_T to the latents, with the model's own null label where it has 1000.

    predict: the transformer, (x [2B, C, H, W], t [2B], y [2B]) -> [2B, C or 2C, H, W]. dtype: of the latents, as it has them.
    """
    scheduler = ddim_scheduler(case)
    C = case.x_T.shape[1]
    x = torch.cat([case.x_T, case.x_T]).to(dtype)
    y = torch.tensor([*case.labels, *[case.model.null_label] * case.batch])
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        half = x[: len(x) // 2]
        x = scheduler.scale_model_input(torch.cat([half, half]), t)
        output = predict(x, t[None].expand(len(x)), y)
        cond, null = output[:, :C].chunk(2)
        eps = null + SCALE * (cond - null)
        x = scheduler.step(torch.cat([eps, eps]), t, x).prev_sample
    return x[: case.batch].float()


def ddim_scheduler(case: Case) -> Any:
    """diffusers' DDIM with the model's schedule; clipping as the model was trained for."""
    from diffusers import DDIMScheduler

    kinds = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
    return DDIMScheduler(beta_schedule=kinds[case.model.schedule.name], clip_sample=case.model.clip)


def _openvino(case: Case, twin: nn.Module, cores: int) -> Iterator[Contender]:
    """The same loop around OpenVINO's transformer. Its hints are an option: all cores on all rows, or one on each part."""
    rows = 2 * case.batch
    hints = {"latency": 1, **({"throughput": cores} if cores > 1 and rows % cores == 0 else {})}
    models = {hint: _converted(twin, (rows // parts, *case.x_T.shape[1:])) for hint, parts in hints.items()}
    for dtype in _dtypes():
        predicts = {hint: _openvino_predict(models[hint], dtype, hint, parts) for hint, parts in hints.items()}
        options: dict[str, Loop] = {
            f"{hint} hint": partial(pipeline_loop, case, predict, torch.float32) for hint, predict in predicts.items()
        }
        yield Contender("OpenVINO", dtype, options)


def _openvino_predict(model: Any, dtype: str, hint: str, parts: int) -> Predict:
    """The converted transformer on `parts` times the rows that it was converted for, as many requests at a time."""
    import openvino

    options = {"PERFORMANCE_HINT": hint.upper(), "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[dtype]}
    queue = openvino.AsyncInferQueue(core().compile_model(model, "CPU", options), parts)
    results: dict[int, Tensor] = {}
    queue.set_callback(lambda request, part: results.update({part: torch.from_numpy(request.get_output_tensor().data.copy())}))

    def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        inputs = (value.contiguous().chunk(parts) for value in (x, t, y))
        for part, values in enumerate(zip(*inputs, strict=True)):
            queue.start_async([value.numpy() for value in values], userdata=part, share_inputs=True)
        queue.wait_all()
        return torch.cat([results[part] for part in range(parts)])

    return predict


def _converted(twin: nn.Module, shape: tuple[int, ...]) -> Any:
    """The module as `openvino.convert_model` makes it of an example, for inputs of one shape."""
    import openvino

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = twin

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return call_module(self.inner, x, t, y)

    whole = torch.zeros(shape[0], dtype=torch.int64)
    example = torch.zeros(shape), whole, whole
    with unreported(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit's, about shapes that become constants, as they should
        return openvino.convert_model(Plain().eval(), example_input=example, input=[list(value.shape) for value in example])
