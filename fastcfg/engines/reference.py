"""The reference engine: plain torch, any module, any device. It is the definition that every other engine is compared with."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fastcfg.engines.base import Request, plain_mode
from fastcfg.engines.classifier import ClassifierTerm
from fastcfg.engines.workers import one_thread
from fastcfg.errors import Error
from fastcfg.models.denoiser import Denoiser, call_module
from fastcfg.models.weights import fingerprint, refuse_stale, refuse_training
from fastcfg.noise import INITIAL_STEP, normal
from fastcfg.plan import Plan


class ReferenceEngine:
    """Runs `plan` row by row on `model.module`, with the module in `dtype` (None: its own) and all else in float64.

    So the only rounding is the module's own. As in the official code, a guided step is one forward of the 2B rows
    [cond; null]. On a CPU the module runs on one thread: with more, libraries cut products at rows that depend on the
    batch, and a sample's bits would depend on its place in it. The module itself is used where it has the device and
    dtype asked for; otherwise a converted copy, whose going stale is noticed.
    """

    name = "reference"
    whole_batches = True
    notes: tuple[str, ...] = ()

    def __init__(self, model: Denoiser, plan: Plan, device: torch.device, dtype: torch.dtype | None):
        if dtype == torch.int8:
            raise Error("engine 'reference' computes in floating point, got dtype 'int8': engines cpu and openvino have it")
        self.model, self.plan, self.device = model, plan, device
        self.dtype = model.dtype if dtype is None else dtype
        self.refresh()

    def refresh(self) -> None:
        source = self.model.module
        self._converted = not self._fits()
        self._module = copy.deepcopy(source).to(self.device, self.dtype) if self._converted else source
        self._fingerprint = fingerprint(source)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self._check_module()
        with plain_mode(self.device), self._threads():
            return self._forward(x.to(self.device), t.to(self.device), self._conditions(y)[0]).float()

    def run(self, request: Request) -> Tensor:
        self._check_module()
        with plain_mode(self.device), self._threads():
            return self._run(request)

    def _threads(self) -> AbstractContextManager[None]:
        return one_thread() if self.device.type == "cpu" else nullcontext()

    def _run(self, request: Request) -> Tensor:
        plan, rows, shape = self.plan, self.plan.rows, self.model.shape
        labels, null = self._conditions(request.labels)
        scale = request.scale.to(self.device, torch.float64)

        def noise(given: Tensor | None, step: int) -> Tensor:
            z = given if given is not None else normal(request.seeds, request.indices, step, shape)
            return z.to(self.device, torch.float64)

        x = plan.init_scale * noise(request.x_T, INITIAL_STEP)
        x0_prev = torch.zeros_like(x)
        for i in range(plan.steps):
            out, v = self._predict(x, i, labels, null if request.guided[i] else None, scale[i], request.classifier)
            x0 = rows.x0_x[i] * x + rows.x0_out[i] * out
            if plan.clip:
                x0 = x0.clamp(-1, 1)
            x = rows.c_x[i] * x + rows.c_out[i] * out + rows.c_x0[i] * x0 + rows.c_prev[i] * x0_prev
            if rows.c_noise[i]:
                z = noise(None if request.noise is None else request.noise[i], i + 1)
                x = x + rows.c_noise[i] * self._deviation(v, i) * z
            x0_prev = x0
        return x.float()

    def _predict(
        self, x: Tensor, i: int, labels: Tensor, null: Tensor | None, scale: Tensor, classifier: ClassifierTerm | None
    ) -> tuple[Tensor, Tensor]:
        """(prediction, v) of step i, guided unless `null` is None; v has no channels where the variance is not learned."""
        C, rows = self.model.shape[0], 1 if null is None else 2
        t_dtype = torch.int64 if self.plan.whole_timesteps else torch.float32
        t = torch.full((rows * len(x),), self.plan.timesteps[i], dtype=t_dtype, device=self.device)
        inputs = (x, t, labels) if null is None else (torch.cat([x, x]), t, torch.cat([labels, null]))
        output = self._forward(*inputs)
        if classifier is not None:
            output = classifier.added(output, x, i)
        if null is None:
            return output[:, :C], output[:, C:]
        cond, uncond = output.chunk(2)
        k = self.plan.guidance.channels or C
        guided = self.plan.guidance.combine(cond[:, :k], uncond[:, :k], scale)
        return torch.cat([guided, cond[:, k:C]], dim=1), cond[:, C:]

    def _forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return call_module(self._module, x.to(self.dtype), t, y).double()

    def _deviation(self, v: Tensor, i: int) -> Tensor | float:
        """exp(log_var / 2) of a learned variance, interpolated by v; 1 where the plan fixes the variance."""
        log_min, log_max = self.plan.rows.log_var_min, self.plan.rows.log_var_max
        if log_min is None or log_max is None:
            return 1.0
        fraction = (v + 1) / 2
        return torch.exp(0.5 * (fraction * log_max[i] + (1 - fraction) * log_min[i]))

    def _conditions(self, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """(labels, null labels), one a row; embeddings take the module's dtype."""
        labels = labels.to(self.device)
        if labels.is_floating_point():
            labels = labels.to(self.dtype)
        if self.model.null_label is None:
            return labels, None
        null = torch.as_tensor(self.model.null_label, dtype=labels.dtype, device=self.device)
        return labels, null.expand_as(labels).contiguous()

    def _check_module(self) -> None:
        refuse_training(self._module)
        if self._converted:
            refuse_stale(self.model.module, self._fingerprint)
        elif not self._fits():
            raise Error(
                f"the model is {self.model.dtype} on {self.model.device} since its sampler was made for {self.dtype} on "
                f"{self.device}: call sampler.refresh(), which then samples a copy as it was, or make a new sampler"
            )

    def _fits(self) -> bool:
        """Whether the module itself has the dtype and device asked for."""
        return self.model.device == self.device and self.model.dtype == self.dtype
