"""The shipped model judged by the Fashion-MNIST CNN: accuracy, variety and Frechet distance over the guidance scale.

    python benchmarks/quality.py /usr/share/datasets/fashion-mnist

Prints the table of the README and writes benchmarks/results/quality.csv. Each scale samples the same labels from the same
noise. accuracy: of the CNN's class against the label asked for. variety: mean distance between samples of one class in the
CNN's features. Frechet distance: to the 10,000 real test images in those features, each of the 128 divided by its standard
deviation over them. The first row is as many real training images, judged the same way: what the numbers would be for
samples as good as data.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import fastcfg
from fastcfg.metrics.fashion_cnn import FashionCNN, judge, load_fashion_cnn
from fastcfg.metrics.frechet import frechet_distance
from fastcfg.metrics.variety import within_class_distance
from fastcfg.training.data import load_data

SCALES = (1.0, 1.25, 1.5, 2.0, 3.0)
FIELDS = ("scale", "samples", "accuracy", "variety", "frechet_distance")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder with the IDX files of Fashion-MNIST")
    parser.add_argument("--checkpoint", default="fashion-mnist")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--eta", type=float, default=None, help="DDIM's noise; the model's own unless given")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES)
    parser.add_argument("--dtype", default="auto", help="the sampler's; auto is the faster on this machine")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality.csv"))
    arguments = parser.parse_args()

    network = load_fashion_cnn()
    test, train = load_data(arguments.data, "test"), load_data(arguments.data, "train")
    reference, _ = judge(network, pixels(test.images))
    labels = torch.arange(arguments.count) % test.num_classes
    rows = [row("real", pixels(balanced(train.images, train.labels, labels)), labels, network, reference)]
    print_row(rows[0])
    sampler = fastcfg.Sampler(
        fastcfg.load(arguments.checkpoint), steps=arguments.steps, batch=100, eta=arguments.eta, dtype=arguments.dtype
    )
    print(f"engine {sampler.engine.name}, {sampler.engine.dtype}, {arguments.steps} DDIM steps", file=sys.stderr)
    for scale in arguments.scales:
        with tqdm(total=arguments.count, desc=f"s = {scale:g}", file=sys.stderr, leave=False) as bar:
            samples = sampler(labels, scale, seeds=0, on_batch=bar.update).clamp(-1, 1)
        rows.append(row(f"{scale:g}", samples, labels, network, reference))
        print_row(rows[-1])
    arguments.out.parent.mkdir(exist_ok=True)
    with open(arguments.out, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


def pixels(images: np.ndarray) -> Tensor:
    """uint8 [N, C, H, W] -> [-1, 1]."""
    return torch.from_numpy(images).float() / 127.5 - 1


def balanced(images: np.ndarray, own: np.ndarray, labels: Tensor) -> np.ndarray:
    """The first images that have `labels`, one each."""
    position = {label: iter(np.flatnonzero(own == label)) for label in np.unique(own)}
    return images[[next(position[label]) for label in labels.tolist()]]


def row(name: str, images: Tensor, labels: Tensor, network: FashionCNN, reference: Tensor) -> dict[str, str]:
    features, predicted = judge(network, images)
    unit = reference.std(dim=0).clamp(min=1e-6)
    return {
        "scale": name,
        "samples": str(len(images)),
        "accuracy": f"{(predicted == labels).double().mean().item():.3f}",
        "variety": f"{within_class_distance((features / unit).numpy(), labels.numpy()):.2f}",
        "frechet_distance": f"{frechet_distance((features / unit).numpy(), (reference / unit).numpy()):.3f}",
    }


def print_row(values: dict[str, str]) -> None:
    if values["scale"] == "real":
        print("| scale | samples | class accuracy | variety | Frechet distance |\n|---|---|---|---|---|")
    print("| " + " | ".join(values[field] for field in FIELDS) + " |", flush=True)


if __name__ == "__main__":
    main()
