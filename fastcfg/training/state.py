"""The state of a training run on disk: one safetensors file, replaced whole, from which the run goes on exactly."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcfg.errors import Error
from fastcfg.files import read_safetensors, write_safetensors

DATA_SHA256 = "data_sha256"  # what a run's config names the content of its data by


def save_state(
    path: Path,
    *,
    step: int,
    config: dict[str, Any],
    weights: dict[str, dict[str, Tensor]],
    optimizers: list[torch.optim.Optimizer],
) -> None:
    """weights: named state dicts (model, ema). Optimizer tensors are kept by position; rates follow from the step."""
    tensors = {f"{group}/{name}": value for group, state in weights.items() for name, value in state.items()}
    for i, optimizer in enumerate(optimizers):
        for index, entries in optimizer.state_dict()["state"].items():
            for name, value in entries.items():
                tensors[f"optimizer{i}/{index}/{name}"] = torch.as_tensor(value)
    write_safetensors(path, tensors, {"step": str(step), "config": json.dumps(config)})


def load_state(
    path: Path,
    *,
    config: dict[str, Any],
    modules: dict[str, torch.nn.Module],
    optimizers: list[torch.optim.Optimizer],
) -> int:
    """Fills modules and optimizers from `path` and returns the step to resume at; refuses another run's state.

    A state from before states named their data resumes with the data given, and a note says so.
    """
    tensors, metadata = read_safetensors(path)
    stored = json.loads(metadata.get("config", "{}"))
    unknown = {DATA_SHA256} - stored.keys()
    different = {k: (stored.get(k), v) for k, v in config.items() if k not in unknown and stored.get(k) != v}
    if different:
        changes = "; ".join(f"{k} was {old!r}, now {new!r}" for k, (old, new) in different.items())
        raise Error(f"{path} belongs to another run ({changes}): use another --out, or the same settings and data to go on")
    if unknown:
        print(f"note: {path} does not say which data its run had: resuming with the data given", file=sys.stderr)
    for group, module in modules.items():
        prefix = f"{group}/"
        module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    for i, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"optimizer{i}/"):
                _, index, name = key.split("/")
                state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return int(metadata["step"])
