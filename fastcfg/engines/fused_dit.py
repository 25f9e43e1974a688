"""The guided DiT sampling loop as one short program over a small set of operations.

    hoist       all steps' shifts, scales and gates of the call's unique labels, in one table
    a step      patch embedding, once for both halves
                per block: adaln, qkv, attention, projection + gate + residual, adaln, fc1 + GELU, fc2 + gate + residual
                adaln, last linear, unpatchify, guided step

adaLN depends on (t, y) alone (Peebles & Xie 2212.09748, section 3.2), so its products leave the step; in a guided step the
halves [cond; null] share x, so they share what comes before the first conditioned operation. What an operation is made of
(oneDNN, Triton, plain torch) is the business of an `Operations`; the order, the bookkeeping and the mathematics are here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastcfg.engines.base import Request
from fastcfg.engines.classifier import ClassifierTerm
from fastcfg.errors import Error
from fastcfg.models.denoiser import Denoiser
from fastcfg.models.dit import Attention, DiT, DiTBlock, DiTConfig, LabelEmbedder, TimestepEmbedder, silu
from fastcfg.noise import INITIAL_STEP, normal
from fastcfg.plan import Plan

TABLE_BYTES = 512 * 2**20  # of a hoisted table, as far as its shortest window allows: a longer run hoists a window at a time
HOIST_STEPS = 32  # steps in a product of `hoist` where its bits depend on its rows: windows begin at multiples of it


class Layer(NamedTuple):
    """A linear layer's weight [N, K] and bias [N], in whatever form `Operations.pack` gave them."""

    weight: Any
    bias: Any


class Operations(Protocol):
    """What the program is made of. Signatures and definitions are those of `fastcfg.kernels`; `out` may be ignored, so
    that the result counts and not the buffer.

    state_dtype: of x between steps. table_dtype: of the hoisted table, None for the program's. any_rows: whether a row's
    bits are the same for any number of rows in a product.
    """

    state_dtype: torch.dtype
    table_dtype: torch.dtype | None
    any_rows: bool

    def pack(self, weight: Tensor, bias: Tensor, *, rows: int, sensitive: bool = False) -> Layer:
        """A layer for `linear`. rows: of a usual product. sensitive: not to be quantised."""
        ...

    def step_table(self, plan: Plan) -> Tensor:
        """The plan as `guided_step` reads it."""
        ...

    def patch_embed(
        self, x: Tensor, weight: Tensor, bias: Tensor, position: Tensor, *, out: Tensor | None = None
    ) -> Tensor: ...

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
    ) -> Tensor: ...

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
    ) -> Tensor: ...

    def attention(self, qkv: Tensor, heads: int, *, out: Tensor | None = None) -> Tensor: ...

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
    ) -> Tensor: ...


@dataclass(frozen=True)
class Buffers:
    """Where the operations of `FusedDiT.denoise` write, [R, T, ...] each; None: they allocate."""

    normed: Tensor | None = None
    qkv: Tensor | None = None
    attended: Tensor | None = None
    stream: Tensor | None = None
    hidden: Tensor | None = None
    patches: Tensor | None = None

    def rows(self, R: int) -> Buffers:
        """The first R rows of each."""
        whole = {field.name: getattr(self, field.name) for field in fields(self)}
        return Buffers(**{name: None if buffer is None else buffer[:R] for name, buffer in whole.items()})


@dataclass
class Samples:
    """Rows of a request between two steps. x, x0_prev: [B, C, H, W]; cond, null: the rows' places among the call's
    labels, int32 [B], null None where there is none; the rest as in `Request`, on the program's device."""

    x: Tensor
    x0_prev: Tensor | None
    cond: Tensor
    null: Tensor | None
    scale: Tensor
    noise: Tensor | None
    seeds: Tensor | None
    indices: Tensor | None
    classifier: ClassifierTerm | None


class _Block(NamedTuple):
    qkv: Layer
    proj: Layer
    fc1: Layer
    fc2: Layer
    eps1: float
    eps2: float


class _Condition(NamedTuple):
    """Embedders of (t, y), in float32, and the adaLN product behind them, which fills the table from `column` on."""

    t_embedder: TimestepEmbedder
    y_embedder: LabelEmbedder
    times: Tensor  # t_embedder of the plan's timesteps, float32 [steps, D]
    product: Layer
    column: int


Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


class FusedDiT:
    """A copy of a DiT's weights, packed for `operations` in `dtype`, and the program that runs `plan` on them.

    model: a Denoiser for which `is_plain_dit`. Holds no state of a run: several threads may use one, each with its own
    buffers.
    """

    def __init__(self, model: Denoiser, plan: Plan, operations: Operations, device: torch.device, dtype: torch.dtype):
        assert isinstance(model.module, DiT)
        self.model, self.plan, self.operations, self.device, self.dtype = model, plan, operations, device, dtype
        module = model.module
        self.config = config = module.config
        embedding = module.x_embedder.proj
        assert embedding.bias is not None
        self.embedding = [self._copy(p) for p in (embedding.weight, embedding.bias, module.pos_embed[0])]
        self._pack_trunk(module)
        self.last_column = 6 * config.hidden_size * config.depth
        self.table_width = self.last_column + 2 * config.hidden_size
        self._conditions = self._pack_conditions(module)
        self.coefficients = operations.step_table(plan).to(device)

    def buffers(self, rows: int) -> Buffers:
        """Buffers for `denoise` on up to this many rows."""
        D, patch = self.config.hidden_size, self.config.patch_size**2 * self.config.out_channels
        widths = (D, 3 * D, D, D, self.config.mlp_width, patch)
        shape = (rows, self.config.tokens)
        return Buffers(*(torch.empty(*shape, width, dtype=self.dtype, device=self.device) for width in widths))

    def run(self, request: Request, pieces: list[slice], denoise: Denoise, each: Each = map) -> Tensor:
        """The samples of `request`, float32 [B, C, H, W]. pieces: the rows that go through the steps together.

        denoise: `self.denoise` with the caller's choice of buffers. each: a `map`, which may be parallel.
        """
        labels, cond, null = self._unique(request)
        samples = [self._begin(request, rows, cond, null) for rows in pieces]
        for window in self.windows(len(labels)):
            table = self.hoist(labels, window, each)

            def advance(piece: Samples, window: range = window, table: Tensor = table) -> None:
                self._advance(piece, request, window, table, denoise)

            list(each(advance, samples))
        return torch.cat([piece.x for piece in samples]).float()

    def embed(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Tokens [B, T, D] of x [B, C, H, W]."""
        return self.operations.patch_embed(x, *self.embedding, out=out)

    def modulations(self, t: Tensor, y: Tensor, each: Each = map) -> Tensor:
        """The table [N, W] of N pairs (t, y), for rows that belong to no plan."""
        return self._fill(y, [condition.t_embedder(t)[:, None] for condition in self._conditions], each)

    def denoise(self, tokens: Tensor, table: Tensor, index: Tensor, buffers: Buffers | None = None) -> Tensor:
        """The network's output [R, C or 2C, H, W]. tokens: [B, T, D]; index: rows of `table`, int32 [R], R = B or 2B.

        tokens is only read.
        """
        return self.unpatchify(self.last_layer(self.trunk(tokens, table, index, buffers), table, index, buffers))

    def trunk(self, tokens: Tensor, table: Tensor, index: Tensor, buffers: Buffers | None = None) -> Tensor:
        """The blocks of `denoise`: [R, T, D], in `buffers.stream` if there are any."""
        ops, D = self.operations, self.config.hidden_size
        to = (buffers or Buffers()).rows(len(index))
        h = tokens  # B rows up to the first residual, R from there on
        for b, block in enumerate(self._blocks):
            shift1, scale1, gate1, shift2, scale2, gate2 = range(6 * D * b, 6 * D * (b + 1), D)
            a = ops.adaln(h, table, index, shift1, scale1, eps=block.eps1, out=to.normed)
            a = ops.linear(a, *block.qkv, out=to.qkv)
            a = ops.attention(a, self.config.num_heads, out=to.attended)
            h = ops.linear(a, *block.proj, residual=h, table=table, index=index, gate_column=gate1, out=to.stream)
            m = ops.adaln(h, table, index, shift2, scale2, eps=block.eps2, out=to.normed)
            m = ops.linear(m, *block.fc1, gelu=True, out=to.hidden)
            h = ops.linear(m, *block.fc2, residual=h, table=table, index=index, gate_column=gate2, out=to.stream)
        return h

    def last_layer(self, h: Tensor, table: Tensor, index: Tensor, buffers: Buffers | None = None) -> Tensor:
        """The end of `denoise`: patches [R, T, p p C'] of the trunk's h, C' = C or 2C."""
        to = (buffers or Buffers()).rows(len(index))
        shift, scale = self.last_column, self.last_column + self.config.hidden_size
        a = self.operations.adaln(h, table, index, shift, scale, eps=self.last_eps, out=to.normed)
        return self.operations.linear(a, *self.last, out=to.patches)

    def _advance(self, piece: Samples, request: Request, window: range, table: Tensor, denoise: Denoise) -> None:
        """Takes `piece` through the steps of `window`, whose modulations `table` holds, label by label."""
        plan, rows = self.plan, len(piece.x)
        guidance = plan.guidance
        both = piece.cond if piece.null is None else torch.cat([piece.cond, piece.null])
        first = both * len(window)
        for i in window:
            halves = 2 if request.guided[i] else 1
            index = first[: halves * rows] + (i - window.start)
            model_out = denoise(self.embed(piece.x), table, index)
            if piece.classifier is not None:
                model_out = piece.classifier.added(model_out, piece.x, i)
            step = torch.full((rows,), i, dtype=torch.int32, device=self.device)
            self.operations.guided_step(
                model_out, piece.x, self.coefficients, piece.scale, step,
                x0_prev=piece.x0_prev, noise=piece.noise, seeds=piece.seeds, indices=piece.indices,
                channels=guidance.channels, rescale=guidance.rescale, clip=plan.clip, learned=plan.learned_variance,
                out=piece.x,
            )  # fmt: skip

    def _unique(self, request: Request) -> tuple[Tensor, Tensor, Tensor | None]:
        """(the call's different labels [G], the rows' places in it int32 [B], the null label's [B] if it is needed)."""
        labels = request.labels.to(self.device)
        if not request.guided.any():
            unique, places = labels.unique(return_inverse=True)
            return unique, places.int(), None
        # DiT's null label is a row of the label table, so it is hoisted like any other
        assert isinstance(self.model.null_label, int)
        null = torch.full_like(labels, self.model.null_label)
        unique, places = torch.cat([labels, null]).unique(return_inverse=True)
        cond, null = places.int().chunk(2)
        return unique, cond, null

    def _begin(self, request: Request, rows: slice, cond: Tensor, null: Tensor | None) -> Samples:
        """The rows of `request` as they enter the first step."""
        plan, shape, dtype = self.plan, self.model.shape, self.operations.state_dtype
        seeds, indices = request.seeds[rows], request.indices[rows]
        z = normal(seeds, indices, INITIAL_STEP, shape) if request.x_T is None else request.x_T[rows]
        noise = request.noise if plan.needs_noise else None
        drawn = plan.needs_noise and noise is None
        x = plan.init_scale * z.to(self.device, dtype)
        return Samples(
            x=x,
            x0_prev=torch.zeros_like(x) if plan.needs_history else None,
            cond=cond[rows],
            null=None if null is None else null[rows],
            scale=request.scale[:, rows].to(self.device).contiguous(),
            noise=None if noise is None else noise[:, rows].to(self.device, torch.float32).contiguous(),
            seeds=torch.from_numpy(seeds).to(self.device) if drawn else None,
            indices=torch.from_numpy(indices).to(self.device) if drawn else None,
            classifier=None if request.classifier is None else request.classifier.rows(rows),
        )

    def windows(self, labels: int) -> Iterator[range]:
        """The plan's steps, as many at a time as `TABLE_BYTES` allows, and `HOIST_STEPS` at least."""
        row = self.table_width * (self.operations.table_dtype or self.dtype).itemsize * labels
        size = max(1, TABLE_BYTES // (row * HOIST_STEPS)) * HOIST_STEPS
        for start in range(0, self.plan.steps, size):
            yield range(start, min(start + size, self.plan.steps))

    def hoist(self, labels: Tensor, window: range, each: Each = map, *, out: Tensor | None = None) -> Tensor:
        """The table [labels * steps, W] of a window, in `out` if given: the steps of one label after those of another."""
        times = [condition.times[None, window.start : window.stop] for condition in self._conditions]
        return self._fill(labels, times, each, out)

    def _fill(self, labels: Tensor, times: list[Tensor], each: Each, out: Tensor | None = None) -> Tensor:
        """The table [G S, W] of labels [G]. times: for each condition, the embedded t of label g, [G or 1, S, D]."""
        G, S = len(labels), times[0].shape[1]
        ops, dtype = self.operations, self.operations.table_dtype or self.dtype
        table = torch.empty(G * S, self.table_width, dtype=dtype, device=self.device) if out is None else out

        # A part is computed from the sum on, so that its shape, which may decide how its last values are rounded, is its own
        parts = [(slice(0, G), slice(0, S))] if ops.any_rows else list(_parts(G, S, HOIST_STEPS))

        def fill(work: tuple[_Condition, Tensor, tuple[slice, slice]]) -> None:
            condition, embedded, (some, steps) = work
            t = embedded[some if len(embedded) > 1 else slice(None), steps]
            c = silu(t + condition.y_embedder(labels[some])[:, None]).to(self.dtype).flatten(0, 1).contiguous()
            start = some.start * S + steps.start
            rows = table[start : start + len(c)]
            whole = rows if len(self._conditions) == 1 and dtype == self.dtype else None
            y = ops.linear(c, *condition.product, out=whole)
            if y is not whole:
                rows[:, condition.column : condition.column + y.shape[1]] = y

        conditions = zip(self._conditions, times, strict=True)
        list(each(fill, [(*condition, part) for condition in conditions for part in parts]))
        return table

    def unpatchify(self, tokens: Tensor, *, out: Tensor | None = None) -> Tensor:
        """[R, T, p p C'] -> [R, C', H, W], in `out` if given."""
        p, side = self.config.patch_size, self.config.input_size // self.config.patch_size
        patches = tokens.view(len(tokens), side, side, p, p, -1).permute(0, 5, 1, 3, 2, 4)
        if out is None:
            return patches.reshape(len(tokens), -1, side * p, side * p)
        out.view(patches.shape).copy_(patches)
        return out

    def weights(self) -> Iterator[Tensor]:
        """Every tensor that was made of the module's weights, in one order, where `Operations.pack` gives tensors."""
        yield from self.embedding
        for layer in (self.last, *(layer for block in self._blocks for layer in block[:4])):
            yield from layer
        for condition in self._conditions:
            yield condition.times
            yield from condition.product
            yield from condition.t_embedder.parameters()
            yield from condition.y_embedder.parameters()

    def _copy(self, parameter: Tensor) -> Tensor:
        return parameter.detach().to(self.device, self.dtype, copy=True)

    def _pack(self, layers: list[nn.Linear], rows: int, sensitive: bool = False) -> Layer:
        """Layers of one input as one layer."""
        weight = torch.cat([layer.weight.detach() for layer in layers]).to(self.device, self.dtype)
        bias = torch.cat([layer.bias.detach() for layer in layers]).to(self.device, self.dtype)
        return self.operations.pack(weight, bias, rows=rows, sensitive=sensitive)

    def _pack_trunk(self, module: DiT) -> None:
        """What `denoise` needs of the weights."""
        self._blocks = [self._pack_block(block) for block in module.blocks]
        self.last = self._pack([module.final_layer.linear], self.config.tokens, sensitive=True)
        self.last_eps = module.final_layer.norm_final.eps

    def _pack_block(self, block: nn.Module) -> _Block:
        assert isinstance(block, DiTBlock)
        layers = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
        qkv, proj, fc1, fc2 = (self._pack([layer], self.config.tokens) for layer in layers)
        return _Block(qkv, proj, fc1, fc2, block.norm1.eps, block.norm2.eps)

    def _pack_conditions(self, module: DiT) -> list[_Condition]:
        """One condition for the whole model; or, with `block_conditioning`, one a block and one for the last layer."""
        blocks = [block for block in module.blocks if isinstance(block, DiTBlock)]
        last = module.final_layer.adaLN_modulation[1]
        t = torch.from_numpy(self.plan.timesteps)

        def condition(owner: DiT | DiTBlock, layers: list[Any], column: int) -> _Condition:
            t_embedder = copy.deepcopy(owner.t_embedder).to(self.device, torch.float32)
            y_embedder = copy.deepcopy(owner.y_embedder).to(self.device, torch.float32)
            product = self._pack(layers, HOIST_STEPS, sensitive=True)
            return _Condition(t_embedder, y_embedder, t_embedder(t.to(self.device)), product, column)

        if not self.config.block_conditioning:
            return [condition(module, [*(block.adaLN_modulation[1] for block in blocks), last], 0)]
        width = 6 * self.config.hidden_size
        own = [condition(block, [block.adaLN_modulation[1]], b * width) for b, block in enumerate(blocks)]
        return [*own, condition(module, [last], self.last_column)]


def is_plain_dit(module: nn.Module) -> bool:
    """Whether `FusedDiT` computes what `module` does: our DiT as its config makes it, with no layer replaced, parametrised,
    patched or hooked."""
    if type(module) is not DiT:
        return False
    parts = _within(module)
    return _made_of(parts) == _made_by(module.config) and not any(
        part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__ for part in parts
    )


def refuse_changed(module: nn.Module) -> None:
    """Raises Error where a module that was a plain DiT is none any more."""
    if not is_plain_dit(module):
        raise Error("the model has got hooks or other layers, which its sampler would leave out: make a new sampler")


def _within(module: nn.Module) -> list[nn.Module]:
    """The module and all in it; `module.modules()` takes three times as long, and this is asked in every call."""
    parts = [module]
    for part in parts:
        parts.extend(child for child in part._modules.values() if child is not None)
    return parts


@lru_cache
def _made_by(config: DiTConfig) -> list[Any]:
    """What a DiT of this config is made of."""
    with torch.device("meta"):
        return _made_of(_within(DiT(config)))


def _made_of(parts: list[nn.Module]) -> list[Any]:
    """Each part's kind, the names of what it holds, and its weights' shapes: a LayerNorm may have some, a Linear no bias."""
    return [
        (
            type(part),
            part.num_heads if type(part) is Attention else 0,
            [*part._modules],
            [None if weight is None else weight.shape for weight in part._parameters.values()],
        )
        for part in parts
    ]


def _parts(labels: int, steps: int, size: int) -> Iterator[tuple[slice, slice]]:
    """One label and up to `size` steps at a time."""
    for label in range(labels):
        for start in range(0, steps, size):
            yield slice(label, label + 1), slice(start, min(start + size, steps))
