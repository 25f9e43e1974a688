"""The machine's matrix rate: what its cores give on large products alone, each core computing by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cpu.timing import Call, seconds_of
from fastcfg.engines.cpu_ops import has_bf16, has_int8, has_packed_products
from fastcfg.engines.workers import Workers, one_thread

# M, K, N of a core's product [M, K] x [K, N]: the one that runs best gives the rate
SHAPES = ((256, 1024, 1024), (1024, 1024, 1024), (2048, 2048, 2048), (4096, 384, 1536))
SECONDS = 0.2  # of a measurement, by repetition


@dataclass(frozen=True)
class Products:
    """Large products on all cores at once. flops: of one call."""

    dtype: str
    shape: tuple[int, int, int]
    call: Call
    flops: int


def matrix_products(cores: int, dtypes: Sequence[str], dry: bool) -> Iterator[Products]:
    """For each of the dtypes that the CPU has, those of the shape that runs best."""
    workers = Workers(cores)
    for dtype in ("fp32", *["bf16"] * has_bf16(), *["int8"] * has_int8()):
        if dtype not in dtypes:
            continue
        found = [_repeated(workers, dtype, shape, 0 if dry else SECONDS) for shape in (SHAPES[:1] if dry else SHAPES)]
        yield max(found, key=lambda products: products.flops / min(seconds_of(products.call) for _ in range(3)))


def _repeated(workers: Workers, dtype: str, shape: tuple[int, int, int], seconds: float) -> Products:
    """As many products as take about `seconds`."""
    product = _product(dtype, *shape)

    def everywhere(repeats: int) -> None:
        with one_thread():
            workers.map(lambda _: [product() for _ in range(repeats)], range(workers.count))

    everywhere(1)
    once = min(seconds_of(lambda: everywhere(1)) for _ in range(5))
    repeats = max(1, round(seconds / once))
    M, K, N = shape
    return Products(dtype, shape, lambda: everywhere(repeats), 2 * M * K * N * repeats * workers.count)


def _product(dtype: str, M: int, K: int, N: int) -> Callable[[], Tensor]:
    """oneDNN's product with a weight that was packed once, as the cpu engine uses it; torch's own where there is none."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((M, K), (N, K), (N,)))
    if dtype == "int8":
        low, whole = (64 * x.clamp(-1, 1) + 128).to(torch.uint8), (64 * weight.clamp(-1, 1)).to(torch.int8)
        packed, scale = torch.ops.onednn.qlinear_prepack(whole, [M, K]), torch.full((N,), 1 / 64)
        zero = torch.zeros(N, dtype=torch.int64)
        return lambda: torch.ops.onednn.qlinear_pointwise(
            low, 1 / 64, 128, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    x, weight, bias = x.to(kind), weight.to(kind), bias.to(kind)
    if not has_packed_products(kind):
        return lambda: F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, M)
    return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
