"""The end of a step, shared by `guided_step` and `step_boundary`: coefficients by step index, guidance, solver update.

With the plan's row of the sample's own step (see `fastcfg.solvers`),

    out = out_null + s (out_cond - out_null)                 (guided channels, where s != 1 and the row is guided)
    x0  = x0_x x + x0_out out                                (clipped to [-1, 1] where asked)
    x'  = c_x x + c_out out + c_x0 x0 + c_prev x0_prev + c_noise exp(log_var / 2) z
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcfg.errors import Error
from fastcfg.kernels._launch import check, wide
from fastcfg.kernels.noise import normal_at
from fastcfg.noise import normal
from fastcfg.plan import Plan

COLUMNS = (
    "x0_x", "x0_out", "c_x", "c_out", "c_x0", "c_prev", "c_noise", "log_var_min", "log_var_max", "guided",
)  # fmt: skip
X0_X, X0_OUT, C_X, C_OUT, C_X0, C_PREV, C_NOISE, LOG_VAR_MIN, LOG_VAR_MAX, GUIDED = (
    tl.constexpr(i) for i in range(len(COLUMNS))
)
WIDTH = tl.constexpr(len(COLUMNS))
NO_NOISE, DRAWN_NOISE, GIVEN_NOISE = (tl.constexpr(i) for i in range(3))


def step_table(plan: Plan) -> Tensor:
    """The plan as the step kernels read it, float32 [steps, 10] on the CPU, columns as in `COLUMNS`."""
    rows = plan.rows
    zeros = np.zeros(plan.steps)
    optional = {"log_var_min": zeros, "log_var_max": zeros, "guided": plan.guided}
    if rows.log_var_min is not None and rows.log_var_max is not None:
        optional |= {"log_var_min": rows.log_var_min, "log_var_max": rows.log_var_max}
    columns = [optional[name] if name in optional else getattr(rows, name) for name in COLUMNS]
    return torch.from_numpy(np.stack(columns, axis=1).astype(np.float32))


@triton.jit
def guide(cond, null, s, channel_guided):
    """The guided prediction; the conditional one, to the bit, where s = 1 or the channel is not guided."""
    return tl.where(tl.where(s != 1.0, channel_guided, False), null + s * (cond - null), cond)


@triton.jit
def solver_update(
    x, out, v, element, mask, coef, step, row, rows, elements, x0_prev, noise, seeds, indices,
    CLIP: tl.constexpr, LEARNED: tl.constexpr, HISTORY: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """x' of a block of one sample's elements; x0 replaces x0_prev. coef points to the row of the sample's step.

    Buffers whose coefficient is 0 are not read, so what an unused history or noise holds does not matter.
    """
    x0 = tl.load(coef + X0_X) * x + tl.load(coef + X0_OUT) * out
    if CLIP:
        x0 = tl.clamp(x0, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    x_next = tl.load(coef + C_X) * x + tl.load(coef + C_OUT) * out + tl.load(coef + C_X0) * x0
    if HISTORY:
        c_prev = tl.load(coef + C_PREV)
        before = x0_prev + row * elements + element
        x_next += c_prev * tl.load(before, mask=tl.where(c_prev != 0.0, mask, False), other=0.0)
        tl.store(before, x0, mask=mask)
    if NOISE != NO_NOISE:
        c_noise = tl.load(coef + C_NOISE)
        if NOISE == DRAWN_NOISE:
            z = normal_at(tl.load(seeds + row), tl.load(indices + row), step + 1, element)
        else:
            given = noise + (step * rows + row) * elements + element
            z = tl.load(given, mask=tl.where(c_noise != 0.0, mask, False), other=0.0)
        if LEARNED:
            fraction = (v + 1.0) / 2.0
            log_max, log_min = tl.load(coef + LOG_VAR_MAX), tl.load(coef + LOG_VAR_MIN)
            z *= tl.exp(0.5 * (fraction * log_max + (1.0 - fraction) * log_min))
        x_next += tl.where(c_noise != 0.0, c_noise * z, 0.0)
    return x_next


def solver_update_ref(
    x: Tensor,
    out: Tensor,
    v: Tensor | None,
    coef: Tensor,
    step: Tensor,
    *,
    clip: bool,
    x0_prev: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    indices: Tensor | None,
) -> Tensor:
    """`solver_update` in torch for whole samples [B, ...]; v is None where the variance is not learned."""
    c = per_row(coef, step, x)
    x0 = c["x0_x"] * x + c["x0_out"] * out
    if clip:
        x0 = x0.clamp(-1, 1)
    x_next = c["c_x"] * x + c["c_out"] * out + c["c_x0"] * x0
    if x0_prev is not None:
        x_next = x_next + torch.where(c["c_prev"] != 0, c["c_prev"] * x0_prev, 0)
        x0_prev.copy_(x0)
    if noise is None and seeds is None:
        return x_next
    z = _noise_of_step(x, step, noise, seeds, indices)
    if v is not None:
        fraction = (v + 1) / 2
        z = z * torch.exp(0.5 * (fraction * c["log_var_max"] + (1 - fraction) * c["log_var_min"]))
    return x_next + torch.where(c["c_noise"] != 0, c["c_noise"] * z, 0)


def _noise_of_step(x: Tensor, step: Tensor, noise: Tensor | None, seeds: Tensor | None, indices: Tensor | None) -> Tensor:
    if noise is not None:
        return noise[step.long(), torch.arange(len(x), device=x.device)].to(x.dtype)
    assert seeds is not None
    assert indices is not None
    seed, index, k = (counter.cpu().numpy() for counter in (seeds, indices, step))
    return normal(seed, index, k + 1, x.shape[1:]).to(x)


def per_row(coef: Tensor, step: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Each column of coef at each sample's step, shaped [B, 1, ...] to broadcast against x, in x's dtype."""
    columns = coef[step.long()].to(x.dtype).unbind(1)
    return {name: column.view(-1, *[1] * (x.ndim - 1)) for name, column in zip(COLUMNS, columns, strict=True)}


def guide_ref(cond: Tensor, null: Tensor, coef: Tensor, scale: Tensor, step: Tensor, rescale: float) -> Tensor:
    """`Guidance.combine` with each sample's own step; rows outside the guidance interval are `cond` to the bit."""
    rows = torch.arange(len(cond), device=cond.device)
    s = wide(scale)[step.long(), rows].to(cond.dtype).view(-1, *[1] * (cond.ndim - 1))
    guided = null + s * (cond - null)
    if rescale:
        axes = tuple(range(1, cond.ndim))
        ratio = cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
        guided = rescale * guided * ratio + (1 - rescale) * guided
    return torch.where((s == 1) | (per_row(coef, step, cond)["guided"] == 0), cond, guided)


def check_step(
    x: Tensor,
    coef: Tensor,
    scale: Tensor,
    step: Tensor,
    *,
    x0_prev: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    indices: Tensor | None,
    learned: bool,
    channels: int,
) -> dict[str, Any]:
    """Checks what both step kernels take, and returns it as their common kernel arguments. channels: of the model."""
    B, C, device = len(x), x.shape[1], x.device
    check("coef", coef, [None, len(COLUMNS)], torch.float32, device)
    S = len(coef)
    check("scale", scale, [S, B], torch.float32, device)
    check("step", step, [B], torch.int32, device)
    if channels not in (C, 2 * C):
        raise Error(f"the model must give {C} channels, or {2 * C} with a variance, got {channels}")
    if learned and channels != 2 * C:
        raise Error(f"a learned variance needs {2 * C} channels from the model, got {channels}")
    if x0_prev is not None:
        check("x0_prev", x0_prev, x.shape, torch.float32, device)
    if (seeds is None) != (indices is None) or (noise is not None and seeds is not None):
        raise Error("noise comes from seeds and indices, or from a given noise tensor, or not at all")
    if noise is not None:
        check("noise", noise, [S, *x.shape], torch.float32, device)
    if seeds is not None:
        check("seeds", seeds, [B], torch.int64, device)
        check("indices", indices, [B], torch.int64, device)
    kind = GIVEN_NOISE if noise is not None else DRAWN_NOISE if seeds is not None else NO_NOISE
    return {
        "coef": coef, "scale": scale, "step": step, "x0_prev": x0_prev, "noise": noise, "seeds": seeds,
        "indices": indices, "LEARNED": learned and kind.value != NO_NOISE.value, "HISTORY": x0_prev is not None,
        "NOISE": kind.value,
    }  # fmt: skip
