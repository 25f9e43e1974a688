"""The fused program's operations on a CPU: oneDNN products on weights packed once, and torch for the rest.

Every operation is meant to run in one thread, on one or a few samples at a time, whose activations then stay in that core's
cache. Signatures and meaning are those of `fastcfg.kernels`. Results are new tensors where the library takes no buffer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcfg import portable
from fastcfg.engines.choice import fastest, machine
from fastcfg.engines.fused_dit import Layer
from fastcfg.guidance import Guidance
from fastcfg.noise import normal
from fastcfg.plan import Plan

# From this many tokens on, attention is two products and a softmax: at 256 tokens on an AMD EPYC with AVX-512 bf16 3.3 times as
# fast as torch's SDPA in bfloat16 and 1.7 times in float32, and no faster below. SDPA's float32 products are MKL's, which are
# fast on Intel's processors: there it takes half the time of these products.
PRODUCT_TOKENS = 128

_COLUMNS = ("x0_x", "x0_out", "c_x", "c_out", "c_x0", "c_prev", "c_noise")


class _Packed(NamedTuple):
    """A weight in oneDNN's own layout."""

    weight: Tensor


class _Quantised(NamedTuple):
    """int8 weight in oneDNN's own layout, and its scale and zero point for each output channel."""

    weight: Tensor
    scale: Tensor
    zero: Tensor


class Tokens(NamedTuple):
    """Tokens as an int8 product reads them: whole uint8 [R, T, K] around 128, with a float32 scale [R, T, 1] each. dtype: of
    what they were, and of the product's result. oneDNN has no fast path for signed activations."""

    whole: Tensor
    scale: Tensor
    dtype: torch.dtype


@dataclass(frozen=True)
class Gate:
    """What a product's result y [R, T, D] goes through where it joins the stream: residual + gate y.

    residual: [B, T, D], R a multiple of B; gate: columns of the table's lines index [R], D from `column` on.
    """

    residual: Tensor
    table: Tensor
    index: Tensor
    column: int

    def packed(self) -> Gate:
        """Its tensors as compiled kernels read them."""
        return Gate(self.residual.contiguous(), self.table.float().contiguous(), self.index.int().contiguous(), self.column)


class CpuOperations:
    """quantise: int8 products for all layers but the sensitive ones."""

    state_dtype: torch.dtype = torch.float64  # as in the reference: rounding is the network's alone
    table_dtype: torch.dtype | None = torch.float32
    any_rows: bool = False

    def __init__(self, quantise: bool = False):
        self.quantise = quantise

    def pack(self, weight: Tensor, bias: Tensor, *, rows: int, sensitive: bool = False) -> Layer:
        if self.quantise and not sensitive:
            return Layer(_quantise(weight.float(), rows), bias.float())
        if has_packed_products(weight.dtype):
            return Layer(_Packed(torch.ops.mkldnn._reorder_linear_weight(weight, rows)), bias)
        return Layer(weight, bias)

    def step_table(self, plan: Plan) -> Tensor:
        """float64 [steps, 9]: the columns of `fastcfg.solvers.Rows`, then log_var_min and log_var_max."""
        rows, zeros = plan.rows, np.zeros(plan.steps)
        bounds = [zeros if bound is None else bound for bound in (rows.log_var_min, rows.log_var_max)]
        return torch.from_numpy(np.stack([*(getattr(rows, name) for name in _COLUMNS), *bounds], axis=1))

    def patch_embed(self, x: Tensor, weight: Tensor, bias: Tensor, position: Tensor, *, out: Tensor | None = None) -> Tensor:
        B, C, H, W = x.shape
        D, p = weight.shape[0], weight.shape[-1]
        patches = x.float().view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5).reshape(-1, C * p * p)
        tokens = F.linear(patches, weight.float().flatten(1), bias.float()).view(B, -1, D)
        return _into(out, (tokens + position).to(weight.dtype))

    def adaln(
        self,
        x: Tensor,
        table: Tensor,
        index: Tensor,
        shift_column: int,
        scale_column: int,
        *,
        eps: float = 1e-6,
        out: Tensor | None = None,
    ) -> Tensor:
        D, rows = x.shape[-1], index.tolist()
        if len(rows) > 1 and x.dtype == torch.float32:  # the same bits as one by one, in fewer calls
            halves = -1, len(x), 1, D
            shift, scale = (table[:, first : first + D][index].view(halves) for first in (shift_column, scale_column))
            moved = torch.addcmul(shift, F.layer_norm(x, (D,), eps=eps), scale.add_(1))
            return _into(out, moved.view(len(rows), -1, D))

        # One sample's modulation is what torch's LayerNorm calls its weight and bias: a single pass
        def normed(sample: Tensor, k: int) -> Tensor:
            shift, scale = (table[k, first : first + D] for first in (shift_column, scale_column))
            return F.layer_norm(sample, (D,), 1 + scale, shift, eps)

        if len(rows) == 1:
            return _into(out, normed(x, rows[0]))
        return _into(out, torch.stack([normed(x[r % len(x)], k) for r, k in enumerate(rows)]))

    def linear(
        self,
        h: Any,
        weight: Any,
        bias: Any = None,
        *,
        gelu: bool = False,
        residual: Tensor | None = None,
        table: Tensor | None = None,
        index: Tensor | None = None,
        gate_column: int = 0,
        out: Tensor | None = None,
    ) -> Any:
        """An int8 layer with GELU gives `Tokens`, which only another one reads."""
        gate = None
        if residual is not None:
            assert table is not None
            assert index is not None
            gate = Gate(residual, table, index, gate_column)
        if isinstance(weight, _Quantised):
            return self._int8(h, weight, bias, gelu, gate, out)
        y = self._product(h, weight, bias, gelu)
        return _into(out, y) if gate is None else self._gated(y, gate, out)

    def _int8(self, h: Any, weight: Any, bias: Tensor, gelu: bool, gate: Gate | None, out: Tensor | None) -> Any:
        tokens = h if isinstance(h, Tokens) else self._quantised(h)
        whole = tokens.whole.view(-1, tokens.whole.shape[-1])
        y = torch.ops.onednn.qlinear_pointwise(
            whole, 1.0, 128, weight.weight, weight.scale, weight.zero, None, 1.0, 0, torch.float32, "none", [], ""
        ).view(*tokens.whole.shape[:-1], -1)
        return self._hidden(y, tokens, bias) if gelu else self._dequantised(y, tokens, bias, gate, out)

    def _product(self, h: Tensor, weight: Any, bias: Tensor, gelu: bool) -> Tensor:
        if isinstance(weight, _Packed):
            activation, form = ("gelu", "tanh") if gelu else ("none", "")
            return torch.ops.mkldnn._linear_pointwise(h, weight.weight, bias, activation, [], form)
        y = F.linear(h, weight, bias)
        return F.gelu(y, approximate="tanh") if gelu else y

    def _gated(self, y: Tensor, gate: Gate, out: Tensor | None) -> Tensor:
        """y is nobody else's, and may hold the result."""
        residual, table, index = gate.residual, gate.table, gate.index
        columns = slice(gate.column, gate.column + y.shape[-1])
        factor = (table[int(index), columns] if len(index) == 1 else table[:, columns][index][:, None]).to(y.dtype)
        if len(residual) < len(y):
            residual = residual.repeat(len(y) // len(residual), 1, 1)
        if y.dtype == torch.float32:  # rounded where the module rounds: after the product, then after the sum
            return _into(out, y.mul_(factor).add_(residual))
        return torch.addcmul(residual, factor, y, out=y if out is None else out)

    def _quantised(self, h: Tensor) -> Tokens:
        values = h.to(torch.float32, copy=True)
        largest = torch.maximum(values.amax(-1, keepdim=True), -values.amin(-1, keepdim=True))
        values.mul_(torch.where(largest > 0, 127 / largest, 0)).round_()
        # torch converts to int8 four times as fast as to uint8; flipping the top bit adds 128
        return Tokens(values.to(torch.int8).bitwise_xor_(-128).view(torch.uint8), largest / 127, h.dtype)

    # Of an int8 layer's product y, float32 [R, T, N], of `tokens`; y is nobody else's, and may hold the result

    def _hidden(self, y: Tensor, tokens: Tokens, bias: Tensor) -> Tokens:
        hidden = self._quantised(_gelu(torch.addcmul(bias, y, tokens.scale, out=y)))
        return hidden._replace(dtype=tokens.dtype)

    def _dequantised(self, y: Tensor, tokens: Tokens, bias: Tensor, gate: Gate | None, out: Tensor | None) -> Tensor:
        y = torch.addcmul(bias, y, tokens.scale, out=y).to(tokens.dtype)
        return _into(out, y) if gate is None else self._gated(y, gate, out)

    def attention(self, qkv: Tensor, heads: int, *, out: Tensor | None = None) -> Tensor:
        R, T, width = qkv.shape
        D, d = width // 3, width // (3 * heads)
        if T < PRODUCT_TOKENS or not _attends_by_products(qkv.dtype):
            return self._attended(qkv, heads, out)
        packed = qkv.view(R, T, 3, heads, d).permute(2, 0, 3, 1, 4).contiguous()
        attend = _attend_heads if qkv.dtype == torch.float32 else _attend
        attended = attend(*packed.view(3, R * heads, T, d)).view(R, heads, T, d)
        return _into(out, attended.transpose(1, 2).reshape(R, T, D))

    def _attended(self, qkv: Tensor, heads: int, out: Tensor | None) -> Tensor:
        """Attention, other than by products."""
        R, T, width = qkv.shape
        packed = qkv.view(R, T, 3, heads, -1).permute(2, 0, 3, 1, 4)
        return _into(out, F.scaled_dot_product_attention(*packed).transpose(1, 2).reshape(R, T, width // 3))

    def guided_step(
        self,
        model_out: Tensor,
        x: Tensor,
        coef: Tensor,
        scale: Tensor,
        step: Tensor,
        *,
        x0_prev: Tensor | None = None,
        noise: Tensor | None = None,
        seeds: Tensor | None = None,
        indices: Tensor | None = None,
        channels: int | None = None,
        rescale: float = 0.0,
        clip: bool = False,
        learned: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """In float64, with terms, their order and their rounding as in the reference engine."""
        (B, C), s = x.shape[:2], scale[step, torch.arange(len(x))].double()
        guided, z = C if channels is None else channels, self.step_noise(coef, step, x, noise, seeds, indices)
        rows = coef[step].view(B, -1, *[1] * (x.ndim - 1))
        x0_x, x0_out, c_x, c_out, c_x0, c_prev, c_noise, log_min, log_max = rows.unbind(1)
        prediction, v = model_out[:B, :C].double(), model_out[:B, C:].double()
        if len(model_out) == 2 * B:
            null = model_out[B:, :guided].double()
            prediction[:, :guided] = _guidance(rescale).combine(prediction[:, :guided], null, s)
        x0 = x0_x * x + x0_out * prediction
        if clip:
            x0 = x0.clamp(-1, 1)
        moved = c_x * x + c_out * prediction + c_x0 * x0
        if x0_prev is not None:
            moved += c_prev * x0_prev
            x0_prev.copy_(x0)
        if z is not None:
            z = z.double()
            if learned:
                fraction = (v + 1) / 2
                z = torch.exp(0.5 * (fraction * log_max + (1 - fraction) * log_min)) * z
            moved += c_noise * z
        return _into(out, moved)

    def step_noise(
        self, coef: Tensor, step: Tensor, x: Tensor, noise: Tensor | None, seeds: Tensor | None, indices: Tensor | None
    ) -> Tensor | None:
        """z of these steps, as given or drawn; None where none is added."""
        if (noise is None and seeds is None) or not bool(coef[step, _COLUMNS.index("c_noise")].any()):
            return None
        return noise[step, torch.arange(len(x))] if noise is not None else self._drawn(seeds, indices, step, x)

    def _drawn(self, seeds: Tensor | None, indices: Tensor | None, step: Tensor, x: Tensor) -> Tensor:
        """Noise for each sample at its own step, float32 of x's shape."""
        assert seeds is not None
        assert indices is not None
        return normal(seeds.numpy(), indices.numpy(), step.numpy() + 1, x.shape[1:])


def has_packed_products(dtype: torch.dtype) -> bool:
    """Whether oneDNN's products on packed weights exist here for this dtype; torch's own serve otherwise."""
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and has_bf16())


@lru_cache
def _attends_by_products(dtype: torch.dtype) -> bool:
    """Not measured: a sample's bits must be the same on all machines with this processor, and in a portable process on all."""
    mkl_is_fast = dtype == torch.float32 and "Intel" in machine() and not portable.active()
    return has_packed_products(dtype) and not mkl_is_fast


def has_bf16() -> bool:
    """Whether this CPU has bf16 products, by oneDNN's reckoning."""
    known = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return known is not None and torch.backends.mkldnn.is_available() and bool(known())


def has_int8() -> bool:
    """Whether torch was built with oneDNN's quantised products."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_prepack")


@lru_cache
def beside_int8() -> torch.dtype:
    """What is not int8 in int8 engines: bfloat16 where a product takes less time in it, as it does not where oneDNN has to
    make it of float32 products. Measured once a machine and remembered."""
    if not has_bf16():
        return torch.float32
    operations, dtypes = CpuOperations(), {"fp32": torch.float32, "bf16": torch.bfloat16}

    def product(dtype: torch.dtype) -> Callable[[], object]:
        layer = operations.pack(torch.ones(512, 512, dtype=dtype), torch.ones(512, dtype=dtype), rows=256)
        h = torch.ones(256, 512, dtype=dtype)
        return lambda: operations.linear(h, *layer)

    return dtypes[fastest("dtype of a product beside int8", {name: product(dtype) for name, dtype in dtypes.items()})]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in bfloat16. q, k, v: contiguous [heads, T, d] (on a strided view the products take half as long again)."""
    unused = torch.empty((), dtype=q.dtype)
    scores = torch.baddbmm(unused, q, k.transpose(1, 2), beta=0, alpha=1 / math.sqrt(q.shape[-1]))
    # oneDNN's softmax takes half the time of torch's, and is reached through its own kind of tensor only
    return torch.bmm(torch.softmax(scores.to_mkldnn(), -1).to_dense(), v)


def _attend_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in float32, head by head: torch's batched products are MKL's there, slower than oneDNN's on AMD."""
    product = torch.ops.mkldnn._linear_pointwise
    q = q * (1 / math.sqrt(q.shape[-1]))
    scores = [product(q[h], k[h], None, "none", [], "") for h in range(len(q))]
    values = v.transpose(1, 2).contiguous()
    return torch.stack([product(torch.softmax(s, -1), values[h], None, "none", [], "") for h, s in enumerate(scores)])


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [N, K], float32 scale [N, 1]) of a float32 weight [N, K]: symmetric, a scale for each output channel."""
    scale = weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return torch.round(weight / scale).to(torch.int8), scale


def _quantise(weight: Tensor, rows: int) -> _Quantised:
    whole, scale = quantised(weight)
    packed = torch.ops.onednn.qlinear_prepack(whole, [rows, weight.shape[1]])
    return _Quantised(packed, scale[:, 0], torch.zeros(len(scale), dtype=torch.int64))


def _gelu(y: Tensor) -> Tensor:
    """tanh-GELU as y sigmoid(2 u), u = sqrt(2 / pi) (y + 0.044715 y^3): torch takes twice as long over its tanh."""
    twice = 2 * math.sqrt(2 / math.pi)
    return (y * y).mul_(0.044715 * twice).add_(twice).mul_(y).sigmoid_().mul_(y)


@lru_cache
def _guidance(rescale: float) -> Guidance:
    return Guidance(rescale=rescale)


def _into(out: Tensor | None, value: Tensor) -> Tensor:
    return value if out is None or out is value else out.copy_(value)
