"""fastcfg sample: guided samples to a PNG grid, an ADM npz or a safetensors file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import torch
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
        pixels = samples if decoder is None else decode(samples, decoder)
        _write_pixels(path, sampler, pixels, wanted, scales, seed)
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


def _write_pixels(
    path: Path, sampler: Sampler, pixels: torch.Tensor, wanted: list[int], scales: list[float], seed: int
) -> None:
    images = to_uint8(pixels)
    if path.suffix == ".npz":
        labels = torch.tensor(wanted).repeat_interleave(len(scales)).numpy()
        several = torch.tensor(scales).repeat(len(wanted)).numpy() if len(scales) > 1 else None
        save_npz(path, images, labels, several)
        return
    names = [_name(sampler.model, label) for label in wanted]
    title = f"{sampler.plan.steps} steps of {sampler.plan.solver}, seed {seed}"
    if len(scales) > 1:
        save_grid(path, images, names, [f"s = {s:g}" for s in scales], title)
        return
    # One scale: a row a class, its samples side by side, in the order of their indices.
    classes = list(dict.fromkeys(wanted))
    columns = max(wanted.count(label) for label in classes)
    blank = images[:1] * 0 + 255
    cells = []
    for label in classes:
        own = [images[i : i + 1] for i, other in enumerate(wanted) if other == label]
        cells += own + [blank] * (columns - len(own))
    rows = [_name(sampler.model, label) for label in classes]
    save_grid(
        path,
        torch.cat([torch.from_numpy(c) for c in cells]).numpy(),
        rows,
        [""] * columns,
        f"s = {scales[0]:g}, {title}",
    )


def _name(model: Denoiser, label: int) -> str:
    return model.label_names[label] if model.label_names else str(label)
