"""Do the metrics tell real images from worse ones? Real test images of Fashion-MNIST, and five ways to spoil them.

    python benchmarks/metrics_check.py /usr/share/datasets/fashion-mnist

Prints the table of docs/metrics.md: --count test images, spoilt, against as many training images, seen through fashion-cnn.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fastcfg import metrics
from fastcfg.training.data import load_data

Set = tuple[NDArray[np.uint8], NDArray[np.int64]]
BAG = 8


def noisy(images: NDArray[np.uint8], deviation: float) -> NDArray[np.uint8]:
    noise = np.random.default_rng(0).normal(0, deviation, images.shape)
    return np.clip(images + noise, 0, 255).astype(np.uint8)


SPOILT: dict[str, Callable[[NDArray[np.uint8], NDArray[np.int64]], Set]] = {
    "real": lambda x, y: (x, y),
    "no bags": lambda x, y: (x[y != BAG], y[y != BAG]),
    "bags alone": lambda x, y: (x[y == BAG], y[y == BAG]),
    "a tenth, ten times": lambda x, y: (np.tile(x[: len(x) // 10], (10, 1, 1, 1)), np.tile(y[: len(y) // 10], 10)),
    "noise of 30 added": lambda x, y: (noisy(x, 30), y),
    "pure noise": lambda x, y: (np.random.default_rng(0).integers(0, 256, x.shape, dtype=np.uint8), y),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder with the IDX files of Fashion-MNIST")
    parser.add_argument("--count", type=int, default=10_000)
    arguments = parser.parse_args()
    network = metrics.load_network("fashion-cnn")
    train, test = (load_data(arguments.data, split) for split in ("train", "test"))
    reference = metrics.reference_of(metrics.from_arrays(_pixels(train.images[: arguments.count])), network)
    names = [name.replace("_", " ") for name in metrics.METRICS]
    print(f"| {arguments.count} test images | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for name, spoil in SPOILT.items():
        images, labels = spoil(_pixels(test.images[: arguments.count]), test.labels[: arguments.count])
        samples = metrics.extract(metrics.from_arrays(images, labels), network)
        estimates = [figure.estimate for figure in metrics.evaluate(samples, reference)]
        cells = [f"{e.value:.4g} ± {metrics.CONFIDENCE * e.error:.2g}" for e in estimates]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _pixels(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return images.transpose(0, 2, 3, 1)


if __name__ == "__main__":
    main()
