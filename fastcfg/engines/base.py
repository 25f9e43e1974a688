"""What every engine is: it runs a plan on a model, and decides nothing about the mathematics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcfg.engines.classifier import ClassifierTerm, RowIndex


@dataclass(frozen=True)
class Request:
    """Up to `batch` rows to sample, all guided in the same steps; exactly as many for an engine of `whole_batches`.

    labels: what the network is given, int64 [B], or embeddings [B, ...]. scale: float32 [steps, B]. guided: bool [steps];
    elsewhere no null rows are computed. seeds, indices: int64 [B], the noise's counters. x_T: float32 [B, C, H, W] or None
    (drawn). noise: float32 [steps, B, C, H, W] in executed order, or None (drawn). classifier: what is added to the network's
    output, if anything.
    """

    labels: Tensor
    scale: Tensor
    guided: NDArray[np.bool_]
    seeds: NDArray[np.int64]
    indices: NDArray[np.int64]
    x_T: Tensor | None = None
    noise: Tensor | None = None
    classifier: ClassifierTerm | None = None

    def rows(self, rows: RowIndex, guided: NDArray[np.bool_]) -> Request:
        """The request for some of its rows, which are guided in these steps."""
        return Request(
            labels=self.labels[rows],
            scale=self.scale[:, rows],
            guided=guided,
            seeds=self.seeds[rows],
            indices=self.indices[rows],
            x_T=None if self.x_T is None else self.x_T[rows],
            noise=None if self.noise is None else self.noise[:, rows],
            classifier=None if self.classifier is None else self.classifier.rows(rows),
        )


@contextmanager
def plain_mode(device: torch.device) -> Iterator[None]:
    """No gradients and no autocast, whatever the caller's modes: what is computed is what the engine's dtype says."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


class Engine(Protocol):
    """An engine is made for one model, plan, device and dtype.

    whole_batches: whether it must be given full batches, for a sample to have the same bits in any. notes: what a reader of
    `explain()` should know of it.
    """

    name: str
    whole_batches: bool
    notes: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The network's output in this engine's arithmetic, float32 [N, C or 2C, H, W]. x: [N, C, H, W]; t, y: [N]."""
        ...

    def run(self, request: Request) -> Tensor:
        """The samples, float32 [B, C, H, W] on the engine's device: a new tensor, which is the caller's."""
        ...

    def refresh(self) -> None:
        """Takes up weights that changed in place since the engine was made."""
        ...
