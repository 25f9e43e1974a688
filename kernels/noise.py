"""Noise that depends on nothing but its address: x[b, e] = scale N(0, 1) at (seeds[b], indices[b], step, e).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), key = 64-bit seed, counter =
(element, step, index low, index high), then Box-Muller in float32: the stream of `fastcfg.noise.normal`, so a sample is
the same for any batch, device and order. Integers agree bit for bit everywhere, normals within 1e-6 between kinds of device.

Shapes: seeds, indices int64 [B]; out float32 [B, ...] of fewer than 2^32 elements a row.
Bytes: 4 B E written. FLOPs: about 80 integer operations and 3 special functions an element, not counted as FLOPs.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcfg.errors import Error
from fastcfg.kernels._launch import Config, Cost, cdiv, check, launch
from fastcfg.noise import normal


def noise_ref(seeds: Tensor, indices: Tensor, step: int, *, out: Tensor, scale: float = 1.0) -> Tensor:
    z = normal(np.asarray(seeds.cpu()), np.asarray(indices.cpu()), step, out.shape[1:])
    return out.copy_(scale * z)


@triton.jit
def normal_at(seed, index, step, element):
    """N(0, 1) float32 for a block of element numbers; seed, index (int64) and step (int32) are scalars."""
    index_low = (index & 0xFFFFFFFF).to(tl.uint32)
    index_high = ((index >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = element.to(tl.uint32) * 0
    a, b, _, _ = tl.philox(seed, element.to(tl.uint32), zero + step.to(tl.uint32), zero + index_low, zero + index_high)
    z, _ = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(a), tl.uint_to_uniform_float(b))
    return z


@triton.jit(do_not_specialize=["step"])
def _noise_kernel(out, seeds, indices, step, elements, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = normal_at(tl.load(seeds + row), tl.load(indices + row), step, element)
    tl.store(out + row * elements + element, scale * z, mask=element < elements)


def noise(
    seeds: Tensor, indices: Tensor, step: int, *, out: Tensor, scale: float = 1.0, config: Config | None = None
) -> Tensor:
    """Fills `out` and returns it. step: 0 for x_T, i + 1 for the i-th executed step. Raises Error on shapes and dtypes."""
    B, elements = _sizes(out)
    check("out", out, out.shape, torch.float32, out.device)
    check("seeds", seeds, [B], torch.int64, out.device)
    check("indices", indices, [B], torch.int64, out.device)
    if not 0 <= step < 2**31:
        raise Error(f"step must lie in [0, 2^31), got {step}")
    if elements >= 2**32:
        raise Error(f"a row has a 32-bit element counter, got {elements} elements a row")
    config = config or noise_config()
    grid = (B, cdiv(elements, config["BLOCK"]))
    arguments = {"seeds": seeds, "indices": indices, "step": step, "elements": elements, "scale": float(scale)}
    launch(_noise_kernel, grid, out.device, config, out=out, **arguments)
    return out


def noise_config() -> Config:
    return {"BLOCK": 1024, "num_warps": 4, "num_stages": 1}


def noise_cost(out: Tensor) -> Cost:
    return Cost(bytes=4 * out.numel(), flops=0)


def _sizes(out: Tensor) -> tuple[int, int]:
    if out.ndim < 2 or out.numel() == 0:
        raise Error(f"out must have rows and at least one element in each, got {list(out.shape)}")
    return len(out), out[0].numel()
