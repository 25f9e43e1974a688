"""fastcfg sample: guided samples to a PNG grid, an ADM npz or a safetensors file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from fastcfg.checkpoints import load
from fastcfg.cli.options import make_sampler, out_path, parse_labels, parse_numbers, sampler_options
from fastcfg.errors import Error
from fastcfg.files import check_writable
from fastcfg.images import SUFFIXES, decode, load_vae, save_grid, save_npz, save_samples, to_uint8
from fastcfg.models.denoiser import Denoiser
from fastcfg.sampler import Sampler


@click.command("sample")
@sampler_options
@click.option("--labels", default="balanced", show_default=True, help='"balanced" or a list: 0,7,9.')
@click.option("--count", default=None, type=int, help="Samples, labels repeating in order. [default: one a label]")
@click.option("--scale", default=None, help="Guidance scale s; several (1,2,4) sample each label at each. [default: 3]")
@click.option("--w", default=None, help="The paper's w = s - 1, instead of --scale.")
@click.option("--seed", default=0, show_default=True, help="Sample i of a seed is the same in any run.")
@click.option("--vae", default=None, type=Path, help="Folder of a diffusers AutoencoderKL that decodes latents.")
@click.option("--out", required=True, help="x.png, x.npz (ADM layout: arr_0, arr_1; of several scales arr_2) or x.safetensors.")
def command(
    labels: str,
    count: int | None,
    scale: str | None,
    w: str | None,
    seed: int,
    vae: Path | None,
    out: str,
    **options: Any,
) -> None:
    """Guided samples of a model.

    \b
    fastcfg sample --labels 0,7,9 --scale 1,3,5 --out grid.png
    fastcfg sample --labels balanced --count 1000 --scale 2 --steps 25 --out samples.npz
    fastcfg sample --classifier fashion-mnist --scale 0,1,4 --out by-classifier.png
    """
    path = out_path(out, SUFFIXES)
    check_writable(path)
    model = load(options["checkpoint"])
    sampler = make_sampler(model, options)
    if model.latent and vae is None and path.suffix != ".safetensors":
        raise Error(f"{options['checkpoint']} makes latents: pass --vae to decode them, or write .safetensors")
    decoder = None if vae is None else _decoder(vae, model, path)
    if model.num_classes is None:
        raise Error("this model takes embeddings for labels: use fastcfg.Sampler from Python")
    wanted = parse_labels(labels, count, model.num_classes)
    by_classifier = sampler.classifier_guidance is not None
    if by_classifier and w is not None:
        raise Error("--w is classifier-free guidance's: a classifier's strength is --scale")
    scales = _scales(scale, w)
    # Row by row, each label at each scale, and the same noise for all scales of a label.
    y = [label for label in wanted for _ in scales]
    s = [value for _ in wanted for value in scales]
    index = [i for i in range(len(wanted)) for _ in scales]
    with tqdm(total=len(y), desc="sample", unit="image", file=sys.stderr) as bar:
        strength: dict[str, Any] = {"classifier_scale" if by_classifier else "scale": s}
        samples = sampler(y, seeds=seed, indices=index, on_batch=bar.update, **strength).cpu()
    if path.suffix == ".safetensors":
        description = {"plan": str(sampler.plan), "checkpoint": str(options["checkpoint"])}
        save_samples(path, samples, torch.tensor(y), torch.tensor(s), seed, description)
    else:
        images = to_uint8(samples if decoder is None else decode(samples, decoder))
        if path.suffix == ".npz":
            save_npz(path, images, np.array(y), np.array(s, np.float32) if len(scales) > 1 else None)
        else:
            _write_grid(path, sampler, images, wanted, scales, seed)
    click.echo(f"{len(y)} samples in {path}")


def _decoder(vae: Path, model: Denoiser, path: Path) -> Any:
    """The VAE. Raises Error where it would be idle, or is none for this model: before the work, which may take hours."""
    if not model.latent:
        raise Error("--vae decodes latents, and this model makes pixels: leave it out")
    if path.suffix == ".safetensors":
        raise Error(f"--vae would be idle, since {path.suffix} keeps the latents: leave it out, or write .png or .npz")
    return load_vae(vae, model.shape[0])


def _scales(scale: str | None, w: str | None) -> list[float]:
    if scale is not None and w is not None:
        raise Error("give the guidance strength once: --scale, or --w = scale - 1")
    if w is not None:
        return [1.0 + value for value in parse_numbers(w, "--w", float)]
    return parse_numbers("3" if scale is None else scale, "--scale", float)


def _write_grid(
    path: Path, sampler: Sampler, images: NDArray[np.uint8], wanted: list[int], scales: list[float], seed: int
) -> None:
    """A PNG: labels down and scales across; of one scale the classes down, and across their samples by index."""
    title = f"{sampler.plan.steps} steps of {sampler.plan.solver}, seed {seed}"
    rows, columns, cells = wanted, [f"s = {s:g}" for s in scales], images
    if len(scales) == 1:
        rows = list(dict.fromkeys(wanted))
        across = max(wanted.count(label) for label in rows)
        blank = np.full_like(images[:1], 255)
        of_rows = ([images[i : i + 1] for i, other in enumerate(wanted) if other == label] for label in rows)
        cells = np.concatenate([cell for own in of_rows for cell in own + [blank] * (across - len(own))])
        columns, title = [""] * across, f"s = {scales[0]:g}, {title}"
    save_grid(path, cells, [sampler.model.label_name(label) for label in rows], columns, title)
