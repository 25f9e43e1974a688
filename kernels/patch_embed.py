"""Patch embedding: tokens = x cut into patches, times W^T, plus bias and position      (Peebles & Xie 2212.09748, section 3.2)

The first tokens of a run, before any step; where it serves, `step_boundary` makes all later ones with the same device
function. x is rounded to the weights' dtype first, as the model itself does. A convolution library would choose its
algorithm by the batch.

Shapes: x [B, C, H, W] fp32; weight [D, C, p, p] and bias [D] fp32, bf16 or fp16; position [T, D] with T = H W / p^2; out
[B, T, D]. Bytes: 4 B C H W + e (D C p^2 + D) + e' T D + e'' B T D. FLOPs: 2 B T D C p^2 + 2 B T D.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcfg.errors import Error
from fastcfg.kernels._launch import (
    FLOATS,
    Config,
    Cost,
    cdiv,
    check,
    dot_precision,
    into,
    launch,
    next_power_of_2,
    target_of,
    wide,
)  # fmt: skip

MAX_COLUMNS = 256  # values of a patch, C p^2, that a tile can hold


def patch_embed_ref(x: Tensor, weight: Tensor, bias: Tensor, position: Tensor, *, out: Tensor | None = None) -> Tensor:
    rounded = x.to(weight.dtype)
    embedded = torch.nn.functional.conv2d(wide(rounded), wide(weight), wide(bias), stride=weight.shape[-1])
    return into(out, embedded.flatten(2).transpose(1, 2) + wide(position), weight.dtype)


@triton.jit
def patch_elements(token, column, SIDE: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PATCH: tl.constexpr):
    """Where in a sample [C, H, W] the (channel, y, x)-ordered columns of tokens lie, int32 [tokens, columns]."""
    channel, y, x = column // (PATCH * PATCH), column // PATCH % PATCH, column % PATCH
    corner = token // SIDE * PATCH * W + token % SIDE * PATCH
    return corner[:, None] + (channel * H * W + y * W + x)[None, :]


@triton.jit
def embed_patches(
    patches, token, tokens, row, weight, bias, position, out,
    D: tl.constexpr, VALUES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores the embedding of patches [tokens of a tile, COLUMNS], whose columns past VALUES are zero."""
    column = tl.arange(0, COLUMNS)
    inside = token.to(tl.int64)[:, None] * D
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        w = tl.load(
            weight + d[None, :] * VALUES + column[:, None], mask=(d < D)[None, :] & (column < VALUES)[:, None], other=0.0
        )
        y = tl.dot(patches.to(w.dtype), w, input_precision=PRECISION)
        y += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        mask = (token < tokens)[:, None] & (d < D)[None, :]
        y += tl.load(position + inside + d[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(out + row * tokens * D + inside + d[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _patch_embed_kernel(
    x, weight, bias, position, out, tokens, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PATCH: tl.constexpr,
    D: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token, column = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, COLUMNS)
    VALUES: tl.constexpr = C * PATCH * PATCH
    mask = (token < tokens)[:, None] & (column < VALUES)[None, :]
    element = patch_elements(token, column, W // PATCH, H, W, PATCH)
    patches = tl.load(x + row * C * H * W + element, mask=mask, other=0.0)
    embed_patches(patches, token, tokens, row, weight, bias, position, out, D, VALUES, COLUMNS, BLOCK_D, PRECISION)


def patch_embed(
    x: Tensor, weight: Tensor, bias: Tensor, position: Tensor, *, out: Tensor | None = None, config: Config | None = None
) -> Tensor:
    """The tokens, in `out` [B, T, D] (weight's dtype unless given). Raises Error on shapes, dtypes and devices."""
    check("x", x, [None, None, None, None], torch.float32, x.device)
    B, C, H, W = x.shape
    D, tokens = check_embedding(x, weight, bias, position)
    out = torch.empty(B, tokens, D, dtype=weight.dtype, device=x.device) if out is None else out
    check("out", out, [B, tokens, D], FLOATS, x.device)
    target = target_of(x)
    columns = patch_columns(C, weight.shape[-1], MAX_COLUMNS)
    config = config or patch_embed_config(columns)
    launch(
        _patch_embed_kernel, (B, cdiv(tokens, config["TOKENS"])), x.device, config,
        x=x, weight=weight, bias=bias, position=position, out=out, tokens=tokens, C=C, H=H, W=W,
        PATCH=weight.shape[-1], D=D, COLUMNS=columns, PRECISION=dot_precision(weight.dtype, target),
    )  # fmt: skip
    return out


def patch_embed_config(columns: int) -> Config:
    block, warps = (64, 4) if columns <= 64 else (32, 8)
    return {"TOKENS": 16, "BLOCK_D": block, "num_warps": warps, "num_stages": 2}


def patch_columns(channels: int, patch: int, most: int) -> int:
    """Columns of a tile of patches: C p^2 up to a power of two of at least 16. Raises Error above `most` values."""
    values = channels * patch * patch
    if values > most:
        raise Error(f"a patch may have up to {most} values here, got {channels} channels of {patch} x {patch}")
    return max(16, next_power_of_2(values))


def check_embedding(x: Tensor, weight: Tensor, bias: Tensor, position: Tensor) -> tuple[int, int]:
    """Checks an embedding's weights against samples x [B, C, H, W] and returns (D, T)."""
    _, C, H, W = x.shape
    check("weight", weight, [None, C, None, None], FLOATS, x.device)
    D, _, p, across = weight.shape
    if p != across or not p or H % p or W % p:
        raise Error(f"the patch must be square and divide {H} x {W}, got {p} x {across}")
    check("bias", bias, [D], weight.dtype, x.device)
    check("position", position, [H * W // p**2, D], FLOATS, x.device)
    return D, len(position)


def patch_embed_cost(x: Tensor, weight: Tensor, position: Tensor, *, out: Tensor) -> Cost:
    tensors = (x, weight, weight[:, 0, 0, 0], position, out)
    values = weight[0].numel()
    return Cost(bytes=sum(t.numel() * t.element_size() for t in tensors), flops=out.numel() * (2 * values + 2))
