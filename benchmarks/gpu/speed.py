"""Ceilings, and the kernels' share of them."""

from __future__ import annotations

import torch

from fastcfg.models.dit import DiTConfig
from gpu.cases import Case, cases
from gpu.correctness import TINY, config_of
from gpu.report import Session, captured, measure


def ceilings(session: Session) -> None:
    """The rate of a large copy, bytes read and written, and of a large bf16 product, both on random data."""
    device = session.device
    size = 2**20 if session.dry else 2**30
    source = torch.randint(-128, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    times = measure(lambda: target.copy_(source), device)
    session.ceilings["copy"] = 2 * size / times[1] * 1e3
    session.report.row("copy", session.ceilings["copy"] / 1e9, "GB/s", shape=f"{size} bytes", times=times)
    n = 64 if session.dry else 8192
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    times = measure(lambda: torch.matmul(a, b, out=out), device)
    session.ceilings["product"] = 2 * n**3 / times[1] * 1e3
    session.report.row(
        "product", session.ceilings["product"] / 1e12, "TFLOP/s", shape=f"{n}^3", dtype=torch.bfloat16, times=times
    )


def kernels(session: Session) -> None:
    """Each kernel in bf16 on DiT-XL/2 and DiT-S/2 shapes, batch 32 first."""
    models = [(DiTConfig(**TINY), 1)] if session.dry else [
        (config_of(name), batch) for name, batch in (("DiT-XL/2", 32), ("DiT-XL/2", 1), ("DiT-S/2", 32), ("DiT-S/2", 1))
    ]  # fmt: skip
    dtype = torch.float32 if session.dry else torch.bfloat16
    for config, batch in models:
        for case in cases(config, batch, dtype, session.device):
            if session.left() <= 0:
                return session.report.row("kernels", "stopped: out of time", "note")
            _row(session, case, dtype)
    return None


def _row(session: Session, case: Case, dtype: torch.dtype) -> None:
    times = measure(captured(case.run, session.device), session.device)
    seconds = times[1] / 1e3
    if case.product:
        value, unit, ceiling = case.cost.flops / seconds / 1e12, "TFLOP/s", session.ceilings.get("product", 0) / 1e12
    else:
        value, unit, ceiling = case.cost.bytes / seconds / 1e9, "GB/s", session.ceilings.get("copy", 0) / 1e9
    fraction = value / ceiling if ceiling else None
    session.report.row(case.name, value, unit, shape=case.shape, dtype=dtype, times=times, fraction=fraction)
