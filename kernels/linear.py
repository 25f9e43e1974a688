"""Matrix product with what follows it: y = h W^T + b, gelu(h W^T + b), or residual + gate (h W^T + b).

The gate is adaLN-Zero's (Peebles & Xie 2212.09748, section 3.2): N values of row index[r] of the hoisted table, from
gate_column on, for all tokens of sample r. GELU is the tanh form. Products of low precision accumulate in fp32 and are
rounded once, after the epilogue. Where the residual has fewer rows than h, the rows share it: row r reads r mod B.

Shapes: h [..., K] fp32, bf16 or fp16 (with a residual: [R, T, K]); weight [N, K] and bias [N] of h's dtype;
residual [B, T, N], R a multiple of B; table [G, W]; index int32 [R]; y [..., N] in the residual's or h's dtype.
Bytes: e (M K + N K + N) + e' M N (+ e'' M N residual). FLOPs: 2 M N K, M rows of h.

A program computes one tile; each element sums over K in the order of BLOCK_K, whatever M is. Operands come through
tensor descriptors (TMA) where the hardware has them and rows start at multiples of 16 bytes, else through pointers. The
epilogue works on the accumulator's halves in turn, and where the tile's rows divide T the gate is one row and the
residual comes through a descriptor as well: without these three the registers spill.
"""

from __future__ import annotations

from typing import Any

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
    target_of,
    tuned_config,
    wide,
)  # fmt: skip
from fastcfg.kernels.adaln import check_table

NO_GATE, ONE_GATE, ROW_GATES = (tl.constexpr(i) for i in range(3))  # gate rows a tile needs: none, one, one each row


def linear_ref(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gelu: bool = False,
    residual: Tensor | None = None,
    table: Tensor | None = None,
    index: Tensor | None = None,
    gate_column: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    y = torch.nn.functional.linear(wide(h), wide(weight), None if bias is None else wide(bias))
    if gelu:
        y = torch.nn.functional.gelu(y, approximate="tanh")
    if residual is None:
        return into(out, y, h.dtype)
    assert table is not None
    assert index is not None
    gate = wide(table)[index.long(), None, gate_column : gate_column + len(weight)].to(y.dtype)
    return into(out, wide(residual).repeat(len(h) // len(residual), 1, 1) + gate * y, residual.dtype)


@triton.jit
def gelu_tanh(x):
    """0.5 x (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def _finish(
    y, m0, n0, bias, residual, table, index, out, rows, tokens, sources, table_width, gate_column,
    N: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, GATE: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Bias, activation, gate, residual and the store of one half of a tile, y fp32 [BLOCK_M, BLOCK_N]."""
    m, n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    mask = (m < rows)[:, None] & (n < N)[None, :]
    if BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GELU:
        y = gelu_tanh(y)
    if GATE == ONE_GATE:
        row = m0 // tokens
        gate = table + tl.load(index + row).to(tl.int64) * table_width + gate_column + n
        y *= tl.load(gate, mask=n < N, other=0.0).to(tl.float32)[None, :]
        source = (row % sources) * tokens + m0 % tokens
        if DESCRIPTORS:
            y += residual.load([source, n0]).to(tl.float32)
        else:
            before = (source + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None] * N + n[None, :]
            y += tl.load(residual + before, mask=mask, other=0.0).to(tl.float32)
    if GATE == ROW_GATES:
        row = tl.minimum(m, rows - 1) // tokens
        gate = table + tl.load(index + row).to(tl.int64) * table_width + gate_column
        y *= tl.load(gate[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32)
        before = ((row % sources) * tokens + m % tokens).to(tl.int64)[:, None] * N + n[None, :]
        y += tl.load(residual + before, mask=mask, other=0.0).to(tl.float32)
    if DESCRIPTORS:
        out.store([m0, n0], y.to(out.dtype))
    else:
        tl.store(out + m.to(tl.int64)[:, None] * N + n[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "sources"])
def _linear_kernel(
    h, weight, bias, residual, table, index, out, rows, tokens, sources, table_width, gate_column,
    N: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, GATE: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Tiles go down GROUP_M rows of tiles before the next column, so that both operands' tiles are found in L2
    across: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    group = tl.program_id(0) // (GROUP_M * across)
    height = tl.minimum(tl.cdiv(rows, BLOCK_M) - group * GROUP_M, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * across)
    m0, n0 = (group * GROUP_M + within % height) * BLOCK_M, within // height * BLOCK_N
    # Rows past the end are clamped into it rather than masked: what they compute is not stored
    m = tl.minimum(m0 + tl.arange(0, BLOCK_M), rows - 1).to(tl.int64)
    n = tl.minimum(n0 + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        if DESCRIPTORS:
            a, b = h.load([m0, k0]), weight.load([n0, k0])
        elif K % BLOCK_K == 0:
            a, b = tl.load(h + m[:, None] * K + k0 + k[None, :]), tl.load(weight + n[:, None] * K + k0 + k[None, :])
        else:
            here = (k0 + k < K)[None, :]
            a = tl.load(h + m[:, None] * K + k0 + k[None, :], mask=here, other=0.0)
            b = tl.load(weight + n[:, None] * K + k0 + k[None, :], mask=here, other=0.0)
        y = tl.dot(a, b.T, y, input_precision=PRECISION)
    left, right = tl.split(tl.permute(tl.reshape(y, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
    _finish(
        left, m0, n0, bias, residual, table, index, out, rows, tokens, sources, table_width, gate_column,
        N, BIAS, GELU, GATE, DESCRIPTORS, BLOCK_M, BLOCK_N // 2,
    )  # fmt: skip
    _finish(
        right, m0, n0 + BLOCK_N // 2, bias, residual, table, index, out, rows, tokens, sources, table_width,
        gate_column, N, BIAS, GELU, GATE, DESCRIPTORS, BLOCK_M, BLOCK_N // 2,
    )  # fmt: skip


def linear(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gelu: bool = False,
    residual: Tensor | None = None,
    table: Tensor | None = None,
    index: Tensor | None = None,
    gate_column: int = 0,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """The product with its epilogue, in `out`, which may be the residual itself where that has as many rows.

    residual, table, index and gate_column go together. Raises Error on shapes, dtypes and devices.
    """
    N, K = _check(h, weight, bias, residual, table, index, gate_column)
    rows = h.numel() // K
    tokens = 0 if residual is None else h.shape[1]  # asked by the gate alone; another number may be compiled anew
    if out is None:
        out = torch.empty(*h.shape[:-1], N, dtype=(h if residual is None else residual).dtype, device=h.device)
    check("out", out, [*h.shape[:-1], N], FLOATS, h.device)
    if residual is not None and len(residual) < len(h) and out.data_ptr() == residual.data_ptr() != 0:
        raise Error("out cannot be the residual where rows share it")
    target = target_of(h)

    def grid(config: Config) -> Grid:
        return (cdiv(rows, config["BLOCK_M"]) * cdiv(N, config["BLOCK_N"]),)

    config = config or tuned_config("linear", (h, out, residual), grid, N=N, K=K, gelu=int(gelu), gate_tokens=tokens)
    config = dict(config or linear_config(N, h.dtype, target, tokens))
    shapes = [(h, K), (weight, K), (out, N)] + [(residual, N)] * (residual is not None)
    config["DESCRIPTORS"] = descriptors = bool(config["DESCRIPTORS"]) and all(
        _aligned(tensor, width) for tensor, width in shapes
    )
    gate = NO_GATE if residual is None else ROW_GATES if tokens % config["BLOCK_M"] else ONE_GATE
    operands: dict[str, Any] = {"h": h, "weight": weight, "out": out, "residual": residual}
    if descriptors:
        M, half = config["BLOCK_M"], config["BLOCK_N"] // 2
        operands["h"] = _descriptor(h, M, config["BLOCK_K"])
        operands["weight"] = _descriptor(weight, config["BLOCK_N"], config["BLOCK_K"])
        operands["out"] = _descriptor(out, M, half)
        if gate is ONE_GATE:
            operands["residual"] = _descriptor(operands["residual"], M, half)
    launch(
        _linear_kernel, grid(config), h.device, config,
        bias=bias, table=table, index=index, rows=rows, tokens=tokens,
        sources=1 if residual is None else len(residual), table_width=0 if table is None else table.shape[1],
        gate_column=gate_column, N=N, K=K, BIAS=bias is not None, GELU=bool(gelu), GATE=gate.value,
        PRECISION=dot_precision(h.dtype, target), **operands,
    )  # fmt: skip
    return out


def linear_config(N: int, dtype: torch.dtype, target: str, gated_tokens: int = 0) -> Config:
    """Tiles by the model's shapes alone. gated_tokens: T where there is a gate, 0 where there is none."""
    tile = _TILES[family(target), dtype == torch.float32]
    config = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"), tile, strict=True))
    if gated_tokens % config["BLOCK_M"] and gated_tokens % 64 == 0:
        config |= {"BLOCK_M": 64, "num_warps": 4}
    elif gated_tokens % config["BLOCK_M"]:  # a gate row for each row of the tile
        config |= {"BLOCK_N": 64, "num_warps": 8}
    if N <= 64:
        config |= {"BLOCK_N": 64}
    return config | {"GROUP_M": 8, "DESCRIPTORS": int(has_descriptors(target))}


# (family, float32): BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages
_TILES = {
    ("sm_80", False): (128, 128, 32, 4, 4),
    ("sm_90", False): (128, 128, 64, 8, 3),
    ("sm_100", False): (128, 128, 64, 8, 3),
    ("sm_120", False): (128, 128, 32, 8, 4),
    ("gfx942", False): (128, 128, 32, 8, 2),
    ("sm_80", True): (64, 64, 32, 4, 3),
    ("sm_90", True): (64, 64, 32, 4, 3),
    ("sm_100", True): (64, 64, 32, 4, 3),
    ("sm_120", True): (64, 64, 32, 4, 3),
    ("gfx942", True): (64, 64, 32, 4, 2),
}


def linear_cost(h: Tensor, weight: Tensor, *, residual: Tensor | None = None, out: Tensor) -> Cost:
    N, K = weight.shape
    M, e = h.numel() // K, h.element_size()
    read = e * (M * K + N) + weight.element_size() * N * K
    read += 0 if residual is None else residual.numel() * residual.element_size()
    return Cost(bytes=read + out.numel() * out.element_size(), flops=2 * M * N * K)


def _descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    flat = tensor.view(-1, tensor.shape[-1])
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [rows, columns])


def _aligned(tensor: Tensor | None, width: int) -> bool:
    """Whether every row of `width` values starts at a multiple of 16 bytes, which descriptors need."""
    return tensor is not None and tensor.data_ptr() % 16 == 0 and width * tensor.element_size() % 16 == 0


def _check(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    table: Tensor | None,
    index: Tensor | None,
    gate_column: int,
) -> tuple[int, int]:
    check("h", h, h.shape if h.ndim and h.numel() else [None, None], FLOATS, h.device)
    check("weight", weight, [None, h.shape[-1]], h.dtype, h.device)
    N, K = weight.shape
    if not h.numel():
        raise Error(f"h must have at least one row and column, got {list(h.shape)}")
    if bias is not None:
        check("bias", bias, [N], h.dtype, h.device)
    if residual is None:
        if table is not None or index is not None:
            raise Error("a gate (table, index) goes with a residual")
        return N, K
    check("h", h, [None, None, K], FLOATS, h.device)
    R, T = h.shape[:2]
    check("residual", residual, [None, T, N], FLOATS, h.device)
    if not len(residual) or R % len(residual):
        raise Error(f"h must have a multiple of the residual's {len(residual)} rows, got {R}")
    if table is None or index is None:
        raise Error("a residual goes with a gate: table, index and gate_column")
    check("index", index, [R], torch.int32, h.device)
    check_table(table, residual, {"gate": gate_column})
    return N, K
