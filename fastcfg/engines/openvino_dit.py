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
import torch.nn.functional as F
from torch import Tensor, nn

from fastcfg.engines.cpu import CpuEngine, refuse_other_devices
from fastcfg.engines.cpu_native import cpu_operations
from fastcfg.engines.cpu_ops import beside_int8, has_bf16, quantised
from fastcfg.engines.fused_dit import Buffers, FusedDiT, is_plain_dit
from fastcfg.engines.openvino_module import GROUP, PRECISIONS, compile_graph, convert, openvino_version, quantises_activations
from fastcfg.errors import Error
from fastcfg.models.denoiser import Denoiser
from fastcfg.models.dit import DiT, DiTBlock
from fastcfg.plan import Plan


class OpenVinoEngine(CpuEngine):
    """`CpuEngine` on OpenVINO's graphs (the extra `openvino`): float32, bfloat16 where the CPU has it, or int8 where it has
    quantised products. In int8 a token's activations have a scale for every `hidden_size` of them: fc2's input four."""

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
        if dtype == torch.bfloat16 and not has_bf16():
            raise Error("engine 'openvino' computes in bf16 on a CPU with bf16 products, which this one lacks: use fp32")
        super().__init__(model, plan, device, dtype, workers)

    def _check_int8(self, model: Denoiser) -> None:
        assert isinstance(model.module, DiT)
        width = model.module.config.hidden_size
        if width % GROUP:
            raise Error(
                f"int8 on engine 'openvino' needs a width that {GROUP} divides, and this DiT's is {width}: use engine 'cpu'"
            )
        if not quantises_activations():
            raise Error("int8 on engine 'openvino' needs a CPU with 8-bit products (VNNI): use fp32")

    def _make_program(self, model: Denoiser, dtype: torch.dtype) -> FusedDiT:
        with torch.no_grad():
            return OpenVinoDiT(model, self.plan, self.device, dtype, self._workers.count)


class OpenVinoDiT(FusedDiT):
    """`FusedDiT` on a CPU with one OpenVINO graph for `denoise`, compiled for each number of rows when it is first needed.

    dtype: the graph's, int8 for the blocks' products; all else is float32. streams: graphs that run at once, on one thread
    each.
    """

    def __init__(self, model: Denoiser, plan: Plan, device: torch.device, dtype: torch.dtype, streams: int):
        self._quantise, self._streams, self._process = dtype == torch.int8, streams, os.getpid()
        self._precision = beside_int8() if self._quantise else dtype
        assert self._precision in PRECISIONS
        self._compiled: dict[int, Any] = {}  # by rows
        self._compiling = threading.Lock()
        self._own = threading.local()  # a thread's requests, by rows
        super().__init__(model, plan, cpu_operations(), device, torch.float32)

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
        group = self.config.hidden_size if self._quantise else 0
        return compile_graph(graph, self._precision, self._streams, self._streams, group)

    def _pack_trunk(self, module: DiT) -> None:
        # OpenVINO computes on the tensors that it is given, so they must be nobody else's to change, and must live as long
        self._trunk = _Trunk(copy.deepcopy(module).float()).eval()
        if self._quantise:
            _quantise_linear(self._trunk.blocks)
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


def _quantise_linear(blocks: nn.ModuleList) -> None:
    """Puts int8 weights into every linear layer of the blocks that is not hoisted."""
    for block in blocks:
        assert isinstance(block, DiTBlock)
        for part in (block.attn, block.mlp):
            for name, layer in part.named_children():
                if isinstance(layer, nn.Linear):
                    setattr(part, name, _Int8Linear(layer))


class _Int8Linear(nn.Module):
    """A linear layer as OpenVINO has to see it, to multiply int8 by int8: whole numbers, widened and scaled."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.weight, self.scale = (nn.Parameter(part, requires_grad=False) for part in quantised(layer.weight))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.float() * self.scale, self.bias)
