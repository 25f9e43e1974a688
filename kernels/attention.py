"""Forward attention straight from the packed product: softmax(q k^T / sqrt(d)) v for every head and sample.

One pass with a running maximum and sum (Dao et al. 2205.14135, algorithm 1), scores and sums in fp32.

Shapes: qkv [R, T, 3 D], each token q, k, v of H heads of d = D / H (fp32, bf16 or fp16); out [R, T, D] of the same dtype.
d is any multiple of 8 up to 128: a head is the largest power of two in it plus a remainder of at least 16, so 72 costs
64 + 16 columns, 8 of them zeros, where padding to a power of two would cost 128. T is any token count.
Bytes: 4 e R T D (q, k, v read, out written; k and v again from cache for each tile of queries). FLOPs: 4 R T^2 D.

A program owns BLOCK_M queries of one head and goes over all keys in order, so nothing depends on the number of rows. k and
v come through one tensor descriptor each for head and remainder, [R, 3 H, T, d], whose bounds fill short tiles with zeros.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastcfg.errors import Error
from fastcfg.kernels._launch import (
    FLOATS,
    Config,
    Cost,
    Grid,
    cdiv,
    check,
    dot_precision,
    family,
    has_descriptors,
    into,
    launch,
    next_power_of_2,
    target_of,
    tuned_config,
    wide,
)  # fmt: skip

MAX_HEAD_DIM = 128


def attention_ref(qkv: Tensor, heads: int, *, out: Tensor | None = None) -> Tensor:
    R, T, width = qkv.shape
    D = width // 3
    q, k, v = wide(qkv).view(R, T, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
    weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(D // heads), dim=-1)
    return into(out, (weights @ v).transpose(1, 2).reshape(R, T, D), qkv.dtype)


@triton.jit
def _tile(
    qkv, row, head, t0, c0, T: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] of a head from token t0 and column c0 on; head counts through q, k and v. Zeros outside."""
    if DESCRIPTORS:
        tile = qkv.load([row.to(tl.int32), head, t0, c0]).reshape(ROWS, COLUMNS)
    else:
        t, c = t0 + tl.arange(0, ROWS), c0 + tl.arange(0, COLUMNS)
        address = (row * T + t)[:, None] * (3 * HEADS * HEAD_DIM) + head * HEAD_DIM + c[None, :]
        if T % ROWS == 0 and HEAD_DIM % COLUMNS == 0:
            tile = tl.load(qkv + address)
        else:
            tile = tl.load(qkv + address, mask=(t < T)[:, None] & (c < HEAD_DIM)[None, :], other=0.0)
    return tile


@triton.jit
def _attend(
    q, q_rest, y, y_rest, top, total, main, rest, row, head, n0, scale, T: tl.constexpr, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Takes BLOCK_N keys from n0 on into the running output y, maximum and sum."""
    k = _tile(main, row, HEADS + head, n0, 0, T, HEADS, HEAD_DIM, BLOCK_N, MAIN, DESCRIPTORS)
    s = tl.dot(q, k.T, input_precision=PRECISION)
    if REST:
        k = _tile(rest, row, HEADS + head, n0, MAIN, T, HEADS, HEAD_DIM, BLOCK_N, REST, DESCRIPTORS)
        s = tl.dot(q_rest, k.T, s, input_precision=PRECISION)
    if T % BLOCK_N:
        s = tl.where((n0 + tl.arange(0, BLOCK_N) < T)[None, :], s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, axis=1) * scale)
    p = tl.exp2(s * scale - new_top[:, None])
    decay = tl.exp2(top - new_top)
    total = total * decay + tl.sum(p, axis=1)
    v = _tile(main, row, 2 * HEADS + head, n0, 0, T, HEADS, HEAD_DIM, BLOCK_N, MAIN, DESCRIPTORS)
    y = tl.dot(p.to(v.dtype), v, y * decay[:, None], input_precision=PRECISION)
    if REST:
        v = _tile(rest, row, 2 * HEADS + head, n0, MAIN, T, HEADS, HEAD_DIM, BLOCK_N, REST, DESCRIPTORS)
        y_rest = tl.dot(p.to(v.dtype), v, y_rest * decay[:, None], input_precision=PRECISION)
    return y, y_rest, new_top, total


@triton.jit
def _attention_kernel(
    qkv, main, rest, out, scale, T: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr,
    REST: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Tiles of queries of one head are neighbours, so that its keys and values stay in L2
    tiles: tl.constexpr = (T + BLOCK_M - 1) // BLOCK_M
    row = (tl.program_id(0) // (tiles * HEADS)).to(tl.int64)
    head = tl.program_id(0) // tiles % HEADS
    m0 = tl.program_id(0) % tiles * BLOCK_M
    REST_TILE: tl.constexpr = REST if REST else 16
    q = _tile(qkv, row, head, m0, 0, T, HEADS, HEAD_DIM, BLOCK_M, MAIN, False)
    q_rest = q
    if REST:
        q_rest = _tile(qkv, row, head, m0, MAIN, T, HEADS, HEAD_DIM, BLOCK_M, REST, False)
    y, y_rest = tl.zeros((BLOCK_M, MAIN), tl.float32), tl.zeros((BLOCK_M, REST_TILE), tl.float32)
    top, total = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for n0 in range(0, T, BLOCK_N):
        y, y_rest, top, total = _attend(
            q, q_rest, y, y_rest, top, total, main, rest, row, head, n0, scale, T, HEADS, HEAD_DIM, MAIN, REST, BLOCK_N,
            PRECISION, DESCRIPTORS,
        )  # fmt: skip
    t = m0 + tl.arange(0, BLOCK_M)
    written = out + (row * T + t)[:, None] * (HEADS * HEAD_DIM) + head * HEAD_DIM
    c = tl.arange(0, MAIN)[None, :]
    y = (y / total[:, None]).to(out.dtype.element_ty)
    tl.store(written + c, y, mask=(t < T)[:, None] & (c < HEAD_DIM))
    if REST:
        c = MAIN + tl.arange(0, REST)[None, :]
        y_rest = (y_rest / total[:, None]).to(out.dtype.element_ty)
        tl.store(written + c, y_rest, mask=(t < T)[:, None] & (c < HEAD_DIM))


def attention(qkv: Tensor, heads: int, *, out: Tensor | None = None, config: Config | None = None) -> Tensor:
    """Attention of every sample, in `out` [R, T, D]. Raises Error on shapes, dtypes and head dims."""
    R, T, D, head_dim = _check(qkv, heads)
    out = torch.empty(R, T, D, dtype=qkv.dtype, device=qkv.device) if out is None else out
    check("out", out, [R, T, D], qkv.dtype, qkv.device)
    target = target_of(qkv)
    # TF32 passes hold both operands' high and low parts in registers, which is too much at 128 columns
    main, rest = head_parts(head_dim, widest=64 if qkv.dtype == torch.float32 else MAX_HEAD_DIM)

    def grid(config: Config) -> Grid:
        return (R * heads * cdiv(T, config["BLOCK_M"]),)

    config = config or tuned_config("attention", (qkv,), grid, tokens=T, head_dim=head_dim)
    config = dict(config or attention_config(T, head_dim, qkv.dtype, target))
    config["DESCRIPTORS"] = descriptors = bool(config["DESCRIPTORS"]) and qkv.data_ptr() % 16 == 0
    operands = [qkv, qkv]
    if descriptors:
        operands = [_descriptor(qkv, heads, config["BLOCK_N"], part) for part in (main, rest or main)]
    launch(
        _attention_kernel, grid(config), qkv.device, config,
        qkv=qkv, main=operands[0], rest=operands[1], out=out, scale=math.log2(math.e) / math.sqrt(head_dim), T=T,
        HEADS=heads, HEAD_DIM=head_dim, MAIN=main, REST=rest, PRECISION=dot_precision(qkv.dtype, target),
    )  # fmt: skip
    return out


def head_parts(head_dim: int, widest: int = MAX_HEAD_DIM) -> tuple[int, int]:
    """(main, rest): the columns that a head's products are made in; both powers of two of at least 16, or rest 0."""
    main = min(widest, max(16, next_power_of_2(head_dim + 1) // 2))
    left = head_dim - main
    return main, max(16, next_power_of_2(left)) if left > 0 else 0


def attention_config(tokens: int, head_dim: int, dtype: torch.dtype, target: str) -> Config:
    """Tiles by the model's shapes alone; short sequences take one tile of keys."""
    if dtype == torch.float32:
        queries, keys, warps, stages = (64, 32, 4, 2) if head_dim <= 64 else (64, 16, 8, 2)
    else:
        queries, keys, warps, stages = _TILES[family(target)]
    if tokens <= 64:
        queries, warps = 64, 4 if dtype != torch.float32 else warps
    keys = min(keys, max(16, next_power_of_2(tokens)))
    tile = {"BLOCK_M": queries, "BLOCK_N": keys, "num_warps": warps, "num_stages": stages}
    return tile | {"DESCRIPTORS": int(has_descriptors(target))}


# family: BLOCK_M, BLOCK_N, num_warps, num_stages
_TILES = {
    "sm_80": (128, 64, 8, 3),
    "sm_90": (128, 64, 8, 3),
    "sm_100": (128, 64, 8, 3),
    "sm_120": (128, 64, 8, 2),
    "gfx942": (128, 64, 8, 1),
}


def attention_cost(qkv: Tensor) -> Cost:
    R, T, width = qkv.shape
    return Cost(bytes=qkv.numel() * qkv.element_size() * 4 // 3, flops=4 * R * T * T * (width // 3))


def _descriptor(qkv: Tensor, heads: int, tokens: int, columns: int) -> TensorDescriptor:
    """[R, 3 H, T, d] over the packed tensor: tokens and columns past a sample's or a head's end are zeros."""
    R, T, width = qkv.shape
    head_dim = width // (3 * heads)
    return TensorDescriptor(qkv, [R, 3 * heads, T, head_dim], [T * width, head_dim, width, 1], [1, 1, tokens, columns])


def _check(qkv: Tensor, heads: int) -> tuple[int, int, int, int]:
    check("qkv", qkv, [None, None, None], FLOATS, qkv.device)
    R, T, width = qkv.shape
    if not qkv.numel() or heads < 1 or width % (3 * heads):
        raise Error(f"qkv must be [R, T, 3 D] with D a multiple of {heads} heads, got {list(qkv.shape)}")
    head_dim = width // (3 * heads)
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        raise Error(f"a head must have a multiple of 8 up to {MAX_HEAD_DIM} values, got {head_dim}")
    return R, T, width // 3, head_dim
