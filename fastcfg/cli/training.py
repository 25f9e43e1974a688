"""What the training commands share: an option for each field of a run's config, and checks before the work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import torch

from fastcfg.errors import Error
from fastcfg.files import check_writable
from fastcfg.training.config import RunConfig
from fastcfg.training.data import ImageData, load_data

NAMED = 10  # empty classes that the note lists by name

_HELP = {
    "schedule": "Noise schedule: cosine, linear, scaled_linear, log_snr_cosine, flow.",
    "images": "Training images to show in all.",
    "batch": "Images a step.",
    "lr": "Peak learning rate.",
    "warmup": "Steps of rising rate.",
    "rate": "cosine (to zero) or constant.",
    "weight_decay": "Decoupled weight decay.",
    "ema": "Decay of the averaged weights.",
    "dtype": "auto (the faster here), fp32 or bf16.",
    "compile": "Use torch.compile where it works here.",
    "seed": "Seed of weights, order, noise and all else that is drawn.",
    "save_every": "Steps between states on disk.",
}


def run_options(config: type[RunConfig], own_help: dict[str, str]) -> Callable[..., Any]:
    """--out, --threads, and an option for each field of `config` with its default. own_help: of what not every run has."""
    options = [
        click.option("--out", required=True, type=Path, help="Folder of the run; the same command resumes it."),
        click.option("--threads", default=None, type=int, help="CPU threads. [default: all]"),
    ]
    for field in fields(config):
        flag = "--" + field.name.replace("_", "-")
        declaration = f"{flag}/--no-{field.name.replace('_', '-')}" if isinstance(field.default, bool) else flag
        text = (_HELP | own_help)[field.name]
        options.append(click.option(declaration, default=field.default, show_default=True, help=text))

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def prepare(data: Path, threads: int | None) -> ImageData:
    """Reads DATA, says which of its classes are empty, and sets the number of threads."""
    images = load_data(data)
    if threads is not None:
        if threads < 1:
            raise Error(f"--threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    if empty := images.empty_classes:
        names = ", ".join(empty[:NAMED]) + (", .." if len(empty) > NAMED else "")
        click.echo(
            f"note: {len(empty)} of {images.num_classes} classes have no image, and cannot be learnt: {names} "
            "(labels count from 0)",
            err=True,
        )
    return images


def make_folder(out: Path) -> None:
    """The folder of a run, once all else is known to be right."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Error(f"cannot make the folder {out}: {error.strerror}") from error
    check_writable(out / "state.safetensors")
