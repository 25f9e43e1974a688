"""Adaptive LayerNorm: y = (x - mean) / sqrt(var + eps) (1 + scale) + shift      (Peebles & Xie 2212.09748, section 3.2)

adaLN depends on (t, y) alone, so shift and scale are not computed here but read from a table made once a call for all
steps and unique conditions: row index[r] of it, columns shift_column.. and scale_column.., D values each.
Where x has fewer rows than index, the rows share it: row r of y is computed from row r mod B of x, which is how the
conditional and the null half use one x before the first conditioned operation.

Shapes: x [B, T, D] fp32, bf16 or fp16; table [G, W] of the same choice; index int32 [R], R a multiple of B; y [R, T, D].
A tile is a few tokens of one sample with all of D in registers: one read, statistics exact (mean first, then squared
deviations). Bytes: B T D e (once, from the second half on from cache) + R T D e' + 2 R D e''. FLOPs: 8 R T D.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcfg.errors import Error
from fastcfg.kernels._launch import FLOATS, Config, Cost, Grid, cdiv, check, into, launch, next_power_of_2, tuned_config, wide


def adaln_ref(
    x: Tensor,
    table: Tensor,
    index: Tensor,
    shift_column: int,
    scale_column: int,
    *,
    eps: float = 1e-6,
    out: Tensor | None = None,
) -> Tensor:
    R, (B, _, D) = len(index), x.shape
    rows = wide(table)[index.long()].to(wide(x).dtype)
    shift, scale = rows[:, None, shift_column : shift_column + D], rows[:, None, scale_column : scale_column + D]
    normal = torch.nn.functional.layer_norm(wide(x), (D,), eps=eps)
    return into(out, normal.repeat(R // B, 1, 1) * (1 + scale) + shift, x.dtype)


@triton.jit(do_not_specialize=["sources"])
def _adaln_kernel(
    x, table, index, out, eps, sources, tokens, width, shift_column, scale_column,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, BLOCK_D)
    mask = (token < tokens)[:, None] & (d < D)[None, :]
    inside = token.to(tl.int64)[:, None] * D + d[None, :]
    h = tl.load(x + row % sources * tokens * D + inside, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(h, axis=1) / D
    h = tl.where(mask, h - mean[:, None], 0.0)
    h *= tl.rsqrt(tl.sum(h * h, axis=1) / D + eps)[:, None]
    entry = table + tl.load(index + row).to(tl.int64) * width + d
    shift = tl.load(entry + shift_column, mask=d < D, other=0.0).to(tl.float32)
    scale = tl.load(entry + scale_column, mask=d < D, other=0.0).to(tl.float32)
    y = h * (1.0 + scale)[None, :] + shift[None, :]
    tl.store(out + row * tokens * D + inside, y.to(out.dtype.element_ty), mask=mask)


def adaln(
    x: Tensor,
    table: Tensor,
    index: Tensor,
    shift_column: int,
    scale_column: int,
    *,
    eps: float = 1e-6,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """The normalised and modulated rows, in `out` [R, T, D] (its dtype may differ from x's). Raises Error on shapes."""
    check("x", x, [None, None, None], FLOATS, x.device)
    B, T, D = x.shape
    check("index", index, [None], torch.int32, x.device)
    R = len(index)
    check_table(table, x, {"shift": shift_column, "scale": scale_column})
    if not B or R % B:
        raise Error(f"index must have a multiple of x's {B} rows, got {R}")
    out = torch.empty(R, T, D, dtype=x.dtype, device=x.device) if out is None else out
    check("out", out, [R, T, D], FLOATS, x.device)

    def grid(config: Config) -> Grid:
        return R, cdiv(T, config["TOKENS"])

    config = config or tuned_config("adaln", (x, out), grid, D=D) or adaln_config(D)
    launch(
        _adaln_kernel, grid(config), x.device, config,
        x=x, table=table, index=index, out=out, eps=float(eps), sources=B, tokens=T, width=table.shape[1],
        shift_column=shift_column, scale_column=scale_column, D=D, BLOCK_D=next_power_of_2(D),
    )  # fmt: skip
    return out


def adaln_config(width: int) -> Config:
    """Tiles of 4,096 values, or one token of a wider model, at 16 values a thread."""
    block = next_power_of_2(width)
    tokens = max(1, 4096 // block)
    return {"TOKENS": tokens, "num_warps": max(1, min(16, tokens * block // 512)), "num_stages": 1}


def check_table(table: Tensor, x: Tensor, columns: dict[str, int]) -> None:
    """Raises Error unless `table` [G, W] holds x's D values from each of the named columns on."""
    check("table", table, [None, None], FLOATS, x.device)
    for name, column in columns.items():
        if not 0 <= column <= table.shape[1] - x.shape[-1]:
            raise Error(
                f"{name}_column must lie in [0, {table.shape[1] - x.shape[-1]}] for {x.shape[-1]} values of a table "
                f"of {table.shape[1]}, got {column}"
            )


def adaln_cost(x: Tensor, table: Tensor, index: Tensor, *, out: Tensor) -> Cost:
    modulation = 2 * len(index) * x.shape[-1] * table.element_size()
    moved = x.numel() * x.element_size() + out.numel() * out.element_size()
    return Cost(bytes=moved + modulation, flops=8 * out.numel())
