"""Classifier guidance as engines meet it: a term that is added to the network's output, from a classifier's gradient."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fastcfg.engines.workers import one_thread
from fastcfg.errors import Error
from fastcfg.models.denoiser import Denoiser
from fastcfg.models.weights import fingerprint, refuse_stale, refuse_training
from fastcfg.plan import Plan
from fastcfg.schedules import Schedule

RowIndex: TypeAlias = "slice | NDArray[np.int64]"  # of a request
TOGETHER = (16, 8, 4, 2)  # samples that may share a classifier's forward on a CPU


class ClassifierGradient:
    """grad_x log p(y | x_t) at the steps of `plan`, by torch's autograd on `module`(x_t, t) -> logits, in float32 on `device`.

    A classifier of another dtype or device, or made in inference mode, is copied, and the copy's going stale is noticed. On a
    CPU as many samples go together as leave each the bits that it has in a pair, and a single one makes a pair with itself:
    torch has other, slower code for convolutions of one sample. Where a sample's bits depend on the other of its pair, samples
    go one at a time.
    Raises Error for a classifier that was trained on other noise levels (as far as it tells, by a `schedule`), or that does not
    give one logit for each of `model`'s labels: it is tried on one row of zeros.
    """

    def __init__(self, module: nn.Module, model: Denoiser, plan: Plan, device: torch.device):
        _check_schedule(module, model)
        tensors = (*module.parameters(), *module.buffers())
        self._source, self._device = module, device
        self._converted = any(
            p.device != device or p.is_inference() or (p.is_floating_point() and p.dtype != torch.float32) for p in tensors
        )
        self._times = torch.from_numpy(plan.timesteps).to(device, torch.int64 if plan.whole_timesteps else torch.float32)
        self._together: tuple[int, ...] = (1,)
        self.refresh()
        self.check()
        self._try(model)

    def refresh(self) -> None:
        """Takes up weights that changed in place since the copy was made."""
        source = self._source
        with torch.inference_mode(False):  # autograd takes no tensors that were made in the caller's
            self._module = copy.deepcopy(source).to(self._device, torch.float32) if self._converted else source
        self._fingerprint = fingerprint(source)

    def check(self) -> None:
        """Raises Error where the classifier is unfit for sampling now."""
        refuse_training(self._module, "classifier")
        if self._converted:
            refuse_stale(self._source, self._fingerprint, "classifier")

    def __call__(self, x: Tensor, step: int, labels: Tensor) -> Tensor:
        """The gradient at step 0..steps-1, float64 [B, C, H, W]. x: [B, C, H, W]; labels: int64 [B]."""
        if x.device.type != "cpu":
            return self._of(x, step, labels).double()
        return torch.cat([self._of_few(x[part], step, labels[part]) for part in self._parts(len(x))]).double()

    def _parts(self, B: int) -> Iterator[slice]:
        """B samples in parts of the sizes that may go together, the largest first; what is left over is single."""
        start = 0
        while start < B:
            size = next((size for size in self._together if size <= B - start), 1)
            yield slice(start, start + size)
            start += size

    def _of_few(self, x: Tensor, step: int, labels: Tensor) -> Tensor:
        if len(x) > 1 or self._together == (1,):
            return self._of(x, step, labels)
        return self._of(torch.cat([x, x]), step, torch.cat([labels, labels]))[:1]

    def _found_together(self, model: Denoiser) -> tuple[int, ...]:
        """The numbers of samples that may share a forward, the largest first."""
        most = TOGETHER[0]
        generator = torch.Generator().manual_seed(0)
        x = torch.randn((most, *model.shape), generator=generator, dtype=torch.float32, device="cpu")
        labels = torch.arange(most, device="cpu") % (model.num_classes or 1)

        def gradients(size: int, order: Tensor) -> Tensor:
            """Of all samples, computed `size` at a time in that order."""
            found = torch.empty_like(x)
            for part in order.split(size):
                found[part] = self._of(x[part], 0, labels[part])
            return found

        with one_thread():
            as_they_come = torch.arange(most, device="cpu")
            pairs = gradients(2, as_they_come)
            if not torch.equal(gradients(2, as_they_come.roll(1)), pairs):  # each with another, in the other place
                return (1,)
            return tuple(size for size in TOGETHER if torch.equal(gradients(size, as_they_come.roll(1)), pairs))

    def _of(self, x: Tensor, step: int, labels: Tensor) -> Tensor:
        # The caller's mode forbids gradients, and in inference mode a tensor cannot have one
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            x_t = torch.empty_like(x, dtype=torch.float32).copy_(x).requires_grad_()
            logits = self._module(x_t, self._times[step].repeat(len(x)))
            chosen = F.log_softmax(logits, dim=-1).gather(1, labels[:, None].clone())
            return torch.autograd.grad(chosen.sum(), x_t)[0]

    def _try(self, model: Denoiser) -> None:
        name, shape = type(self._source).__name__, [1, *model.shape]
        x = torch.zeros(shape, device=self._device, dtype=torch.float32)
        try:
            with torch.no_grad():
                logits = self._module(x, self._times[:1])
            if isinstance(logits, Tensor) and logits.shape == (1, model.num_classes):
                self._of(x, 0, torch.zeros(1, dtype=torch.int64, device=self._device))
                if self._device.type == "cpu":
                    self._together = self._found_together(model)
        except Exception as error:  # any module, any failure: what matters is that it came before the work
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise Error(f"{name} could not be differentiated as classifier(x {shape}, t [1]): {line}") from error
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if got != [1, model.num_classes]:
            raise Error(f"{name} turned x {shape} into {got}: want logits [1, {model.num_classes}], one for each label")


@dataclass(frozen=True)
class ClassifierTerm:
    """What classifier guidance adds to the network's output for B rows of a request.

    labels: the classes that are wanted, int64 [B]. weight: what multiplies the gradient, float64 [steps, B]: the plan's column
    times the scale. steps: where any of it is not zero, bool [steps].
    """

    gradient: ClassifierGradient
    labels: Tensor
    weight: Tensor
    steps: NDArray[np.bool_]

    def rows(self, rows: RowIndex) -> ClassifierTerm:
        """The term of some of its rows."""
        return replace(self, labels=self.labels[rows], weight=self.weight[:, rows])

    def added(self, output: Tensor, x: Tensor, step: int) -> Tensor:
        """`output` with the term in its prediction, in both halves where there are two. output: [B or 2B, C or 2C, H, W]."""
        if not self.steps[step]:
            return output
        B, C = x.shape[:2]
        term = self.weight[step].view(-1, 1, 1, 1) * self.gradient(x, step, self.labels)
        moved = output[:, :C] + term.repeat(len(output) // B, 1, 1, 1)
        return moved if output.shape[1] == C else torch.cat([moved, output[:, C:]], dim=1)


def _check_schedule(module: nn.Module, model: Denoiser) -> None:
    own, wanted = getattr(module, "schedule", None), model.schedule
    if isinstance(own, Schedule) and not (np.array_equal(own.alpha, wanted.alpha) and np.array_equal(own.sigma, wanted.sigma)):
        raise Error(f"the classifier was trained on schedule {own.to_json()}, and the model is sampled on {wanted.to_json()}")
