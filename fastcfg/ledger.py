"""The ledger: what each launch of the fused DiT program must do, counted before anything runs.

The program itself (`engines/fused_dit.py`) runs on tensors without data, over operations that leave their kernels' cost
(`X_cost` in `fastcfg.kernels`) instead of computing. Bytes are an operation's operands, read or written once; what stays in a
cache between two operations may cost less, and what is read twice more. FLOPs count a multiply-add as two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcfg.ceilings import Ceilings
from fastcfg.engines.cpu_dit import wide_dtype
from fastcfg.engines.fused_dit import TABLE_BYTES, FusedDiT, Layer
from fastcfg.errors import Error
from fastcfg.kernels._launch import FLOATS, Cost
from fastcfg.kernels._step import step_table
from fastcfg.kernels.adaln import adaln_cost
from fastcfg.kernels.attention import attention_cost
from fastcfg.kernels.guided_step import guided_step_cost
from fastcfg.kernels.linear import linear_cost
from fastcfg.kernels.noise import noise_cost
from fastcfg.kernels.patch_embed import patch_embed_cost
from fastcfg.kernels.step_boundary import MAX_VALUES, step_boundary_cost
from fastcfg.models.denoiser import Denoiser
from fastcfg.models.dit import FREQUENCY_DIM, DiT, DiTConfig
from fastcfg.plan import Plan

META = torch.device("meta")


@dataclass(frozen=True)
class Entry:
    """Launches of one kind. flops, bytes, floor_seconds: of all of them together; the floor is None without ceilings."""

    name: str
    launches: int
    flops: int
    bytes: int
    floor_seconds: float | None


@dataclass(frozen=True)
class Work:
    """What a step, or another part of a call, launches. On the cpu engine the launches are those of one piece of the batch."""

    entries: tuple[Entry, ...]
    total: Entry


@dataclass(frozen=True)
class Saving:
    """What a call of a full batch does not have to do, and why. Negative where it does more."""

    name: str
    reason: str
    flops: int
    bytes: int
    floor_seconds: float | None


@dataclass(frozen=True)
class Ledger:
    """A full batch on the fused `engine` in `dtype`.

    guided, unguided: one step of 2N and of N model rows; guided is None where the model has no null label. start: once a call,
    before the first step. hoisted: the table of all steps' shifts, scales and gates, once a call, for as many different labels
    as the batch may bring. unhoisted: what a step (guided, if any is) would do without the table. call: all of a call.
    """

    engine: str
    dtype: str
    batch: int
    ceilings: Ceilings | None
    guided: Work | None
    unguided: Work
    start: Work
    hoisted: Work
    unhoisted: Work
    call: Entry
    savings: tuple[Saving, ...]


class _Launch(NamedTuple):
    name: str
    cost: Cost
    dtype: str  # of its products


class _Counting:
    """The fused program's operations, on meta tensors: each appends what it would launch to `launches`."""

    any_rows = True

    def __init__(self, engine: str, dtype: torch.dtype):
        on_cpu = engine == "cpu"
        self.product_dtype, self.dtype = dtype, wide_dtype(dtype) if on_cpu else dtype
        self.state_dtype = torch.float64 if on_cpu else torch.float32
        self.table_dtype = torch.float32 if on_cpu else None
        self.step_table = step_table
        self.launches: list[_Launch] = []

    def add(self, name: str, cost: Cost, dtype: torch.dtype | None = None) -> None:
        self.launches.append(_Launch(name, cost, _name(self.dtype if dtype is None else dtype)))

    def take(self) -> list[_Launch]:
        """The launches since the last call."""
        taken, self.launches = self.launches, []
        return taken

    def pack(self, weight: Tensor, bias: Tensor, *, rows: int, sensitive: bool = False) -> Layer:
        del rows
        return Layer(weight if sensitive else weight.to(self.product_dtype), bias)

    def patch_embed(self, x: Tensor, weight: Tensor, bias: Tensor, position: Tensor, *, out: Tensor | None = None) -> Tensor:
        del bias
        out = _empty(len(x), *position.shape, dtype=self.dtype) if out is None else out
        self.add("patch_embed", patch_embed_cost(x, weight, position, out=out))
        return out

    def adaln(
        self,
        x: Tensor,
        table: Tensor,
        index: Tensor,
        shift_column: int,
        scale_column: int,
        *,
        eps: float = 1e-6,
        out: Tensor | None = None,
    ) -> Tensor:
        del shift_column, scale_column, eps
        out = _empty(len(index), *x.shape[1:], dtype=self.dtype) if out is None else out
        self.add("adaln", adaln_cost(x, table, index, out=out))
        return out

    def linear(
        self,
        h: Tensor,
        weight: Any,
        bias: Any = None,
        *,
        gelu: bool = False,
        residual: Tensor | None = None,
        table: Tensor | None = None,
        index: Tensor | None = None,
        gate_column: int = 0,
        out: Tensor | None = None,
    ) -> Tensor:
        del bias, table, index, gate_column
        N, K = weight.shape
        out = _empty(*h.shape[:-1], N, dtype=h.dtype) if out is None else out
        epilogue = ", GELU" if gelu else ", gate, residual" if residual is not None else ""
        self.add(f"linear {K} to {N}{epilogue}", linear_cost(h, weight, residual=residual, out=out), weight.dtype)
        return out

    def attention(self, qkv: Tensor, heads: int, *, out: Tensor | None = None) -> Tensor:
        R, T, width = qkv.shape
        self.add(f"attention {heads} x {width // (3 * heads)}", attention_cost(qkv))
        return _empty(R, T, width // 3, dtype=qkv.dtype) if out is None else out

    def unpatchify(self, patches: Tensor, x: Tensor) -> Tensor:
        """A copy that the program makes by itself: [R, T, p p C'] to [R, C', H, W]."""
        self.add("unpatchify", Cost(2 * patches.numel() * patches.element_size(), 0))
        return _empty(len(patches), patches[0].numel() // x[0, 0].numel(), *x.shape[2:], dtype=patches.dtype)

    def guided_step(
        self,
        model_out: Tensor,
        x: Tensor,
        coef: Tensor,
        scale: Tensor,
        step: Tensor,
        *,
        x0_prev: Tensor | None = None,
        noise: Tensor | None = None,
        seeds: Tensor | None = None,
        indices: Tensor | None = None,
        channels: int | None = None,
        rescale: float = 0.0,
        clip: bool = False,
        learned: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        del coef, scale, step, noise, seeds, indices, clip
        options: dict[str, Any] = {"channels": channels, "learned": learned, "history": x0_prev is not None}
        cost = guided_step_cost(model_out, x, rescale=rescale, **options)
        if rescale and len(model_out) > len(x):  # a launch of its own gathers the moments before
            plain = guided_step_cost(model_out, x, **options)
            self.add("guided_step, moments", Cost(cost.bytes - plain.bytes, cost.flops - plain.flops))
            cost = plain
        self.add("guided_step", cost)
        return x if out is None else out


class _Counted:
    """The program of one engine, model, plan and batch, and its parts' launches."""

    def __init__(self, engine: str, model: Denoiser, plan: Plan, batch: int, dtype: torch.dtype):
        assert isinstance(model.module, DiT)
        with META:
            module = DiT(model.module.config)
        self.engine, self.plan, self.batch = engine, plan, batch
        self.ops = _Counting(engine, dtype)
        self.program = FusedDiT(replace(model, module=module), plan, self.ops, META, self.ops.dtype)
        self.config: DiTConfig = self.program.config
        self.x = _empty(batch, *model.shape, dtype=self.ops.state_dtype)
        self.table = _empty(1, self.program.table_width, dtype=self.ops.table_dtype or self.ops.dtype)
        self.halves = 1 if model.null_label is None else 2
        self.guided_steps = int(plan.guided.sum()) if self.halves == 2 else 0
        self.unguided_steps = plan.steps - self.guided_steps
        self.labels = min(batch, self.config.num_classes) + (self.guided_steps > 0)  # a call's different ones, at most

    def step(self, halves: int, *, shared: bool = True) -> list[_Launch]:
        """A step of `halves` model rows a sample. shared: as it is; else with tokens of their own for the null rows."""
        rows = halves * self.batch
        index = _empty(rows, dtype=torch.int32)
        on_cpu = self.engine == "cpu"
        if on_cpu:
            self.program.embed(self.x if shared else self._both(self.x))
        # The cpu engine computes row by row: each reads its tokens anew
        own = on_cpu or not shared
        h = self.program.trunk(self._tokens(rows if own else self.batch), self.table, index)
        self._end(h, index, shared)
        return self.ops.take()

    def start(self) -> list[_Launch]:
        self.ops.add("noise", noise_cost(self.x))
        if self.engine == "cuda":
            self.program.embed(self.x)
        return self.ops.take()

    def hoist(self) -> list[_Launch]:
        for window in self._windows():
            self.program.hoist(_empty(self.labels, dtype=torch.int64), window)
        return self.ops.take()

    def unhoisted(self, halves: int) -> list[_Launch]:
        """What `hoist` keeps out of a step: the embedding of t and the adaLN products, for every model row."""
        rows, D, ops = halves * self.batch, self.config.hidden_size, self.ops
        owners = self.config.depth + 1 if self.config.block_conditioning else 1
        c = _empty(rows, D, dtype=ops.dtype)
        for _ in range(owners):
            ops.linear(_empty(rows, FREQUENCY_DIM, dtype=ops.dtype), _empty(D, FREQUENCY_DIM, dtype=ops.dtype))
            ops.linear(c, _empty(D, D, dtype=ops.dtype))
        for width in [6 * D] * self.config.depth + [2 * D]:
            ops.linear(c, _empty(width, D, dtype=ops.dtype))
        return ops.take()

    def _end(self, h: Tensor, index: Tensor, shared: bool) -> None:
        """From the trunk's output to the next x, and on a GPU to the next step's tokens."""
        program, plan, ops, x, config = self.program, self.plan, self.ops, self.x, self.config
        history = torch.empty_like(x) if plan.needs_history else None
        on_gpu = self.engine == "cuda"
        if on_gpu and not plan.guidance.rescale and config.in_channels * config.patch_size**2 <= MAX_VALUES:
            cost = step_boundary_cost(
                h, program.last.weight, x, patch=config.patch_size, learned=plan.learned_variance, history=history is not None,
                tokens=self._tokens(self.batch), position=program.embedding[2],
            )  # fmt: skip
            ops.add("step_boundary", cost)
            if not shared:
                weight, _, position = program.embedding
                one = patch_embed_cost(x, weight, position, out=self._tokens(self.batch))
                both = patch_embed_cost(self._both(x), weight, position, out=self._tokens(2 * self.batch))
                ops.add("patch_embed", Cost(both.bytes - one.bytes, both.flops - one.flops))
        else:
            out = ops.unpatchify(program.last_layer(h, self.table, index), x)
            coefficients = [program.coefficients] * 3  # and scales and steps, none of which cost anything here
            ops.guided_step(
                out, x, *coefficients, x0_prev=history, learned=plan.learned_variance, channels=plan.guidance.channels,
                rescale=plan.guidance.rescale,
            )  # fmt: skip
            if on_gpu:
                program.embed(x if shared else self._both(x))
        if on_gpu:
            ops.add("count steps", Cost(2 * 4 * 3 * self.batch, 0))

    def _windows(self) -> Iterator[range]:
        if self.engine == "cpu":
            return self.program.windows(self.labels)
        size = max(1, TABLE_BYTES // (self.table.numel() * self.table.element_size() * (self.batch + 1)))
        return (range(i, min(i + size, self.plan.steps)) for i in range(0, self.plan.steps, size))

    def _tokens(self, rows: int) -> Tensor:
        return _empty(rows, self.config.tokens, self.config.hidden_size, dtype=self.ops.dtype)

    @staticmethod
    def _both(x: Tensor) -> Tensor:
        return _empty(2 * len(x), *x.shape[1:], dtype=x.dtype)


def make_ledger(
    engine: str, model: Denoiser, plan: Plan, batch: int, dtype: torch.dtype, ceilings: Ceilings | None = None
) -> Ledger:
    """The ledger of a plain DiT on the fused engine "cpu" or "cuda"; no device is touched.

    dtype: of the engine, int8 on "cpu" included. Raises Error where the ceilings say nothing of that dtype.
    """
    if engine == "cuda" and dtype not in FLOATS:
        raise Error(f"engine 'cuda' computes in {', '.join(map(_name, FLOATS))}, got {_name(dtype)}")
    counted = _Counted(engine, model, plan, batch, dtype)
    if ceilings is not None:
        _check_rates(ceilings, {_name(dtype), _name(counted.ops.dtype)})

    def work(launches: list[_Launch]) -> Work:
        return _work(launches, ceilings)

    guided, unguided = work(counted.step(counted.halves)), work(counted.step(1))
    start, hoisted = work(counted.start()), work(counted.hoist())
    times = (counted.guided_steps, counted.unguided_steps, 1, 1)
    parts = [work.total for work in (guided, unguided, start, hoisted)]
    return Ledger(
        engine=engine,
        dtype=_name(dtype),
        batch=batch,
        ceilings=ceilings,
        guided=guided if counted.halves == 2 else None,
        unguided=unguided,
        start=start,
        hoisted=hoisted,
        unhoisted=work(counted.unhoisted(counted.halves if counted.guided_steps else 1)),
        call=_sum("call", *zip(parts, times, strict=True)),
        savings=tuple(_savings(counted, ceilings)),
    )


def _savings(counted: _Counted, ceilings: Ceilings | None) -> Iterator[Saving]:
    """What is saved by the table of modulations, by what the halves share, and by the guidance interval."""

    def total(launches: list[_Launch]) -> Entry:
        return _work(launches, ceilings).total

    def saving(name: str, reason: str, *parts: tuple[Entry, int]) -> Saving:
        saved = _sum(name, *parts)
        return Saving(name, reason, saved.flops, saved.bytes, saved.floor_seconds)

    halves, guided_steps, unguided_steps = counted.halves, counted.guided_steps, counted.unguided_steps
    yield saving(
        "hoisted",
        f"adaLN of t and y, {counted.labels} labels a call",
        (total(counted.unhoisted(halves)), guided_steps),
        (total(counted.unhoisted(1)), unguided_steps),
        (total(counted.hoist()), -1),
    )
    guided, unguided = total(counted.step(halves)), total(counted.step(1))
    own_tokens = total(counted.step(halves, shared=False))
    yield saving("shared", _SHARED[counted.engine], (own_tokens, guided_steps), (guided, -guided_steps))
    reason = f"no null rows in {unguided_steps} of {guided_steps + unguided_steps} steps"
    yield saving("interval", reason, (guided, unguided_steps), (unguided, -unguided_steps))


_SHARED = {"cpu": "both halves' patch embedding", "cuda": "both halves' patch embedding, read once"}


def _work(launches: list[_Launch], ceilings: Ceilings | None) -> Work:
    """The launches by kind, in the order in which kinds first appear."""
    order = {launch.name: place for place, launch in reversed(list(enumerate(launches)))}
    ordered = sorted(launches, key=lambda launch: order[launch.name])
    entries = [_entry(name, list(group), ceilings) for name, group in groupby(ordered, key=lambda launch: launch.name)]
    return Work(tuple(entries), _sum("total", *((entry, 1) for entry in entries)))


def _entry(name: str, launches: list[_Launch], ceilings: Ceilings | None) -> Entry:
    flops, moved = sum(launch.cost.flops for launch in launches), sum(launch.cost.bytes for launch in launches)
    floor = None if ceilings is None else sum(ceilings.floor(launch.cost, launch.dtype) for launch in launches)
    return Entry(name, len(launches), flops, moved, floor)


def _sum(name: str, *parts: tuple[Entry, int]) -> Entry:
    """Each part so many times."""
    floors = [times * entry.floor_seconds for entry, times in parts if entry.floor_seconds is not None]
    return Entry(
        name,
        launches=sum(times * entry.launches for entry, times in parts),
        flops=sum(times * entry.flops for entry, times in parts),
        bytes=sum(times * entry.bytes for entry, times in parts),
        floor_seconds=sum(floors) if len(floors) == len(parts) else None,
    )


def _check_rates(ceilings: Ceilings, dtypes: set[str]) -> None:
    missing = sorted(dtypes - set(ceilings.rates))
    if missing:
        raise Error(
            f"no rate for {', '.join(missing)} in the ceilings of {ceilings.name}: they have {', '.join(ceilings.rates)}"
        )


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
