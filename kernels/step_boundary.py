"""The end of one step and the beginning of the next in one launch: final LayerNorm, modulation and linear layer for both
halves, guidance, solver update, unpatchify, and the next step's patch embedding.

    out = Linear(LN(h) (1 + scale) + shift)        (Peebles & Xie 2212.09748, section 3.2), for [cond; null] rows of h
    x'  = guidance and solver update of out        (see `_step.py`)
    tokens = patches of x' times W^T + bias + position

One pass over D. The last layer is linear, so with h's mean m and reciprocal deviation r a row of it is

    out = r (h W' - m sum_d W') + W shift + bias,        W' = W (1 + scale)

and h W', sum h and sum h^2 are gathered together; m and r enter at the end. W' is rounded to the dtype of W before both the
product and its sum, so that a large mean cancels exactly. Only channels that are used are computed: eps of both halves, v of
the conditional half and only for a learned variance.

Shapes: h [B | 2B, T, D], rows [cond; null]; table [G, W] and index int32 [B | 2B]; weight [p^2 C', D], bias [p^2 C'], rows
ordered (y, x, channel), C' = C or 2 C; x, out [B, C, H, W] fp32; coef, scale, step, history and noise as in `guided_step`;
tokens [B, T, D] with embed_weight [D, C, p, p], embed_bias [D], position [T, D]; without them x' alone is written.
A rescale needs whole samples before the update, and patches of over 64 values (C p^2) do not fit a tile: those take `adaln`,
`linear`, `guided_step` and `patch_embed` instead.

Bytes: e h + weights + 8 B C H W (+ 4 B C H W each for history read, written and given noise) + e' B T D.
FLOPs: 2 B T D C p^2 (halves + learned + embedding) + 4 T D rows of h for the statistics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcfg.errors import Error
from fastcfg.kernels._launch import (
    FLOATS,
    Config,
    Cost,
    Grid,
    cdiv,
    check,
    dot_precision,
    family,
    launch,
    target_of,
    tuned_config,
)
from fastcfg.kernels._step import GUIDED, WIDTH, check_step, guide, solver_update
from fastcfg.kernels.adaln import adaln_ref, check_table
from fastcfg.kernels.guided_step import guided_step_ref
from fastcfg.kernels.linear import linear_ref
from fastcfg.kernels.patch_embed import (
    check_embedding,
    embed_patches,
    patch_columns,
    patch_elements,
    patch_embed_ref,
)  # fmt: skip

MAX_VALUES = 64  # values of a patch, C p^2, whose two halves and variance fit a tile's registers


def step_boundary_ref(
    h: Tensor,
    table: Tensor,
    index: Tensor,
    shift_column: int,
    scale_column: int,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    coef: Tensor,
    scale: Tensor,
    step: Tensor,
    *,
    patch: int,
    eps: float = 1e-6,
    x0_prev: Tensor | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    indices: Tensor | None = None,
    channels: int | None = None,
    clip: bool = False,
    learned: bool = False,
    embed_weight: Tensor | None = None,
    embed_bias: Tensor | None = None,
    position: Tensor | None = None,
    tokens: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    rows, (down, across) = len(h), (x.shape[2] // patch, x.shape[3] // patch)
    predicted = linear_ref(adaln_ref(h, table, index, shift_column, scale_column, eps=eps), weight, bias)
    patches = predicted.view(rows, down, across, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    model_out = patches.reshape(rows, -1, *x.shape[2:])
    x_next = guided_step_ref(
        model_out, x, coef, scale, step, x0_prev=x0_prev, noise=noise, seeds=seeds, indices=indices,
        channels=channels, clip=clip, learned=learned, out=out,
    )  # fmt: skip
    if tokens is not None:
        assert embed_weight is not None
        assert embed_bias is not None
        assert position is not None
        patch_embed_ref(x_next, embed_weight, embed_bias, position, out=tokens)
    return x_next


@triton.jit
def _accumulate(y, scale_sum, shift_sum, h, w, scale, shift, PRECISION: tl.constexpr):
    """Adds a slice of D to h W' [tokens, columns], sum W' [columns] and W shift [columns]."""
    scaled = (w.to(tl.float32) * (1.0 + scale)[None, :]).to(w.dtype)
    y = tl.dot(h.to(w.dtype), scaled.T, y, input_precision=PRECISION)
    scale_sum += tl.sum(scaled.to(tl.float32), axis=1)
    shift_sum += tl.sum(w.to(tl.float32) * shift[None, :], axis=1)
    return y, scale_sum, shift_sum


@triton.jit
def _last_layer(
    h, table, entry, weight, bias, shift_column, scale_column, eps, h_row, token, tokens, eps_row, v_row, used,
    D: tl.constexpr, LEARNED: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(eps, v) of one half, fp32 [TOKENS, COLUMNS]: rows eps_row and v_row of the last layer. v is eps unless LEARNED."""
    y, v = tl.zeros((TOKENS, COLUMNS), tl.float32), tl.zeros((TOKENS, COLUMNS), tl.float32)
    y_scale, y_shift = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    v_scale, v_shift = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    total, squares = tl.zeros((TOKENS,), tl.float32), tl.zeros((TOKENS,), tl.float32)
    h += (h_row * tokens + token.to(tl.int64))[:, None] * D
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        here = tl.load(h + d[None, :], mask=(token < tokens)[:, None] & (d < D)[None, :], other=0.0)
        shift = tl.load(table + entry + shift_column + d, mask=d < D, other=0.0).to(tl.float32)
        scale = tl.load(table + entry + scale_column + d, mask=d < D, other=0.0).to(tl.float32)
        mask = used[:, None] & (d < D)[None, :]
        w = tl.load(weight + eps_row[:, None] * D + d[None, :], mask=mask, other=0.0)
        y, y_scale, y_shift = _accumulate(y, y_scale, y_shift, here, w, scale, shift, PRECISION)
        if LEARNED:
            w = tl.load(weight + v_row[:, None] * D + d[None, :], mask=mask, other=0.0)
            v, v_scale, v_shift = _accumulate(v, v_scale, v_shift, here, w, scale, shift, PRECISION)
        value = here.to(tl.float32)
        total += tl.sum(value, axis=1)
        squares += tl.sum(value * value, axis=1)
    mean = total / D
    deviation = tl.rsqrt(tl.maximum(squares / D - mean * mean, 0.0) + eps)
    y_shift += tl.load(bias + eps_row, mask=used, other=0.0).to(tl.float32)
    y = deviation[:, None] * (y - mean[:, None] * y_scale[None, :]) + y_shift[None, :]
    if LEARNED:
        v_shift += tl.load(bias + v_row, mask=used, other=0.0).to(tl.float32)
        v = deviation[:, None] * (v - mean[:, None] * v_scale[None, :]) + v_shift[None, :]
    return y, v


@triton.jit(do_not_specialize=["rows"])
def _step_boundary_kernel(
    h, table, index, weight, bias, x, out, embed_weight, embed_bias, position, next_tokens, coef, scale, step, x0_prev,
    noise, seeds, indices, eps, rows, tokens, table_width, shift_column, scale_column, guided_elements,
    C: tl.constexpr, OUT_CHANNELS: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PATCH: tl.constexpr, D: tl.constexpr,
    HALVES: tl.constexpr, EMBED: tl.constexpr, CLIP: tl.constexpr, LEARNED: tl.constexpr, HISTORY: tl.constexpr,
    NOISE: tl.constexpr, PRECISION: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token, column = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, COLUMNS)
    VALUES: tl.constexpr = C * PATCH * PATCH
    used = column < VALUES
    # Columns run (channel, y, x), as the embedding wants them; the last layer's rows run (y, x, channel)
    eps_row = column % (PATCH * PATCH) * OUT_CHANNELS + column // (PATCH * PATCH)
    k = tl.load(step + row).to(tl.int64)
    coef += k * WIDTH
    mask = (token < tokens)[:, None] & used[None, :]
    element = patch_elements(token, column, W // PATCH, H, W, PATCH)
    entry = tl.load(index + row).to(tl.int64) * table_width
    prediction, v = _last_layer(
        h, table, entry, weight, bias, shift_column, scale_column, eps, row, token, tokens, eps_row, eps_row + C, used,
        D, LEARNED, COLUMNS, TOKENS, BLOCK_D, PRECISION,
    )  # fmt: skip
    if HALVES == 2:
        entry = tl.load(index + rows + row).to(tl.int64) * table_width
        null, _ = _last_layer(
            h, table, entry, weight, bias, shift_column, scale_column, eps, rows + row, token, tokens, eps_row, eps_row,
            used, D, False, COLUMNS, TOKENS, BLOCK_D, PRECISION,
        )  # fmt: skip
        s = tl.load(scale + k * rows + row, mask=tl.load(coef + GUIDED) != 0.0, other=1.0)
        prediction = guide(prediction, null, s, element < guided_elements)
    x_t = tl.load(x + row * C * H * W + element, mask=mask, other=0.0)
    x_next = solver_update(
        x_t, prediction, v, element, mask, coef, k, row, rows, C * H * W, x0_prev, noise, seeds, indices,
        CLIP, LEARNED, HISTORY, NOISE,
    )  # fmt: skip
    tl.store(out + row * C * H * W + element, x_next, mask=mask)
    if EMBED:
        patches = tl.where(mask, x_next, 0.0)
        embed_patches(
            patches, token, tokens, row, embed_weight, embed_bias, position, next_tokens,
            D, VALUES, COLUMNS, BLOCK_D, PRECISION,
        )  # fmt: skip


def step_boundary(
    h: Tensor,
    table: Tensor,
    index: Tensor,
    shift_column: int,
    scale_column: int,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    coef: Tensor,
    scale: Tensor,
    step: Tensor,
    *,
    patch: int,
    eps: float = 1e-6,
    x0_prev: Tensor | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    indices: Tensor | None = None,
    channels: int | None = None,
    clip: bool = False,
    learned: bool = False,
    embed_weight: Tensor | None = None,
    embed_bias: Tensor | None = None,
    position: Tensor | None = None,
    tokens: Tensor | None = None,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """x' in `out` (which may be x itself) and, where `tokens` is given, the next step's tokens in it.

    h of B rows is taken unguided. The options are those of `guided_step`; patch is p. Raises Error on shapes, dtypes,
    devices, and patches of more than 64 values.
    """
    out = torch.empty_like(x) if out is None else out
    out_channels = _check(h, table, index, shift_column, scale_column, weight, bias, x, patch, channels, out)
    B, C, H, W = x.shape
    arguments = check_step(
        x, coef, scale, step, x0_prev=x0_prev, noise=noise, seeds=seeds, indices=indices, learned=learned,
        channels=out_channels,
    )  # fmt: skip
    embedding = {"embed_weight": embed_weight, "embed_bias": embed_bias, "position": position, "next_tokens": tokens}
    _check_embedding(x, h, patch, embedding)
    T, D = h.shape[1:]
    target, columns = target_of(h), patch_columns(C, patch, MAX_VALUES)

    def grid(config: Config) -> Grid:
        return B, cdiv(T, config["TOKENS"])

    config = config or tuned_config("step_boundary", (h, weight), grid, columns=columns, D=D, learned=int(learned))
    config = config or step_boundary_config(columns, weight.dtype, target)
    launch(
        _step_boundary_kernel, grid(config), x.device, config,
        h=h, table=table, index=index, weight=weight, bias=bias, x=x, out=out, eps=float(eps), rows=B, tokens=T,
        table_width=table.shape[1], shift_column=shift_column, scale_column=scale_column,
        guided_elements=H * W * (C if channels is None else channels), C=C, OUT_CHANNELS=out_channels, H=H, W=W,
        PATCH=patch, D=D, HALVES=len(h) // B, EMBED=tokens is not None, CLIP=bool(clip),
        PRECISION=dot_precision(weight.dtype, target), COLUMNS=columns, **embedding, **arguments,
    )  # fmt: skip
    return out


def step_boundary_config(columns: int, dtype: torch.dtype, target: str) -> Config:
    """Tiles by the model's shapes alone: 64 tokens, as wgmma and tcgen05 want, where their registers suffice."""
    generation, single = family(target), dtype == torch.float32
    stages = 1 if generation == "gfx942" else 3
    if columns <= 32:
        tokens, block, warps = 64, 32 if single else 64, 4
    elif generation == "gfx942":
        tokens, block, warps = 16 if single else 32, 32, 4
    elif single:
        tokens, block, warps = 32, 32, 8
    else:
        tokens, block, warps = (64, 32, 8) if generation in ("sm_90", "sm_100") else (32, 32, 4)
    return {"TOKENS": tokens, "BLOCK_D": block, "num_warps": warps, "num_stages": stages}


def step_boundary_cost(
    h: Tensor,
    weight: Tensor,
    x: Tensor,
    *,
    patch: int,
    learned: bool = False,
    history: bool = False,
    given_noise: bool = False,
    tokens: Tensor | None = None,
    position: Tensor | None = None,
) -> Cost:
    rows, T, D = h.shape
    B, values = len(x), x.shape[1] * patch**2
    halves, embed = rows // B, tokens is not None
    parts = [h, weight[: values * (1 + learned)], *([x] * (2 + 2 * history + given_noise))]
    moved = sum(t.numel() * t.element_size() for t in [*parts, *(t for t in (tokens, position) if t is not None)])
    moved += 2 * rows * D * h.element_size() + embed * (values + 1) * D * weight.element_size()
    products = 2 * B * T * D * values * (halves + learned + embed)
    return Cost(bytes=moved, flops=products + 4 * rows * T * D + (8 + 3 * (halves - 1)) * x.numel())


def _check(
    h: Tensor,
    table: Tensor,
    index: Tensor,
    shift_column: int,
    scale_column: int,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    patch: int,
    channels: int | None,
    out: Tensor,
) -> int:
    """Checks the last layer against the samples, and returns the model's channels."""
    check("x", x, [None, None, None, None], torch.float32, x.device)
    check("out", out, x.shape, torch.float32, x.device)
    B, C, H, W = x.shape
    if not x.numel() or patch < 1 or H % patch or W % patch:
        raise Error(f"patch must divide the sample's {H} x {W}, got {patch}")
    check("h", h, [None, H * W // patch**2, None], FLOATS, x.device)
    if len(h) not in (B, 2 * B):
        raise Error(f"h must have {B} rows, or {2 * B} with the null half, got {len(h)}")
    check("index", index, [len(h)], torch.int32, x.device)
    check_table(table, h, {"shift": shift_column, "scale": scale_column})
    check("weight", weight, [None, h.shape[2]], FLOATS, x.device)
    check("bias", bias, [len(weight)], weight.dtype, x.device)
    if len(weight) % patch**2:
        raise Error(f"weight must have a multiple of {patch**2} rows for patches of {patch} x {patch}, got {len(weight)}")
    if channels is not None and not 1 <= channels <= C:
        raise Error(f"channels must lie in [1, {C}], got {channels}")
    return len(weight) // patch**2


def _check_embedding(x: Tensor, h: Tensor, patch: int, embedding: dict[str, Tensor | None]) -> None:
    given = [tensor for tensor in embedding.values() if tensor is not None]
    if not given:
        return
    if len(given) < len(embedding):
        raise Error("embed_weight, embed_bias, position and tokens go together")
    weight, bias, position, tokens = given
    check_embedding(x, weight, bias, position)
    if weight.shape[0] != h.shape[2] or weight.shape[2] != patch:
        raise Error(f"embed_weight must be [{h.shape[2]}, C, {patch}, {patch}], got {list(weight.shape)}")
    check("tokens", tokens, [len(x), *h.shape[1:]], FLOATS, x.device)
