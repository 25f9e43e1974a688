"""What a run leaves to look at: the EMA model as a checkpoint, a grid of its samples, the loss curve."""

from __future__ import annotations

from pathlib import Path

from fastcfg.checkpoints import save
from fastcfg.images import save_grid, to_uint8
from fastcfg.models.denoiser import Denoiser, describe_dit
from fastcfg.plots import plot_loss
from fastcfg.sampler import Sampler
from fastcfg.schedules import schedule
from fastcfg.training.loop import Trainer
from fastcfg.training.run import read_log

GRID_SCALES = (1.0, 2.0, 4.0)  # of a model with a null label; any other has scale 1 alone
GRID_CLASSES = 10


def ema_model(trainer: Trainer) -> Denoiser:
    """The run's EMA weights as a pixel-space Denoiser, with how they were trained."""
    return describe_dit(
        trainer.ema,
        schedule=schedule(trainer.config.schedule),
        predicts=trainer.config.predicts,
        clip=True,
        eta=1.0,  # its noise washes out what errors of the network leave behind: see docs/training.md
        low_precision=False,  # at the noisy end x0 = (x - sigma eps) / alpha magnifies bfloat16's rounding of eps
        label_names=trainer.data.label_names,
        training={**trainer.config.to_json(), "step": trainer.step, "images_seen": trainer.step * trainer.config.batch},
    )


def report(trainer: Trainer) -> None:
    """Writes model.safetensors, samples-STEP.png (classes by scales, the same noise each time) and loss.png."""
    model = ema_model(trainer)
    save(model, trainer.out / "model.safetensors")
    labels = list(range(min(GRID_CLASSES, trainer.data.num_classes)))
    solver = "euler" if trainer.config.predicts == "flow" else "ddim"
    sampler = Sampler(model, steps=25, solver=solver, batch=len(labels), device="cpu", engine="reference")
    scales = (1.0,) if model.null_label is None else GRID_SCALES
    y = [label for label in labels for _ in scales]
    s = [scale for _ in labels for scale in scales]
    samples = sampler(y, s, seeds=0, indices=[i for i in range(len(labels)) for _ in scales])
    names = [trainer.data.label_names[label] for label in labels]
    path = trainer.out / f"samples-{trainer.step:06d}.png"
    save_grid(path, to_uint8(samples), names, [f"s = {scale:g}" for scale in scales], f"step {trainer.step}")
    _plot_log(trainer.log_path, trainer.out / "loss.png")


def _plot_log(log: Path, path: Path) -> None:
    rows = read_log(log)
    if len(rows) > 1:
        plot_loss([int(row["step"]) for row in rows], [float(row["loss"]) for row in rows], path)
