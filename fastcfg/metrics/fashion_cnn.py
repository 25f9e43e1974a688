"""The feature network for Fashion-MNIST: a small CNN whose classes judge samples and whose features measure distances."""

from __future__ import annotations

from importlib.resources import files

import torch
from safetensors.torch import load
from torch import Tensor, nn

FEATURES = 128


class FashionCNN(nn.Module):
    """images [N, 1, 28, 28] in [-1, 1] -> logits [N, 10]; `features` gives the [N, 128] before the last layer."""

    def __init__(self) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

        self.body = nn.Sequential(
            *stage(1, 32), *stage(32, 32), nn.MaxPool2d(2),
            *stage(32, 64), *stage(64, 64), nn.MaxPool2d(2), nn.Dropout(0.3),
            nn.Flatten(), nn.Linear(64 * 49, FEATURES), nn.ReLU(),
        )  # fmt: skip
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(FEATURES, 10)

    def features(self, images: Tensor) -> Tensor:
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.drop(self.features(images)))


def fashion_cnn_bytes() -> bytes:
    """The shipped weights, a safetensors file (made by `benchmarks/train_fashion_cnn.py`)."""
    return files("fastcfg").joinpath("assets/fashion-cnn.safetensors").read_bytes()


def load_fashion_cnn() -> FashionCNN:
    """The shipped network, in eval mode."""
    network = FashionCNN()
    network.load_state_dict(load(fashion_cnn_bytes()))
    return network.eval().requires_grad_(False)


@torch.no_grad()
def judge(network: FashionCNN, images: Tensor) -> tuple[Tensor, Tensor]:
    """(features [N, 128], predicted classes [N]) of images [N, 1, 28, 28] in [-1, 1]."""
    features = torch.cat([network.features(part) for part in images.split(500)])
    return features, network.head(features).argmax(1)
