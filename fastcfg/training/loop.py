"""Training with label dropout: one network learns eps(x_t | y) and eps(x_t | null) (Ho & Salimans 2207.12598, alg. 1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcfg.errors import check_known
from fastcfg.models.dit import DiT, DiTConfig
from fastcfg.solvers import PREDICTIONS
from fastcfg.training.config import TrainConfig
from fastcfg.training.run import Run


@dataclass
class Trainer(Run[DiT]):
    """The run of a DiT."""

    config: TrainConfig

    def run(self, on_sample: Callable[[Trainer], None] | None = None) -> None:
        """Trains to the end, saving every `save_every` steps; `on_sample` is called every `sample_every` steps, and
        again where a run resumes at one."""

        def look() -> None:
            if on_sample is not None and (self.step % self.config.sample_every == 0 or self.step == self.config.steps):
                on_sample(self)

        self.train(look)

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x0, labels after dropout, t, noise) of a step."""
        index, generator = self._draw(step)
        x0 = self._images[index].float() / 127.5 - 1
        dropped = torch.rand(len(index), generator=generator) < self.config.label_dropout
        labels = torch.where(dropped, self.data.num_classes, self._labels[index])
        t = torch.randint(len(self._alpha), (len(index),), generator=generator)
        return x0, labels, t, torch.randn(x0.shape, generator=generator)

    def _loss(self, step: int) -> Tensor:
        x0, labels, t, eps = self.batch(step)
        alpha, sigma = self._levels(t)
        target = prediction_target(self.config.predicts, x0, eps, alpha, sigma)
        with self._autocast():
            output = self._forward(alpha * x0 + sigma * eps, t + self._schedule.time_offset, labels)
        return F.mse_loss(output.float(), target)

    def _make_optimizers(self) -> list[torch.optim.Optimizer]:
        return make_optimizers(self.model, self.config)

    def _make_model(self) -> DiT:
        config = self.config
        return DiT(
            DiTConfig(
                input_size=self.data.images.shape[2],
                patch_size=config.patch_size,
                in_channels=self.data.images.shape[1],
                hidden_size=config.hidden_size,
                depth=config.depth,
                num_heads=config.num_heads,
                class_dropout_prob=config.label_dropout,
                num_classes=self.data.num_classes,
                learn_sigma=False,
            )
        )


def prediction_target(predicts: str, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the network is asked for: eps, x0, v = alpha eps - sigma x0 (2202.00512), or flow's eps - x0."""
    check_known("prediction", predicts, PREDICTIONS)
    match predicts:
        case "eps":
            return eps
        case "x0":
            return x0
        case "v":
            return alpha * eps - sigma * x0
        case _:  # "flow"
            return eps - x0


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the blocks' matrices (where its orthogonal updates save steps) and AdamW for the rest."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            inside = config.optimizer == "muon" and name.startswith("blocks.") and parameter.ndim == 2
            (matrices if inside else others).append(parameter)
    decay = config.weight_decay
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=config.lr, weight_decay=decay, betas=(0.9, 0.99), fused=True)
    ]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=config.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers
