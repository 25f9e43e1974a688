"""Engines: each runs a plan on a model. `reference` is the definition."""

from __future__ import annotations

import torch

from fastcfg.engines.base import Engine, Request
from fastcfg.engines.reference import ReferenceEngine
from fastcfg.errors import Error
from fastcfg.models.denoiser import Denoiser
from fastcfg.plan import Plan

__all__ = ["ENGINES", "Engine", "Request", "make_engine"]

ENGINES = {"reference": ReferenceEngine}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_engine(name: str, model: Denoiser, plan: Plan, device: str, dtype: str) -> Engine:
    """The engine called `name` ("auto": the best there is for the device), for one model and plan.

    device: "auto" (a GPU where there is one, else the CPU) or torch's name of one. dtype: "auto" (the model's own),
    "fp32", "bf16" or "fp16".
    """
    if name != "auto" and name not in ENGINES:
        raise Error(f"unknown engine {name!r}: known are auto, {', '.join(ENGINES)}")
    if dtype != "auto" and dtype not in DTYPES:
        raise Error(f"unknown dtype {dtype!r}: known are auto, {', '.join(DTYPES)}")
    kind = "reference" if name == "auto" else name
    return ENGINES[kind](model, plan, find_device(device), model.dtype if dtype == "auto" else DTYPES[dtype])


def find_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise Error(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device
