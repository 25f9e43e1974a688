"""The CPU engine for modules that are not our DiT: their own forward, by whatever runs it fastest here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from fastcfg.engines.base import Request
from fastcfg.engines.choice import fastest
from fastcfg.engines.openvino_module import PRECISIONS, OpenVinoForward, openvino_version
from fastcfg.engines.reference import ReferenceEngine
from fastcfg.errors import Error
from fastcfg.models.denoiser import Denoiser, call_module
from fastcfg.models.weights import fingerprint, refuse_stale
from fastcfg.plan import Plan

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
TITLES = {"eager": "the module as it is", "openvino": "OpenVINO", "compiled": "torch.compile"}

NO_OPENVINO = "OpenVINO is not installed, so not tried: pip install 'fastcfg[openvino]'"


class CpuModuleEngine(ReferenceEngine):
    """The reference's steps on one sample at a time, so that its bits depend on no other; all cores in each operation.

    A forward is the module's own, torch.compile's or, where it is installed, OpenVINO's (`openvino_module`): the fastest, as
    measured at the first forward of a shape and remembered. `notes` says which that was, and why another could not be had.
    dtype: float32, bfloat16, float16, or None for the module's own. Runs take turns. Torch's own threads compute, and a process
    that is forked once they have would wait for them for ever: start it by spawn.
    """

    name = "cpu"
    whole_batches = False

    def __init__(self, model: Denoiser, plan: Plan, device: torch.device, dtype: torch.dtype | None):
        if dtype == torch.int8:
            raise Error(
                f"dtype 'int8' is for DiT models, and {type(model.module).__name__} is another module: use bf16 or fp32"
            )
        self._turn = threading.Lock()
        super().__init__(model, plan, device, model.dtype if dtype is None else dtype)

    def _threads(self) -> AbstractContextManager[None]:
        return nullcontext()  # a forward of one sample is cut the same way every time

    def refresh(self) -> None:
        with self._turn:
            super().refresh()
            self._forwards: dict[tuple[int, torch.dtype, torch.dtype], Forward] = {}  # by rows, dtype of t, dtype of y
            self._compiled: nn.Module | None = None
            self.notes = () if openvino_version() else (NO_OPENVINO,)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with self._turn:
            rows = [slice(n, n + 1) for n in range(len(x))]
            return torch.cat([ReferenceEngine.forward(self, x[n], t[n], y[n]) for n in rows])

    def run(self, request: Request) -> Tensor:
        with self._turn:
            rows = [request.rows(slice(b, b + 1), request.guided) for b in range(len(request.labels))]
            return torch.cat([ReferenceEngine.run(self, row) for row in rows])

    def _check_module(self) -> None:
        super()._check_module()
        if any(isinstance(forward, OpenVinoForward) for forward in self._forwards.values()):
            refuse_stale(self.model.module, self._fingerprint)

    def _forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        key = (len(x), t.dtype, y.dtype)
        if key not in self._forwards:
            self._forwards[key] = self._choose(x, t, y)
        return self._forwards[key](x.to(self.dtype), t, y).double()

    def _choose(self, x: Tensor, t: Tensor, y: Tensor) -> Forward:
        """The fastest forward of inputs like these; one that cannot be had is noted, and the rest are compared."""
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(self.dtype)
        made: dict[str, Forward] = {"eager": partial(call_module, self._module)}

        def run(name: str) -> None:
            try:
                if name not in made:
                    made[name] = self._make(name, noise, t, y)
                made[name](noise, t, y)
            except Exception as error:  # no compiler, a module that cannot be converted: what is raised is not ours to list
                if name == "eager":
                    raise
                raise _UnusableError(name, error) from error

        # The compiler comes last: it takes minutes, which the memory saves where it is the other that fails
        names = ["eager", *["openvino"] * bool(openvino_version() and self.dtype in PRECISIONS), "compiled"]
        while True:
            try:
                choice = fastest(self._question(names, x), {name: partial(run, name) for name in names})
                run(choice)  # what was remembered may no longer be possible
                break
            except _UnusableError as unusable:
                names.remove(unusable.name)
                self._note(f"{TITLES[unusable.name]} is not used: {unusable}")
        self._note(f"{TITLES[choice]} was the fastest here for {'guided' if len(x) == 2 else 'unguided'} steps")
        return made[choice]

    def _question(self, names: list[str], x: Tensor) -> str:
        """What is asked of the machine's memory: it holds for these ways to run a module of this kind and size."""
        parameters = sum(p.numel() for p in self._module.parameters())
        ways = ", ".join(f"{name} {openvino_version()}" if name == "openvino" else name for name in names)
        return f"forward of a {type(self._module).__name__} of {parameters} parameters, {self.dtype}, {list(x.shape)}: {ways}"

    def _make(self, name: str, *inputs: Tensor) -> Forward:
        if name == "openvino":
            if not self._converted:  # then its weights are a copy from now on
                self._fingerprint = fingerprint(self.model.module)
            return OpenVinoForward(self._module, *inputs)
        if self._compiled is None:
            compiled = torch.compile(self._module, dynamic=False)
            assert isinstance(compiled, nn.Module)
            self._compiled = compiled
        return partial(call_module, self._compiled)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes = (*self.notes, text)


class _UnusableError(Exception):
    """The way called `name` cannot run this module; says why in one line."""

    def __init__(self, name: str, error: Exception):
        super().__init__((str(error).splitlines() or [type(error).__name__])[0])
        self.name = name
