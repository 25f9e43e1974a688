"""What a sampler will do and what it costs, before anything runs: plan, forwards, FLOPs, bytes and the ledger of launches."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fastcfg.ceilings import Ceilings, known_gpu, measured_ceilings, stated_ceilings
from fastcfg.engines.base import Engine
from fastcfg.engines.fused_dit import is_plain_dit
from fastcfg.errors import Error
from fastcfg.models.denoiser import Denoiser, try_module
from fastcfg.models.dit import DiT
from fastcfg.plan import Plan

if TYPE_CHECKING:
    from fastcfg.ledger import Entry, Ledger, Saving

MEASURED = "measured"


@dataclass(frozen=True)
class Explanation:
    """Costs of one full batch with guidance on: at a scale other than 1; or, where a classifier guides, by that alone.

    flops: multiply-adds counted as two, of the module's products and attention. classifier_rows, classifier_flops: of the
    classifier's forwards and backwards, which `rows` and `flops` leave out. weight_bytes: read once a forward. last_seconds: of
    the sampler's last batch, or None before its first. ledger: launch by launch, for the package's DiT on the fused engines,
    else None.
    """

    plan: str
    engine: str
    device: str
    dtype: str
    batch: int
    steps: int
    guided_steps: int
    rows: int
    flops_per_row: int
    flops: int
    weight_bytes: int
    classifier_rows: int
    classifier_flops: int
    last_seconds: float | None
    notes: tuple[str, ...]
    ledger: Ledger | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        unguided = self.steps - self.guided_steps
        lines = [
            self.plan,
            "",
            f"engine        {self.engine} on {self.device}, {self.dtype}, batch {self.batch}",
            f"model rows    {self.rows}: {self.guided_steps} guided steps x {2 * self.batch}"
            + (f", {unguided} unguided x {self.batch}" if unguided else ""),
            f"model FLOPs   {self.flops / 1e9:.3f} G a batch ({self.flops_per_row / 1e9:.4f} G a row)",
            *self._classifier_lines(),
            f"weights       {self.weight_bytes / 1e6:.2f} MB" + ("" if self.ledger else f", read {self.steps} times a batch"),
        ]
        if self.last_seconds is not None:
            rate = (self.flops + self.classifier_flops) / self.last_seconds / 1e9
            lines.append(f"measured      {self.last_seconds:.3f} s for the last batch ({rate:.1f} GFLOP/s if it was guided)")
            if self.ledger and self.ledger.engine == self.engine and self.ledger.call.floor_seconds is not None:
                lines.append(f"floor         {self.ledger.call.floor_seconds:.3f} s for a guided batch")
        lines += [f"note          {note}" for note in self.notes]
        return "\n".join(lines if self.ledger is None else [*lines, "", *_ledger_lines(self.ledger, self.steps)])

    def _classifier_lines(self) -> list[str]:
        if not self.classifier_rows:
            return []
        flops = self.classifier_flops / 1e9
        return [f"classifier    {self.classifier_rows} rows, forward and backward: {flops:.3f} GFLOP a batch"]


def explain(
    model: Denoiser,
    plan: Plan,
    engine: Engine,
    batch: int,
    last_seconds: float | None,
    ceilings: str | Ceilings | None = None,
    dtype: torch.dtype | None = None,
    classifier: nn.Module | None = None,
) -> Explanation:
    """The explanation of a sampler made of these; `last_seconds` is what its last batch took.

    ceilings: where the ledger's floor times come from: "measured" (on the engine's device, in a second or two), a GPU's name in
    `fastcfg.ceilings.STATED`, or a `Ceilings`; None: what is stated of the engine's GPU, else there are no floor times. A
    GPU's name gives the ledger of the cuda engine, whatever engine this is, in `dtype` (None: what that engine would choose).
    classifier: what guides instead of the null rows; the ledger leaves it out. Raises Error where ceilings are asked for and
    there is no ledger.
    """
    t = torch.from_numpy(plan.timesteps[:1]).to(torch.int64 if plan.whole_timesteps else torch.float32)
    flops, pushed, shown = count_flops(model, t), 0, str(plan)
    if classifier is not None:
        assert plan.gradient is not None
        pushed = batch * int(np.count_nonzero(plan.gradient * plan.guided))
        plan = replace(plan, guided=np.zeros_like(plan.guided))
    guided = int(plan.guided.sum()) if model.null_label is not None else 0
    rows = batch * (plan.steps + guided)
    parameters = [*model.module.parameters(), *model.module.buffers()]
    ledger, notes = _ledger(model, plan, engine, batch, ceilings, dtype)
    return Explanation(
        plan=shown,
        engine=engine.name,
        device=str(engine.device),
        dtype=str(engine.dtype).removeprefix("torch."),
        batch=batch,
        steps=plan.steps,
        guided_steps=guided,
        rows=rows,
        flops_per_row=flops,
        flops=flops * rows,
        weight_bytes=sum(p.numel() for p in parameters) * engine.dtype.itemsize,
        classifier_rows=pushed,
        classifier_flops=pushed * (0 if classifier is None else count_gradient_flops(classifier, model, t)),
        last_seconds=last_seconds,
        notes=(*engine.notes, *notes),
        ledger=ledger,
    )


def count_flops(model: Denoiser, t: Tensor | None = None) -> int:
    """FLOPs of the module's forward on one row, operation by operation. t: [1], 0 unless given.

    The package's DiT is counted without data, on torch's meta device, which not every module can be on: any other is called.
    """
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton, which importing fastcfg should not

    if is_plain_dit(model.module):
        assert isinstance(model.module, DiT)
        with torch.device("meta"):
            model = replace(model, module=DiT(model.module.config).eval())
    with FlopCounterMode(display=False) as counter:
        try_module(model, _time(t), 0 if model.null_label is None else None)
    return counter.get_total_flops()


def count_gradient_flops(classifier: nn.Module, model: Denoiser, t: Tensor | None = None) -> int:
    """FLOPs of one row's grad_x log p(y | x_t): the classifier's forward, and its backward as far as x."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.inference_mode(False), torch.enable_grad(), FlopCounterMode(display=False) as counter:
        module = copy.deepcopy(classifier).float()  # autograd takes no tensors that were made in inference mode
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        x = torch.zeros(1, *model.shape, device=device, dtype=torch.float32, requires_grad=True)
        # A clone, since the inputs that the counter hooks into cannot be leaves
        torch.autograd.grad(module(x.clone(), _time(t).to(device)).sum(), x)
    return counter.get_total_flops()


def _time(t: Tensor | None) -> Tensor:
    return torch.zeros(1, dtype=torch.int64, device="cpu") if t is None else t


def _ledger(
    model: Denoiser, plan: Plan, engine: Engine, batch: int, asked: str | Ceilings | None, dtype: torch.dtype | None
) -> tuple[Ledger | None, tuple[str, ...]]:
    """The ledger where there is one, and a note where it is left out for want of Triton."""
    gpu = None if asked is None or asked == MEASURED or isinstance(asked, Ceilings) else stated_ceilings(asked)
    name = "cuda" if gpu is not None else engine.name
    note: tuple[str, ...] = ()
    try:
        obstacle = _obstacle(model, name)
        if obstacle is None:
            from fastcfg.ledger import make_ledger  # the costs stand beside the kernels, which import triton
    except ImportError as error:
        obstacle = f"the kernels' costs need Triton, which cannot be imported here: {error}"
        note = (f"no ledger: {obstacle}",)
    if obstacle is not None:
        if asked is not None:
            raise Error(f"ceilings {asked!r} asked, but there is no ledger to give floor times to: {obstacle}")
        return None, note
    if engine.name == name:
        dtype = engine.dtype
    elif dtype is None:
        dtype = torch.bfloat16 if model.low_precision else torch.float32
    ceilings = gpu or _ceilings(asked, engine.device, dtype)
    return make_ledger(name, model, plan, batch, dtype, ceilings), note


def _ceilings(asked: str | Ceilings | None, device: torch.device, dtype: torch.dtype) -> Ceilings | None:
    if isinstance(asked, Ceilings):
        return asked
    return known_gpu(device) if asked is None else measured_ceilings(device, dtype)


def _obstacle(model: Denoiser, engine: str) -> str | None:
    """Why there is no ledger of `model` on `engine`; None where there is."""
    if engine == "cuda":
        from fastcfg.engines import cuda

        return cuda.why_not_fused(model)
    if engine != "cpu":
        what = "the blocks as OpenVINO's graph" if engine == "openvino" else "the module as it is"
        return f"engine {engine!r} runs {what}"
    return None if is_plain_dit(model.module) else f"{type(model.module).__name__} is not the package's DiT"


def _ledger_lines(ledger: Ledger, steps: int) -> Iterator[str]:
    """The ledger for people: a step's launches, the totals, and what is saved."""
    guided = ledger.guided is not None
    yield f"ledger        engine {ledger.engine}, {ledger.dtype}, batch {ledger.batch}"
    yield f"ceilings      {ledger.ceilings or 'none given: no floor times'}"
    yield ""
    # The cpu engine takes the batch through in pieces: its calls are those of one
    launches = "times a piece" if ledger.engine == "cpu" else "launches"
    yield _columns("a guided step" if guided else "a step", launches, ledger)
    step = ledger.guided or ledger.unguided
    for entry in step.entries:
        yield _row(f"  {entry.name}", f"{entry.launches:,}", entry)
    totals = {
        "  total": step.total,
        "a step without null rows": ledger.unguided.total if guided else None,
        "before the first step": ledger.start.total,
        "the hoisted table": ledger.hoisted.total,
        f"a call of {steps} steps": ledger.call,
        "a step would add, not hoisted": ledger.unhoisted.total,
    }
    for name, total in totals.items():
        if total is not None:
            yield _row(name, f"{total.launches:,}", total)
    yield ""
    yield _columns("saved in a call", "", ledger)
    for saving in ledger.savings:
        if saving.flops or saving.bytes:
            yield _row(f"  {saving.name}: {saving.reason}", "", saving)


def _columns(title: str, launches: str, ledger: Ledger) -> str:
    floor = "floor ms" if ledger.ceilings else ""
    return f"{title:36}{launches:>14}{'GFLOP':>14}{'MB':>14}{floor:>14}".rstrip()


def _row(name: str, launches: str, cost: Entry | Saving) -> str:
    floor = "" if cost.floor_seconds is None else _number(1e3 * cost.floor_seconds)
    named = f"{name:36}{launches:>14}" if launches else f"{name:50}"
    return f"{named}{_number(cost.flops / 1e9):>14}{_number(cost.bytes / 1e6):>14}{floor:>14}".rstrip()


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
