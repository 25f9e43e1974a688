"""Counter-based noise: the same (seed, index, step, element) gives the same N(0, 1) value anywhere and in any order.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) keyed by the 64-bit seed, with the
counter (element, step, index low, index high), then Box-Muller in float32 exactly as Triton's `tl.randn` does it. So
`philox_normal(seed, offset)` equals `tl.randn(seed, offset)`, and `fastcfg.kernels.noise` draws the same stream on a GPU:
the integers agree bit for bit everywhere, the normal values bit for bit on one kind of device and to 1e-6 between kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fastcfg.errors import Error, as_whole

INITIAL_STEP = 0  # x_T is drawn at step 0, the noise of the i-th executed step (from 0) at step i + 1

_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_ROUND_A, _ROUND_B = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(seed: ArrayLike, counter: Sequence[ArrayLike]) -> tuple[NDArray[np.uint32], ...]:
    """Philox4x32-10: four uint32 words for each (64-bit seed, four 32-bit counter words); all are broadcast together."""
    key = np.asarray(seed).astype(np.int64).view(np.uint64)
    k0, k1 = key & _LOW, key >> _SHIFT
    c0, c1, c2, c3 = (np.asarray(word).astype(np.uint64) & _LOW for word in counter)
    for _ in range(10):
        # 32 x 32 -> 64-bit products held in uint64; only their halves go on
        product_a, product_b = _ROUND_A * c0, _ROUND_B * c2
        c0, c1 = (product_b >> _SHIFT) ^ c1 ^ k0, product_b & _LOW
        c2, c3 = (product_a >> _SHIFT) ^ c3 ^ k1, product_a & _LOW
        k0, k1 = (k0 + np.uint64(_KEY_A)) & _LOW, (k1 + np.uint64(_KEY_B)) & _LOW
    return tuple(word.astype(np.uint32) for word in np.broadcast_arrays(c0, c1, c2, c3))


def _uniform(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """uint32 -> [0, 1) in float32, folding the sign bit as `tl.rand` does."""
    signed = words.view(np.int32)
    return np.where(signed < 0, -signed - np.int32(1), signed).astype(np.float32) * np.float32(4.6566127342e-10)


def box_muller(words: Sequence[NDArray[np.uint32]]) -> NDArray[np.float32]:
    """Normal values, float32, of the first two words of `philox`."""
    u1, u2 = np.maximum(np.float32(1.0e-7), _uniform(words[0])), _uniform(words[1])
    return np.sqrt(np.float32(-2.0) * np.log(u1)) * np.cos(np.float32(6.283185307179586) * u2)


def philox_normal(seed: ArrayLike, offset: ArrayLike) -> NDArray[np.float32]:
    """What `tl.randn(seed, offset)` returns, float32, for a 64-bit seed and offsets of up to 64 bits."""
    wide = np.asarray(offset).astype(np.uint64)
    return box_muller(philox(seed, (wide & _LOW, wide >> _SHIFT, np.uint64(0), np.uint64(0))))


def normal(seeds: ArrayLike, indices: ArrayLike, step: ArrayLike, shape: Sequence[int]) -> Tensor:
    """Noise for a batch of samples, float32 [B, *shape], on the CPU.

    seeds, indices: whole numbers [B], 64 bits each; row b depends on (seeds[b], indices[b], step) alone.
    step: `INITIAL_STEP` for x_T, i + 1 for the i-th executed step; one for all rows, or one a row [B].
    Raises Error for what is not a whole number of 64 bits.
    """
    key, index = whole_numbers("seeds", seeds)[:, None], whole_numbers("indices", indices).view(np.uint64)[:, None]
    element = np.arange(int(np.prod(shape)), dtype=np.uint64)[None]
    at = np.asarray(step).astype(np.uint64).reshape(-1, 1)
    words = philox(key, (element, at, index & _LOW, index >> _SHIFT))
    return torch.from_numpy(box_muller(words)).reshape(len(key), *shape)


def whole_numbers(name: str, values: Any) -> NDArray[np.int64]:
    """`values` [B] of any library's as int64, each as `as_seed` gives it. Raises Error, which calls them `name`, for others."""
    if isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "iu":
        return values.astype(np.int64)
    try:  # one by one: NumPy makes float64, which holds 53 bits, of numbers from 2^63 on beside negative ones
        numbers = [as_seed(value) for value in values]
    except TypeError:
        numbers = [None]
    if None in numbers:
        raise Error(f"{name} must be whole numbers of up to 64 bits, got {values!r}")
    return np.array(numbers, np.int64)


def as_seed(value: Any) -> int | None:
    """`value` as a Python int if it is a whole number that fits 64 bits (signed or not), else None."""
    number = as_whole(value)
    if number is None or not -(2**63) <= number < 2**64:
        return None
    return number if number < 2**63 else number - 2**64
