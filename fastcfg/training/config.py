"""What a training run is: every choice in one frozen record, checked before any work."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from fastcfg.errors import Error, check_known
from fastcfg.schedules import SCHEDULES
from fastcfg.solvers import PREDICTIONS

SEEDS = 2**32  # the generators' seeds, of 64 bits, are made of a run's seed and a step


@dataclass(frozen=True)
class RunConfig:
    """What any run has. images: how many training images to show in all. rate: "cosine" to zero or "constant", after `warmup`
    steps. dtype: "auto" times a few steps of each and keeps the faster. compile: where torch.compile works on this machine.
    seed: 0..2**32-1. save_every: in steps.
    """

    schedule: str = "cosine"
    images: int = 960_000
    batch: int = 128
    lr: float = 2e-3
    warmup: int = 200
    rate: str = "cosine"
    weight_decay: float = 0.01
    ema: float = 0.999
    dtype: str = "auto"
    compile: bool = True
    seed: int = 0
    save_every: int = 250

    def __post_init__(self) -> None:
        self._check_counts("images", "batch", "save_every")
        self._check_names(schedule=tuple(SCHEDULES), rate=("cosine", "constant"), dtype=("auto", "fp32", "bf16"))
        self._check_range("ema", 0, 1)
        self._check_range("lr", 0, 1e9)
        self._check_range("weight_decay", 0, 1e9)
        if self.warmup < 0:
            raise Error(f"train: warmup must not be negative, got {self.warmup}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < SEEDS:
            raise Error(f"train: seed must be a whole number in 0..{SEEDS - 1}, got {self.seed!r}")

    @property
    def steps(self) -> int:
        return -(-self.images // self.batch)

    def learning_rate(self, step: int) -> float:
        """The rate of step 0..steps-1."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.rate == "constant":
            return self.lr
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * progress))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def _check_counts(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise Error(f"train: {name} must be a whole number of at least 1, got {value!r}")

    def _check_names(self, **names: tuple[str, ...]) -> None:
        for name, known in names.items():
            check_known(name, getattr(self, name), known, where="train: ")

    def _check_range(self, name: str, low: float, high: float) -> None:
        if not low <= getattr(self, name) < high:
            raise Error(f"train: {name} must lie in [{low}, {high:g}), got {getattr(self, name)!r}")


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """The run of a DiT. label_dropout: probability of the null label. optimizer: "adamw", or "muon" (Muon for the matrices
    inside the blocks at AdamW's update size, AdamW for the rest). sample_every: in steps.
    """

    patch_size: int = 4
    hidden_size: int = 192
    depth: int = 6
    num_heads: int = 3
    predicts: str = "eps"
    label_dropout: float = 0.1
    optimizer: str = "muon"
    sample_every: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_counts("patch_size", "hidden_size", "depth", "num_heads", "sample_every")
        self._check_names(predicts=PREDICTIONS, optimizer=("adamw", "muon"))
        self._check_range("label_dropout", 0, 1)
        if (self.predicts == "flow") != (self.schedule == "flow"):
            raise Error("train: predicts 'flow' and schedule 'flow' go together")


@dataclass(frozen=True)
class TrainClassifierConfig(RunConfig):
    """The run of a classifier of noisy images. width, levels, blocks: see `ClassifierConfig`. validation: images held out of
    the data, on which accuracy is measured.
    """

    width: int = 32
    levels: int = 3
    blocks: int = 1
    validation: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_counts("width", "levels", "blocks", "validation")
