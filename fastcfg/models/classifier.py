"""A compact classifier of noisy images, for classifier guidance: log p(y | x_t) at any noise level of a schedule."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcfg.devices import find_device
from fastcfg.errors import Error
from fastcfg.files import read_safetensors, write_safetensors
from fastcfg.models.dit import TimestepEmbedder
from fastcfg.schedules import Schedule, schedule_from_json, stored_schedule

SHIPPED = ("fashion-mnist",)
FORMAT = "fastcfg-classifier-1"
GROUPS = 8  # of a GroupNorm


@dataclass(frozen=True)
class ClassifierConfig:
    """width: channels at half the input's resolution, doubled at each of `levels` halvings. blocks: residual blocks a level."""

    in_channels: int = 3
    num_classes: int = 1000
    width: int = 32
    levels: int = 3
    blocks: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise Error(f"classifier: {name} must be a whole number of at least 1, got {value!r}")
        if self.width % GROUPS:
            raise Error(f"classifier: width must be a multiple of {GROUPS}, got {self.width}")

    @property
    def widths(self) -> list[int]:
        return [self.width * 2**level for level in range(self.levels)]


class Block(nn.Module):
    """Two convolutions around a GroupNorm whose scale and shift follow from t (adaGN, 2105.05233 section 3), and a skip."""

    def __init__(self, inputs: int, outputs: int, condition: int, stride: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        self.modulation = nn.Linear(condition, 2 * outputs)
        self.norm2 = nn.GroupNorm(GROUPS, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride) if (inputs, 1) != (outputs, stride) else nn.Identity()

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.modulation(c)[:, :, None, None].chunk(2, dim=1)
        inner = self.conv1(F.silu(self.norm1(h)))
        return self.skip(h) + self.conv2(F.silu(self.norm2(inner) * (1 + scale) + shift))


class Classifier(nn.Module):
    """forward(x_t [N, C, H, W], t [N]) -> logits [N, K]: the encoder's half of a U-Net, its last level averaged.

    schedule: the noise levels it was trained on, which are those it must be asked about.
    """

    def __init__(self, config: ClassifierConfig, schedule: Schedule):
        super().__init__()
        self.config, self.schedule = config, schedule
        widths = config.widths
        self.t_embedder = TimestepEmbedder(widths[-1], 0)
        self.stem = nn.Conv2d(config.in_channels, widths[0], 4, stride=2, padding=1)
        ends = [(w, w) for w in widths for _ in range(config.blocks)]
        for level in range(1, config.levels):
            ends[level * config.blocks] = (widths[level - 1], widths[level])
        self.blocks = nn.ModuleList([Block(i, o, widths[-1], stride=1 if i == o else 2) for i, o in ends])
        self.norm = nn.GroupNorm(GROUPS, widths[-1])
        self.head = nn.Linear(widths[-1], config.num_classes)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        c = F.silu(self.t_embedder(t))
        # On a CPU torch hands a single image to oneDNN only in this layout: three times as fast as its own convolution
        h = self.stem(x_t).contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            h = block(h, c)
        return self.head(F.silu(self.norm(h)).mean(dim=(2, 3)))


def save_classifier(classifier: Classifier, path: str | Path, training: Mapping[str, Any]) -> None:
    """Writes `classifier` as safetensors with all that `load_classifier` needs, and how it was trained; whole or not at all.

    Raises Error for a schedule that could not be made again from its name and parameters.
    """
    described = {
        "config": asdict(classifier.config),
        "schedule": stored_schedule(classifier.schedule),
        "training": dict(training),
    }
    metadata = {"format": FORMAT, **{key: json.dumps(value) for key, value in described.items()}}
    write_safetensors(Path(path), classifier.state_dict(), metadata)


def load_classifier(name: str | Path, device: str | torch.device = "cpu") -> Classifier:
    """A classifier ready for `ClassifierGuidance`, in eval mode.

    name: that of the shipped model it guides (`SHIPPED`), or the path of a file that `fastcfg train-classifier` wrote. device:
    as `Sampler` takes it.
    Raises Error for a file of another kind, one cut short, weights that do not fit its config and a device that is not here.
    """
    where = find_device(device)
    if str(name) in SHIPPED:
        with as_file(files("fastcfg").joinpath(f"assets/{name}-classifier.safetensors")) as path:
            return load_classifier(path, where)
    path = Path(name)
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise Error(f"{path} is a safetensors file of another kind: want a classifier that fastcfg wrote (format {FORMAT})")
    try:
        config, schedule = (json.loads(metadata[key]) for key in ("config", "schedule"))
        with torch.device("meta"):
            classifier = Classifier(ClassifierConfig(**config), schedule_from_json(schedule))
    except (KeyError, ValueError, TypeError) as error:
        raise Error(f"{path}: its description is damaged ({type(error).__name__}: {error})") from error
    try:
        classifier.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
    except RuntimeError as error:
        raise Error(f"{path} does not fit its config: {' '.join(str(error).split())}") from error
    classifier.to(where).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return classifier.eval().requires_grad_(False)
