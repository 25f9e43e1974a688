"""What bfloat16 and int8 cost: the error of a sample against float32, and the quality of the shipped model's samples.

    python benchmarks/precision.py /usr/share/datasets/fashion-mnist

Prints two tables and writes them to benchmarks/results/precision.csv. Errors: |x - x_fp32| / |x_fp32| over 16 samples of
DDIM (eta 0) with s = 1.5, the median sample and the worst, on the cpu engine and, where OpenVINO is installed, in int8 on the
openvino engine; beside them plain torch's in bfloat16 (the reference engine, same model and noise). Quality: as in
benchmarks/quality.py, with the model's own settings.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import torch
from quality import pixels, row
from torch import Tensor, nn

import fastcfg
from fastcfg.engines.openvino_module import openvino_version
from fastcfg.metrics.fashion_cnn import judge, load_fashion_cnn
from fastcfg.training.data import load_data

ERRORS = ("model", "engine", "dtype", "steps", "median_error", "worst_error")
QUALITY = ("scale", "engine", "dtype", "samples", "accuracy", "variety", "frechet_distance")
LOW = (("reference", "bf16"), ("cpu", "bf16"), ("cpu", "int8"), *[("openvino", "int8")] * (openvino_version() is not None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder with the IDX files of Fashion-MNIST")
    parser.add_argument("--count", type=int, default=1000, help="samples of each quality figure")
    parser.add_argument("--dtypes", nargs="+", choices=("bf16", "int8"), default=("bf16", "int8"), help="compared with fp32")
    parser.add_argument("--scales", type=float, nargs="+", default=(1.25, 3.0))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/precision.csv"))
    arguments = parser.parse_args()
    low = [(engine, dtype) for engine, dtype in LOW if dtype in arguments.dtypes]
    tables = [
        printed(ERRORS, errors(low)),
        printed(QUALITY, quality(low, arguments.data, arguments.scales, arguments.count)),
    ]
    with open(arguments.out, "w", newline="") as file:
        for fields, rows in zip((ERRORS, QUALITY), tables, strict=True):
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            writer.writerows(rows)


def errors(low: list[tuple[str, str]]) -> Iterator[dict[str, str]]:
    """The error of samples, in rows of `ERRORS`."""
    models: dict[str, fastcfg.Denoiser | nn.Module] = {
        "fashion-mnist": fastcfg.load("fashion-mnist"),
        "DiT-S/2, random weights": random_dit(),
    }
    for name, model in models.items():
        for steps in (2, 10, 50) if name == "fashion-mnist" else (2, 10):
            exact = samples(model, steps, "cpu", "fp32")
            for engine, dtype in low:
                error = (samples(model, steps, engine, dtype) - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
                figures = {"median_error": f"{error.median():.1e}", "worst_error": f"{error.max():.1e}"}
                yield {"model": name, "engine": engine, "dtype": dtype, "steps": str(steps)} | figures


def samples(model: fastcfg.Denoiser | nn.Module, steps: int, engine: str, dtype: str) -> Tensor:
    schedule = None if isinstance(model, fastcfg.Denoiser) else "linear"
    sampler = fastcfg.Sampler(
        model, steps=steps, eta=0.0, batch=16, device="cpu", engine=engine, dtype=dtype, schedule=schedule
    )
    return sampler(torch.arange(16) % 10, 1.5)


def random_dit() -> nn.Module:
    """DiT-S/2 at 256 px with random weights, the zero-initialised ones among them."""
    module = fastcfg.DiT(fastcfg.DiTConfig(hidden_size=384, depth=12, num_heads=6)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.03, generator=generator)
    return module


def quality(low: list[tuple[str, str]], data: str, scales: list[float], count: int) -> Iterator[dict[str, str]]:
    """The quality of the shipped model's samples, in rows of `QUALITY`."""
    network, labels = load_fashion_cnn(), torch.arange(count) % 10
    reference, _ = judge(network, pixels(load_data(data, "test").images))
    for engine, dtype in (("cpu", "fp32"), *(kind for kind in low if kind[0] != "reference")):
        sampler = fastcfg.Sampler(fastcfg.load("fashion-mnist"), steps=50, batch=100, engine=engine, dtype=dtype)
        for scale in scales:
            images = sampler(labels, scale, seeds=0).clamp(-1, 1)
            yield {"engine": engine, "dtype": dtype} | row(f"{scale:g}", images, labels, network, reference)


def printed(fields: tuple[str, ...], rows: Iterator[dict[str, str]]) -> list[dict[str, str]]:
    """The rows, each printed as it comes, under their heads."""
    print("\n| " + " | ".join(fields) + " |\n" + "|---" * len(fields) + "|")
    kept = []
    for values in rows:
        print("| " + " | ".join(values[field] for field in fields) + " |", flush=True)
        kept.append(values)
    return kept


if __name__ == "__main__":
    main()
