"""A network together with how its inputs and output are to be read: what a sampler needs to know of any model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastcfg.errors import Error, as_whole
from fastcfg.models.dit import DiT
from fastcfg.models.weights import refuse_training
from fastcfg.schedules import Schedule, linear
from fastcfg.schedules import schedule as find_schedule


@dataclass(frozen=True)
class Denoiser:
    """module(x [N, C, H, W], t [N], y [N, ...]) -> [N, C or 2C, H, W], and the conventions it was trained with.

    shape: (C, H, W) of a sample. null_label: the y that stands for no condition: a whole number, or a tensor where y is an
    embedding; None for a model that has none, which can be sampled at scale 1 only. num_classes: valid labels are
    0..num_classes-1; None where y is an embedding. learned_variance: channels C.. are v (2102.09672). clip, eta: whether x0
    is clipped to [-1, 1] (pixel models), and DDIM's noise, unless the caller says otherwise. latent: samples are a VAE's
    latents. low_precision: whether samples keep their quality in bfloat16, so that dtype "auto" may choose it.
    """

    module: nn.Module
    shape: tuple[int, int, int]
    null_label: int | Tensor | None
    num_classes: int | None
    schedule: Schedule = field(default_factory=linear)
    predicts: str = "eps"
    learned_variance: bool = False
    clip: bool = False
    eta: float = 0.0
    latent: bool = False
    low_precision: bool = True
    label_names: tuple[str, ...] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def label_name(self, label: int) -> str:
        """What the label is called, the number itself where it has no name."""
        if self.label_names is None or not 0 <= label < len(self.label_names):
            return str(label)
        return self.label_names[label]

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)


def call_module(module: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """module(x, t, y), taking the `.sample` that diffusers' models wrap their output in."""
    output = module(x, t, y)
    return getattr(output, "sample", output)


def as_denoiser(
    model: nn.Module | Denoiser,
    *,
    schedule: str | Schedule | None = None,
    predicts: str | None = None,
    null_label: int | Tensor | None = None,
    num_classes: int | None = None,
    shape: tuple[int, int, int] | None = None,
) -> Denoiser:
    """`model` as a Denoiser. For a Denoiser or our DiT all is known, and the arguments override; any other module is
    read as far as its `config` tells (diffusers), and tried once on one row, so that what does not fit is said here.
    """
    null_label, num_classes = _whole_null_label(null_label), _whole_count(num_classes)
    model = _dit_within(model)
    module = model.module if isinstance(model, Denoiser) else model
    if not isinstance(module, nn.Module):
        raise Error(f"model must be a torch.nn.Module or what fastcfg.load returns, got {type(module).__name__}")
    of_dit = describe_dit(module) if isinstance(module, DiT) else None
    known = model if isinstance(model, Denoiser) else of_dit or _describe_foreign(module, shape, null_label, num_classes)
    changes: dict[str, Any] = {
        "schedule": None if schedule is None else find_schedule(schedule),
        "predicts": predicts,
        "null_label": null_label,
        "num_classes": num_classes,
        "shape": _checked_shape(known.shape if shape is None else shape),
    }
    described = replace(known, **{name: value for name, value in changes.items() if value is not None})
    described, own = _checked_labels(described), of_dit or known
    if described.shape != tuple(own.shape):
        raise Error(f"shape {described.shape} asked, but the model's samples are {own.shape} (C, H, W)")
    if described.learned_variance and not own.learned_variance:
        raise Error("learned_variance asked, but the model predicts no variance")
    return described if isinstance(model, (Denoiser, DiT)) else _probe(described)


def _dit_within(model: nn.Module | Denoiser) -> nn.Module | Denoiser:
    """Our DiT where torch.compile or data parallelism has wrapped it, since the engines run it faster themselves."""
    inner: Any = model
    while isinstance(inner, nn.Module):
        if isinstance(inner, DiT):
            return inner
        if isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = inner.module
        else:
            inner = getattr(inner, "_orig_mod", None)  # of torch.compile's wrapper, whose class takes a second to import
    return model


def describe_dit(model: DiT, **others: Any) -> Denoiser:
    """A DiT as its config describes it; the schedule is DiT's linear one unless given."""
    config = model.config
    return Denoiser(
        module=model,
        shape=(config.in_channels, config.input_size, config.input_size),
        null_label=config.null_label,
        num_classes=config.num_classes,
        learned_variance=config.learn_sigma,
        **others,
    )


def _describe_foreign(
    module: nn.Module, shape: tuple[int, int, int] | None, null_label: int | Tensor | None, num_classes: int | None
) -> Denoiser:
    config = getattr(module, "config", None)
    if not isinstance(config, Mapping):
        config = {}
    if shape is None:
        channels, size = config.get("in_channels"), config.get("sample_size")
        if channels is None or size is None:
            raise Error(f"{type(module).__name__} does not say the shape of its samples: pass shape=(C, H, W)")
        shape = (channels, *(size if isinstance(size, (list, tuple)) else (size, size)))
    if null_label is None:
        null_label = config.get("num_embeds_ada_norm")  # diffusers' DiT keeps one row more than it has classes
    if null_label is None:
        raise Error(f"{type(module).__name__} does not say which label means 'no condition': pass null_label=")
    if num_classes is None and isinstance(null_label, int):
        if null_label == 0:
            raise Error("null_label 0 does not tell how many labels there are: pass num_classes= (labels are 0..num_classes-1)")
        num_classes = null_label
    return Denoiser(module=module, shape=_checked_shape(shape), null_label=null_label, num_classes=num_classes)


def _checked_shape(shape: Any) -> tuple[int, int, int]:
    try:
        channels, height, width = (int(n.__index__()) for n in shape)
    except (TypeError, ValueError, AttributeError):
        raise Error(f"shape must be three whole numbers (C, H, W), got {shape!r}") from None
    if min(channels, height, width) < 1:
        raise Error(f"shape must be positive (C, H, W), got {shape!r}")
    return channels, height, width


def _whole_null_label(null: Any) -> int | Tensor | None:
    """An embedding as it is, and any library's whole number as an int."""
    if null is None or (isinstance(null, Tensor) and (null.ndim or null.is_floating_point())):
        return null
    whole = as_whole(null)
    if whole is None or whole < 0:
        raise Error(f"null_label must be a whole number of at least 0 or a tensor, got {null!r}")
    return whole


def _whole_count(count: Any) -> int | None:
    whole = as_whole(count)
    if count is not None and (whole is None or whole < 1):
        raise Error(f"num_classes must be a whole number of at least 1, got {count!r}")
    return whole


def _checked_labels(model: Denoiser) -> Denoiser:
    null, count = _whole_null_label(model.null_label), _whole_count(model.num_classes)
    if count is None and not isinstance(null, Tensor):
        raise Error("the model does not tell how many labels there are: pass num_classes= (labels are 0..num_classes-1)")
    if isinstance(model.module, DiT):
        rows = model.module.y_embedder.embedding_table.num_embeddings
        if isinstance(null, int) and null >= rows:
            raise Error(f"null_label {null} asked, but the model's label table has rows 0..{rows - 1}")
        if count is not None and count > rows:  # one more than its classes lets the null label be asked for
            raise Error(f"num_classes {count} asked, but the model's label table has rows 0..{rows - 1}")
    return replace(model, null_label=null, num_classes=count)


def try_module(model: Denoiser, t: Tensor, label: int | None = None) -> Tensor:
    """What the module makes of one row of zeros at t [1], with this label (None: the null label), on its own device.

    Raises Error, which says what was tried, for whatever the module raises, for one in training mode, and for another output
    than `model` promises.
    """
    refuse_training(model.module)  # whose normalisations would keep statistics of the zeros
    x = torch.zeros(1, *model.shape, device=model.device, dtype=model.dtype)
    y = torch.as_tensor(model.null_label if label is None else label, device=model.device)[None]
    y = y.to(model.dtype) if y.is_floating_point() else y
    try:
        with torch.no_grad():
            output = call_module(model.module, x, t.to(model.device), y)
    except Exception as error:  # any module, any failure: what matters is that it came before the work
        what = f"null label {model.null_label if y.ndim == 1 else list(y.shape)}"
        if label is not None:
            what = f"{label}, the last of num_classes = {model.num_classes} labels"
        line = (str(error).splitlines() or [""])[0]
        raise Error(
            f"{type(model.module).__name__} could not be called as module(x {list(x.shape)}, t = {t.item():g} "
            f"({str(t.dtype).removeprefix('torch.')}), y = {what}): {line or type(error).__name__}"
        ) from error
    name, (channels, *size) = type(model.module).__name__, model.shape
    if not isinstance(output, Tensor):
        raise Error(f"{name} must return a tensor or have one as .sample, got {type(output).__name__}")
    wanted = (2 * channels,) if model.learned_variance else (channels, 2 * channels)
    if list(output.shape) not in [[1, number, *size] for number in wanted]:
        numbers = " or ".join(map(str, wanted))
        raise Error(f"{name} turned x {list(x.shape)} into {list(output.shape)}: want {numbers} channels")
    return output


def _probe(model: Denoiser) -> Denoiser:
    """Tries the module with the null label; learns from its output whether it has variance channels."""
    output = try_module(model, torch.zeros(1, dtype=torch.int64, device="cpu"))
    return replace(model, learned_variance=output.shape[1] == 2 * model.shape[0])
