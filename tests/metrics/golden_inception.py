"""Makes inception.expected.safetensors: torch-fidelity's Inception on random weights and images that anyone can draw again.

    pip install --no-deps --target /tmp/fidelity torch-fidelity==0.4.0
    PYTHONPATH=/tmp/fidelity python tests/metrics/golden_inception.py

torch-fidelity imports torchvision, which its Inception does not use: a stand-in takes that place.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastcfg.metrics.inception import FIDInception

EXPECTED = Path(__file__).with_name("inception.expected.safetensors")


def weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Uniform values, name by name in order: He's width for kernels, 0.5 to 1.5 for variances and gains, else -0.1 to 0.1."""
    rng = np.random.RandomState(0)
    drawn = {}
    for name, shape in sorted(shapes.items()):
        u = rng.random_sample(shape)
        if len(shape) > 1:
            u = (2 * u - 1) * np.sqrt(6 / np.prod(shape[1:]))
        else:
            u = 0.5 + u if name.endswith(("running_var", "bn.weight")) else 0.2 * u - 0.1
        drawn[name] = torch.from_numpy(u.astype(np.float32))
    return drawn


def images() -> Tensor:
    """uint8 [2, 3, 32, 48]: neither square nor of a size that divides 299."""
    return torch.from_numpy(np.random.RandomState(1).randint(0, 256, size=(2, 3, 32, 48)).astype(np.uint8))


def shapes() -> dict[str, tuple[int, ...]]:
    """Of the weights; that these are torch-fidelity's own is seen by its loading them."""
    return {k: tuple(v.shape) for k, v in FIDInception().state_dict().items() if not k.endswith("num_batches_tracked")}


def main() -> None:
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules.setdefault(name, MagicMock())
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(weights(shapes()), file.name)
        network = FeatureExtractorInceptionV3("golden", ["2048", "logits_unbiased"], feature_extractor_weights_path=file.name)
    features, logits = network(images())
    save_file({"features": features, "logits": logits}, EXPECTED, {"source": "torch-fidelity 0.4.0, float32, CPU"})


if __name__ == "__main__":
    main()
