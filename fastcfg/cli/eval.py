"""fastcfg eval: samples judged against a reference."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import click
from tqdm import tqdm

from fastcfg import metrics as m


@click.command("eval")
@click.argument("samples")
@click.argument("reference")
@click.option("--features", required=True, help="fashion-cnn, or a path: TorchScript .pt, Inception .safetensors or .pth.")
@click.option("--metrics", default=None, help=f"Of {', '.join(m.METRICS)}. [default: all that the inputs allow]")
@click.option("--scale", default=None, type=float, help="Which of SAMPLES, where they have several guidance scales.")
@click.option("--bootstrap", default=None, type=int, help="Resamples; 0 for none. [default: 100; 20 above 512 features]")
@click.option("--seed", default=m.SEED, show_default=True, help="Of subsets, splits and resamples.")
@click.option("--device", default="auto", show_default=True, help="Where the feature network runs: auto, cpu, cuda, ...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(
    samples: str,
    reference: str,
    features: str,
    metrics: str | None,
    scale: float | None,
    bootstrap: int | None,
    seed: int,
    device: str,
    as_json: bool,
) -> None:
    """Judges SAMPLES against REFERENCE: Frechet distance, KID, inception score, precision and recall, and more.

    SAMPLES: an .npz (arr_0 uint8 [N, H, W, C], arr_1 labels, arr_2 scales), a job's folder, a folder of images, or a folder of
    IDX files as FOLDER:test or FOLDER:train. REFERENCE: the same, or an .npz of statistics (mu, sigma); it is not read where
    --metrics names none that needs it. A TorchScript file runs the code that it holds: name only files that you trust.

    \b
    fastcfg eval samples.npz /usr/share/datasets/fashion-mnist:test --features fashion-cnn
    fastcfg eval out/ VIRTUAL_imagenet256_labeled.npz --features inception-2015-12-05.pt --scale 1.5
    """
    names = None if metrics is None else [name.strip() for name in metrics.split(",")]
    images = m.open_images(samples, scale)
    network = m.load_network(features, device)
    expected = m.preview(images, network)
    m.check(expected, None, names, bootstrap, seed)
    other = None
    if names is None or not set(names) <= set(m.WITHOUT_REFERENCE):
        with tqdm(desc="reference", unit="image", file=sys.stderr, delay=1) as bar:
            other = m.open_reference(reference, network, on_batch=bar.update)
        m.check(expected, other, names, bootstrap, seed)
    with tqdm(desc="samples", total=images.count, unit="image", file=sys.stderr) as bar:
        own = m.extract(images, network, on_batch=bar.update)
    figures = m.evaluate(own, other, names, bootstrap=bootstrap, seed=seed)
    left_out = {} if names is not None else m.unavailable(own, other)
    width = own.values.shape[1]
    if as_json:
        described = {
            "samples": {"path": samples, "scale": scale, "count": len(own)},
            "reference": {"path": reference, "count": None if other is None else other.count},
            "features": {"network": network.name, "fingerprint": network.fingerprint, "width": width},
            "seed": seed,
            "figures": {figure.name: _numbers(figure) for figure in figures},
            "left_out": left_out,
        }
        click.echo(json.dumps(described, indent=1))
        return
    against = "" if other is None else f" against {reference}"
    click.echo(f"{samples}{against}, seen through {network.name} ({width} features)\n")
    for line in _table(figures):
        click.echo(line)
    for name, reason in left_out.items():
        click.echo(f"{name} is left out: it {reason}")
    if len(own) <= width and any(figure.name == "frechet_distance" for figure in figures):
        click.echo(f"{len(own)} samples do not fill {width} features: the Frechet distance is far too large, take more samples")


def _numbers(figure: m.Figure) -> dict[str, Any]:
    value, error = figure.estimate
    known = not math.isnan(error)
    low, high = figure.estimate.interval if known else (None, None)
    return {
        "value": value,
        "error": error if known else None,
        "low": low,
        "high": high,
        "samples": figure.samples,
        "reference": figure.reference,
    }


def _table(figures: list[m.Figure]) -> list[str]:
    rows = [("figure", "value", "95 % interval", "samples", "reference")]
    for figure in figures:
        value, error = figure.estimate
        low, high = figure.estimate.interval
        interval = "-" if math.isnan(error) else f"{low:.4g} to {high:.4g}"
        reference = "?" if figure.reference is None else str(figure.reference or "-")
        rows.append((figure.name.replace("_", " "), f"{value:.4g}", interval, str(figure.samples), reference))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return [
        "  ".join([row[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)])
        for row in rows
    ]
