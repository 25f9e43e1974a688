"""The CUDA engine: the fused DiT program on Triton kernels, or any module with `guided_step` behind it, in CUDA graphs.

What a step reads or writes lies in static buffers made once a batch size: labels (as rows of the hoisted table), scales,
seeds, indices, x, history, given noise, and the counter that says which step it is. A call fills them, runs the steps (see
`capture`) and copies x out. A sample's bits do not depend on its batch: no kernel's order of summation does; only a foreign
module's own operations may break this.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fastcfg.engines.base import Request, plain_mode
from fastcfg.engines.capture import Lane, StepGraphs, lane_of
from fastcfg.engines.fused_dit import TABLE_BYTES, FusedDiT, Layer, is_plain_dit, refuse_changed
from fastcfg.errors import Error
from fastcfg.kernels._launch import cdiv, gpu_of, interpreted
from fastcfg.kernels._step import step_table
from fastcfg.kernels.adaln import adaln
from fastcfg.kernels.attention import MAX_HEAD_DIM, attention
from fastcfg.kernels.guided_step import guided_step, moments_shape
from fastcfg.kernels.linear import linear
from fastcfg.kernels.noise import noise
from fastcfg.kernels.patch_embed import MAX_COLUMNS, patch_embed
from fastcfg.kernels.step_boundary import MAX_VALUES, step_boundary
from fastcfg.kernels.tuned import table_for
from fastcfg.models.denoiser import Denoiser, call_module
from fastcfg.models.dit import DiTConfig
from fastcfg.models.weights import fingerprint, refuse_stale, refuse_training
from fastcfg.noise import INITIAL_STEP
from fastcfg.plan import Plan

MAX_BATCHES = 4  # batch sizes whose buffers and graphs are kept
FLOATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class CudaEngine:
    """Runs `plan` on `model` on a GPU; or on the CPU, uncaptured, where Triton interprets its kernels (TRITON_INTERPRET=1).

    dtype: float32, bfloat16, float16 or None: for a DiT that keeps its quality in bfloat16 (`Denoiser.low_precision`) bfloat16
    on GPUs that have it, else float16; for any other DiT float32; for any other module its own. x and the solver are float32.
    Calls from any thread and stream are taken in turn, and ordered like other work on the stream they come from. `notes` says
    what could not be fused.
    """

    name = "cuda"
    whole_batches = True  # graphs are captured for one number of rows

    def __init__(self, model: Denoiser, plan: Plan, device: torch.device, dtype: torch.dtype | None = None):
        if plan.gradient is not None:
            raise Error("engine 'cuda' replays CUDA graphs, which hold no classifier's gradient: use the reference engine")
        if (device.type == "cpu") != interpreted() or device.type not in ("cpu", "cuda"):
            raise Error(
                f"engine 'cuda' needs a GPU (or TRITON_INTERPRET=1 and device 'cpu', for tests), got device {str(device)!r}: "
                "use the cpu engine"
            )
        self.model, self.plan = model, plan
        self.device = torch.empty(0, device=device).device  # with its index
        obstacle = why_not_fused(model)
        self.notes = (*_tiles(self.device), *((f"the module's own forward is used: {obstacle}",) if obstacle else ()))
        self.dtype = _dtype(dtype, model, self.device, fused=obstacle is None)
        self._lane = lane_of(self.device)
        self._loops: dict[int, Loop] = {}
        made_for = _MadeFor(model, plan, self.device, self.dtype, self._lane)
        self._weights = _DiTWeights(made_for) if obstacle is None else _ModuleWeights(made_for)

    def refresh(self) -> None:
        """Copies the weights anew into the buffers that graphs read, so that nothing is captured again."""
        with _own_mode(self.device), self._lane.turn():
            if not self._weights.refresh():
                self._drop_loops()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self._weights.check()
        with _own_mode(self.device), self._lane.turn() as caller:
            out = self._weights.forward(*(part.to(self.device) for part in (x, t, y))).float()
            if caller is not None:
                out.record_stream(caller)
        return out

    def run(self, request: Request) -> Tensor:
        self._weights.check()
        with _own_mode(self.device):
            result = torch.empty(len(request.labels), *self.model.shape, **_float32(self.device))  # on the caller's stream
            with self._lane.turn():
                loop = self._loop(request)
                loop.samples.load(request)
                for window in loop.windows(request):
                    guided = request.guided[window.start : window.stop].tolist()
                    loop.graphs.run(loop.step, guided, variant=loop.samples.noise_given)
                result.copy_(loop.samples.x)
        return result

    def _loop(self, request: Request) -> Loop:
        """The static buffers and graphs for as many rows as the request has."""
        batch = len(request.labels)
        if batch not in self._loops:
            if len(self._loops) == MAX_BATCHES:
                self._loops.pop(next(iter(self._loops))).graphs.clear()
            self._loops[batch] = self._weights.loop(Samples(self.model, self.plan, batch, self.device), request)
        return self._loops[batch]

    def _drop_loops(self) -> None:
        for loop in self._loops.values():
            loop.graphs.clear()
        self._loops.clear()


class TritonOperations:
    """The kernels as `FusedDiT` wants them."""

    state_dtype = torch.float32
    table_dtype: torch.dtype | None = None
    any_rows = True

    adaln = staticmethod(adaln)
    attention = staticmethod(attention)
    guided_step = staticmethod(guided_step)
    linear = staticmethod(linear)
    patch_embed = staticmethod(patch_embed)
    step_table = staticmethod(step_table)

    def pack(self, weight: Tensor, bias: Tensor, *, rows: int, sensitive: bool = False) -> Layer:
        del rows, sensitive
        return Layer(weight, bias)


class Samples:
    """Static buffers for what a request says of B rows, and for what a step makes of them.

    x, x0_prev: float32 [B, C, H, W]. scale: float32 [steps, B]. seeds, indices: int64 [B]. step: int32 [B]. places: int32
    [2B], where there is a hoisted table each row's rows of it (conditional, null); a step counts both of them up. noise:
    float32 [steps, B, C, H, W], made when a request first brings some. coefficients: see `step_table`.

    Each begins at a multiple of 16 bytes, whatever B: Triton compiles a kernel anew for an address that does not.
    """

    def __init__(self, model: Denoiser, plan: Plan, batch: int, device: torch.device):
        self.plan, self.batch = plan, batch
        self.x = torch.empty(batch, *model.shape, **_float32(device))
        self.x0_prev = torch.empty_like(self.x) if plan.needs_history else None
        self.scale = torch.empty(plan.steps, batch, **_float32(device))
        self.seeds, self.indices = torch.empty(2, batch + batch % 2, dtype=torch.int64, device=device)[:, :batch]
        self.at = torch.empty(cdiv(batch, 4) * 4 + 2 * batch, dtype=torch.int32, device=device)
        self.step, self.places = self.at[:batch], self.at[-2 * batch :]
        self.coefficients = step_table(plan).to(device)
        self.noise_given = False
        self._options = {"channels": plan.guidance.channels, "clip": plan.clip, "learned": plan.learned_variance}

    @cached_property
    def noise(self) -> Tensor:
        return torch.empty(self.plan.steps, *self.x.shape, **_float32(self.x.device))

    def load(self, request: Request) -> None:
        """Takes over a request's scales, counters and noise, and draws x where it is not given."""
        self._copy(self.seeds, torch.from_numpy(np.asarray(request.seeds)))
        self._copy(self.indices, torch.from_numpy(np.asarray(request.indices)))
        self._copy(self.scale, request.scale)
        if request.x_T is None:
            noise(self.seeds, self.indices, INITIAL_STEP, out=self.x, scale=self.plan.init_scale)
        else:
            self.x.copy_(request.x_T).mul_(self.plan.init_scale)
        self.noise_given = request.noise is not None and self.plan.needs_noise
        if self.noise_given:
            assert request.noise is not None
            self.noise.copy_(request.noise)

    def start(self, step: int, places: Tensor) -> None:
        """Sets the counters: all rows are at `step`, and their rows of the table are `places`, [2B] on the host."""
        at = torch.cat([places.new_full((len(self.at) - len(places),), step), places])
        self._copy(self.at, at.to(torch.int32))

    def update(self) -> dict[str, Any]:
        """What `guided_step` and `step_boundary` are told beyond the model's output; x is updated in place."""
        drawn = self.plan.needs_noise and not self.noise_given
        seeds, indices = (self.seeds, self.indices) if drawn else (None, None)
        noise = self.noise if self.noise_given else None
        given = {"x0_prev": self.x0_prev, "noise": noise, "seeds": seeds, "indices": indices}
        return {
            "x": self.x, "coef": self.coefficients, "scale": self.scale, "step": self.step, "out": self.x,
            **given, **self._options,
        }  # fmt: skip

    @staticmethod
    def _copy(buffer: Tensor, value: Tensor) -> None:
        # From pageable memory the driver takes its own copy before it returns: no need to wait for the device
        buffer.copy_(value, non_blocking=True)


class Loop(Protocol):
    """The step of a batch, on its static buffers."""

    samples: Samples
    graphs: StepGraphs

    def windows(self, request: Request) -> Iterator[range]:
        """The plan's steps, in windows; before each, what its steps read is made ready."""
        ...

    def step(self, guided: bool) -> None:
        """One step, with launches that are the same at every step."""
        ...


class DiTLoop:
    """The fused step of a DiT."""

    def __init__(self, program: FusedDiT, samples: Samples, lane: Lane):
        self.program, self.samples, self.graphs = program, samples, StepGraphs(lane)
        B, steps, config = samples.batch, program.plan.steps, program.config
        empty: dict[str, Any] = {"dtype": program.dtype, "device": samples.x.device}
        self.buffers = program.buffers(2 * B)
        self.tokens = torch.empty(B, config.tokens, config.hidden_size, **empty)
        most = TABLE_BYTES // (program.table_width * program.dtype.itemsize * (B + 1))
        self.window = max(1, min(steps, most))
        self.table = torch.empty((B + 1) * self.window, program.table_width, **empty)
        rescale = program.plan.guidance.rescale
        self.whole_end = not rescale and config.in_channels * config.patch_size**2 <= MAX_VALUES
        if not self.whole_end:
            self.output = torch.empty(2 * B, config.out_channels, *samples.x.shape[2:], **empty)
            self.moments = torch.empty(moments_shape(samples.x, program.plan.guidance.channels), **_float32(samples.x.device))

    def windows(self, request: Request) -> Iterator[range]:
        program, samples = self.program, self.samples
        program.embed(samples.x, out=self.tokens)
        labels, places = self._places(request)
        for start in range(0, program.plan.steps, self.window):
            window = range(start, min(start + self.window, program.plan.steps))
            program.hoist(labels, window, out=self.table[: len(labels) * len(window)])
            samples.start(start, places * len(window))
            yield window

    def step(self, guided: bool) -> None:
        program, samples, B = self.program, self.samples, self.samples.batch
        index = samples.places if guided else samples.places[:B]
        h = program.trunk(self.tokens, self.table, index, self.buffers)
        if self.whole_end:
            weight, bias, position = program.embedding
            step_boundary(
                h, self.table, index, program.last_column, program.last_column + h.shape[-1], *program.last,
                patch=program.config.patch_size, eps=program.last_eps, embed_weight=weight, embed_bias=bias,
                position=position, tokens=self.tokens, **samples.update(),
            )  # fmt: skip
        else:
            patches = program.last_layer(h, self.table, index, self.buffers)
            model_out = program.unpatchify(patches, out=self.output[: len(h)])
            rescale = program.plan.guidance.rescale
            guided_step(model_out, rescale=rescale, moments=self.moments if rescale else None, **samples.update())
            program.embed(samples.x, out=self.tokens)
        samples.at.add_(1)

    def _places(self, request: Request) -> tuple[Tensor, Tensor]:
        """(the call's different labels, on the device; each row's place among them and the null label's, [2B] here)."""
        labels = request.labels.cpu()
        both = torch.cat([labels, labels])
        if request.guided.any():
            assert isinstance(self.program.model.null_label, int)
            both[len(labels) :] = self.program.model.null_label
        unique, places = both.unique(return_inverse=True)
        return unique.to(self.tokens.device, non_blocking=True), places


class ModuleLoop:
    """A module's own forward on rows [cond; null], then `guided_step`, which writes x and the module's next input."""

    def __init__(self, module: nn.Module, model: Denoiser, samples: Samples, labels: Tensor, lane: Lane):
        self.module, self.null, self.samples, self.graphs = module, model.null_label, samples, StepGraphs(lane)
        B, plan, device = samples.batch, samples.plan, samples.x.device
        dtype = _module_dtype(module)
        rows = B if self.null is None else 2 * B
        self.input = torch.empty(rows, *samples.x.shape[1:], dtype=dtype, device=device)
        self.y = torch.empty(rows, *labels.shape[1:], dtype=dtype if labels.is_floating_point() else torch.int64, device=device)
        t_dtype = torch.int64 if plan.whole_timesteps else torch.float32
        self.times = torch.from_numpy(plan.timesteps).to(device, t_dtype)
        self.t = torch.empty(rows, dtype=t_dtype, device=device)
        self.moments = torch.empty(moments_shape(samples.x, plan.guidance.channels), **_float32(device))

    def windows(self, request: Request) -> Iterator[range]:
        B = self.samples.batch
        self.y[:B].copy_(request.labels)
        self.input[:B].copy_(self.samples.x)
        if self.null is not None:
            self.y[B:].copy_(torch.as_tensor(self.null, device=self.y.device).expand_as(self.y[B:]))
            self.input[B:].copy_(self.samples.x)
        self.samples.start(0, torch.zeros(2 * B, dtype=torch.int64, device="cpu"))
        yield range(self.samples.plan.steps)

    def step(self, guided: bool) -> None:
        samples, rescale = self.samples, self.samples.plan.guidance.rescale
        rows = 2 * samples.batch if guided else samples.batch
        # There is no table, and places count steps too
        torch.index_select(self.times, 0, samples.places[:rows], out=self.t[:rows])
        model_out = call_module(self.module, self.input[:rows], self.t[:rows], self.y[:rows]).contiguous()
        moments = self.moments if rescale else None
        guided_step(model_out, rescale=rescale, moments=moments, model_input=self.input, **samples.update())
        samples.at.add_(1)


class _MadeFor(NamedTuple):
    """What an engine's weights are kept for; not the engine itself, whose memory a cycle would hold until it is collected."""

    model: Denoiser
    plan: Plan
    device: torch.device
    dtype: torch.dtype
    lane: Lane


class _DiTWeights:
    """A DiT's weights, packed."""

    def __init__(self, made_for: _MadeFor):
        self._made_for, self._module = made_for, made_for.model.module
        with _own_mode(made_for.device), made_for.lane.turn():
            self._program = self._pack()
        self._fingerprint = fingerprint(self._module)

    def check(self) -> None:
        refuse_changed(self._module)
        refuse_training(self._module)
        refuse_stale(self._module, self._fingerprint)

    def refresh(self) -> bool:
        refuse_changed(self._module)
        for old, new in zip(self._program.weights(), self._pack().weights(), strict=True):
            old.copy_(new)
        self._fingerprint = fingerprint(self._module)
        return True

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        index = torch.arange(len(x), dtype=torch.int32, device=x.device)
        tokens = self._program.embed(x.float().contiguous())
        return self._program.denoise(tokens, self._program.modulations(t, y), index)

    def loop(self, samples: Samples, request: Request) -> Loop:
        del request
        return DiTLoop(self._program, samples, self._made_for.lane)

    def _pack(self) -> FusedDiT:
        model, plan, device, dtype, _ = self._made_for
        return FusedDiT(model, plan, TritonOperations(), device, dtype)


class _ModuleWeights:
    """Any other module: itself where it has the device and dtype asked for, else a converted copy."""

    def __init__(self, made_for: _MadeFor):
        model, _, device, dtype, _ = self._made_for = made_for
        self._source = model.module
        self._converted = model.device != device or model.dtype != dtype
        with _own_mode(device):  # `refresh` writes into a copy
            self._module = copy.deepcopy(self._source).to(device, dtype) if self._converted else self._source
        self._fingerprint = fingerprint(self._source)

    def check(self) -> None:
        refuse_training(self._module)
        if self._converted:
            refuse_stale(self._source, self._fingerprint)
        elif [at for at, _ in fingerprint(self._source)] != [at for at, _ in self._fingerprint]:
            raise Error("the model's weights moved since the sampler saw them: call sampler.refresh()")

    def refresh(self) -> bool:
        """Whether graphs that were captured still hold: not where the module's own weights lie elsewhere now."""
        if self._converted:
            for old, new in zip(_tensors(self._module), _tensors(self._source), strict=True):
                old.copy_(new)
        self._fingerprint = fingerprint(self._source)
        return self._converted

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return call_module(self._module, x.to(self._made_for.dtype), t, self._labels(y))

    def loop(self, samples: Samples, request: Request) -> Loop:
        return ModuleLoop(self._module, self._made_for.model, samples, request.labels, self._made_for.lane)

    def _labels(self, y: Tensor) -> Tensor:
        return y.to(self._made_for.dtype) if y.is_floating_point() else y


@contextmanager
def _own_mode(device: torch.device) -> Iterator[None]:
    """`plain_mode`, which a captured step keeps, and no inference mode: buffers made in it could not be written outside."""
    with torch.inference_mode(False), plain_mode(device):
        yield


def _float32(device: torch.device) -> dict[str, Any]:
    """What makes a float32 tensor on the device, whatever torch's default dtype."""
    return {"dtype": torch.float32, "device": device}


def _tiles(device: torch.device) -> tuple[str, ...]:
    """Where the kernels' tiles come from, said. A table that cannot be used is an Error here, before any work."""
    table = table_for(gpu_of(torch.empty(0, device=device)))
    if device.type != "cuda":
        return ()
    known = "the defaults, for this GPU has no tuned table" if table is None else f"{len(table.entries)} tuned on this GPU"
    return (f"the kernels' tiles: {known}",)


def why_not_fused(model: Denoiser) -> str | None:
    """Why the fused program does not serve this model; None where it does."""
    if not is_plain_dit(model.module):
        return f"{type(model.module).__name__} is not the package's DiT"
    if isinstance(model.null_label, Tensor):
        raise Error("a DiT's null label is a whole number, got a tensor")
    config = model.module.config
    assert isinstance(config, DiTConfig)
    head, values = config.hidden_size // config.num_heads, config.in_channels * config.patch_size**2
    if head % 8 or head > MAX_HEAD_DIM:
        return f"a head has {head} values, and the kernels take multiples of 8 up to {MAX_HEAD_DIM}"
    if values > MAX_COLUMNS:
        return f"a patch has {values} values, and the kernels take up to {MAX_COLUMNS}"
    return None


def _dtype(asked: torch.dtype | None, model: Denoiser, device: torch.device, fused: bool) -> torch.dtype:
    if asked is not None and asked not in FLOATS:
        raise Error(f"engine 'cuda' computes in {', '.join(FLOATS.values())}, got {str(asked).removeprefix('torch.')}")
    if not fused:
        if asked is None and model.dtype not in FLOATS:
            got = str(model.dtype).removeprefix("torch.")
            raise Error(f"engine 'cuda' computes in {', '.join(FLOATS.values())}, and the model is {got}: give a dtype")
        return model.dtype if asked is None else asked
    if device.type == "cpu":
        if asked == torch.bfloat16:
            raise Error("Triton's interpreter multiplies bf16 wrongly: use fp32 or fp16")
        return asked or torch.float32
    if asked is not None or not model.low_precision:
        return asked or torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _module_dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
