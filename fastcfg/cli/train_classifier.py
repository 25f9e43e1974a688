"""fastcfg train-classifier: a classifier of noisy images, for classifier guidance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastcfg.cli.training import make_folder, prepare, run_options
from fastcfg.training.config import TrainClassifierConfig

_HELP = {
    "width": "Channels at half the images' resolution, doubled at each further level.",
    "levels": "Resolutions, each half of the one before.",
    "blocks": "Residual blocks a level.",
    "validation": "Images held out of DATA, on which accuracy is measured at each save.",
}


@click.command("train-classifier")
@click.argument("data", type=Path)
@run_options(TrainClassifierConfig, _HELP)
def command(data: Path, out: Path, threads: int | None, **options: Any) -> None:
    """Trains a classifier of DATA's images at every noise level: a folder of IDX files, a folder of class folders, or an npz.

    OUT receives state.safetensors (to go on from), classifier.safetensors (the EMA weights, for fastcfg.load_classifier) and
    log.csv, with the accuracy at several noise levels. --schedule must be that of the model it is to guide.

    \b
    fastcfg train-classifier /usr/share/datasets/fashion-mnist --out runs/classifier --images 480000
    """
    from fastcfg.training.classifier import ClassifierTrainer  # what only training needs comes late

    config = TrainClassifierConfig(**options)
    trainer = ClassifierTrainer(config, prepare(data, threads), out)
    make_folder(out)
    click.echo(
        f"{len(trainer.data.images)} images, {len(trainer.held.images)} held out, {trainer.data.num_classes} classes, "
        f"steps {trainer.step} to {config.steps}",
        err=True,
    )
    trainer.train()
    click.echo(f"{trainer.classifier_path}")
