"""Trains the CNN that judges Fashion-MNIST samples and writes fastcfg/assets/fashion-cnn.safetensors.

    python benchmarks/train_fashion_cnn.py /usr/share/datasets/fashion-mnist

Prints the test accuracy after every epoch. Real images only; the generator never sees this network.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from fastcfg.metrics.fashion_cnn import FashionCNN, judge
from fastcfg.training.data import load_data


def tensors(folder: str, split: str) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1] and labels."""
    data = load_data(folder, split)
    return torch.from_numpy(data.images).float() / 127.5 - 1, torch.from_numpy(data.labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder with the four IDX files")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("fastcfg/assets/fashion-cnn.safetensors"))
    arguments = parser.parse_args()

    torch.manual_seed(0)
    images, labels = tensors(arguments.data, "train")
    test_images, test_labels = tensors(arguments.data, "test")
    network = FashionCNN()
    batch, steps = 128, arguments.epochs * (len(images) // 128)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.02)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for epoch in range(arguments.epochs):
        network.train()
        for index in torch.randperm(len(images)).split(batch)[: len(images) // batch]:
            loss = F.cross_entropy(network(images[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
        _, predicted = judge(network.eval(), test_images)
        accuracy = (predicted == test_labels).float().mean().item()
        print(f"epoch {epoch + 1}: test accuracy {accuracy:.4f}", flush=True)
    save_file(network.state_dict(), arguments.out, metadata={"test_accuracy": f"{accuracy:.4f}"})


if __name__ == "__main__":
    main()
