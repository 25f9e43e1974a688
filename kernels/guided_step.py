"""One guided solver step behind any model: guidance, clipping, solver update and noise, x written in fp32.

    out = out_null + s (out_cond - out_null)                        (Ho & Salimans 2207.12598, eq. 6, with s = 1 + w)
    out = phi out std(out_cond) / std(out) + (1 - phi) out          (Lin et al. 2305.08891, eq. 15-16, where phi > 0)
    x'  = the plan's row applied to x, out, the x0 before and noise (see `_step.py`)

Each row reads its coefficients at its own step index, so rows at different steps, scales and even solvers can share a
launch. The unbiased std over a sample's guided channels is merged from per-chunk means and squared deviations (Chan et
al. 1979), so it needs a launch of its own before, and depends on nothing but the sample.

Shapes: model_out [B | 2B, C | 2C, ...] fp32, bf16 or fp16, [cond rows; null rows] where guided, channels C.. being the
variance's v in [-1, 1]; x, out, x0_prev [B, C, ...] fp32; coef fp32 [S, 10]; scale fp32 [S, B]; step int32 [B].
With n = C H W and e bytes an output value: bytes B n (2 e + 8) guided, + e for a learned variance, + 8 for history, + 4
for given noise, + e' for each copy of the model's next input; FLOPs B n (3 guidance + 8 update).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcfg.errors import Error
from fastcfg.kernels._launch import FLOATS, Config, Cost, Grid, cdiv, check, launch, next_power_of_2, tuned_config, wide
from fastcfg.kernels._step import C_NOISE, GUIDED, WIDTH, check_step, guide, guide_ref, solver_update, solver_update_ref

CHUNK = 4096  # elements behind one entry of the moments table


def guided_step_ref(
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
    moments: Tensor | None = None,  # noqa: ARG001 - the reference needs no workspace
    model_input: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    B, C = x.shape[:2]
    k = C if channels is None else channels
    prediction, v = wide(model_out[:B, :C]), wide(model_out[:B, C:])
    if len(model_out) == 2 * B:
        guided = guide_ref(prediction[:, :k], wide(model_out[B:, :k]), coef, scale, step, rescale)
        prediction = torch.cat([guided, prediction[:, k:]], dim=1)
    x_next = solver_update_ref(
        wide(x), prediction, v if learned else None, coef, step,
        clip=clip, x0_prev=x0_prev, noise=noise, seeds=seeds, indices=indices,
    )  # fmt: skip
    if model_input is not None:
        model_input.copy_(torch.cat([x_next] * (len(model_input) // B)))
    return x_next if out is None else out.copy_(x_next)


@triton.jit(do_not_specialize=["rows"])
def _moments_kernel(
    model_out, moments, scale, step, rows, guided_elements, out_elements, chunks, CHUNK: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s = tl.load(scale + tl.load(step + row).to(tl.int64) * rows + row)
    element = chunk.to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    mask = element < guided_elements
    count = tl.sum(mask.to(tl.float32), axis=0)
    cond = tl.load(model_out + row * out_elements + element, mask=mask, other=0.0).to(tl.float32)
    null = tl.load(model_out + (rows + row) * out_elements + element, mask=mask, other=0.0).to(tl.float32)
    guided = null + s * (cond - null)
    cond_mean, guided_mean = tl.sum(cond, axis=0) / count, tl.sum(guided, axis=0) / count
    cond_off, guided_off = tl.where(mask, cond - cond_mean, 0.0), tl.where(mask, guided - guided_mean, 0.0)
    entry = moments + (row * chunks + chunk) * 4
    tl.store(entry, cond_mean)
    tl.store(entry + 1, tl.sum(cond_off * cond_off, axis=0))
    tl.store(entry + 2, guided_mean)
    tl.store(entry + 3, tl.sum(guided_off * guided_off, axis=0))


@triton.jit
def _squared_deviation(entries, guided_elements, chunks, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Sum of squared deviations from the mean over all chunks; entries points to the first chunk's (mean, sum) pair."""
    i = tl.arange(0, CHUNKS)
    mean = tl.load(entries + 4 * i, mask=i < chunks, other=0.0)
    within = tl.load(entries + 4 * i + 1, mask=i < chunks, other=0.0)
    count = tl.minimum(tl.maximum(guided_elements - i * CHUNK, 0), CHUNK).to(tl.float32)
    grand_mean = tl.sum(count * mean, axis=0) / guided_elements
    return tl.sum(within + count * (mean - grand_mean) * (mean - grand_mean), axis=0)


@triton.jit(do_not_specialize=["rows"])
def _guided_step_kernel(
    model_out, x, out, model_input, moments, coef, scale, step, x0_prev, noise, seeds, indices, rescale,
    rows, elements, guided_elements, out_elements, chunks,
    HALVES: tl.constexpr, COPIES: tl.constexpr, RESCALE: tl.constexpr, CLIP: tl.constexpr, LEARNED: tl.constexpr,
    HISTORY: tl.constexpr, NOISE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < elements
    k = tl.load(step + row).to(tl.int64)
    coef += k * WIDTH
    prediction = tl.load(model_out + row * out_elements + element, mask=mask, other=0.0).to(tl.float32)
    if HALVES == 2:
        s = tl.load(scale + k * rows + row, mask=tl.load(coef + GUIDED) != 0.0, other=1.0)
        here = element < guided_elements
        null_mask = tl.where(s != 1.0, mask & here, False)
        null = tl.load(model_out + (rows + row) * out_elements + element, mask=null_mask, other=0.0).to(tl.float32)
        guided = guide(prediction, null, s, here)
        if RESCALE:
            entries = moments + row * chunks * 4
            cond_square = _squared_deviation(entries, guided_elements, chunks, CHUNK, CHUNKS)
            guided_square = _squared_deviation(entries + 2, guided_elements, chunks, CHUNK, CHUNKS)
            ratio = tl.sqrt(cond_square) / tl.sqrt(guided_square)
            rescaled = rescale * guided * ratio + (1.0 - rescale) * guided
            guided = tl.where(null_mask, rescaled, prediction)
        prediction = guided
    v = prediction
    if LEARNED:
        used = tl.where(tl.load(coef + C_NOISE) != 0.0, mask, False)
        v = tl.load(model_out + row * out_elements + elements + element, mask=used, other=0.0).to(tl.float32)
    x_t = tl.load(x + row * elements + element, mask=mask, other=0.0)
    x_next = solver_update(
        x_t, prediction, v, element, mask, coef, k, row, rows, elements, x0_prev, noise, seeds, indices,
        CLIP, LEARNED, HISTORY, NOISE,
    )  # fmt: skip
    tl.store(out + row * elements + element, x_next, mask=mask)
    for copy in tl.static_range(COPIES):
        copied = model_input + (copy * rows + row) * elements + element
        tl.store(copied, x_next.to(model_input.dtype.element_ty), mask=mask)


def guided_step(
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
    moments: Tensor | None = None,
    model_input: Tensor | None = None,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """x' in `out` (which may be x itself), and its copies in `model_input` [B | 2B, C, ...] of the model's dtype.

    model_out of B rows is taken unguided. x0_prev: DPM-Solver++'s history, replaced by this step's x0. Noise: from
    (seeds, indices) int64 [B] at step index + 1, or from `noise` fp32 [S, B, C, ...] in executed order, or none where no
    row has any. channels: guide only the first this many. rescale: phi. learned: read v. moments: fp32 workspace of
    `moments_shape`, allocated if rescale needs it and it is not given. Raises Error on shapes, dtypes and devices.
    """
    out = torch.empty_like(x) if out is None else out
    B, C = _check(model_out, x, channels, rescale, model_input, out)
    elements, positions = x[0].numel(), x[0, 0].numel()
    guided_elements = positions * (C if channels is None else channels)
    arguments = check_step(
        x, coef, scale, step, x0_prev=x0_prev, noise=noise, seeds=seeds, indices=indices, learned=learned,
        channels=model_out.shape[1],
    )  # fmt: skip
    halves, chunks = len(model_out) // B, cdiv(guided_elements, CHUNK)
    sizes = {"rows": B, "guided_elements": guided_elements, "out_elements": model_out[0].numel(), "chunks": chunks}
    rescaled = bool(rescale) and halves == 2
    if rescaled:
        moments = x.new_empty(moments_shape(x, channels)) if moments is None else moments
        check("moments", moments, moments_shape(x, channels), torch.float32, x.device)
        tables = {"moments": moments, "scale": scale, "step": step, "CHUNK": CHUNK}
        launch(_moments_kernel, (B, chunks), x.device, _MOMENTS_CONFIG, model_out=model_out, **tables, **sizes)

    def grid(config: Config) -> Grid:
        return B, cdiv(elements, config["BLOCK"])

    config = config or tuned_config("guided_step", (model_out,), grid, elements=elements) or guided_step_config()
    launch(
        _guided_step_kernel, grid(config), x.device, config,
        model_out=model_out, x=x, out=out, model_input=model_input, moments=moments if rescaled else None,
        rescale=float(rescale), elements=elements, HALVES=halves, RESCALE=rescaled, CLIP=bool(clip), CHUNK=CHUNK,
        COPIES=0 if model_input is None else len(model_input) // B, CHUNKS=next_power_of_2(chunks),
        **sizes, **arguments,
    )  # fmt: skip
    return out


_MOMENTS_CONFIG: Config = {"num_warps": 8, "num_stages": 1}


def guided_step_config() -> Config:
    return {"BLOCK": 1024, "num_warps": 4, "num_stages": 1}


def moments_shape(x: Tensor, channels: int | None = None) -> tuple[int, int, int]:
    """Shape of the workspace that rescale needs for samples x [B, C, ...]."""
    guided = x[0, 0].numel() * (x.shape[1] if channels is None else channels)
    return len(x), cdiv(guided, CHUNK), 4


def guided_step_cost(
    model_out: Tensor,
    x: Tensor,
    *,
    channels: int | None = None,
    rescale: float = 0.0,
    learned: bool = False,
    history: bool = False,
    given_noise: bool = False,
    model_input: Tensor | None = None,
) -> Cost:
    B, C = x.shape[:2]
    n, e, state = x.numel(), model_out.element_size(), x.element_size()
    guided = n // C * (C if channels is None else channels) if len(model_out) == 2 * B else 0
    read = e * (n + guided + n * learned) + state * n * (1 + history) + 4 * n * given_noise
    written = state * n * (1 + history) + (0 if model_input is None else model_input.numel() * model_input.element_size())
    passes = 2 if rescale else 1
    return Cost(bytes=read + written + (passes - 1) * 2 * guided * e, flops=8 * n + (3 + 7 * (passes - 1)) * guided)


def _check(
    model_out: Tensor, x: Tensor, channels: int | None, rescale: float, model_input: Tensor | None, out: Tensor
) -> tuple[int, int]:
    if x.ndim < 3 or x.numel() == 0:
        raise Error(f"x must be [B, C, ...] with at least one element, got {list(x.shape)}")
    B, C = x.shape[:2]
    check("x", x, x.shape, torch.float32, x.device)
    check("out", out, x.shape, torch.float32, x.device)
    check("model_out", model_out, [None, None, *x.shape[2:]], FLOATS, x.device)
    if len(model_out) not in (B, 2 * B):
        raise Error(f"model_out must have {B} rows, or {2 * B} with the null half, got {len(model_out)}")
    if channels is not None and not 1 <= channels <= C:
        raise Error(f"channels must lie in [1, {C}], got {channels}")
    if not 0 <= rescale <= 1:
        raise Error(f"rescale must lie in [0, 1], got {rescale}")
    if model_input is not None:
        check("model_input", model_input, [None, *x.shape[1:]], FLOATS, x.device)
        if len(model_input) not in (B, 2 * B):
            raise Error(f"model_input must have {B} or {2 * B} rows, got {len(model_input)}")
    return B, C
