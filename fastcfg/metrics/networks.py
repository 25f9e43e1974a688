"""Feature networks: what images are seen through before they are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcfg.devices import find_device
from fastcfg.errors import Error
from fastcfg.files import is_file, read_pickle, read_safetensors
from fastcfg.metrics.fashion_cnn import fashion_cnn_bytes, load_fashion_cnn
from fastcfg.metrics.inception import build_inception

SHIPPED = ("fashion-cnn",)
WANTED = f"{', '.join(SHIPPED)}, a TorchScript file (.pt), or the FID Inception's weights (.safetensors, .pth)"


@dataclass(frozen=True)
class FeatureNetwork:
    """forward: uint8 images [n, C, H, W] -> (features [n, D], logits [n, K] or None), on `device`.

    fingerprint: names the network and its weights, for caches; "" if statistics made with it must not be kept.
    judges_labels: whether logit k is that of the samples' label k. batch: images in a forward.
    """

    name: str
    forward: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    fingerprint: str = ""
    judges_labels: bool = False
    batch: int = 50
    device: str | torch.device = "cpu"


def load_network(name: str | Path, device: str | torch.device = "cpu") -> FeatureNetwork:
    """A network by its shipped name, or from a path; see `WANTED`. device: as `Sampler` takes it.

    A TorchScript file runs the code it holds: load only files you trust. It takes uint8 images; where its forward has the
    argument `return_features`, as in StyleGAN's inception-2015-12-05.pt, that is used, and its `output` layer gives logits.
    """
    where = find_device(device)
    if str(name) in SHIPPED:
        return _fashion_cnn(where)
    path = Path(name)
    if not is_file(path):
        raise Error(f"no feature network at '{path}': want {WANTED}")
    if path.suffix == ".safetensors":
        return _inception(path, read_safetensors(path)[0], where)
    if path.suffix == ".pth":
        return _inception(path, _read_pth(path), where)
    if path.suffix in (".pt", ".ts", ".torchscript"):
        return _torchscript(path, where)
    raise Error(f"{path} is no feature network that fastcfg reads: want {WANTED}")


def as_network(features: Callable[[Tensor], Any], name: str = "callable", *, judges_labels: bool = False) -> FeatureNetwork:
    """Any callable from uint8 images [n, C, H, W] to features [n, D], or to (features, logits [n, K]), as tensors."""

    def forward(images: Tensor) -> tuple[Tensor, Tensor | None]:
        out = features(images)
        return out if isinstance(out, tuple) else (out, None)

    return FeatureNetwork(name, forward, judges_labels=judges_labels)


def _fashion_cnn(device: torch.device) -> FeatureNetwork:
    network = load_fashion_cnn().to(device)

    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        if images.shape[1:] != (1, 28, 28):
            raise Error(f"fashion-cnn sees grey images of 28 x 28, got {_size(images)}")
        features = network.features(images.float() / 127.5 - 1)
        return features, network.head(features)

    return FeatureNetwork("fashion-cnn", forward, _fingerprint("fashion-cnn", fashion_cnn_bytes()), True, 500, device)


def _inception(path: Path, tensors: Mapping[str, Tensor], device: torch.device) -> FeatureNetwork:
    network = build_inception(tensors, str(path)).to(device)
    fingerprint = _fingerprint("inception", path.read_bytes())
    return FeatureNetwork(path.name, lambda images: network(_rgb(images)), fingerprint, device=device)


def _torchscript(path: Path, device: torch.device) -> FeatureNetwork:
    try:
        module = torch.jit.load(str(path), map_location=device).eval()
        arguments = {argument.name for argument in module.forward.schema.arguments}
        last = getattr(getattr(module, "output", None), "weight", None)
    except (RuntimeError, ValueError, AttributeError) as error:
        raise Error(f"{path} is not a whole TorchScript file: {str(error).splitlines()[0]}") from error

    def forward(images: Tensor) -> tuple[Tensor, Tensor | None]:
        try:
            if "return_features" not in arguments:
                return module(images), None
            features = module(_rgb(images), return_features=True)
            # The inception score's logits have no bias: `no_output_bias` of these files, without a second forward.
            return features, None if last is None else features @ last.T
        except RuntimeError as error:
            raise Error(f"{path} could not be called with images of {_size(images)}: {str(error).splitlines()[-1]}") from error

    return FeatureNetwork(path.name, forward, _fingerprint("torchscript", path.read_bytes()), device=device)


def _read_pth(path: Path) -> dict[str, Tensor]:
    content = read_pickle(path)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise Error(f"{path} holds no state dict of tensors")
    return content


def _fingerprint(kind: str, data: bytes) -> str:
    return f"{kind} {hashlib.sha256(data).hexdigest()}"


def _rgb(images: Tensor) -> Tensor:
    if images.shape[1] not in (1, 3):
        raise Error(f"this network sees images of 1 or 3 channels, got {_size(images)}")
    return images.expand(-1, 3, -1, -1)


def _size(images: Tensor) -> str:
    return " x ".join(str(n) for n in images.shape[1:]) + " (C, H, W)"
