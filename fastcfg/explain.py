"""What a sampler will do and what it costs: the plan, forwards, FLOPs and bytes, before anything runs."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastcfg.engines.base import Engine
from fastcfg.models.denoiser import Denoiser, call_module
from fastcfg.plan import Plan


@dataclass(frozen=True)
class Explanation:
    """Costs of one full batch with guidance on (scale other than 1).

    flops: multiply-adds counted as two, of the module's products and attention. weight_bytes: read once a forward.
    last_seconds: of the sampler's last batch, or None before its first.
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
    last_seconds: float | None
    notes: tuple[str, ...]

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
            f"weights       {self.weight_bytes / 1e6:.2f} MB, read {self.steps} times a batch",
        ]
        if self.last_seconds is not None:
            rate = self.flops / self.last_seconds / 1e9
            lines.append(f"measured      {self.last_seconds:.3f} s for the last batch ({rate:.1f} GFLOP/s if it was guided)")
        return "\n".join([*lines, *(f"note          {note}" for note in self.notes)])


def explain(model: Denoiser, plan: Plan, engine: Engine, batch: int, last_seconds: float | None) -> Explanation:
    """The explanation of a sampler made of these; `last_seconds` is what its last batch took."""
    flops = count_flops(model)
    guided = int(plan.guided.sum()) if model.null_label is not None else 0
    rows = batch * (plan.steps + guided)
    parameters = [*model.module.parameters(), *model.module.buffers()]
    return Explanation(
        plan=str(plan),
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
        last_seconds=last_seconds,
        notes=engine.notes,
    )


def count_flops(model: Denoiser) -> int:
    """FLOPs of the module's forward on one row, operation by operation, on a copy without data (torch's meta device)."""
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton, which importing fastcfg should not

    module = copy.deepcopy(model.module).to("meta")
    null = torch.as_tensor(0 if model.null_label is None else model.null_label)
    x = torch.empty(1, *model.shape, device="meta", dtype=model.dtype)
    t = torch.zeros(1, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call_module(module, x, t, torch.empty(1, *null.shape, dtype=null.dtype, device="meta"))
    return counter.get_total_flops()
