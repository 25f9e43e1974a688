"""A job small enough to run in every test: a tiny DiT, whose unit takes milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from crashing import Start, forking
from making import make_job

import fastcfg
from fastcfg.jobs import Spec
from fastcfg.models.denoiser import describe_dit
from fastcfg.models.dit import DiT

TINY = {
    "count": 20,
    "scales": [1.0, 3.0],
    "steps": 3,
    "eta": 1.0,
    "dtype": "fp32",
    "engine": "cpu",
    "seed": 5,
    "unit_size": 6,
    "batch": 4,
}  # 40 samples in 7 units, the last of 4


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DiT of 8 x 8 pixels in three colours and five classes, as fastcfg's own safetensors."""
    torch.manual_seed(1)
    model = DiT(
        input_size=8, patch_size=4, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=5, learn_sigma=False
    ).eval()
    for parameter in model.parameters():  # the published initialisation makes the output zero
        torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    fastcfg.save(describe_dit(model), path)
    return path


@pytest.fixture(scope="module")
def folder(spec: Spec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The complete job of the module's own fixture `spec`."""
    out = tmp_path_factory.mktemp("a job") / "out"
    make_job(spec, out)
    return out


@pytest.fixture(scope="session")
def start() -> Iterator[Start]:
    """start(arguments) runs `fastcfg ARGUMENTS` in a process group of its own, without the seconds of importing torch."""
    with forking() as start:
        yield start


@pytest.fixture
def write_spec(tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """write_spec(name="spec.toml", **changes): a TOML file like TINY with these values changed, None leaving a key out."""

    def write(name: str = "spec.toml", **changes: object) -> Path:
        values = {"checkpoint": str(tiny_checkpoint), **TINY, **changes}
        path = tmp_path / name
        path.write_text("".join(f"{key} = {_toml(value)}\n" for key, value in values.items() if value is not None))
        return path

    return write


@pytest.fixture
def tiny_spec_path(write_spec: Callable[..., Path]) -> Path:
    return write_spec()


@pytest.fixture
def tiny_spec(tiny_spec_path: Path) -> Spec:
    """40 samples in 7 units: labels 0..4 in turn, each at s = 1 and s = 3."""
    return Spec.from_toml(tiny_spec_path)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
