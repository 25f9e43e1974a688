"""The capture lint: says whether a step may be captured in a CUDA graph, where there is no GPU to capture it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.tools.tensor_descriptor import TensorDescriptor

from fastcfg.errors import Error
from fastcfg.kernels._launch import Config, Grid, offline

Launch = tuple[str, tuple[tuple[str, Any], ...]]


def lint(loop: Callable[[], object]) -> list[Launch]:
    """Runs `loop` with the kernels' launches recorded in place of made, as on sm_90, and returns them.

    A launch is (kernel, its arguments by name), tensors given by address; a loop that may be replayed records the same
    every time. Raises Error, naming the operation, where the loop allocates a tensor, reads one on the host, copies between
    devices or synchronises.
    """
    launches: list[Launch] = []

    def record(kernel: Any, grid: Grid, config: Config, arguments: dict[str, Any]) -> None:
        named = {name: _address(value) for name, value in (arguments | config | {"grid": grid}).items()}
        launches.append((kernel.fn.__name__, tuple(sorted(named.items()))))

    with offline("sm_90", record), _no_synchronisation(), CaptureLint():
        loop()
    return launches


class CaptureLint(TorchDispatchMode):
    """Refuses torch operations that a captured step must not contain."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if len({tensor.device for tensor in given}) > 1:
            raise Error(f"{func} copies between devices, inside a captured step")
        result = func(*args, **(kwargs or {}))
        storages = {tensor.untyped_storage()._cdata for tensor in given}
        for leaf in tree_leaves(result):
            if not isinstance(leaf, Tensor):
                raise Error(f"{func} reads a tensor on the host, inside a captured step")
            if leaf.untyped_storage()._cdata not in storages:
                raise Error(f"{func} allocates a tensor {list(leaf.shape)}, inside a captured step")
        return result


@contextlib.contextmanager
def _no_synchronisation() -> Iterator[None]:
    """Inside, torch's ways to wait for a device raise Error."""

    def refuse(*_: object, **__: object) -> None:
        raise Error("the host waits for the device, inside a captured step")

    waits = ((torch.cuda, "synchronize"), (torch.cuda.Stream, "synchronize"), (torch.cuda.Event, "synchronize"))
    with contextlib.ExitStack() as patches:
        for owner, name in waits:
            patches.enter_context(mock.patch.object(owner, name, refuse))
        yield


def _address(value: Any) -> Any:
    """What a launch would hold of an argument."""
    if isinstance(value, TensorDescriptor):
        return value.base.data_ptr(), tuple(value.shape), tuple(value.strides), tuple(value.block_shape)
    return value.data_ptr() if isinstance(value, Tensor) else value
