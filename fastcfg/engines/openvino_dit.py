"""The openvino engine: the cpu engine's program with OpenVINO's graph for the blocks of a DiT.

What the fused program hoists and shares stays hoisted and shared, and a sample's bits depend on no other: a graph takes one
model row, or several where that was found to change no bit.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastcfg.engines.cpu import CpuEngine, refuse_other_devices
from fastcfg.engines.cpu_native import cpu_operations
from fastcfg.engines.cpu_ops import beside_int8, has_bf16, quantised
from fastcfg.engines.fused_dit import Buffers, FusedDiT, is_plain_dit
from fastcfg.engines.openvino_module import GROUP, PRECISIONS, compile_graph, core, openvino_version, quantises_activations
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
        self._graph = _trunk(module, self._quantise)


def _trunk(module: DiT, quantise: bool) -> Any:
    """The graph of a DiT between its tokens [R, T, D] and its patches [R, T, p p C'], conditioned by rows of the hoisted table
    [R, W], with a copy of its weights. quantise: the blocks' products are int8.

    Written out rather than converted from the module, which takes ten times as long.
    """
    core()  # first, so that no other import of OpenVINO comes before
    from openvino import Model
    from openvino import opset13 as op

    D, T, heads = module.config.hidden_size, module.config.tokens, module.config.num_heads
    parts = 6 * module.config.depth + 2
    tokens, table = op.parameter([-1, T, D], np.float32), op.parameter([-1, parts * D], np.float32)
    columns = [op.unsqueeze(part, 1) for part in op.split(table, 1, parts).outputs()]

    def modulated(x: Any, eps: float, shift: Any, scale: Any) -> Any:
        normal = op.mvn(x, [-1], True, eps, "inside_sqrt")
        return op.add(op.multiply(normal, op.add(scale, np.float32(1))), shift)

    def linear(x: Any, layer: nn.Linear, quantise: bool) -> Any:
        if quantise:  # as OpenVINO has to see it, to multiply int8 by int8: whole numbers, widened and scaled
            whole, scales = (part.numpy() for part in quantised(layer.weight.detach().float()))
            weight = op.multiply(op.convert(op.constant(whole), "f32"), op.constant(scales))
        else:
            weight = op.constant(layer.weight.detach().float().numpy())
        return op.add(op.matmul(x, weight, False, True), op.constant(layer.bias.detach().float().numpy()))

    def attended(x: Any) -> Any:
        packed = op.transpose(op.reshape(x, [0, T, 3, heads, D // heads], True), [2, 0, 3, 1, 4])
        q, k, v = (op.squeeze(part, 0) for part in op.split(packed, 0, 3).outputs())
        return op.reshape(op.transpose(op.scaled_dot_product_attention(q, k, v), [0, 2, 1, 3]), [0, T, D], True)

    x = tokens
    for b, block in enumerate(module.blocks):
        assert isinstance(block, DiTBlock)
        shift1, scale1, gate1, shift2, scale2, gate2 = columns[6 * b : 6 * b + 6]
        h = attended(linear(modulated(x, block.norm1.eps, shift1, scale1), block.attn.qkv, quantise))
        x = op.add(x, op.multiply(gate1, linear(h, block.attn.proj, quantise)))
        h = op.gelu(linear(modulated(x, block.norm2.eps, shift2, scale2), block.mlp.fc1, quantise), "tanh")
        x = op.add(x, op.multiply(gate2, linear(h, block.mlp.fc2, quantise)))
    last = module.final_layer
    return Model([linear(modulated(x, last.norm_final.eps, *columns[-2:]), last.linear, False)], [tokens, table])
