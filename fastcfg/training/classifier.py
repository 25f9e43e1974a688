"""Training a classifier of noisy images: cross-entropy on x_t ~ q(x_t | x_0), t uniform (Dhariwal & Nichol 2105.05233)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcfg.models.classifier import Classifier, ClassifierConfig, save_classifier
from fastcfg.schedules import schedule
from fastcfg.training.config import TrainClassifierConfig
from fastcfg.training.data import ImageData, hold_out
from fastcfg.training.run import Run

LEVELS = (0, 200, 400, 600, 800)  # timesteps at which accuracy is measured
VALIDATION_BATCH = 500


@dataclass
class ClassifierTrainer(Run[Classifier]):
    """The run of a classifier. Beside the state, `out` receives classifier.safetensors, the EMA weights, at each save."""

    figure_names = tuple(f"accuracy_t{t}" for t in LEVELS)

    config: TrainClassifierConfig
    held: ImageData = field(init=False)

    def __post_init__(self) -> None:
        self.data, self.held = hold_out(self.data, self.config.validation, self.config.seed)
        super().__post_init__()

    @property
    def classifier_path(self) -> Path:
        return self.out / "classifier.safetensors"

    def save(self) -> None:
        seen = {"step": self.step, "images_seen": self.step * self.config.batch}
        save_classifier(self.ema, self.classifier_path, {**self.config.to_json(), **seen})
        super().save()  # last: a run whose state is its last one is not gone on with

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t, labels, t) of a step."""
        index, generator = self._draw(step)
        t = torch.randint(len(self._alpha), (len(index),), generator=generator)
        return self._noisy(self._images[index], t, generator), self._labels[index], t

    def _figures(self) -> list[float]:
        """The share of held-out images that the EMA weights name correctly at each of `LEVELS`, the noise being the same."""
        images, labels = torch.from_numpy(self.held.images), torch.from_numpy(self.held.labels)
        generator = torch.Generator().manual_seed(self.config.seed)
        return [self._accuracy(images, labels, level, generator) for level in LEVELS]

    @torch.no_grad()
    def _accuracy(self, images: Tensor, labels: Tensor, level: int, generator: torch.Generator) -> float:
        right = 0
        for some, wanted in zip(images.split(VALIDATION_BATCH), labels.split(VALIDATION_BATCH), strict=True):
            t = torch.full((len(some),), level)
            logits = self.ema(self._noisy(some, t, generator), t + self._schedule.time_offset)
            right += int((logits.argmax(1) == wanted).sum())
        return right / len(images)

    def _loss(self, step: int) -> Tensor:
        x_t, labels, t = self.batch(step)
        with self._autocast():
            logits = self._forward(x_t, t + self._schedule.time_offset)
        return F.cross_entropy(logits.float(), labels)

    def _noisy(self, images: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
        """x_t of images uint8 [N, C, H, W] at timesteps t [N]."""
        alpha, sigma = self._levels(t)
        return alpha * (images.float() / 127.5 - 1) + sigma * torch.randn(images.shape, generator=generator)

    def _make_model(self) -> Classifier:
        config = self.config
        shape = {"in_channels": self.data.images.shape[1], "num_classes": self.data.num_classes}
        sizes = {"width": config.width, "levels": config.levels, "blocks": config.blocks}
        return Classifier(ClassifierConfig(**shape, **sizes), schedule(config.schedule))

    def _make_optimizers(self) -> list[torch.optim.Optimizer]:
        config = self.config
        parameters = self.model.parameters()
        return [torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.99), fused=True)]
