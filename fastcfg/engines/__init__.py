"""Engines: each runs a plan on a model. `reference` is the definition, `cpu` the fast one on a CPU, `openvino` the same
with OpenVINO's products, `cuda` the one on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastcfg.devices import find_device
from fastcfg.engines.base import Engine, Request
from fastcfg.engines.cpu import make_cpu_engine
from fastcfg.engines.fused_dit import is_plain_dit
from fastcfg.engines.reference import ReferenceEngine
from fastcfg.errors import Error, check_known
from fastcfg.models.denoiser import Denoiser
from fastcfg.plan import Plan

__all__ = ["ENGINES", "Engine", "Request", "make_engine"]


def make_cuda_engine(model: Denoiser, plan: Plan, device: torch.device, dtype: torch.dtype | None) -> Engine:
    """The CUDA engine, imported when it is asked for: it brings Triton with it."""
    try:
        from fastcfg.engines.cuda import CudaEngine
    except ImportError as error:
        raise Error(f"engine 'cuda' needs Triton, which cannot be imported here: {error}") from error
    return CudaEngine(model, plan, device, dtype)


def make_openvino_engine(model: Denoiser, plan: Plan, device: torch.device, dtype: torch.dtype | None) -> Engine:
    """The openvino engine, imported when it is asked for."""
    from fastcfg.engines.openvino_dit import OpenVinoEngine

    return OpenVinoEngine(model, plan, device, dtype)


ENGINES: dict[str, Callable[[Denoiser, Plan, torch.device, torch.dtype | None], Engine]] = {
    "reference": ReferenceEngine,
    "cpu": make_cpu_engine,
    "openvino": make_openvino_engine,
    "cuda": make_cuda_engine,
}
ON_CPU = ("cpu", "openvino")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


def make_engine(name: str, model: Denoiser, plan: Plan, device: str | torch.device, dtype: str) -> Engine:
    """The engine called `name` ("auto": cpu for a DiT on the CPU, else reference), for one model and plan.

    device: "auto" (a GPU where there is one and the engine uses it, else the CPU) or torch's name of one. dtype: "fp32",
    "bf16", "fp16" or, where an engine has it, "int8"; or "auto": the model's own, but for a DiT on engines cpu, openvino and
    cuda what they say of None (fp32, or a lower one where the model keeps its quality in that).
    """
    check_known("engine", name, ("auto", *ENGINES))
    check_known("dtype", dtype, ("auto", *DTYPES))
    where = find_device("cpu" if name in ON_CPU and device == "auto" else device)
    if model.device.type == "meta" != where.type:
        raise Error(f"the model's weights are on the meta device, which holds no values: load them before sampling on {where}")
    kind = _best(model, where, dtype) if name == "auto" else name
    return ENGINES[kind](model, plan, where, None if dtype == "auto" else DTYPES[dtype])


def _best(model: Denoiser, device: torch.device, dtype: str) -> str:
    fused = device.type == "cpu" and dtype != "fp16" and is_plain_dit(model.module)
    return "cpu" if fused else "reference"
