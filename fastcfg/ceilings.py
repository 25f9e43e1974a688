"""What a device can do at most, as its vendor states or as measured here: FLOP/s of products, bytes/s of memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from fastcfg.engines.choice import machine, measure
from fastcfg.engines.cpu_dit import NativeLayer, in_one_call, wide_dtype
from fastcfg.engines.cpu_native import cpu_operations, kernels
from fastcfg.engines.workers import Workers, one_thread
from fastcfg.errors import Error

if TYPE_CHECKING:
    from fastcfg.kernels._launch import Cost

CPU_PRODUCT = (256, 1024, 1024)  # M, K, N a core: what a DiT's products are like, and it stays in the core's cache
CPU_COPY = 2**18  # bytes a core: so does what the cpu engine's operations hand to one another
GPU_PRODUCT = 8192
GPU_COPY = 2**29  # bytes: several times the largest cache
REPEATS = 10  # calls between two looks at the clock


@dataclass(frozen=True)
class Ceilings:
    """rates: FLOP/s of products, by dtype ("bfloat16", ...). bandwidth: bytes/s, read and written together.

    name: of the device. source: "stated" (dense peak, from the vendor's data sheet) or "measured" (here, just now).
    """

    name: str
    source: str
    rates: Mapping[str, float]
    bandwidth: float

    def floor(self, cost: Cost, dtype: str) -> float:
        """The least seconds that `cost` takes: its FLOPs at the products' rate, or its bytes at the memory's."""
        return max(cost.flops / self.rates[dtype], cost.bytes / self.bandwidth)

    def __str__(self) -> str:
        rates = ", ".join(f"{dtype} {rate / 1e12:.4g} TFLOP/s" for dtype, rate in self.rates.items())
        return f"{self.name}, {self.source}: {rates}; {self.bandwidth / 1e9:.4g} GB/s"


def _stated(name: str, low: float, full: float, bandwidth: float) -> Ceilings:
    rates = {"bfloat16": low * 1e12, "float16": low * 1e12, "float32": full * 1e12}
    return Ceilings(name, "stated", rates, bandwidth * 1e12)


# Dense peaks (data sheets give twice as much, with sparsity) and memory bandwidth. float32 products are three passes in TF32
# on NVIDIA GPUs, so a third of that rate, and the matrix units' own float32 on AMD's.
# NVIDIA: "A100 Tensor Core GPU" data sheet (SXM, 80 GB); "H100 Tensor Core GPU Architecture" white paper (SXM5); "H200 Tensor
# Core GPU" data sheet (SXM); "Blackwell Architecture Technical Brief" (HGX B200). AMD: "Instinct MI300X" data sheet.
STATED = {
    "a100": _stated("A100 SXM 80 GB", 312, 156 / 3, 2.039),
    "h100": _stated("H100 SXM", 989.4, 494.7 / 3, 3.35),
    "h200": _stated("H200 SXM", 989.4, 494.7 / 3, 4.8),
    "b200": _stated("B200 SXM", 2250, 1100 / 3, 8.0),
    "mi300x": _stated("MI300X", 1307.4, 163.4, 5.3),
}


def stated_ceilings(name: str) -> Ceilings:
    """The vendor's figures for one of `STATED`. Raises Error for any other name."""
    if not isinstance(name, str) or name not in STATED:
        raise Error(f"no stated ceilings for {name!r}: known are {', '.join(STATED)}; others can be measured on the device")
    return STATED[name]


def known_gpu(device: torch.device) -> Ceilings | None:
    """The stated ceilings of a GPU whose name tells that it is one of `STATED`, in the form that these are of."""
    if device.type != "cuda":
        return None
    words = set(torch.cuda.get_device_name(device).lower().replace("-", " ").split())
    found = [ceilings for name, ceilings in STATED.items() if name in words]
    return found[0] if found and not words & {"pcie", "nvl", "40gb", "mig"} else None


def measured_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Ceilings for `dtype` on `device`, measured in a second or two.

    CPU: the cpu engine's own products and a copy, one a core at a time, all cores at once, on data that stays in the cores'
    caches. GPU: torch's product of 8192 x 8192 matrices, and a copy of 512 MiB.
    """
    return _measured_on_cpu(dtype) if device.type == "cpu" else _measured_on_gpu(device)


def _measured_on_cpu(dtype: torch.dtype) -> Ceilings:
    wide = wide_dtype(dtype)
    dtypes = {_name(kind): kind for kind in (dtype, wide)}  # attention is computed in the wider one
    workers = Workers(torch.get_num_threads())
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(0), device="cpu")
    M, K, N = CPU_PRODUCT

    def everywhere(work: Callable[[int], object]) -> Callable[[], object]:
        return lambda: workers.map(work, range(workers.count))

    def product(kind: torch.dtype) -> Callable[[int], object]:
        operations, stored = cpu_operations(kind == torch.int8), wide if kind == torch.int8 else kind
        weight, bias, h = (randn(shape).to(stored) for shape in ((N, K), (N,), (1, M, K)))
        if in_one_call(kind):
            products = NativeLayer(kernels().library, weight, bias, kind).products(h[0].float())
            return lambda _: [products() for _ in range(REPEATS)]
        layer = operations.pack(weight, bias, rows=M)
        return lambda _: [operations.linear(h, *layer) for _ in range(REPEATS)]

    buffers = [(randn(CPU_COPY // 4), randn(CPU_COPY // 4)) for _ in range(workers.count)]

    def copy(worker: int) -> object:
        source, target = buffers[worker]
        return [target.copy_(source) for _ in range(REPEATS)]

    with one_thread():
        options = {name: everywhere(product(kind)) for name, kind in dtypes.items()}
        seconds = measure({**options, "copy": everywhere(copy)})
    times = workers.count * REPEATS
    rates = {name: times * 2 * M * K * N / seconds[name] for name in dtypes}
    return Ceilings(machine(), "measured", rates, times * 2 * CPU_COPY / seconds["copy"])


def _measured_on_gpu(device: torch.device) -> Ceilings:
    n = GPU_PRODUCT
    try:
        generator = torch.Generator(device).manual_seed(0)
        a, b = (torch.randn(n, n, generator=generator, device=device).to(torch.bfloat16) for _ in range(2))
        product, copied = torch.empty_like(a), torch.ones(GPU_COPY // 4, device=device)
        target = torch.empty_like(copied)
    except torch.OutOfMemoryError:
        raise Error(
            f"measuring takes about 2 GiB of memory on {device}, which is not free: name a GPU's stated ceilings"
        ) from None

    def repeat(work: Callable[[], object]) -> Callable[[], None]:
        def timed() -> None:
            for _ in range(REPEATS):
                work()
            torch.cuda.synchronize(device)

        return timed

    with torch.no_grad():
        options = {"product": repeat(lambda: torch.mm(a, b, out=product)), "copy": repeat(lambda: target.copy_(copied))}
        seconds = measure(options)
    low = REPEATS * 2 * n**3 / seconds["product"]
    # float32: three TF32 passes at half the rate each; on AMD's CDNA 3 the matrix units' float32, an eighth
    full = low / 6 if torch.version.hip is None else low / 8
    rates = {"bfloat16": low, "float16": low, "float32": full}
    return Ceilings(torch.cuda.get_device_name(device), "measured", rates, REPEATS * 2 * GPU_COPY / seconds["copy"])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
