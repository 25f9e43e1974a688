"""The fused program on a CPU with the whole network, from tokens to its output, in one call of `cpu_network.c`.

Operation by operation, two worker threads take turns at Python's lock between any two, and wait longer for it than a small
product takes. Products are the library's own, since torch's cannot be called from there.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcfg import portable
from fastcfg.engines.base import Request
from fastcfg.engines.choice import cpuinfo
from fastcfg.engines.cpu_native import KINDS, NativeOperations, address, kernels
from fastcfg.engines.cpu_ops import CpuOperations, beside_int8, quantised
from fastcfg.engines.fused_dit import Buffers, Denoise, FusedDiT, Samples
from fastcfg.engines.workers import Item, Result, Workers
from fastcfg.models.denoiser import Denoiser
from fastcfg.models.dit import DiT, DiTBlock
from fastcfg.plan import Plan

TOKENS_EACH = 16  # tokens that each thread of a team has at least
NOISE_BYTES = 2**20  # of noise that is drawn before the steps that need it


class _Layer(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("weight", "start", "scale", "bias")),
        *((name, ctypes.c_long) for name in ("N", "K", "kind")),
    ]


class _Tokens(ctypes.Structure):
    _fields_: ClassVar = [(name, ctypes.c_void_p) for name in ("values", "whole", "scale")]


class _Block(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, _Layer) for name in ("qkv", "proj", "fc1", "fc2")),
        *((name, ctypes.c_float) for name in ("eps1", "eps2")),
    ]


class _Network(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("embedding", "position")),
        ("blocks", ctypes.POINTER(_Block)),
        ("last", _Layer),
        ("last_eps", ctypes.c_float),
        *((name, ctypes.c_long) for name in ("depth", "T", "D", "H", "heads", "width", "side", "p", "C", "outputs")),
    ]


class _Job(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("net", "tokens", "table", "index", "out", "memory")),
        *((name, ctypes.c_long) for name in ("R", "B", "threads")),
    ]


class _Loop(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("net", "table", "scale", "noise", "coef", "lines", "guided", "x", "history")),
        *((name, ctypes.c_void_p) for name in ("tokens", "out", "memory", "index", "stopped")),
        *((name, ctypes.c_long) for name in ("B", "first", "last", "start", "channels", "clip", "threads")),
    ]


def in_one_call(dtype: torch.dtype) -> bool:
    """Whether `NativeDiT` makes its products in this dtype here. Not measured: a sample's bits must be the same on all machines
    with this processor. Products of AMX tiles, which are oneDNN's, are several times as fast."""
    library = None if portable.active() else kernels().library
    if library is None or dtype not in (torch.float32, torch.bfloat16, torch.int8):
        return False
    has = library.fastcfg_has_int8() if dtype == torch.int8 else library.fastcfg_has_float32()
    tiles = {torch.int8: "amx_int8", torch.bfloat16: "amx_bf16"}.get(dtype)
    return bool(has) and tiles not in cpuinfo("flags").split()


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What engine cpu computes in beside its blocks' products, which are in `dtype`."""
    if in_one_call(dtype):
        return torch.float32
    return beside_int8() if dtype == torch.int8 else dtype


class NativeDiT(FusedDiT):
    """`FusedDiT` in float32, with the blocks' products in `dtype`: float32, bfloat16 or int8. Rows of a sample depend on no
    others, whatever number of them is computed together."""

    def __init__(self, model: Denoiser, plan: Plan, device: torch.device, dtype: torch.dtype = torch.float32):
        self._library: Any = kernels().library
        self._products_dtype = dtype
        self._own = threading.local()  # a thread's scratch memory, and the team that it leads
        self._native = NativeOperations(self._library)
        super().__init__(model, plan, self._native, device, torch.float32)

    def embed(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """As FusedDiT's, from x in float64."""
        assert out is None
        x = x.double().contiguous()
        tokens = torch.empty(len(x), self.config.tokens, self.config.hidden_size, dtype=torch.float32)
        self._library.fastcfg_embed(ctypes.byref(self._network), x.data_ptr(), tokens.data_ptr(), len(x))
        return tokens

    def denoise(self, tokens: Tensor, table: Tensor, index: Tensor, buffers: Buffers | None = None) -> Tensor:
        """As FusedDiT's, with the caller's team, if it leads one (`led`); the library has its own buffers."""
        del buffers
        (R, B), size = (len(index), len(tokens)), self.config.input_size
        tokens, table, index = tokens.contiguous(), table.contiguous(), index.int().contiguous()
        out = torch.empty(R, self.config.out_channels, size, size, dtype=torch.float32)
        team, threads = self._led()
        memory = self._scratch(R, threads)
        places = (tokens.data_ptr(), table.data_ptr(), index.data_ptr(), out.data_ptr(), memory.data_ptr())
        job = _Job(ctypes.addressof(self._network), *places, R, B, threads)
        if team is None:
            self._library.fastcfg_denoise(ctypes.byref(job), None, 0)
        else:
            team.workers.check()
            self._library.fastcfg_denoise(ctypes.byref(job), team.place, team.gather(R * self.config.tokens))
        return out

    def products(self, rows: int, attention: bool) -> object:
        """What `denoise` cannot do without, for measuring: products with their bias alone, or with attention, on what memory
        holds."""
        memory = self._scratch(rows, 1)
        return self._library.fastcfg_products(ctypes.byref(self._network), memory.data_ptr(), rows, attention)

    def led(self, workers: Workers, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """`workers.map`, with those that have nothing else to do helping the others in what they compute here."""

        def lead(item: Item) -> Result:
            team = self._own.team = _Team(self._library, workers)
            try:
                return function(item)
            finally:
                self._own.team = None
                team.dismiss()

        return workers.map(lead, items)

    def _advance(self, piece: Samples, request: Request, window: range, table: Tensor, denoise: Denoise) -> None:
        """As FusedDiT's, with as many steps in a call as need nothing of Python in between."""
        if piece.classifier is not None or self.plan.guidance.rescale or self.plan.learned_variance:
            super()._advance(piece, request, window, table, denoise)
            return
        team, threads = self._led()
        loop, tensors = self._loop(piece, request, window, table, threads)
        rows = len(tensors["index"])
        if team is not None:
            loop.stopped = ctypes.addressof(team.workers.stopped)
        while window:
            if team is not None:
                team.workers.check()
            expected = 0 if team is None else team.gather(rows * self.config.tokens)
            # Whoever is done with its own work can help from the next step on
            wait_for_help = team is not None and not team.full(rows * self.config.tokens)
            steps = window[: 1 if wait_for_help else self._drawn_at_once(piece)]
            noise = self._noise(piece, steps)
            loop.noise, loop.first, loop.last = address(noise), steps.start, steps.stop
            self._library.fastcfg_loop(ctypes.byref(loop), None if team is None else team.place, expected)
            window = window[len(steps) :]

    def _loop(
        self, piece: Samples, request: Request, window: range, table: Tensor, threads: int
    ) -> tuple[_Loop, dict[str, Tensor]]:
        """(what `fastcfg_loop` is told of a piece, without the steps and their noise; the tensors that it points to)."""
        config, B, channels = self.config, len(piece.x), self.plan.guidance.channels
        piece.x = piece.x.contiguous()
        tensors = {
            "table": table,
            "scale": piece.scale.float().contiguous(),
            "coef": self.coefficients,
            "lines": len(window) * (piece.cond if piece.null is None else torch.cat([piece.cond, piece.null])),
            "guided": torch.from_numpy(np.ascontiguousarray(request.guided)),
            "x": piece.x,
            "tokens": torch.empty(B, config.tokens, config.hidden_size, dtype=torch.float32),
        }
        rows = len(tensors["lines"])
        tensors |= {
            "out": torch.empty(rows, config.out_channels, config.input_size, config.input_size, dtype=torch.float32),
            "index": torch.empty(rows, dtype=torch.int32),
            "memory": self._scratch(rows, threads),
        }
        if piece.x0_prev is not None:
            tensors["history"] = piece.x0_prev = piece.x0_prev.contiguous()
        loop = _Loop(
            net=ctypes.addressof(self._network), B=B, start=window.start, threads=threads, clip=self.plan.clip,
            channels=config.in_channels if channels is None else channels,
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        )  # fmt: skip
        return loop, tensors

    def _drawn_at_once(self, piece: Samples) -> int:
        """How many steps' noise is drawn before the first of them; all where there is none to draw."""
        return self.plan.steps if piece.seeds is None else max(1, NOISE_BYTES // (4 * piece.x.numel()))

    def _noise(self, piece: Samples, steps: range) -> Tensor | None:
        """The noise of these steps, float32 [steps, B, C, H, W], as given or drawn; None where none is added."""
        if piece.noise is not None:
            return piece.noise[steps.start : steps.stop]
        if piece.seeds is None:
            return None
        noise = torch.zeros(len(steps), *piece.x.shape, dtype=torch.float32)
        for z, i in zip(noise, steps, strict=True):
            step = torch.full((len(piece.x),), i, dtype=torch.int32)
            drawn = self._native.step_noise(self.coefficients, step, piece.x, None, piece.seeds, piece.indices)
            if drawn is not None:
                z.copy_(drawn)
        return noise

    def _led(self) -> tuple[_Team | None, int]:
        """The team that the caller leads, if any, and how many threads may compute with it."""
        team: _Team | None = getattr(self._own, "team", None)
        return team, 1 if team is None else team.size

    def _scratch(self, rows: int, threads: int) -> Tensor:
        floats = self._library.fastcfg_denoise_scratch(ctypes.byref(self._network), rows, threads)
        kept: Tensor | None = getattr(self._own, "scratch", None)
        if kept is None or len(kept) < floats:
            kept = self._own.scratch = torch.empty(floats, dtype=torch.float32)
        return kept

    def _pack_trunk(self, module: DiT) -> None:
        self._packed: list[Any] = []  # what the library's structures point to
        config, last = module.config, module.final_layer
        weight, bias, position = self.embedding
        blocks = [self._native_block(block) for block in module.blocks]
        self._network = _Network(
            self._kept(weight.flatten(1).T), self._kept(position + bias),
            (_Block * len(blocks))(*blocks), self._native_layer(last.linear, torch.float32), last.norm_final.eps,
            config.depth, config.tokens, config.hidden_size, config.mlp_width, config.num_heads,
            (6 * config.depth + 2) * config.hidden_size,
            config.input_size // config.patch_size, config.patch_size, config.in_channels, config.out_channels,
        )  # fmt: skip

    def _kept(self, tensor: Tensor) -> int:
        """Where the tensor lies from now on."""
        self._packed.append(tensor.contiguous())
        return self._packed[-1].data_ptr()

    def _native_block(self, block: nn.Module) -> _Block:
        assert isinstance(block, DiTBlock)
        layers = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
        return _Block(*(self._native_layer(layer, self._products_dtype) for layer in layers), block.norm1.eps, block.norm2.eps)

    def _native_layer(self, layer: nn.Linear, dtype: torch.dtype) -> _Layer:
        packed = NativeLayer(self._library, layer.weight.detach().cpu(), layer.bias.detach().cpu(), dtype)
        self._packed.append(packed)
        return packed.structure


class NativeLayer:
    """A copy of a linear layer, weight [N, K] and bias [N], as the library's products read it.

    Panels of columns, filled up with zeros: float32 [panels, K, columns], bfloat16 [panels, K / 2, columns, 2] or int8
    [panels, K / 4, columns, 4].
    """

    def __init__(self, library: Any, weight: Tensor, bias: Tensor, dtype: torch.dtype):
        self._library, self._dtype = library, dtype
        (N, K), columns = weight.shape, library.fastcfg_columns()
        filled, together = -N % columns, {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}[dtype]
        start = scale = None
        if dtype == torch.int8:
            weight, scale = quantised(weight.float())
            start, scale = F.pad(-128 * weight.sum(1, dtype=torch.int32), (0, filled)), F.pad(scale[:, 0], (0, filled))
        weight = F.pad(weight.to(dtype), (0, -K % together, 0, filled)).view(-1, columns, -(-K // together), together)
        panels = weight.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        self._tensors = (panels, start, scale, F.pad(bias.float(), (0, filled)).clone())
        self.structure = _Layer(*map(address, self._tensors), N, K, KINDS[dtype])

    def products(self, h: Tensor) -> Callable[[], Tensor]:
        """What computes the layer alone for h, float32 [M, K], for measuring: in scratch memory, with more columns; in int8, of
        tokens that are quantised already, and 4 must divide K."""
        place = ctypes.byref(self.structure)
        y = torch.empty(self._library.fastcfg_layer_scratch(place), dtype=torch.float32)
        values = F.pad(h.bfloat16(), (0, h.shape[1] % 2)) if self._dtype == torch.bfloat16 else h
        whole, scale, _ = CpuOperations()._quantised(h)
        given = _Tokens(values.data_ptr(), whole.data_ptr(), scale.data_ptr())

        def call() -> Tensor:
            self._library.fastcfg_layer_products(place, ctypes.byref(given), y.data_ptr(), len(h))
            return y

        call.kept = (values, whole, scale)  # type: ignore[attr-defined]
        return call


class _Team:
    """A team of the library, and how its leader gets helpers."""

    def __init__(self, library: Any, workers: Workers):
        self._library, self.workers = library, workers
        self.size = workers.count
        self._memory = ctypes.create_string_buffer(library.fastcfg_team_size())
        self.place = ctypes.addressof(self._memory)
        self._asked = 0
        library.fastcfg_team(self.place)

    def gather(self, tokens: int) -> int:
        """Asks workers that have nothing to do, as long as there is enough for each; returns how many were asked so far."""
        while not self.full(tokens) and self.workers.offer(self._help) is not None:
            self._asked += 1
        return self._asked

    def full(self, tokens: int) -> bool:
        """Whether no more may be asked: each thread needs `TOKENS_EACH`, and scratch memory is for `size` threads."""
        return self._asked >= min(tokens // TOKENS_EACH, self.size) - 1

    def _help(self) -> None:
        self._library.fastcfg_help(self.place)

    def dismiss(self) -> None:
        self._library.fastcfg_dismiss(self.place)
