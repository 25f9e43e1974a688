"""The Diffusion Transformer (Peebles & Xie 2212.09748) as a standard torch training module.

Parameter names and arithmetic are those of the official code, so its checkpoints load as they are: attention and MLP
biases, LayerNorm eps 1e-6, tanh GELU, sin-cos position embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcfg.errors import Error, as_number, as_whole, check_known

CPU = torch.device("cpu")
FREQUENCY_DIM = 256  # width of the sinusoidal timestep features in every official DiT


@dataclass(frozen=True)
class DiTConfig:
    """The constructor's arguments under their official names, plus what diffusers' form of DiT does differently.

    class_dropout_prob: probability of the null label in training; at 0 there is no null label and no guidance.
    time_frequency_shift: sinusoidal frequencies are 10000^(-i / (128 - shift)): 0 officially, 1 in diffusers.
    mlp_norm_eps: eps of the LayerNorm before the MLP: 1e-6 officially, 1e-5 in diffusers.
    block_conditioning: each block embeds t and y by itself (diffusers keeps such copies, and may have trained them apart).
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    num_classes: int = 1000
    learn_sigma: bool = True
    time_frequency_shift: float = 0
    mlp_norm_eps: float = 1e-6
    block_conditioning: bool = False

    def __post_init__(self) -> None:
        for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes"):
            value = getattr(self, name)
            whole = as_whole(value)
            if whole is None or whole < 1:
                raise Error(f"DiT: {name} must be a whole number of at least 1, got {value!r}")
            object.__setattr__(self, name, whole)  # one of NumPy's could not be written into a checkpoint
        if self.input_size % self.patch_size:
            raise Error(f"DiT: input_size {self.input_size} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % self.num_heads:
            raise Error(f"DiT: hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.hidden_size % 4:
            raise Error(f"DiT: hidden_size must be a multiple of 4 for the position embedding, got {self.hidden_size}")
        for name, low, high in (
            ("class_dropout_prob", 0.0, 0.999),
            ("mlp_ratio", 1 / self.hidden_size, 1e3),
            ("mlp_norm_eps", 1e-12, 1.0),
            ("time_frequency_shift", 0, 1),
        ):
            number = as_number(getattr(self, name))
            if number is None or not low <= number <= high:
                raise Error(f"DiT: {name} must be a number in [{low:g}, {high:g}], got {getattr(self, name)!r}")
            object.__setattr__(self, name, number)
        for name in ("learn_sigma", "block_conditioning"):
            if not isinstance(getattr(self, name), bool):
                raise Error(f"DiT: {name} must be true or false, got {getattr(self, name)!r}")

    @property
    def out_channels(self) -> int:
        return self.in_channels * 2 if self.learn_sigma else self.in_channels

    @property
    def tokens(self) -> int:
        return (self.input_size // self.patch_size) ** 2

    @property
    def mlp_width(self) -> int:
        return int(self.hidden_size * self.mlp_ratio + 1e-6)  # a ratio read back from weights may fall just short

    @property
    def null_label(self) -> int | None:
        """The label that stands for no condition, or None for a model trained without one."""
        return self.num_classes if self.class_dropout_prob > 0 else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> DiTConfig:
        """The config stored in a checkpoint; unknown keys are refused rather than ignored."""
        if not isinstance(data, dict):
            raise Error(f"a DiT config is stored as an object, got {type(data).__name__}")
        unknown = sorted(set(data) - set(cls.__dataclass_fields__))
        if unknown:
            raise Error(f"unknown DiT config keys {unknown}: known are {sorted(cls.__dataclass_fields__)}")
        return cls(**data)


_SIZES = {"XL": (28, 1152, 16), "L": (24, 1024, 16), "B": (12, 768, 12), "S": (12, 384, 6)}  # depth, width, heads
DIT_NAMES = tuple(f"DiT-{size}/{patch}" for size in _SIZES for patch in (2, 4, 8))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, with one shift and scale per row. x: [N, T, D]; shift, scale: [N, D]."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def _by_rows(activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """An activation of x [..., D] whose rounding of a row does not depend on where the row lies in x.

    On a CPU torch computes 32 float32 values at a time over the whole tensor and what is left at its end by other code, which
    rounds differently: rows are padded to whole groups.
    """
    D = x.shape[-1]
    return activation(x) if D % 32 == 0 else activation(F.pad(x, (0, -D % 32)))[..., :D]


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x), the same for a row wherever it lies in x [..., D]."""
    return _by_rows(F.silu, x)


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, the same for a row wherever it lies in x [..., D]."""
    return _by_rows(partial(F.gelu, approximate="tanh"), x)


class SiLU(nn.Module):
    """`silu` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return silu(x)


@lru_cache
def timestep_frequencies(shift: float, device: torch.device = CPU) -> Tensor:
    """10000^(-i / (128 - shift)) for i = 0..127, float32, the same on every machine; kept on each device, since a copy in every
    forward would wait for the device, which CUDA graphs do not allow.

    The angles are t times these, so one ulp of a frequency moves an angle by up to 6e-5: more than the rest of a float32
    forward. torch.exp rounds some entries differently from one processor to the next (and the official code takes its
    table from whatever host it runs on), so the exponentials are taken in float64 of the official float32 exponents, and
    rounded once. Entry 13 of the official table is one ulp above that: so it is in the official outputs that
    `tests/golden` holds, and `tests/test_dit.py` shows that no other single change fits them better.
    """
    if device != CPU:
        return timestep_frequencies(shift).to(device)
    half = FREQUENCY_DIM // 2
    with torch.inference_mode(False), CPU:  # whatever the mode and default device of whoever asks first
        exponent = -math.log(10000.0) * torch.arange(half, dtype=torch.float32) / (half - shift)
        table = torch.exp(exponent.double()).float()
        if shift == 0:
            table[13] = torch.nextafter(table[13], torch.tensor(1.0))
    return table


class TimestepEmbedder(nn.Module):
    """t [N] -> [N, D]: sinusoidal features through two layers."""

    def __init__(self, hidden_size: int, frequency_shift: float):
        super().__init__()
        self.frequency_shift = frequency_shift
        self.mlp = nn.Sequential(nn.Linear(FREQUENCY_DIM, hidden_size), SiLU(), nn.Linear(hidden_size, hidden_size))

    def features(self, t: Tensor) -> Tensor:
        """[cos, sin] of t at falling frequencies, float32 [N, 256]."""
        angles = t[:, None].float() * timestep_frequencies(self.frequency_shift, t.device)[None]
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.features(t).to(self.get_parameter("mlp.0.weight").dtype))


class LabelEmbedder(nn.Module):
    """y [N] -> [N, D]. The table's last row is the null label where the model has one."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        rows = config.num_classes + (config.null_label is not None)
        self.embedding_table = nn.Embedding(rows, config.hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    """Multi-head self-attention on [N, T, D], with one packed qkv product."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        N, T, D = x.shape
        q, k, v = self.qkv(x).reshape(N, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, T, D))


class Mlp(nn.Module):
    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


class DiTBlock(nn.Module):
    """Attention and MLP, each behind an adaLN whose shift, scale and gate come from the condition c [N, D].

    With `block_conditioning` the block makes its own c from t and y [N].
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        D = config.hidden_size
        self.norm1 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(D, config.num_heads)
        self.norm2 = nn.LayerNorm(D, elementwise_affine=False, eps=config.mlp_norm_eps)
        self.mlp = Mlp(D, config.mlp_width)
        self.adaLN_modulation = nn.Sequential(SiLU(), nn.Linear(D, 6 * D))
        self.own_condition = config.block_conditioning
        if self.own_condition:
            self.t_embedder = TimestepEmbedder(D, config.time_frequency_shift)
            self.y_embedder = LabelEmbedder(config)

    def forward(self, x: Tensor, c: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self.own_condition:
            c = self.t_embedder(t) + self.y_embedder(y)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """adaLN and the linear layer to patch_size^2 x out_channels values a token."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        D = config.hidden_size
        self.norm_final = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(D, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(SiLU(), nn.Linear(D, 2 * D))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class PatchEmbed(nn.Module):
    """[N, C, H, W] -> [N, T, D], one token a patch, row by row."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class DiT(nn.Module):
    """forward(x [N, C, H, W], t [N], y [N] int64) -> [N, out_channels, H, W]; channels are eps, then v if learn_sigma.

    Draws no labels to drop by itself: the training loop (`fastcfg.training`) replaces labels by `config.null_label`.
    """

    def __init__(self, config: DiTConfig | None = None, **arguments: Any):
        super().__init__()
        if config is not None and arguments:
            raise Error("DiT takes a DiTConfig or its fields as keywords, not both")
        self.config = config = config if config is not None else DiTConfig(**arguments)
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(config.hidden_size, config.time_frequency_shift)
        self.y_embedder = LabelEmbedder(config)
        table = position_embedding(config.hidden_size, config.input_size // config.patch_size)
        self.pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.blocks = nn.ModuleList([DiTBlock(config) for _ in range(config.depth)])
        self.final_layer = FinalLayer(config)
        self._initialize()

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> DiT:
        """One of the twelve published sizes, `DIT_NAMES` ("DiT-XL/2" .. "DiT-S/8"); overrides are DiTConfig fields."""
        check_known("DiT size", name, DIT_NAMES)
        size, patch = name.removeprefix("DiT-").split("/")
        depth, hidden_size, num_heads = _SIZES[size]
        shape = {"depth": depth, "hidden_size": hidden_size, "num_heads": num_heads, "patch_size": int(patch)}
        return cls(**(shape | overrides))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, c, t, y)
        return self.unpatchify(self.final_layer(tokens, c))

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """[N, T, p p C] -> [N, C, H, W]."""
        side, p = self.config.input_size // self.config.patch_size, self.config.patch_size
        patches = tokens.reshape(len(tokens), side, side, p, p, self.config.out_channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, side * p, side * p)

    def _initialize(self) -> None:
        """The official initialisation: Xavier for products, 0.02 for embeddings, zero for every gate and the output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():  # a second pass: it narrows some of the products just drawn
            if isinstance(module, TimestepEmbedder):
                nn.init.normal_(module.get_parameter("mlp.0.weight"), std=0.02)
                nn.init.normal_(module.get_parameter("mlp.2.weight"), std=0.02)
            elif isinstance(module, LabelEmbedder):
                nn.init.normal_(module.embedding_table.weight, std=0.02)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.config.hidden_size, -1))
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer.") or name == "x_embedder.proj.bias":
                nn.init.zeros_(parameter)


def position_embedding(width: int, side: int) -> Tensor:
    """Fixed 2-D sin-cos table, float32 [side * side, width]: the column's half first, then the row's (MAE's order)."""
    omega = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4.0))
    column, row = np.meshgrid(np.arange(side, dtype=np.float64), np.arange(side, dtype=np.float64))
    angles = [np.outer(axis.reshape(-1), omega) for axis in (column, row)]
    table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)
    return torch.tensor(table, dtype=torch.float32)  # on the default device, as all else of a module
