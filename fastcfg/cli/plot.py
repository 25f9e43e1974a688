"""fastcfg plot: pictures of what guidance does."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from fastcfg.checkpoints import load
from fastcfg.cli.options import out_path, parse_numbers
from fastcfg.errors import Error
from fastcfg.files import check_writable
from fastcfg.plots import check_geometry, plot_geometry, pyplot
from fastcfg.sampler import Sampler
from fastcfg.training.data import load_data


@click.group("plot")
def command() -> None:
    """Pictures of what guidance does."""


@command.command("geometry")
@click.option("--checkpoint", default="fashion-mnist", show_default=True, help="A shipped name or a path.")
@click.option("--label", default=9, show_default=True, help="The condition y.")
@click.option("--timestep", default=400, show_default=True, help="Training timestep of x_t.")
@click.option("--scale", default="1,2,3,5,8", show_default=True, help="Scales s to extrapolate to.")
@click.option("--seed", default=0, show_default=True, help="Of the noise, and of the sampled image.")
@click.option("--data", default=None, type=Path, help="Take a real image from here. [default: sample one]")
@click.option("--index", default=0, show_default=True, help="Which image of the label in --data.")
@click.option("--out", required=True, help="x.png")
def geometry(
    checkpoint: str, label: int, timestep: int, scale: str, seed: int, data: Path | None, index: int, out: str
) -> None:
    """eps_null, eps_y, their difference and the extrapolated points, in the plane that they span.

    \b
    fastcfg plot geometry --label 9 --timestep 400 --out geometry.png
    """
    path = out_path(out, (".png",))
    check_writable(path)
    pyplot()  # before the sampling
    scales = parse_numbers(scale, "--scale", float)
    model = load(checkpoint)
    if model.predicts != "eps":
        raise Error(f"the picture is of eps predictions, but {checkpoint} predicts {model.predicts}: name a model of eps")
    if model.null_label is None:
        raise Error(f"the picture is of eps_null, but {checkpoint} has no null label: name a model trained with label dropout")
    check_geometry(model.schedule, timestep, scales)
    sampler = Sampler(model, steps=25, batch=1)
    if data is None:
        x0 = sampler([label], 1.0, seed)[0].cpu()
        source = "a sample"
    else:
        x0 = _real_image(data, label, index, model.shape)
        source = f"real image {index}"
    result = plot_geometry(sampler, x0, label, timestep, scales, seed, path, f"{model.label_name(label)} ({source})")
    click.echo(f"cos(eps_null, eps_y - eps_null) = {result.cosine:.4f}; {path}")


def _real_image(data: Path, label: int, index: int, shape: tuple[int, int, int]) -> torch.Tensor:
    images = load_data(data)
    own = images.images[images.labels == label]
    if not 0 <= index < len(own):
        raise Error(f"--index {index} asked, but {data} has {len(own)} images of label {label}")
    if own[index].shape != shape:
        raise Error(f"images in {data} are {own[index].shape}, the model's are {shape} (C, H, W)")
    return torch.from_numpy(own[index]).float() / 127.5 - 1
