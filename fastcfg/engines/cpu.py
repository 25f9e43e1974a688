"""The CPU engine: the fused DiT program, with one worker thread a core and a few samples at a time in each.

A sample's bits depend on neither its batch nor its neighbours: products are made of one model row (one half of one sample),
or of several: in the C network, whose rows depend on no others, and elsewhere where that was found to change no bit on this
machine. Batching is how many such pieces are under way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fastcfg import portable
from fastcfg.engines.base import Engine, Request, plain_mode
from fastcfg.engines.choice import fastest
from fastcfg.engines.cpu_dit import NativeDiT, in_one_call, wide_dtype
from fastcfg.engines.cpu_module import CpuModuleEngine
from fastcfg.engines.cpu_native import cpu_operations, kernels
from fastcfg.engines.cpu_ops import has_bf16, has_int8, has_packed_products
from fastcfg.engines.fused_dit import Each, FusedDiT, is_plain_dit, refuse_changed
from fastcfg.engines.workers import Workers, one_thread
from fastcfg.errors import Error
from fastcfg.models.denoiser import Denoiser
from fastcfg.models.dit import DiT
from fastcfg.models.weights import fingerprint, refuse_stale, refuse_training
from fastcfg.plan import Plan

JOINED_TOKENS = 256  # rows of fewer tokens than half of this are joined: small products leave a core half idle
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8"}


def make_cpu_engine(model: Denoiser, plan: Plan, device: torch.device, dtype: torch.dtype | None) -> Engine:
    """The CPU engine for our DiT; for any other module, its own forward. dtype None: chosen for the model and machine.

    Raises Error for a device or dtype that the engine has not.
    """
    refuse_other_devices("cpu", device)
    if not is_plain_dit(model.module):
        return CpuModuleEngine(model, plan, device, dtype)
    return CpuEngine(model, plan, device, dtype)


def refuse_other_devices(engine: str, device: torch.device) -> None:
    if device.type != "cpu":
        raise Error(f"engine {engine!r} runs on the CPU, got device {str(device)!r}")


class CpuEngine:
    """Runs `plan` on a DiT's weights, packed in `dtype`; changes of the module after that are noticed.

    dtype: float32, bfloat16, int8 (per-token activations and per-channel weights in the blocks' products; the rest in
    `wide_dtype`) or None: float32, or for models that keep their quality in bfloat16 (`Denoiser.low_precision`) the faster of
    the two, measured once a machine and remembered. workers: threads, torch's number unless given. notes: what was chosen for
    this machine, and what it lacks. Runs of one process take turns, so any thread may call.
    """

    name = "cpu"
    whole_batches = False

    def __init__(
        self,
        model: Denoiser,
        plan: Plan,
        device: torch.device,
        dtype: torch.dtype | None = None,
        workers: int | None = None,
    ):
        if isinstance(model.null_label, Tensor):
            raise Error("a DiT's null label is a whole number, got a tensor")
        if dtype is not None and dtype not in NAMES:
            kinds, got = ", ".join(NAMES.values()), str(dtype).removeprefix("torch.")
            raise Error(f"engine {self.name!r} computes in {kinds}, got {got}")
        if dtype == torch.int8:
            self._check_int8(model)
        self.model, self.plan, self.device = model, plan, device
        self._workers = Workers(workers or torch.get_num_threads())
        measured = dtype is None and model.low_precision
        self.dtype = self._fastest_dtype() if measured else dtype or torch.float32
        self.notes = self._choices(measured)
        self.refresh()
        self._joined = self._joinable()

    def refresh(self) -> None:
        refuse_changed(self.model.module)
        with one_thread():
            self._program = self._made(self.model, self.dtype)
            self._fingerprint = fingerprint(self.model.module)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with self._ready() as program:
            table = program.modulations(t.cpu(), y.cpu(), self._workers.map)
            x = x.cpu()

            def row(r: int) -> Tensor:
                return program.denoise(program.embed(x[r : r + 1]), table, torch.tensor([r]))

            return torch.cat(list(self._each(program)(row, range(len(x))))).float()

    def run(self, request: Request) -> Tensor:
        with self._ready() as program:
            pieces = list(self._pieces(len(request.labels)))
            denoise = program.denoise if isinstance(program, NativeDiT) else self._denoise
            return program.run(request, pieces, denoise, self._each(program))

    def _each(self, program: FusedDiT) -> Each:
        """How work is given to the workers: where the network is one call, those without any help the others with theirs."""
        return partial(program.led, self._workers) if isinstance(program, NativeDiT) else self._workers.map

    @contextmanager
    def _ready(self) -> Iterator[FusedDiT]:
        """The program, once the module is found fit for sampling, and all cores for it."""
        with one_thread():
            refuse_changed(self.model.module)
            refuse_training(self.model.module)
            refuse_stale(self.model.module, self._fingerprint)
            with plain_mode(self.device):
                yield self._program

    def _denoise(self, tokens: Tensor, table: Tensor, index: Tensor) -> Tensor:
        """Both halves of a piece; the null half by an idle worker, if there is one."""
        self._workers.check()
        B = len(tokens)
        null = self._workers.offer(lambda: self._rows(tokens, table, index[B:])) if len(index) > B else None
        if null is None:
            return self._rows(tokens, table, index)
        return torch.cat([self._rows(tokens, table, index[:B]), null.result()])

    def _rows(self, tokens: Tensor, table: Tensor, index: Tensor) -> Tensor:
        R, B = len(index), len(tokens)
        if R in self._joined:
            return self._program.denoise(tokens, table, index)
        single = [self._program.denoise(tokens[r % B : r % B + 1], table, index[r : r + 1]) for r in range(R)]
        return torch.cat(single)

    def _pieces(self, B: int) -> Iterator[slice]:
        """B rows in pieces of 1, 2, 4, ... samples: no more than can be joined, nor than leave a worker without any."""
        most = max(1, min(max(self._joined) // 2, B // self._workers.count))
        start = 0
        while start < B:
            size = 1 << (min(most, B - start).bit_length() - 1)
            yield slice(start, start + size)
            start += size

    def _joinable(self) -> frozenset[int]:
        """The numbers of model rows that may share a product: those that give every row the bits it has alone."""
        program, config = self._program, self._program.config
        T = config.tokens
        sizes = [size for size in (2, 4, 8, 16) if size * T <= 2 * JOINED_TOKENS]
        if isinstance(program, NativeDiT):
            return frozenset({1, *sizes})
        # torch may round otherwise what is left over at a tensor's end when the rest went through whole vectors
        left_over = T * config.hidden_size % 32 or T * config.mlp_width % 32
        if T > JOINED_TOKENS // 2 or left_over:
            return frozenset({1})
        R = sizes[-1]
        tokens, table = _random(program, R)
        index = torch.arange(R, device="cpu")

        def same(size: int) -> bool:
            joined = program.denoise(tokens[:size], table, index[:size])
            single = [program.denoise(tokens[r : r + 1], table, index[r : r + 1]) for r in range(size)]
            return torch.equal(joined, torch.cat(single))

        with one_thread():
            found = self._workers.map(same, sizes)
        return frozenset({1, *sizes}) if all(found) else frozenset({1})

    def _fastest_dtype(self) -> torch.dtype:
        """float32 or bfloat16, by the time of one block and the last layer on one model row."""
        if not has_bf16():
            return torch.float32
        module = self.model.module
        assert isinstance(module, DiT)
        shallow, config = replace(self.model, module=_first_block(module)), module.config
        kind = f"a DiT of width {config.hidden_size}, {config.num_heads} heads, {config.tokens} tokens"
        question = f"dtype of {kind}, engine {self.name}"

        def option(dtype: torch.dtype) -> Callable[[], object]:
            program = self._made(shallow, dtype)
            tokens, table = _random(program, 1)
            index = torch.zeros(1, dtype=torch.int32, device="cpu")
            return lambda: self._workers.map(lambda _: program.denoise(tokens, table, index), range(1))

        with one_thread():
            names = {NAMES[dtype]: dtype for dtype in (torch.float32, torch.bfloat16)}
            return names[fastest(question, {name: option(dtype) for name, dtype in names.items()})]

    def _choices(self, measured: bool) -> tuple[str, ...]:
        """What was chosen for this machine, and what it lacks."""
        count = self._workers.count
        notes = [f"{count} worker thread{'s' * (count > 1)}"]
        notes += [f"dtype {NAMES[self.dtype]} was the faster here"] if measured and has_bf16() else []
        if not has_bf16():
            notes.append("this CPU has no bf16 products")
        if not has_packed_products(torch.float32):
            notes.append("this torch has no oneDNN products on packed weights: torch's own are used")
        if self.name == CpuEngine.name and not (portable.active() or kernels().library):
            notes.append(f"torch's own operations are used, up to three times as slow in a small model: {kernels().why}")
        return tuple(notes)

    def _check_int8(self, model: Denoiser) -> None:
        del model
        if not (in_one_call(torch.int8) or has_int8()):
            raise Error("dtype 'int8' needs oneDNN's quantised products, which this torch lacks: use bf16 or fp32")

    def _made(self, model: Denoiser, dtype: torch.dtype) -> FusedDiT:
        with plain_mode(self.device):
            return self._make_program(model, dtype)

    def _make_program(self, model: Denoiser, dtype: torch.dtype) -> FusedDiT:
        if in_one_call(dtype):
            return NativeDiT(model, self.plan, self.device, dtype)
        return FusedDiT(model, self.plan, cpu_operations(dtype == torch.int8), self.device, wide_dtype(dtype))


def _first_block(module: DiT) -> DiT:
    """`module` with one block; its weights are shared."""
    shallow = copy.copy(module)
    shallow._modules = {**module._modules, "blocks": module.blocks[:1]}
    shallow.config = replace(module.config, depth=1)
    return shallow


def _random(program: FusedDiT, rows: int) -> tuple[Tensor, Tensor]:
    """(tokens [rows, T, D], table [rows, W]) to try `program` on; the caller's random state is left alone."""
    config, generator = program.config, torch.Generator().manual_seed(0)
    drawn = partial(torch.randn, generator=generator, dtype=torch.float32, device="cpu")
    return drawn(rows, config.tokens, config.hidden_size).to(program.dtype), drawn(rows, program.table_width)
