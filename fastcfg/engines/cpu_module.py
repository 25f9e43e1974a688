"""The CPU engine for modules that are not our DiT: their own forward, compiled where that is faster."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from fastcfg.engines.base import Request
from fastcfg.engines.choice import fastest
from fastcfg.engines.reference import ReferenceEngine
from fastcfg.errors import Error
from fastcfg.models.denoiser import Denoiser, call_module
from fastcfg.plan import Plan


class CpuModuleEngine(ReferenceEngine):
    """The reference's steps on one sample at a time, so that its bits depend on no other; all cores in each operation.

    Whether `torch.compile` is faster than the module as it is, is measured at the first run and remembered; where it cannot
    be had, `notes` says so. dtype: float32, bfloat16, or None for the module's own. Runs take turns.
    """

    name = "cpu"

    def __init__(self, model: Denoiser, plan: Plan, device: torch.device, dtype: torch.dtype | None):
        if dtype == torch.int8:
            raise Error(
                f"dtype 'int8' is for DiT models, and {type(model.module).__name__} is another module: use bf16 or fp32"
            )
        self.notes: tuple[str, ...] = ()
        self._turn = threading.Lock()
        self._compiled: bool | None = None  # not decided yet
        super().__init__(model, plan, device, model.dtype if dtype is None else dtype)

    def _threads(self) -> AbstractContextManager[None]:
        return nullcontext()  # a forward of one sample is cut the same way every time

    def refresh(self) -> None:
        with self._turn:
            super().refresh()
            if self._compiled:
                self._module = _compiled(self._module)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with self._turn:
            rows = [slice(n, n + 1) for n in range(len(x))]
            return torch.cat([ReferenceEngine.forward(self, x[n], t[n], y[n]) for n in rows])

    def run(self, request: Request) -> Tensor:
        with self._turn:
            self._check_module()
            if self._compiled is None:
                self._decide(request)
            return torch.cat([ReferenceEngine.run(self, _row(request, b)) for b in range(len(request.labels))])

    @torch.no_grad()
    def _decide(self, request: Request) -> None:
        """Keeps the compiled module if it is the faster, on as many rows as a step of this request has."""
        rows = 2 if request.guided.any() else 1
        x = torch.zeros(rows, *self.model.shape, dtype=self.dtype)
        t = torch.full((rows,), self.plan.timesteps[0], dtype=torch.int64 if self.plan.whole_timesteps else torch.float32)
        y = self._conditions(request.labels[:1])[0].expand(rows, *request.labels.shape[1:]).contiguous()
        eager = self._module
        parameters = sum(p.numel() for p in eager.parameters())
        question = f"forward of a {type(eager).__name__} of {parameters} parameters, {self.dtype}, {list(x.shape)}"
        modules = {"eager": eager, "compiled": _compiled(eager)}

        def forward(name: str) -> Tensor:
            return call_module(modules[name], x, t, y)

        try:
            choice = fastest(question, {name: partial(forward, name) for name in modules})
            forward(choice)  # what was remembered may no longer be possible
        except Exception as error:  # no compiler, or a module that cannot be compiled: what is raised is not ours to list
            choice, reason = "eager", str(error).splitlines() or [type(error).__name__]
            self.notes = (f"torch.compile is not used: {reason[0]}",)
        self._module, self._compiled = modules[choice], choice == "compiled"


def _compiled(module: nn.Module) -> nn.Module:
    compiled = torch.compile(module, dynamic=False)
    assert isinstance(compiled, nn.Module)
    return compiled


def _row(request: Request, b: int) -> Request:
    """One row of `request`."""
    rows = slice(b, b + 1)
    return replace(
        request,
        labels=request.labels[rows],
        scale=request.scale[:, rows],
        seeds=request.seeds[rows],
        indices=request.indices[rows],
        x_T=None if request.x_T is None else request.x_T[rows],
        noise=None if request.noise is None else request.noise[:, rows],
    )
