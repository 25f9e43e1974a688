"""A module's forward by OpenVINO: converted for inputs of one shape, and refused where its output is not the module's."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import lru_cache
from importlib import metadata
from io import StringIO
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastcfg.errors import Error
from fastcfg.models.denoiser import call_module

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: torch.finfo(torch.bfloat16).eps}  # of the output's norm
PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}
GROUP = 16  # OpenVINO quantises activations in groups that this divides, and otherwise not at all


def openvino_version() -> str | None:
    """The version of OpenVINO that is installed, None if there is none."""
    try:
        return metadata.version("openvino")
    except metadata.PackageNotFoundError:
        return None


@contextmanager
def unreported() -> Iterator[None]:
    """Within it OpenVINO takes itself to be in continuous integration: elsewhere importing it and converting by
    `openvino.convert_model` are reported over the network."""
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        yield
    finally:
        del os.environ["CI"]
        if before is not None:
            os.environ["CI"] = before


@lru_cache
def core() -> Any:
    """OpenVINO's Core, one a process and never dropped.

    Its CPU plugin gives the thread that makes it a stack for signal handlers. If another thread drops the last Core, that stack
    is unmapped while still in use, and the next handled signal (SIGCHLD of a DataLoader's workers, say) ends the process.
    """
    with unreported():
        import openvino
    return openvino.Core()


class OpenVinoForward:
    """module(x, t, y) for inputs of the given ones' shapes and dtypes, computed in the dtype of x; float32 results.

    It has a copy of the weights as they are now. Control flow that depends on values, which a trace would freeze, is refused
    by torch.export. Raises Error where the output differs from the module's in float32 by more than 1e-5 of its norm, or, for
    bfloat16, by more than twice what the module itself does in that. What cannot be converted raises as torch or OpenVINO do.
    """

    def __init__(self, module: nn.Module, x: Tensor, t: Tensor, y: Tensor):
        dtype = x.dtype
        # OpenVINO computes on the tensors that it is given, so they must be nobody else's to change, and must live as long
        self._module = copy.deepcopy(module).float()
        wide = [value.float() if value.is_floating_point() else value for value in (x, t, y)]
        graph = convert(_Plain(self._module).eval(), wide)
        self._request = compile_graph(graph, dtype, torch.get_num_threads()).create_infer_request()
        self._check(call_module(module, x, t, y).float(), call_module(self._module, *wide), wide, dtype)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.from_numpy(self._request.infer([_array(value) for value in (x, t, y)], share_inputs=True)[0])

    def _check(self, own: Tensor, exact: Tensor, inputs: list[Tensor], dtype: torch.dtype) -> None:
        """own, exact: the module's outputs in `dtype` and in float32."""
        error, mine = ((output - exact).norm().item() for output in (self(*inputs), own))
        allowed = max(TOLERANCE[dtype] * exact.norm().item(), 2 * mine)
        if not error <= allowed:
            raise Error(f"its output differs from the module's by {error:.1e} in norm, where {allowed:.1e} is allowed")


class _Plain(nn.Module):
    """A module whose output is the tensor."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return call_module(self.inner, x, t, y)


def convert(module: nn.Module, inputs: list[Tensor]) -> Any:
    """The module's forward on inputs of these shapes as an OpenVINO graph. By way of the frontend, which needs no
    `openvino.convert_model`."""
    core()  # first, so that no other import of OpenVINO comes before
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder
    from openvino.frontend.pytorch.torchdynamo.export_decompositions import ops_to_not_decompose
    from torch.export.decomp_utils import CustomDecompTable

    with warnings.catch_warnings(), redirect_stderr(StringIO()):  # torch prints the graph of what it cannot export
        warnings.simplefilter("ignore")
        exported = torch.export.export(module, tuple(inputs))
        decompositions = CustomDecompTable()
        for operation in ops_to_not_decompose():
            if operation in decompositions:
                decompositions.pop(operation)
        decoder = TorchFXPythonDecoder(exported.run_decompositions(decompositions).module())
    frontend = FrontEndManager().load_by_framework("pytorch")
    return frontend.convert(frontend.load(decoder))


def compile_graph(graph: Any, dtype: torch.dtype, threads: int, streams: int = 1, group: int = 0) -> Any:
    """OpenVINO's compiled model for this CPU. streams: requests that run at once, of threads / streams threads each.
    group: of activations that get a common scale where they are multiplied by int8 weights; 0: they stay as they are.

    Threads are left to the system's scheduler: OpenVINO would bind them to the first cores, those of every process.
    """
    options = {
        "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": streams,
        "ENABLE_CPU_PINNING": False,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": group,
    }
    return core().compile_model(graph, "CPU", options)


@lru_cache
def quantises_activations() -> bool:
    """Whether OpenVINO multiplies int8 by int8 on this CPU; elsewhere it widens the weights and says nothing. A layer tells:
    the rounding of its input shows in its output."""
    core()
    from openvino import Model
    from openvino import opset13 as op

    x = op.parameter([1, 4 * GROUP], np.float32)
    weight = op.multiply(op.convert(op.constant(np.ones((GROUP, 4 * GROUP), np.int8)), "f32"), np.float32(1))
    graph = Model([op.matmul(x, weight, False, True)], [x])
    values = np.linspace(0.3, 1, 4 * GROUP, dtype=np.float32)[None]
    exact, rounded = (
        compile_graph(graph, torch.float32, 1, group=group).create_infer_request().infer([values])[0]
        for group in (0, 4 * GROUP)
    )
    return not np.array_equal(exact, rounded)


def _array(value: Tensor) -> Any:
    return (value.float() if value.is_floating_point() else value).contiguous().numpy()
