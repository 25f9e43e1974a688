"""Guidance, classifier-free and by a classifier: what is asked for, how strong, and in which steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastcfg.errors import Error, as_number, as_whole
from fastcfg.schedules import Array

BASES = ("null", "conditional")
_LARGEST = float(np.finfo(np.float32).max)  # a scale is float32 in `scale_table`

# Where a scale below 1 asks for something that can be had: eps_null itself, which is what s = 0 and w = -1 stand for
_UNCONDITIONAL = (
    "for unconditional samples give the null label as label, at scale 1, to a sampler made with num_classes=null_label + 1"
)

Real = TypeVar("Real", np.float32, np.float64)


def exact(value: float) -> str:
    """A number in as few digits as tell it from every other."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


@dataclass(frozen=True)
class Interval:
    """Guidance only in part of the run (Kynkaanniemi et al. 2404.07724).

    unit "timestep": for lo <= t <= hi, t as the model is given it and a plan prints it. unit "sigma": for sigma / alpha in
    (lo, hi], as in the paper.
    """

    lo: float
    hi: float
    unit: str = "timestep"

    def __post_init__(self) -> None:
        if self.unit not in ("timestep", "sigma"):
            raise Error(f"interval: unit must be 'timestep' or 'sigma', got {self.unit!r}")
        for name, value in (("lo", self.lo), ("hi", self.hi)):
            if (number := as_number(value)) is None or number < 0:
                raise Error(f"interval: bounds must be numbers of at least 0, got {value!r}")
            object.__setattr__(self, name, number)
        if self.lo > self.hi or (self.unit == "sigma" and self.lo == self.hi):
            raise Error(f"interval: the lower bound comes first and below the upper, got {self.lo} to {self.hi}")

    @classmethod
    def parse(cls, value: Any) -> Interval | None:
        """None, an Interval, a pair of timesteps, or text: "100:261" (timesteps), "sigma:0.34:1.02"."""
        if value is None or isinstance(value, Interval):
            return value
        form = 'want two timesteps (100, 261), "100:261", "sigma:0.34:1.02" or fastcfg.Interval'
        unit, bounds = "timestep", value
        if isinstance(value, str):
            *head, first, second = value.split(":") if value.count(":") in (1, 2) else ("", "", "")
            unit, bounds = (head[0] if head else unit), (first, second)
        try:
            lo, hi = (float(bound) for bound in bounds)
        except (TypeError, ValueError):
            raise Error(f"interval: {form}, got {value!r}") from None
        return cls(lo, hi, unit)

    def __str__(self) -> str:
        """As `parse` takes it."""
        return f"{'sigma:' if self.unit == 'sigma' else ''}{exact(self.lo)}:{exact(self.hi)}"

    def contains(self, timesteps: Array, noise_ratio: Array) -> NDArray[np.bool_]:
        """Which steps are inside, bool [steps]. timesteps: t; noise_ratio: sigma / alpha; both [steps]."""
        if self.unit == "sigma":
            return (noise_ratio > self.lo) & (noise_ratio <= self.hi)
        return (timesteps >= self.lo) & (timesteps <= self.hi)


@dataclass(frozen=True)
class Guidance:
    """How the conditional and the null prediction become one, eps_null + s (eps_y - eps_null): all but s (see `scale_table`).

    interval: guide only there; elsewhere the conditional prediction stands. rescale: phi in [0, 1] (Lin et al. 2305.08891,
    section 3.4). channels: guide only the first this many channels, as the official DiT does with 3; None guides all.
    """

    interval: Interval | None = None
    rescale: float = 0.0
    channels: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "interval", Interval.parse(self.interval))
        phi, channels = as_number(self.rescale), self.channels
        if phi is None or not 0 <= phi <= 1:
            raise Error(f"rescale must be a number in [0, 1], got {self.rescale!r}")
        object.__setattr__(self, "rescale", phi)
        if channels is not None:
            object.__setattr__(self, "channels", as_whole(channels))
            if self.channels is None or self.channels < 1:
                raise Error(f"guidance_channels must be None (all) or a whole number of at least 1, got {channels!r}")

    def combine(self, cond: Tensor, null: Tensor, scale: Tensor) -> Tensor:
        """The guided prediction. cond, null: [B, C, ...]; scale: [B]. Rows with scale 1 are `cond` to the bit."""
        scale = scale.view(-1, *[1] * (cond.ndim - 1))
        guided = null + scale * (cond - null)
        if self.rescale:
            guided = self.rescale * guided * (_std(cond) / _std(guided)) + (1 - self.rescale) * guided
        return torch.where(scale == 1, cond, guided)


@dataclass(frozen=True)
class ClassifierGuidance:
    """Guidance by a classifier of noisy images (Dhariwal & Nichol 2105.05233, algorithm 2).

    eps_hat = eps - scale sigma grad_x log p(y | x_t), with sigma = sqrt(1 - alpha_bar). classifier: module(x_t [N, C, H, W],
    t [N]) -> logits [N, K], one for each of the model's labels, trained on its noise levels and its t, in eval mode. scale: in
    the forms of `scale_table`, at least 0; 0 is off. base: which prediction eps is: "null", the unconditional one, or
    "conditional", the one for y, which a classifier-free scale above 1 has guided already.
    """

    classifier: nn.Module
    scale: Any = 1.0
    base: str = "null"

    def __post_init__(self) -> None:
        if not isinstance(self.classifier, nn.Module):
            raise Error(f"classifier must be a torch.nn.Module(x_t, t) -> logits, got {type(self.classifier).__name__}")
        if self.base not in BASES:
            raise Error(f"base must be 'null' or 'conditional', got {self.base!r}")
        object.__setattr__(self, "scale", _checked_scale(self.scale, name="classifier scale", least=0.0))

    def table(self, steps: int, rows: int) -> Array:
        """The scale of every step and row, float64 [steps, rows]."""
        return _table("classifier scale", self.scale, steps, rows, np.float64)


def scale_table(scale: Any, steps: int, rows: int) -> NDArray[np.float32]:
    """The guidance scale s of every step and row, float32 [steps, rows]; 1 is off, and below 1 is an Error.

    scale: a number, one per row [rows], or one per step, [steps, 1] or [steps, rows], in executed order (noisiest first).
    """
    return _table("scale", _checked_scale(scale), steps, rows, np.float32)


def scale_from_w(w: Any) -> Array:
    """s = 1 + w of the paper's form, (1 + w) eps_y - w eps_null. w: in the forms of `scale_table`, at least 0."""
    return _checked_scale(w, name="w", least=0.0) + 1.0


def _table(name: str, scale: Array, steps: int, rows: int, dtype: type[Real]) -> NDArray[Real]:
    """`scale`, as `_checked_scale` gave it, for every step and row [steps, rows]."""
    if scale.ndim == 1 and len(scale) != rows:
        raise Error(f"{name} has one value a row: {len(scale)} values arrived for {rows} rows")
    if scale.ndim == 2 and (scale.shape[0] != steps or scale.shape[1] not in (1, rows)):
        raise Error(f"{name} per step must be [{steps}, 1] or [{steps}, {rows}], got {list(scale.shape)}")
    table = np.empty((steps, rows), dtype)
    table[:] = scale
    return table


def _std(x: Tensor) -> Tensor:
    """Unbiased standard deviation of each sample, [B, 1, ...]."""
    return x.std(dim=tuple(range(1, x.ndim)), keepdim=True)


def _checked_scale(scale: Any, name: str = "scale", least: float = 1.0) -> Array:
    """`scale` as float64 of rank 0, 1 or 2, every value finite and at least `least`."""
    try:
        if isinstance(scale, Tensor):
            scale = scale.detach().cpu()
            scale = scale.double() if scale.is_floating_point() else scale  # NumPy has no bfloat16
        values = np.asarray(scale)
        if values.dtype == bool or values.dtype.kind not in "iuf":
            raise TypeError
        values = values.astype(np.float64)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor without values
        raise Error(f"{name} must be a number or numbers, got {scale!r}") from None
    if values.ndim > 2 or values.size == 0:
        raise Error(f"{name} must be a number, one per row, or one per step and row, got shape {list(values.shape)}")
    low, high = (values[()],) * 2 if values.ndim == 0 else (values.min(), values.max())
    if not (low >= least and high <= _LARGEST):  # a NaN is the least and the largest
        wrong = values[~((values >= least) & (values <= _LARGEST))]
        note = " (1 is no guidance; the paper's w is scale - 1)" if name == "scale" else ""
        way = f": {_UNCONDITIONAL}" if name in ("scale", "w") and wrong[0] < least else ""
        raise Error(f"{name} must be finite and at least {least:g}{note}, got {wrong[0]}{way}")
    return values
