"""What every kernel's host side shares: the target's name, the launch itself, argument checks and the cost record."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastcfg.errors import Error
from fastcfg.kernels import tuned
from fastcfg.kernels.tuned import Config, Key

Grid = tuple[int, ...]
LaunchHook = Callable[[Any, Grid, Config, dict[str, Any]], None]
Lookup = Callable[[Key], Config | None]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")

_offline: tuple[str, LaunchHook, Lookup] | None = None  # what `offline` was given, inside it


class Cost(NamedTuple):
    """What a launch must at least do: bytes read and written once, and floating point operations (2 a multiply-add)."""

    bytes: int
    flops: int


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on any device's tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@contextlib.contextmanager
def offline(target: str, hook: LaunchHook, lookup: Lookup = lambda key: None) -> Iterator[None]:
    """Inside, launches go to `hook` instead of a device and configurations are `target`'s: meta tensors are enough.

    lookup: answers for the device's table of tuned configurations; None is the default's.
    """
    global _offline
    _offline, before = (target, hook, lookup), _offline
    try:
        yield
    finally:
        _offline = before


def target_of(tensor: Tensor) -> str:
    """ "sm_90", "gfx942", ... of the tensor's device, or "interpreter". Raises Error where no kernel can run."""
    if _offline is not None:
        return _offline[0]
    if interpreted():
        return "interpreter"
    if tensor.device.type != "cuda":
        raise Error(f"the kernels need a GPU, got a tensor on {tensor.device}: move it there, or use the cpu engine")
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(tensor.device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return f"sm_{major}{minor}"


def gpu_of(tensor: Tensor) -> str:
    """The name of the tensor's GPU, which tables of tuned configurations go by, or "interpreter"."""
    return "interpreter" if target_of(tensor) == "interpreter" else torch.cuda.get_device_name(tensor.device)


def multiprocessors(tensor: Tensor) -> int:
    """How many the tensor's GPU has; an H100's in the interpreter."""
    return 132 if interpreted() else torch.cuda.get_device_properties(tensor.device).multi_processor_count


def tuned_config(kernel: str, tensors: Sequence[Tensor | None], grid: Callable[[Config], Grid], **shape: int) -> Config | None:
    """The configuration measured for a kernel on the tensors' GPU, dtypes and a model's shape; None where there is none.

    grid: the launch's, by configuration. shape: what `tuned.FIELDS` names for the kernel. It must not depend on the number
    of rows: a sample's bits would.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    dtypes = dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in given)
    asked = tuned.key(kernel, "+".join(dtypes), shape)
    if _offline is not None:
        return _offline[2](asked)
    entry = tuned.entries_for(gpu_of(given[0])).get(asked)
    return None if entry is None else entry.taken(math.prod(grid(entry.config)), multiprocessors(given[0]))


def family(target: str) -> str:
    """The entry of `TARGETS` whose configurations serve `target`: the newest generation that is not newer than it."""
    if not target.startswith("sm_"):
        return "gfx942" if target.startswith("gfx") else "sm_90"  # the interpreter walks the path with descriptors
    generation = int(target[3:])
    return next((name for name in ("sm_120", "sm_100", "sm_90") if generation >= int(name[3:])), "sm_80")


def has_descriptors(target: str) -> bool:
    """Whether loads through tensor descriptors become TMA copies; elsewhere they would be unrolled into pointers."""
    return family(target) in ("sm_90", "sm_100", "sm_120")


def dot_precision(dtype: torch.dtype, target: str) -> str:
    """Triton's input_precision: float32 products keep float32's accuracy, on tensor cores where three TF32 passes do."""
    return "tf32x3" if dtype == torch.float32 and family(target) != "gfx942" else "ieee"


def launch(kernel: Any, grid: Grid, device: torch.device, config: Config, **arguments: Any) -> None:
    """Runs `kernel` over `grid` on `device`, every argument by name."""
    if _offline is not None:
        _offline[1](kernel, grid, config, arguments)
        return
    # Triton launches on the current device, which need not be the tensors'
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](**arguments, **config)


def check(
    name: str,
    tensor: Any,
    shape: Sequence[int | None],
    dtypes: torch.dtype | Sequence[torch.dtype],
    device: torch.device,
) -> None:
    """Raises Error unless `tensor` is a contiguous tensor of that shape (None: any size), dtype and device."""
    allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    form = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
    wanted = f"{name} must be a contiguous {' or '.join(str(d).removeprefix('torch.') for d in allowed)} tensor {form}"
    if not isinstance(tensor, Tensor):
        raise Error(f"{wanted}, got {type(tensor).__name__}")
    fits = len(tensor.shape) == len(shape) and all(want in (None, size) for want, size in zip(shape, tensor.shape, strict=True))
    if not fits or tensor.dtype not in allowed:
        raise Error(f"{wanted}, got {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}")
    if tensor.device != device:
        raise Error(f"{wanted} on {device}, got one on {tensor.device}")
    if not tensor.is_contiguous():
        raise Error(f"{wanted}, got strides {tensor.stride()}")


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that references compute in: float64 stays, everything else becomes float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def into(out: Tensor | None, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A reference's result: copied into `out` where given, else a tensor of `dtype`."""
    return value.to(dtype) if out is None else out.copy_(value)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return int(triton.next_power_of_2(n))
