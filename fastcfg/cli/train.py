"""fastcfg train: a class-conditional DiT with label dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastcfg import plots
from fastcfg.cli.training import make_folder, prepare, run_options
from fastcfg.training.config import TrainConfig

_HELP = {
    "patch_size": "Pixels along a patch's side.",
    "hidden_size": "Width of the transformer.",
    "depth": "Blocks.",
    "num_heads": "Attention heads.",
    "predicts": "What the network predicts: eps, v, x0, flow.",
    "label_dropout": "Probability of the null label.",
    "optimizer": "muon or adamw.",
    "sample_every": "Steps between sample grids.",
}


@click.command("train")
@click.argument("data", type=Path)
@run_options(TrainConfig, _HELP)
def command(data: Path, out: Path, threads: int | None, **options: Any) -> None:
    """Trains a DiT on DATA: a folder of IDX files, a folder of class folders of images, or an npz.

    OUT receives state.safetensors (to go on from), model.safetensors (the EMA weights, for sampling), log.csv, loss.png
    and sample grids. A killed run loses at most --save-every steps.

    \b
    fastcfg train /usr/share/datasets/fashion-mnist --out runs/fashion-mnist --images 960000
    """
    from fastcfg.training.loop import Trainer  # what only training needs comes late
    from fastcfg.training.report import report

    plots.pyplot()  # before the work, which may take hours
    config = TrainConfig(**options)
    images = prepare(data, threads)
    trainer = Trainer(config, images, out)
    make_folder(out)
    click.echo(f"{len(images.images)} images, {images.num_classes} classes, steps {trainer.step} to {config.steps}", err=True)
    trainer.run(on_sample=report)
    click.echo(f"{out / 'model.safetensors'}")
