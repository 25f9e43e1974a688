"""Speed of the cpu engine's pieces on one core: one model row of DiT-S/2 at 256 px, the call that an engine makes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcfg
from fastcfg import Sampler
from fastcfg.engines.cpu import CpuEngine
from fastcfg.engines.cpu_dit import NativeLayer, in_one_call, wide_dtype
from fastcfg.engines.cpu_native import cpu_operations, kernels
from fastcfg.engines.cpu_ops import has_bf16, has_int8
from fastcfg.engines.fused_dit import FusedDiT
from fastcfg.engines.workers import one_thread

T, D, HEADS = 256, 384, 6
DTYPES = ["fp32", *["bf16"] * has_bf16(), *["int8"] * has_int8()]
CPU = torch.device("cpu")
KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
WIDE = {**KINDS, "int8": wide_dtype(torch.int8)}  # what the operations compute in beside their products


@pytest.fixture(autouse=True)
def _as_a_worker() -> Iterator[None]:
    with one_thread(), torch.inference_mode():
        yield


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("K", "N", "options"),
    [
        pytest.param(D, 3 * D, {}, id="qkv"),
        pytest.param(D, D, {"gated": True}, id="proj"),
        pytest.param(D, 4 * D, {"gelu": True}, id="fc1"),
        pytest.param(4 * D, D, {"gated": True}, id="fc2"),
    ],
)
def test_linear(benchmark: Any, K: int, N: int, options: dict[str, bool], dtype: str) -> None:
    operations, wide = cpu_operations(dtype == "int8"), WIDE[dtype]
    layer = operations.pack(draw(N, K, dtype=wide) / K**0.5, draw(N, dtype=wide), rows=T)
    given: dict[str, Any] = {"gelu": options.get("gelu", False)}
    if options.get("gated"):
        index = torch.zeros(1, dtype=torch.int32)
        given |= {"residual": draw(1, T, N, dtype=wide), "table": draw(1, N), "index": index, "gate_column": 0}
    benchmark(operations.linear, draw(1, T, K, dtype=wide), *layer, **given)


@pytest.mark.parametrize("tokens", [49, 256])
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if in_one_call(KINDS[dtype])])
@pytest.mark.parametrize("whose", ["own", "onednn"])
def test_products(benchmark: Any, whose: str, dtype: str, tokens: int) -> None:
    """fc1 as the network in one call has it, and as one of oneDNN's operations."""
    quantise, weight, bias, h = dtype == "int8", draw(4 * D, D) / D**0.5, draw(4 * D), draw(1, tokens, D)
    if whose == "own":
        benchmark(NativeLayer(kernels().library, weight, bias, KINDS[dtype]).products(h[0]))
    else:
        operations = cpu_operations(quantise)
        layer = operations.pack(weight.to(WIDE[dtype]), bias.to(WIDE[dtype]), rows=tokens)
        benchmark(operations.linear, h.to(WIDE[dtype]), *layer)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if in_one_call(KINDS[dtype])])
@pytest.mark.parametrize("how", ["one call", "operations"])
def test_network(benchmark: Any, how: str, dtype: str) -> None:
    """A forward of one row of the shipped model."""
    with torch.inference_mode(False):
        made = Sampler(fastcfg.load("fashion-mnist"), steps=2, engine="cpu", dtype=dtype)
    assert isinstance(made.engine, CpuEngine)
    program = made.engine._program
    if how == "operations":
        program = FusedDiT(made.model, made.plan, cpu_operations(dtype == "int8"), CPU, WIDE[dtype])
    tokens = draw(1, program.config.tokens, program.config.hidden_size, dtype=program.dtype)
    benchmark(program.denoise, tokens, draw(1, program.table_width), torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "int8"])
def test_attention(benchmark: Any, dtype: str) -> None:
    benchmark(cpu_operations().attention, draw(1, T, 3 * D, dtype=WIDE[dtype]), HEADS)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "int8"])
def test_adaln(benchmark: Any, dtype: str) -> None:
    index = torch.zeros(1, dtype=torch.int32)
    benchmark(cpu_operations().adaln, draw(1, T, D, dtype=WIDE[dtype]), draw(1, 2 * D), index, 0, D)
