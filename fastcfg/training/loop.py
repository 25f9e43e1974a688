"""Training with label dropout: one network learns eps(x_t | y) and eps(x_t | null) (Ho & Salimans 2207.12598, alg. 1)."""

from __future__ import annotations

import copy
import csv
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcfg.errors import Error, missing_extra
from fastcfg.models.dit import DiT, DiTConfig
from fastcfg.schedules import schedule
from fastcfg.training.config import TrainConfig
from fastcfg.training.data import ImageData
from fastcfg.training.state import load_state, save_state

LOG_FIELDS = ("step", "images", "loss", "lr", "images_per_second")


@dataclass
class Trainer:
    """A run in progress. `out` receives state.safetensors (resumes the run) and log.csv.

    Every random choice is drawn from (seed, step) alone, so a resumed run repeats an uninterrupted one's numbers.
    """

    config: TrainConfig
    data: ImageData
    out: Path
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.config.seed)
        self.model = DiT(self._dit_config())
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizers = make_optimizers(self.model, self.config)
        self._images = torch.from_numpy(self.data.images)
        self._labels = torch.from_numpy(self.data.labels)
        table = schedule(self.config.schedule)
        self._time_offset = table.time_offset
        self._alpha = torch.from_numpy(table.alpha).float()
        self._sigma = torch.from_numpy(table.sigma).float()
        if self.state_path.is_file():
            self.step = load_state(
                self.state_path,
                config=self._identity(),
                modules={"model": self.model, "ema": self.ema},
                optimizers=self.optimizers,
            )
        self._dtype = torch.float32
        self._forward: Callable[..., Tensor] = self.model

    @property
    def state_path(self) -> Path:
        return self.out / "state.safetensors"

    @property
    def log_path(self) -> Path:
        return self.out / "log.csv"

    def run(self, on_sample: Callable[[Trainer], None] | None = None) -> None:
        """Trains to the end, saving every `save_every` steps; `on_sample` is called every `sample_every` steps."""
        self._choose_arithmetic()
        self._trim_log()
        start, losses = time.perf_counter(), []
        with self._progress() as bar:
            for step in range(self.step, self.config.steps):
                losses.append(self._train_step(step))
                self.step = step + 1
                bar.update(1)
                last = self.step == self.config.steps
                if self.step % self.config.save_every == 0 or last:
                    loss = torch.stack(losses).mean().item()
                    if not math.isfinite(loss):
                        raise Error(f"the loss is {loss} near step {step}: lower lr; {self.state_path} is from before")
                    speed = len(losses) * self.config.batch / (time.perf_counter() - start)
                    bar.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{speed:.0f}")
                    self._append_log(loss, speed)
                    self.save()
                    start, losses = time.perf_counter(), []
                if on_sample is not None and (self.step % self.config.sample_every == 0 or last):
                    begin = time.perf_counter()
                    on_sample(self)
                    start += time.perf_counter() - begin  # keep pictures out of the speed

    def save(self) -> None:
        save_state(
            self.state_path,
            step=self.step,
            config=self._identity(),
            weights={"model": self.model.state_dict(), "ema": self.ema.state_dict()},
            optimizers=self.optimizers,
        )

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x0, labels after dropout, t, noise) of a step."""
        per_epoch = max(1, len(self._images) // self.config.batch)
        epoch, position = divmod(step, per_epoch)
        shuffle = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self._images), generator=shuffle)
        index = order[position * self.config.batch : (position + 1) * self.config.batch]
        generator = torch.Generator().manual_seed((self.config.seed + 1) * 1_000_000_007 + step)
        x0 = self._images[index].float() / 127.5 - 1
        dropped = torch.rand(len(index), generator=generator) < self.config.label_dropout
        labels = torch.where(dropped, self.data.num_classes, self._labels[index])
        t = torch.randint(len(self._alpha), (len(index),), generator=generator)
        return x0, labels, t, torch.randn(x0.shape, generator=generator)

    def _train_step(self, step: int) -> Tensor:
        x0, labels, t, eps = self.batch(step)
        alpha, sigma = (table[t].view(-1, 1, 1, 1) for table in (self._alpha, self._sigma))
        target = prediction_target(self.config.predicts, x0, eps, alpha, sigma)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            output = self._forward(alpha * x0 + sigma * eps, t + self._time_offset, labels)
        loss = F.mse_loss(output.float(), target)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.config.learning_rate(step)
            optimizer.step()
        self._update_ema(step)
        return loss.detach()

    @torch.no_grad()
    def _update_ema(self, step: int) -> None:
        """Averages with a decay that rises to `ema`, so that early weights are forgotten soon."""
        decay = min(self.config.ema, (1 + step) / (10 + step))
        for average, current in zip(self.ema.parameters(), self.model.parameters(), strict=True):
            average.lerp_(current, 1 - decay)

    def _dit_config(self) -> DiTConfig:
        config = self.config
        return DiTConfig(
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

    def _identity(self) -> dict[str, object]:
        """What must be the same for a run to go on: all settings but how often it saves and with which arithmetic."""
        free = {"save_every", "sample_every", "dtype", "compile"}
        return {k: v for k, v in self.config.to_json().items() if k not in free} | {
            "data": [len(self._images), *self.data.images.shape[1:]]
        }

    def _choose_arithmetic(self) -> None:
        """bf16 autocast where a step is faster with it; torch.compile where asked and a compiler is at hand."""
        if self.config.dtype == "auto":
            seconds = {dtype: self._time_forward(dtype) for dtype in (torch.float32, torch.bfloat16)}
            self._dtype = min(seconds, key=lambda dtype: seconds[dtype])
        else:
            self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self.config.dtype]
        if self.config.compile:
            self._forward = torch.compile(self.model)

    def _time_forward(self, dtype: torch.dtype) -> float:
        x0, labels, t, _ = self.batch(0)
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                output = self.model(x0, t, labels)
            output.float().mean().backward()
            times.append(time.perf_counter() - begin)
        self.model.zero_grad(set_to_none=True)
        return min(times)

    def _progress(self):  # type: ignore[no-untyped-def]
        try:
            from tqdm import tqdm
        except ImportError as error:
            raise missing_extra("train", "the progress bar", error) from error
        return tqdm(total=self.config.steps, initial=self.step, unit="step", desc="train")

    def _trim_log(self) -> None:
        """Drops log rows past the state that a killed run left, so that no step is logged twice."""
        rows = read_log(self.log_path) if self.log_path.is_file() else []
        with open(self.log_path, "w", newline="") as file:
            writer = csv.DictWriter(file, LOG_FIELDS)
            writer.writeheader()
            writer.writerows(row for row in rows if int(row["step"]) <= self.step)

    def _append_log(self, loss: float, speed: float) -> None:
        lr = self.config.learning_rate(self.step - 1)
        with open(self.log_path, "a", newline="") as file:
            csv.writer(file).writerow((self.step, self.step * self.config.batch, f"{loss:.5f}", f"{lr:.3e}", f"{speed:.0f}"))


def read_log(path: Path) -> list[dict[str, str]]:
    """The rows of a log.csv, as strings."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def prediction_target(predicts: str, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the network is asked for: eps, x0, v = alpha eps - sigma x0 (2202.00512), or flow's eps - x0."""
    match predicts:
        case "eps":
            return eps
        case "x0":
            return x0
        case "v":
            return alpha * eps - sigma * x0
        case "flow":
            return eps - x0
        case _:
            raise Error(f"unknown prediction {predicts!r}: known are eps, v, x0, flow")


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
