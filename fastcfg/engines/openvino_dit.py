"""The openvino engine: the cpu engine's program with OpenVINO's graph for the blocks of a DiT.

What the fused program hoists and shares stays hoisted and shared, and a sample's bits depend on no other: a graph takes one
model row, or several where that was found to change no bit.
"""

from __future__ import annotations

import copy
import os
import threading
from typing import Any

import torch
from torch import Tensor, nn

from fastcfg.engines.cpu import CpuEngine, refuse_other_devices
from fastcfg.engines.cpu_ops import CpuOperations, has_bf16
from fastcfg.engines.fused_dit import Buffers, FusedDiT, is_plain_dit
from fastcfg.engines.openvino_module import PRECISIONS, compile_graph, convert, openvino_version
from fastcfg.errors import Error
from fastcfg.models.denoiser import Denoiser
from fastcfg.models.dit import DiT, DiTBlock
from fastcfg.plan import Plan


class OpenVinoEngine(CpuEngine):
    """`CpuEngine` on OpenVINO's graphs (the extra `openvino`): float32, or bfloat16 where the CPU has it."""

    name = "openvino"

    def __init__(
        self, model: Denoiser, plan: Plan, device: torch.device, dtype: torch.dtype | None = None, workers: int | None = None
    ):
        if openvino_version() is None:
            raise Error("engine 'openvino' needs OpenVINO: pip install 'fastcfg[openvino]'")
        refuse_other_devices(self.name, device)
        if not is_plain_dit(model.module):
            raise Error(
                f"engine 'openvino' is for DiT models, and this is a {type(model.module).__name__}: engine 'cpu' takes it"
            )
        if dtype not in (None, torch.float32, *[torch.bfloat16] * has_bf16()):
            kinds = "fp32" + (" and bf16" if has_bf16() else ", and on a CPU with bf16 products in bf16")
            raise Error(f"engine 'openvino' computes in {kinds}, got {str(dtype).removeprefix('torch.')}")
        super().__init__(model, plan, device, dtype, workers)

    def _make_program(self, model: Denoiser, dtype: torch.dtype) -> FusedDiT:
        with torch.no_grad():
            return OpenVinoDiT(model, self.plan, self.device, dtype, self._workers.count)


class OpenVinoDiT(FusedDiT):
    """`FusedDiT` on a CPU with one OpenVINO graph for `denoise`, compiled for each number of rows when it is first needed.

    precision: the graph's; all else is float32. streams: graphs that run at once, on one thread each.
    """

    def __init__(self, model: Denoiser, plan: Plan, device: torch.device, precision: torch.dtype, streams: int):
        assert precision in PRECISIONS
        self._precision, self._streams, self._process = precision, streams, os.getpid()
        self._compiled: dict[int, Any] = {}  # by rows
        self._compiling = threading.Lock()
        self._own = threading.local()  # a thread's requests, by rows
        super().__init__(model, plan, CpuOperations(), device, torch.float32)

    def denoise(self, tokens: Tensor, table: Tensor, index: Tensor, buffers: Buffers | None = None) -> Tensor:
        """As FusedDiT's; the graph has its own buffers."""
        del buffers
        R = len(index)
        if len(tokens) < R:
            tokens = tokens.repeat(R // len(tokens), 1, 1)
        inputs = [value.contiguous().numpy() for value in (tokens, table[index])]
        return self.unpatchify(torch.from_numpy(self._request(R).infer(inputs, share_inputs=True)[0]))

    def _request(self, rows: int) -> Any:
        """This thread's way into the graph of so many rows."""
        requests: dict[int, Any] = self._own.__dict__.setdefault("requests", {})
        if rows not in requests:
            if self._process != os.getpid():
                raise Error("a sampler on engine 'openvino' does not outlive a fork: make one in each process")
            with self._compiling:
                if rows not in self._compiled:
                    self._compiled[rows] = self._compile(rows)
            requests[rows] = self._compiled[rows].create_infer_request()
        return requests[rows]

    def _compile(self, rows: int) -> Any:
        graph = self._graph.clone()
        graph.reshape({port: [rows, *list(port.partial_shape)[1:]] for port in graph.inputs})
        return compile_graph(graph, self._precision, self._streams, self._streams)

    def _pack_trunk(self, module: DiT) -> None:
        # OpenVINO computes on the tensors that it is given, so they must be nobody else's to change, and must live as long
        self._trunk = _Trunk(copy.deepcopy(module).float()).eval()
        width = (6 * self.config.depth + 2) * self.config.hidden_size
        tokens = torch.zeros(2, self.config.tokens, self.config.hidden_size)
        self._graph = convert(self._trunk, [tokens, torch.zeros(2, width)], any_rows=True)


class _Trunk(nn.Module):
    """A DiT between its tokens [R, T, D] and its patches [R, T, p p C'], conditioned by rows of the hoisted table [R, W]."""

    def __init__(self, module: DiT):
        super().__init__()
        self.blocks, self.last, self.width = module.blocks, module.final_layer, module.config.hidden_size

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        columns = table.split(self.width, dim=1)
        for b, block in enumerate(self.blocks):
            assert isinstance(block, DiTBlock)
            x = block.conditioned(x, *columns[6 * b : 6 * b + 6])
        return self.last.conditioned(x, *columns[-2:])
