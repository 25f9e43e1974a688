"""fastcfg train: a class-conditional DiT with label dropout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import torch

from fastcfg.errors import Error
from fastcfg.files import check_writable
from fastcfg.training.config import TrainConfig
from fastcfg.training.data import load_data

_HELP = {
    "patch_size": "Pixels along a patch's side.",
    "hidden_size": "Width of the transformer.",
    "depth": "Blocks.",
    "num_heads": "Attention heads.",
    "schedule": "Noise schedule: cosine, linear, scaled_linear, log_snr_cosine, flow.",
    "predicts": "What the network predicts: eps, v, x0, flow.",
    "label_dropout": "Probability of the null label.",
    "images": "Training images to show in all.",
    "batch": "Images a step.",
    "lr": "Peak learning rate.",
    "warmup": "Steps of rising rate.",
    "rate": "cosine (to zero) or constant.",
    "optimizer": "muon or adamw.",
    "weight_decay": "Decoupled weight decay.",
    "ema": "Decay of the averaged weights.",
    "dtype": "auto (the faster here), fp32 or bf16.",
    "compile": "Use torch.compile.",
    "seed": "Seed of weights, order, noise and dropout.",
    "save_every": "Steps between states on disk.",
    "sample_every": "Steps between sample grids.",
}


def _config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """One option a field of TrainConfig, with its default."""
    for field in reversed(fields(TrainConfig)):
        flag = "--" + field.name.replace("_", "-")
        declaration = f"{flag}/--no-{field.name}" if isinstance(field.default, bool) else flag
        option = click.option(declaration, default=field.default, show_default=True, help=_HELP[field.name])
        command = option(command)
    return command


@click.command("train")
@click.argument("data", type=Path)
@click.option("--out", required=True, type=Path, help="Folder of the run; the same command goes on with what it holds.")
@click.option("--threads", default=None, type=int, help="CPU threads. [default: all]")
@_config_options
def command(data: Path, out: Path, threads: int | None, **options: Any) -> None:
    """Trains a DiT on DATA: a folder of IDX files, a folder of class folders of images, or an npz.

    OUT receives state.safetensors (to go on from), model.safetensors (the EMA weights, for sampling), log.csv, loss.png
    and sample grids. A killed run loses at most --save-every steps.

    \b
    fastcfg train /usr/share/datasets/fashion-mnist --out runs/fashion-mnist --images 960000
    """
    from fastcfg.training.loop import Trainer  # what only training needs comes late
    from fastcfg.training.report import report

    config = TrainConfig(**options)
    images = load_data(data)
    if threads is not None:
        if threads < 1:
            raise Error(f"--threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Error(f"cannot make the folder {out}: {error.strerror}") from error
    check_writable(out / "state.safetensors")
    trainer = Trainer(config, images, out)
    click.echo(f"{len(images.images)} images, {images.num_classes} classes, steps {trainer.step} to {config.steps}", err=True)
    trainer.run(on_sample=report)
    click.echo(f"{out / 'model.safetensors'}")
