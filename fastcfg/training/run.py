"""A training run: order, noise, averaged weights, log and state on disk. What is learnt is for the subclass to say."""

from __future__ import annotations

import copy
import csv
import math
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastcfg.errors import Error
from fastcfg.files import is_file, write_file
from fastcfg.schedules import schedule
from fastcfg.training.config import RunConfig
from fastcfg.training.data import ImageData
from fastcfg.training.state import DATA_SHA256, load_state, save_state

LOG_FIELDS = ("step", "images", "loss", "lr", "images_per_second")


Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Run(ABC, Generic[Model]):
    """A run in progress. `out` receives state.safetensors (resumes the run) and log.csv.

    Every random choice is drawn from (seed, step) alone, so a resumed run repeats an uninterrupted one's numbers.
    """

    figure_names: ClassVar[tuple[str, ...]] = ()  # of what `_figures` adds to the log

    config: RunConfig
    data: ImageData
    out: Path
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.config.batch > len(self.data.images):
            raise Error(
                f"train: batch {self.config.batch} asked, but there are {len(self.data.images)} images to train on: "
                f"a step shows each at most once, so take a batch of {len(self.data.images)} or fewer"
            )
        self._data_sha256 = self.data.sha256()  # once: _identity is asked for at each save
        torch.manual_seed(self.config.seed)
        self.model: Model = self._make_model()
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizers = self._make_optimizers()
        self._images = torch.from_numpy(self.data.images)
        self._labels = torch.from_numpy(self.data.labels)
        self._schedule = schedule(self.config.schedule)
        self._alpha = torch.from_numpy(self._schedule.alpha).float()
        self._sigma = torch.from_numpy(self._schedule.sigma).float()
        if is_file(self.state_path):
            self.step = load_state(
                self.state_path,
                config=self._identity(),
                modules={"model": self.model, "ema": self.ema},
                optimizers=self.optimizers,
            )
        self._dtype = torch.float32
        self._forward: Callable[..., Tensor] = self.model

    @abstractmethod
    def _make_model(self) -> Model: ...

    @abstractmethod
    def _make_optimizers(self) -> list[torch.optim.Optimizer]: ...

    @abstractmethod
    def _loss(self, step: int) -> Tensor:
        """The loss of a step's batch, by `_forward` under `_autocast`."""

    def _figures(self) -> list[float]:
        """What is said of the averaged weights in each row of the log."""
        return []

    @property
    def state_path(self) -> Path:
        return self.out / "state.safetensors"

    @property
    def log_path(self) -> Path:
        return self.out / "log.csv"

    def train(self, after_step: Callable[[], None] = lambda: None) -> None:
        """Trains to the end, saving every `save_every` steps."""
        self._trim_log()
        if self.step:
            after_step()  # a kill may have come between the state and what follows it
        if self.step < self.config.steps:  # a run that has ended compiles nothing
            self._choose_arithmetic()
        start, losses = time.perf_counter(), []
        with tqdm(total=self.config.steps, initial=self.step, unit="step", desc="train") as bar:
            for step in range(self.step, self.config.steps):
                losses.append(self._train_step(step))
                self.step = step + 1
                bar.update(1)
                begin = time.perf_counter()
                if self.step % self.config.save_every == 0 or self.step == self.config.steps:
                    loss = torch.stack(losses).mean().item()
                    if not math.isfinite(loss):
                        raise Error(f"the loss is {loss} near step {step}: lower lr; {self.state_path} is from before")
                    speed = len(losses) * self.config.batch / (begin - start)
                    bar.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{speed:.0f}")
                    self._append_log(loss, speed)
                    self.save()
                    start, losses = time.perf_counter(), []
                    begin = start
                after_step()
                start += time.perf_counter() - begin  # keep what is not training out of the speed

    def save(self) -> None:
        save_state(
            self.state_path,
            step=self.step,
            config=self._identity(),
            weights={"model": self.model.state_dict(), "ema": self.ema.state_dict()},
            optimizers=self.optimizers,
        )

    def _draw(self, step: int) -> tuple[Tensor, torch.Generator]:
        """(which images a step shows, each at most once an epoch; a generator for what else is drawn in it)."""
        per_epoch = len(self._images) // self.config.batch
        epoch, position = divmod(step, per_epoch)
        shuffle = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self._images), generator=shuffle)
        index = order[position * self.config.batch : (position + 1) * self.config.batch]
        return index, torch.Generator().manual_seed((self.config.seed + 1) * 1_000_000_007 + step)

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of timesteps t [N], [N, 1, 1, 1] each."""
        return self._alpha[t].view(-1, 1, 1, 1), self._sigma[t].view(-1, 1, 1, 1)

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self._dtype == torch.bfloat16)

    def _train_step(self, step: int) -> Tensor:
        loss = self._loss(step)
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

    def _identity(self) -> dict[str, object]:
        """What must be the same for a run to go on: all settings but how often it saves and with which arithmetic."""
        free = {"save_every", "sample_every", "dtype", "compile"}
        return {k: v for k, v in self.config.to_json().items() if k not in free} | {
            "data": [len(self._images), *self.data.images.shape[1:]],
            DATA_SHA256: self._data_sha256,
        }

    def _choose_arithmetic(self) -> None:
        """bf16 autocast where a step is faster with it; torch.compile where asked and possible here."""
        if self.config.dtype == "auto":
            seconds = {dtype: self._time_step(dtype) for dtype in (torch.float32, torch.bfloat16)}
            self._dtype = min(seconds, key=lambda dtype: seconds[dtype])
        else:
            self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self.config.dtype]
        if self.config.compile:
            self._compile()

    def _compile(self) -> None:
        """Compiles the model and tries a forward and a backward: torch compiles each when it is first called."""
        self._forward = torch.compile(self.model)
        try:
            with warnings.catch_warnings():  # Dynamo sees that a table of constants is kept, and warns of it
                warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
                self._loss(0).backward()
        except Exception as error:  # no compiler, a broken one, a full disk: what is raised is not ours to list
            self._forward = self.model
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"note: torch.compile is not used: {reason}", file=sys.stderr)
        self.model.zero_grad(set_to_none=True)

    def _time_step(self, dtype: torch.dtype) -> float:
        """Seconds of the shortest of three forwards and backwards."""
        self._dtype, times = dtype, []
        for _ in range(3):
            begin = time.perf_counter()
            self._loss(0).backward()
            times.append(time.perf_counter() - begin)
        self.model.zero_grad(set_to_none=True)
        return min(times)

    def _trim_log(self) -> None:
        """Drops log rows past the state that a killed run left, so that no step is logged twice.

        Raises Error for a row that is not one number a column, and leaves the log as it was.
        """
        names = (*LOG_FIELDS, *self.figure_names)
        rows = read_log(self.log_path) if is_file(self.log_path) else []
        kept = [row for row in rows if self._logged_step(row, names) <= self.step]

        def write(temporary: Path) -> None:
            with open(temporary, "w", newline="") as file:
                writer = csv.DictWriter(file, names)
                writer.writeheader()
                writer.writerows(kept)

        write_file(self.log_path, write)

    def _logged_step(self, row: dict[str, str], names: tuple[str, ...]) -> int:
        try:
            if tuple(row) != names:
                raise ValueError("other columns")
            for value in row.values():
                float(value)
            return int(row["step"])
        except (TypeError, ValueError) as error:  # a row that is cut short has None for what is missing
            raise Error(
                f"{self.log_path} has a row that is not one number for each of {', '.join(names)}: "
                f"{list(row.values())!r:.100}: correct the file or move it away"
            ) from error

    def _append_log(self, loss: float, speed: float) -> None:
        lr, figures = self.config.learning_rate(self.step - 1), (f"{figure:.4f}" for figure in self._figures())
        row = (self.step, self.step * self.config.batch, f"{loss:.5f}", f"{lr:.3e}", f"{speed:.0f}", *figures)
        try:
            with open(self.log_path, "a", newline="") as file:
                csv.writer(file).writerow(row)
        except OSError as error:  # a full disk
            raise Error(f"cannot write {self.log_path}: {error.strerror}") from error


def read_log(path: Path) -> list[dict[str, str]]:
    """The rows of a log.csv, as strings. A last line without its end, which a kill or a full disk cut short, is left out: its
    state was not saved either. Raises Error for a file that cannot be read."""
    try:
        with open(path, newline="") as file:
            return list(csv.DictReader(line for line in file if line.endswith("\n")))
    except (OSError, UnicodeError, csv.Error) as error:
        raise Error(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
